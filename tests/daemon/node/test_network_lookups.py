"""Lookups elsewhere without a network: what is asked first, and what clients are told when one ends."""

from hyperspace_vllm.core.events.response_reading import (
    AnswerResponse,
    HintResponse,
    ReadShared,
    ResponseReleased,
    ResponseWanted,
    SharedRead,
)
from hyperspace_vllm.core.events.stored_responses import ResponsesUsed
from hyperspace_vllm.core.events.vocabulary import NetworkEvent
from hyperspace_vllm.core.peers.trust import Trust
from hyperspace_vllm.core.records.errors import Refused
from hyperspace_vllm.core.records.ids import PeerId, RequestKey, network_id
from hyperspace_vllm.core.response.cache_proof import request_hash
from hyperspace_vllm.core.response.sealed_hit import Opened
from hyperspace_vllm.daemon.metrics import Metrics
from hyperspace_vllm.daemon.node.lookup_tasks import LookupTasks
from hyperspace_vllm.daemon.node.network_lookups import SHARED_READS_MAX, NetworkLookups
from hyperspace_vllm.daemon.responses.response_lookups import FoundResponse

NETWORK = network_id("test")
KEY, MODEL = RequestKey(bytes(32)), bytes(32)
PEER = PeerId("a peer")
NAME = request_hash(NETWORK, KEY)


class Clients:
    """Where lookups end."""

    def __init__(self) -> None:
        self.hints: list[tuple[int, bool]] = []
        self.ends: list[tuple[int, str]] = []

    def hint(self, lookup: int, hinted: bool) -> None:
        self.hints.append((lookup, hinted))

    def let_try(self, lookup: int, body: bytes, proof: bytes) -> None: ...

    def answer(self, lookup: int, found: FoundResponse | None, reason: str) -> None:
        self.ends.append((lookup, reason))


class Registry:
    """A fleet's Redis that knows one provider."""

    async def providers(self, id: bytes) -> tuple[PeerId, ...]:
        return (PEER,)


class Shared:
    """A shared store that holds nothing."""

    def __init__(self, is_away: bool = False, purged: bool = False) -> None:
        self.is_away, self.purged = is_away, purged

    def is_purged(self, request_hash: bytes) -> bool:
        return self.purged

    async def read(self, key: RequestKey, model_digest: bytes, timeout_s: float) -> Opened:
        raise Refused("not_found")


class Bench:
    def __init__(self, shared: Shared | None = None) -> None:
        self.events: list[NetworkEvent] = []
        self.clients = Clients()
        metrics = Metrics()
        trust = Trust("members", bytes(32), frozenset(), frozenset(), None)
        self.tasks = LookupTasks("l1", metrics)
        self.lookups = NetworkLookups(
            NETWORK, trust, self.clients, None, "network", metrics, self.events.append, self.tasks, shared
        )


async def test_the_shared_store_is_read_first_and_its_miss_tells_whom_the_registry_names() -> None:
    bench = Bench(Shared())
    bench.lookups.find(1, KEY, MODEL, 300, Registry())
    assert bench.events == [ResponseWanted(1, NAME, 300, shared=True)]
    bench.lookups.read_shared(ReadShared(1, NAME, 100), Registry())
    await bench.tasks.close(60)
    assert bench.events[1:] == [SharedRead(1, "not_found", (PEER,))]


async def test_a_shared_store_that_is_away_is_not_read() -> None:
    bench = Bench(Shared(is_away=True))
    bench.lookups.find(1, KEY, MODEL, 300, None)
    assert bench.events == [ResponseWanted(1, NAME, 300)]


async def test_what_is_about_to_be_deleted_from_the_shared_store_is_not_read() -> None:
    bench = Bench(Shared(purged=True))
    bench.lookups.find(1, KEY, MODEL, 300, None)
    bench.lookups.read_shared(ReadShared(1, NAME, 100), None)
    assert bench.events[1:] == [SharedRead(1, "not_read")]


async def test_the_shared_store_is_read_for_so_many_lookups_at_once() -> None:
    bench = Bench(Shared())
    for number in range(SHARED_READS_MAX + 1):
        bench.lookups.find(number, KEY, MODEL, 300, None)
        bench.lookups.read_shared(ReadShared(number, NAME, 100), None)
    assert bench.events[-1] == SharedRead(SHARED_READS_MAX, "not_read")
    await bench.tasks.close(60)
    assert sum(isinstance(event, SharedRead) for event in bench.events) == SHARED_READS_MAX + 1
    bench.events.clear()
    bench.lookups.read_shared(ReadShared(0, NAME, 100), None)
    assert bench.events == []  # there is room again
    await bench.tasks.close(60)


async def test_a_client_is_told_why_its_lookup_ended() -> None:
    bench = Bench()
    bench.lookups.find(1, KEY, MODEL, 300, None)
    assert bench.events == [ResponseWanted(1, NAME, 300)]
    bench.lookups.answer(AnswerResponse(1, None, "none", "no_peers"))
    assert bench.clients.ends == [(1, "no_peers")]
    assert bench.lookups.last["reason"] == "no_peers"


async def test_whom_the_registry_names_is_asked_about_first() -> None:
    bench = Bench()
    bench.lookups.find(1, KEY, MODEL, 300, Registry())
    assert bench.events == []
    await bench.tasks.close(60)
    assert bench.events == [ResponseWanted(1, NAME, 300, (PEER,))]


async def test_hits_of_clients_are_counted_by_the_hashes_of_their_requests() -> None:
    bench = Bench()
    bench.lookups.used([KEY, KEY])
    assert bench.events == [ResponsesUsed((NAME,) * 2)]


async def test_a_purged_lookup_ends_at_once_and_only_once() -> None:
    bench = Bench()
    bench.lookups.find(1, KEY, MODEL, 300, None)
    bench.lookups.purge([KEY])
    bench.lookups.hint(HintResponse(1, True))
    bench.lookups.answer(AnswerResponse(1, None, "none", "deadline"))
    assert bench.clients.ends == [(1, "not_found")]
    assert bench.clients.hints == []


async def test_a_lookup_that_is_over_is_not_released() -> None:
    bench = Bench()
    bench.lookups.find(1, KEY, MODEL, 300, None)
    bench.lookups.release(1)
    bench.lookups.answer(AnswerResponse(1, None, "none", "deadline"))
    bench.lookups.release(1)
    assert bench.events[1:] == [ResponseReleased(1)]
