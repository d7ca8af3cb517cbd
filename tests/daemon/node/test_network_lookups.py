"""Lookups at other nodes without a network: what clients are told when one ends."""

import pytest

from hyperspace_vllm.core.events.response_reading import AnswerResponse, HintResponse, ResponseReleased, ResponseWanted
from hyperspace_vllm.core.events.stored_responses import ResponsesUsed
from hyperspace_vllm.core.events.vocabulary import NetworkEvent
from hyperspace_vllm.core.peers.trust import Trust
from hyperspace_vllm.core.records.ids import PeerId, RequestKey, network_id
from hyperspace_vllm.core.response.cache_proof import request_hash
from hyperspace_vllm.daemon.metrics import Metrics
from hyperspace_vllm.daemon.node.lookup_tasks import LookupTasks
from hyperspace_vllm.daemon.node.network_lookups import NetworkLookups
from hyperspace_vllm.daemon.responses.response_lookups import FoundResponse

NETWORK = network_id("test")
KEY, MODEL = RequestKey(bytes(32)), bytes(32)
PEER = PeerId("a peer")


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


class Bench:
    def __init__(self) -> None:
        self.events: list[NetworkEvent] = []
        self.clients = Clients()
        metrics = Metrics()
        trust = Trust("members", bytes(32), frozenset(), frozenset(), None)
        self.tasks = LookupTasks("l1", metrics)
        self.lookups = NetworkLookups(
            NETWORK, trust, self.clients, None, "network", metrics, self.events.append, self.tasks
        )


@pytest.mark.parametrize(("beside_redis", "reason"), [(False, "no_peers"), (True, "not_found")])
async def test_beside_redis_a_client_is_not_told_that_asking_is_useless(beside_redis: bool, reason: str) -> None:
    bench = Bench()
    bench.lookups.find(1, KEY, MODEL, 300, beside_redis, None)
    assert bench.events == [ResponseWanted(1, request_hash(NETWORK, KEY), 300)]
    bench.lookups.answer(AnswerResponse(1, None, "none", "no_peers"))
    assert bench.clients.ends == [(1, reason)]
    assert bench.lookups.last["reason"] == "no_peers"


async def test_whom_the_registry_names_is_asked_about_first() -> None:
    bench = Bench()
    bench.lookups.find(1, KEY, MODEL, 300, False, Registry())
    assert bench.events == []
    await bench.tasks.close(60)
    assert bench.events == [ResponseWanted(1, request_hash(NETWORK, KEY), 300, (PEER,))]


async def test_hits_of_clients_are_counted_by_the_hashes_of_their_requests() -> None:
    bench = Bench()
    bench.lookups.used([KEY, KEY])
    assert bench.events == [ResponsesUsed((request_hash(NETWORK, KEY),) * 2)]


async def test_a_purged_lookup_ends_at_once_and_only_once() -> None:
    bench = Bench()
    bench.lookups.find(1, KEY, MODEL, 300, False, None)
    bench.lookups.purge([KEY])
    bench.lookups.hint(HintResponse(1, True))
    bench.lookups.answer(AnswerResponse(1, None, "none", "deadline"))
    assert bench.clients.ends == [(1, "not_found")]
    assert bench.clients.hints == []


async def test_a_lookup_that_is_over_is_not_released() -> None:
    bench = Bench()
    bench.lookups.find(1, KEY, MODEL, 300, False, None)
    bench.lookups.release(1)
    bench.lookups.answer(AnswerResponse(1, None, "none", "deadline"))
    bench.lookups.release(1)
    assert bench.events[1:] == [ResponseReleased(1)]
