"""Real sockets, real shared memory, real client processes; the lease is shortened so that losing it takes a second."""

import asyncio
import os
import signal
import stat
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import pytest
import zmq
import zmq.asyncio

from hyperspace_vllm.api.node_lookup import HINT_S, NodeLookup
from hyperspace_vllm.async_client import AsyncNodeClient
from hyperspace_vllm.client import NodeClient
from hyperspace_vllm.config import Config
from hyperspace_vllm.core.events.node_state import ServedChanged
from hyperspace_vllm.core.events.prefix_reading import PrefixReleased, PrefixWanted
from hyperspace_vllm.core.events.prefix_writing import ClientGone, RequestOver, RowArrived, SegmentKeyKnown
from hyperspace_vllm.core.events.vocabulary import PrefixEvent
from hyperspace_vllm.core.local.kv_messages import (
    NO_ENGINE,
    LookupPrefix,
    PrefixAnswer,
    PrefixesInMemory,
    RegisterLayout,
    ReleaseLookup,
    RequestEnded,
    RowStaged,
    SegmentNamed,
    StagingGranted,
    StagingUnused,
    WantStaging,
)
from hyperspace_vllm.core.local.messages import NodeMessage, decode_node_message, encode
from hyperspace_vllm.core.local.response_cache_messages import (
    FindResponse,
    PurgeResponses,
    ReleaseResponse,
    ResponseAudited,
    ResponseFound,
    ResponseHint,
    ResponseNotFound,
    StoreResponse,
    TouchResponses,
)
from hyperspace_vllm.core.local.session_messages import (
    LOCAL_PROTOCOL,
    GetStatus,
    Hello,
    LeaseLost,
    Rejected,
    Status,
    Welcome,
)
from hyperspace_vllm.core.local.slab import PAGE_BYTES, LoadedRow, Slab
from hyperspace_vllm.core.records.ids import RequestKey, RowKey, SegmentKey, network_id, row_key, sha256, wire_id
from hyperspace_vllm.core.records.layout import Layout, Part
from hyperspace_vllm.core.records.limits import LOOKUPS_PER_CLIENT_MAX, RESPONSE_BYTES_MAX, MiB
from hyperspace_vllm.core.records.vram_digest import approximate_count, overlap
from hyperspace_vllm.daemon.identity import Identity
from hyperspace_vllm.daemon.kv.arena import Arena
from hyperspace_vllm.daemon.kv.row_cache import UNSTORED, RowCache
from hyperspace_vllm.daemon.local import served
from hyperspace_vllm.daemon.local.engine_messages import EngineMessages
from hyperspace_vllm.daemon.local.local_server import LocalServer, make_welcome
from hyperspace_vllm.daemon.local.local_socket import LocalSocket
from hyperspace_vllm.daemon.local.prefix_lookups import PrefixLookups
from hyperspace_vllm.daemon.local.response_messages import ResponseMessages
from hyperspace_vllm.daemon.local.served import Served
from hyperspace_vllm.daemon.local.staging import Staging
from hyperspace_vllm.daemon.metrics import Metrics
from hyperspace_vllm.daemon.responses.response_lookups import FoundResponse, ResponseLookups

pytestmark = pytest.mark.io

ROW_BYTES = 2 * PAGE_BYTES
LAYOUT = Layout(bytes(32), 256, (Part(0, ROW_BYTES), Part(512, PAGE_BYTES)), 1)
KEY = SegmentKey(bytes(range(32)))
ENGINE = bytes(range(16))
M = TypeVar("M")


@dataclass
class Finder:
    """Whoever asks other nodes: the tests answer in its place."""

    wanted: list[tuple[int, bytes, bytes, int]] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    purged: list[bytes] = field(default_factory=list)
    hits: list[bytes] = field(default_factory=list)

    def find(self, lookup: int, request_key: RequestKey, model_digest: bytes, deadline_ms: int) -> None:
        self.wanted.append((lookup, request_key, model_digest, deadline_ms))

    def release(self, lookup: int) -> None:
        self.released.append(lookup)

    def used(self, keys: Iterable[bytes]) -> None:
        self.hits += keys

    def purge(self, keys: Iterable[bytes]) -> None:
        """What lies elsewhere has to go too."""
        self.purged += keys


@dataclass
class SmallNode:
    """A server whose core keeps every named row in memory and answers from there."""

    config: Config
    cache: RowCache
    metrics: Metrics = field(default_factory=Metrics)
    events: list[PrefixEvent] = field(default_factory=list)
    stored: list[StoreResponse] = field(default_factory=list)
    touched: list[bytes] = field(default_factory=list)
    answers: bool = True
    finder: Finder | None = field(default_factory=Finder)
    told: list[ServedChanged] = field(default_factory=list)
    lease_ms: int = 60_000
    _staged: dict[tuple[str, str, int], RowArrived] = field(default_factory=dict)

    def __post_init__(self) -> None:
        identity = Identity.load(self.config.data_dir)
        self.socket = LocalSocket(self.config.socket_path)
        self.staging = Staging(self.cache, self.metrics)
        self.prefixes, self.responses = PrefixLookups(self.socket.send), ResponseLookups(self.socket.send)
        served = Served(network_id("default"), self.told.append)
        config, send = self.config, self.socket.send
        engines = EngineMessages(
            config.kv_cache, config.data_dir, self.staging, self.prefixes, self.submit, served, send
        )
        responses = ResponseMessages(
            config.share, self, None, lambda audit: None, self.finder, self.responses, served, send
        )
        welcome = make_welcome(identity.peer_id, network_id("default"), self.cache.arena)
        self.server = LocalServer(
            self.socket, welcome, engines, responses, served, lambda: b"{}", self.metrics, self.lease_ms
        )

    def store(self, message: StoreResponse) -> bool:
        self.stored.append(message)
        return True

    def touch(self, keys: Iterable[bytes]) -> None:
        self.touched.extend(keys)

    def purge(self, keys: Iterable[bytes]) -> bool:
        return True

    def submit(self, event: PrefixEvent) -> None:
        self.events.append(event)
        match event:
            case RowArrived():
                self._staged[event.client, event.request_id, event.segment] = event
            case SegmentKeyKnown():
                arrived = self._staged.pop((event.client, event.request_id, event.segment), None)
                slab = self.staging.take(arrived.staged) if arrived else None
                if arrived is None or slab is None:
                    return  # of another engine, or not here yet
                self.cache.keep(row_key(event.segment_key, arrived.part, arrived.rank), slab)
            case PrefixWanted() if self.answers:
                slab = self.cache.lease(row_key(event.segment_keys[0], 0, 0), event.lookup)
                rows = () if slab is None else (LoadedRow(0, 0, 0, slab),)
                if not self.prefixes.answer(event.lookup, len(rows), rows, "memory", "none", "hit"):
                    self.submit(PrefixReleased(event.lookup))
            case PrefixReleased(lookup):
                self.cache.end_leases(lookup)
            case ClientGone():
                for arrived in self._staged.values():
                    self.staging.drop(arrived.staged, "client_gone")
                self._staged.clear()

    def count(self, kind: type[PrefixEvent]) -> int:
        return sum(isinstance(event, kind) for event in self.events)


@asynccontextmanager
async def small_node(
    tmp_path: Path,
    kv_cache: bool = True,
    size: int = 4 * MiB,
    finds: bool = True,
    lease_ms: int = 60_000,
    shared_memory: Path = Path("/dev/shm"),
) -> AsyncIterator[SmallNode]:
    # Leases are long unless a test is about them: a busy machine stops a client's heartbeats for seconds.
    config = Config(data_dir=tmp_path, kv_cache=kv_cache)
    arena = Arena.create(tmp_path, size, shared_memory)
    node = SmallNode(config, RowCache(arena), finder=Finder() if finds else None, lease_ms=lease_ms)
    node.socket.bind()
    serving = asyncio.create_task(node.server.run())
    try:
        yield node
    finally:
        serving.cancel()
        with suppress(asyncio.CancelledError):
            await serving
        node.socket.close()
        arena.close()


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[SmallNode]:
    async with small_node(tmp_path) as started:
        yield started


@pytest.fixture
async def strict(tmp_path: Path) -> AsyncIterator[SmallNode]:
    """A node whose leases end after a second."""
    async with small_node(tmp_path, lease_ms=1_000) as started:
        yield started


async def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        await asyncio.sleep(0.002)


async def next_message(client: NodeClient, kind: type[M]) -> M:
    found: list[NodeMessage] = []
    await until(lambda: found.extend(client.receive()) or found)
    assert len(found) == 1, found
    assert isinstance(found[0], kind), found
    return found[0]


@asynccontextmanager
async def connected(
    node: SmallNode, role: str = "worker", engine: bytes = ENGINE, layout: Layout | None = LAYOUT
) -> AsyncIterator[NodeClient]:
    client = NodeClient(node.config, role, "engine")  # type: ignore[arg-type]
    try:
        await until(lambda: client.connected)
        if layout:
            assert client.send(RegisterLayout(layout, engine))
        yield client
    finally:
        client.close()


async def granted(client: NodeClient, count: int = 1, row_bytes: int = ROW_BYTES) -> tuple[Slab, ...]:
    assert client.send(WantStaging(row_bytes, count))
    return (await next_message(client, StagingGranted)).slabs


def lookup(number: int, key: bytes = KEY, scope: str = "network") -> LookupPrefix:
    return LookupPrefix(number, f"r{number}", (key,), 0, 0, 1000, scope)  # type: ignore[arg-type]


async def test_the_socket_is_private(node: SmallNode) -> None:
    async with connected(node, "cli"):
        assert stat.S_IMODE(node.config.socket_path.stat().st_mode) == 0o600


async def test_a_client_learns_who_its_node_is(node: SmallNode) -> None:
    async with connected(node, "api") as client:
        assert client.epoch == 1
        assert client.peer_id == Identity.load(node.config.data_dir).peer_id
        assert client.network_id == network_id("default")
        assert node.metrics.clients._value.get() == 1
        assert node.server.engine_leases == 1
    await until(lambda: node.server.engine_leases == 0)


async def test_status_needs_no_engine_lease(node: SmallNode) -> None:
    async with connected(node, "cli", layout=None) as client:
        assert node.server.engine_leases == 0
        client.send(GetStatus())
        assert (await next_message(client, Status)).json == b"{}"


async def test_a_staged_and_named_row_is_read_back_through_shared_memory(node: SmallNode) -> None:
    async with connected(node, "worker") as worker, connected(node, "scheduler") as scheduler:
        (slab,) = await granted(worker)
        worker.view(slab)[:] = b"K" * ROW_BYTES
        assert worker.send(RowStaged("r", 0, 0, 0, slab))
        await until(lambda: node.count(RowArrived) == 1)
        assert scheduler.send(SegmentNamed("r", 0, KEY, "private"))
        assert scheduler.send(lookup(7))
        answer = await next_message(scheduler, PrefixAnswer)
        assert (answer.lookup, answer.end_segment, answer.source) == (7, 1, "memory")
        (row,) = answer.rows
        assert bytes(worker.view(row.slab)) == b"K" * ROW_BYTES
        assert worker.is_current(row.slab)
        scheduler.send(ReleaseLookup(7))
        await until(lambda: node.count(PrefixReleased) == 1)
        named = next(e for e in node.events if isinstance(e, SegmentKeyKnown))
        arrived = next(e for e in node.events if isinstance(e, RowArrived))
        assert (named.client, named.shareable, arrived.client, arrived.length) == (
            ENGINE.hex(),
            False,
            ENGINE.hex(),
            ROW_BYTES,
        )


async def test_engines_of_one_name_never_get_each_others_rows(node: SmallNode) -> None:
    others = bytes(range(1, 17))
    async with (
        connected(node, "worker") as worker,
        connected(node, "scheduler") as scheduler,
        connected(node, "worker", others) as other_worker,
        connected(node, "scheduler", others) as other_scheduler,
    ):
        for client in (worker, other_worker):
            (slab,) = await granted(client)
            assert client.send(RowStaged("1", 0, 0, 0, slab))
        for client in (scheduler, other_scheduler):
            assert client.send(SegmentNamed("1", 0, KEY, "private"))
        await until(lambda: node.count(RowArrived) == node.count(SegmentKeyKnown) == 2)
        rows = {event.client for event in node.events if isinstance(event, RowArrived)}
        names = {event.client for event in node.events if isinstance(event, SegmentKeyKnown)}
        assert rows == names == {ENGINE.hex(), others.hex()}
        scheduler.close()
        await until(lambda: ClientGone(ENGINE.hex()) in node.events)
        assert ClientGone(others.hex()) not in node.events


async def test_a_row_of_no_known_engine_is_rejected(node: SmallNode) -> None:
    async with connected(node, "worker", NO_ENGINE) as worker:
        (slab,) = await granted(worker)
        assert worker.send(RowStaged("1", 0, 0, 0, slab))
        assert "register" in (await next_message(worker, Rejected)).detail
        assert not node.count(RowArrived)


@pytest.mark.parametrize(("scope", "asks"), [("private", False), ("network", True), ("public", True)])
async def test_only_a_private_lookup_stays_inside_the_node(tmp_path: Path, scope: str, asks: bool) -> None:
    async with small_node(tmp_path) as node, connected(node, "scheduler") as scheduler:
        scheduler.send(lookup(1, scope=scope))
        await next_message(scheduler, PrefixAnswer)
        wanted = next(e for e in node.events if isinstance(e, PrefixWanted))
        assert wanted.may_ask_peers is asks


async def test_a_request_that_ends_is_forgotten(node: SmallNode) -> None:
    async with connected(node, "scheduler") as scheduler:
        scheduler.send(RequestEnded("r"))
        await until(lambda: RequestOver(ENGINE.hex(), "r") in node.events)


async def test_responses_go_to_their_store_and_hits_of_them_to_the_network(node: SmallNode) -> None:
    async with connected(node, "api", layout=None) as client:
        message = StoreResponse(bytes(32), "network", bytes(32), "0.32.0", 1000, b"{}")
        client.send(message)
        client.send(TouchResponses((bytes(32),)))
        await until(lambda: node.touched)
        assert node.stored == [message]
    assert node.finder is not None
    assert node.finder.hits == [bytes(32)]


async def test_what_is_purged_or_found_false_goes_from_where_it_is_shared_too(node: SmallNode) -> None:
    async with connected(node) as client:
        client.send(ResponseAudited(b"passed".ljust(32), b"proof", 9, 0))
        client.send(ResponseAudited(b"false".ljust(32), b"proof", 9, 1))
        client.send(PurgeResponses((b"purged".ljust(32),)))
        await until(lambda: len(node.finder.purged) == 2 if node.finder else False)
    assert node.finder is not None
    assert node.finder.purged == [b"false".ljust(32), b"purged".ljust(32)]


async def test_lookups_beyond_the_bound_are_answered_busy_and_a_release_makes_room(node: SmallNode) -> None:
    node.answers = False
    async with connected(node, "scheduler") as scheduler:
        for number in range(LOOKUPS_PER_CLIENT_MAX + 1):
            await until(lambda n=number: scheduler.send(lookup(n)))  # type: ignore[misc]
        answer = await next_message(scheduler, PrefixAnswer)
        assert (answer.lookup, answer.end_segment, answer.reason) == (LOOKUPS_PER_CLIENT_MAX, 0, "busy")
        scheduler.send(ReleaseLookup(0))
        scheduler.send(lookup(LOOKUPS_PER_CLIENT_MAX))
        await until(lambda: node.count(PrefixWanted) == LOOKUPS_PER_CLIENT_MAX + 1)
        assert not scheduler.receive()


async def test_an_answer_after_the_release_is_ignored(node: SmallNode) -> None:
    node.answers = False
    async with connected(node, "scheduler") as scheduler:
        scheduler.send(lookup(1))
        scheduler.send(ReleaseLookup(1))
        await until(lambda: node.count(PrefixReleased) == 1)
        wanted = next(e for e in node.events if isinstance(e, PrefixWanted))
        node.prefixes.answer(wanted.lookup, 0, (), "none", "", "late")
        scheduler.send(GetStatus())
        await next_message(scheduler, Status)


async def test_a_miss_ends_its_lookup(node: SmallNode) -> None:
    async with connected(node, "scheduler") as scheduler:
        for _ in range(3):  # the same number again
            scheduler.send(lookup(1))
            assert (await next_message(scheduler, PrefixAnswer)).end_segment == 0


# --- responses of other nodes ---------------------------------------------------------------------

FOUND = FoundResponse(b"{}", b"proof", 1, 2, "12D3KooW", "gossip", "members")


def find(number: int) -> FindResponse:
    return FindResponse(number, bytes(32), bytes([1]) * 32, 300)


async def wanted(node: SmallNode, count: int = 1) -> Finder:
    finder = node.finder
    assert finder is not None
    await until(lambda: len(finder.wanted) >= count)
    return finder


async def test_a_client_hears_of_the_hint_and_of_the_answer_under_its_own_number(node: SmallNode) -> None:
    async with connected(node, "api", layout=None) as one, connected(node, "api", layout=None) as other:
        for client in (one, other):
            client.send(find(7))
        finder = await wanted(node, 2)
        (first, *rest), (second, *_) = finder.wanted
        assert rest == [bytes(32), bytes([1]) * 32, 300]
        assert first != second
        node.responses.hint(first, True)
        node.responses.hint(second, False)
        hints = [await next_message(client, ResponseHint) for client in (one, other)]
        assert sorted((hint.lookup, hint.hinted) for hint in hints) == [(7, False), (7, True)]
        node.responses.answer(first, FOUND, "hit")
        node.responses.answer(second, None, "not_found")
        hinted, unhinted = (one, other) if hints[0].hinted else (other, one)
        answer = await next_message(hinted, ResponseFound)
        assert answer == ResponseFound(7, b"{}", b"proof", 1, 2, "12D3KooW", "gossip", "members")
        assert await next_message(unhinted, ResponseNotFound) == ResponseNotFound(7, "not_found")
        node.responses.answer(first, FOUND, "twice")
        one.send(find(7))  # the number is free again
        await wanted(node, 3)
        assert finder.released == []


async def test_the_largest_response_crosses_the_socket(node: SmallNode) -> None:
    async with connected(node, "api", layout=None) as client:
        client.send(find(1))
        ((lookup, *_),) = (await wanted(node)).wanted
        body = os.urandom(RESPONSE_BYTES_MAX)
        node.responses.answer(lookup, replace(FOUND, body=body, source="s" * 1000), "hit")
        answer = await next_message(client, ResponseFound)
        assert (answer.body, answer.source) == (body, "s" * 256)


async def test_a_node_that_asks_nobody_says_so(tmp_path: Path) -> None:
    async with small_node(tmp_path, finds=False) as node, connected(node, "api", layout=None) as client:
        client.send(find(1))
        assert await next_message(client, ResponseNotFound) == ResponseNotFound(1, "off")
        client.send(ReleaseResponse(1))
        client.send(GetStatus())
        await next_message(client, Status)


async def test_a_released_lookup_is_neither_hinted_nor_answered(node: SmallNode) -> None:
    async with connected(node, "api", layout=None) as client:
        client.send(find(1))
        client.send(ReleaseResponse(1))
        client.send(ReleaseResponse(1))
        finder = await wanted(node)
        await until(lambda: finder.released == [finder.wanted[0][0]])
        node.responses.hint(finder.wanted[0][0], True)
        node.responses.answer(finder.wanted[0][0], FOUND, "late")
        client.send(GetStatus())
        await next_message(client, Status)


@pytest.mark.parametrize("goes", ["goodbye", "silence"])
async def test_a_client_that_goes_releases_its_lookups(strict: SmallNode, goes: str) -> None:
    if goes == "goodbye":
        async with connected(strict, "api", layout=None) as client:
            client.send(find(1))
            client.send(find(2))
            finder = await wanted(strict, 2)
    else:
        async with raw_socket(strict) as socket:
            await socket.send(encode(Hello(LOCAL_PROTOCOL, "api", bytes(16), "n")))
            for number in (1, 2):
                await socket.send(encode(find(number)))
            finder = await wanted(strict, 2)
            await until(lambda: strict.server.engine_leases == 0)
    await until(lambda: sorted(finder.released) == [lookup for lookup, *_ in finder.wanted])
    for lookup in finder.released:
        strict.responses.answer(lookup, FOUND, "late")


async def test_response_lookups_beyond_the_bound_are_answered_busy(node: SmallNode) -> None:
    async with connected(node, "api", layout=None) as client:
        for number in range(LOOKUPS_PER_CLIENT_MAX + 1):
            await until(lambda n=number: client.send(find(n)))  # type: ignore[misc]
        assert await next_message(client, ResponseNotFound) == ResponseNotFound(LOOKUPS_PER_CLIENT_MAX, "busy")
        client.send(ReleaseResponse(0))
        client.send(find(LOOKUPS_PER_CLIENT_MAX))
        await wanted(node, LOOKUPS_PER_CLIENT_MAX + 1)


async def test_a_response_lookup_under_way_keeps_its_number(node: SmallNode) -> None:
    async with connected(node, "api", layout=None) as client:
        client.send(find(1))
        client.send(find(1))
        assert "under way" in (await next_message(client, Rejected)).detail
        assert len((await wanted(node)).wanted) == 1


async def test_an_api_server_learns_of_hint_and_answer_while_its_heartbeat_reads_the_socket_too(
    node: SmallNode,
) -> None:
    async with connected(node, "api", layout=None) as client:
        lookups = NodeLookup(AsyncNodeClient(client))
        hints_s: list[float] = []
        for number in range(1, 101):
            began = time.perf_counter()
            pending = lookups.start(RequestKey(bytes(32)), bytes(32), 30.0)
            assert pending is not None
            lookup, *_ = (await wanted(node, number)).wanted[-1]
            node.responses.hint(lookup, True)
            await pending.hint
            hints_s.append(time.perf_counter() - began)
            node.responses.answer(lookup, FOUND, "hit")
            answer = await pending.answer
            assert answer is not None
            assert answer.body == b"{}"
        print(f"hint p50: {statistics.median(hints_s) * 1000:.2f} ms")  # the loop is the node's as well, and polls
        assert min(hints_s) < HINT_S


async def test_a_node_that_dies_is_not_waited_for(tmp_path: Path) -> None:
    client = NodeClient(Config(data_dir=tmp_path), "api", "n")
    lookups = NodeLookup(AsyncNodeClient(client))
    assert lookups.start(RequestKey(bytes(32)), bytes(32), 30.0) is None
    async with small_node(tmp_path) as node:
        await until(lambda: client.connected)
        pending = lookups.start(RequestKey(bytes(32)), bytes(32), 60.0)
        assert pending is not None
        await wanted(node)
    async with small_node(tmp_path):  # it comes back, and knows of nothing
        async with asyncio.timeout(30):
            assert await pending.answer is None
    client.close()


async def test_staging_never_takes_more_than_half_of_the_arena(node: SmallNode) -> None:
    one_part = Layout(bytes(32), 256, (Part(0, ROW_BYTES),), 1)
    async with (
        connected(node, layout=one_part) as worker,
        connected(node, engine=bytes(range(1, 17)), layout=one_part) as other,
    ):
        half = node.cache.arena.capacity_bytes // 2
        shares = [len(await granted(client, 1000)) for client in (worker, other)]
        assert shares == [half * 3 // 4 // ROW_BYTES, (half - shares[0] * ROW_BYTES) * 3 // 4 // ROW_BYTES]
        assert min(shares) > 0
        (free,) = {len(await granted(client, 1000)) for client in (worker, other)}
        assert free == 0
        assert node.cache.arena.free_bytes >= half


async def test_rows_of_one_size_leave_room_for_those_of_the_other_that_a_segment_needs(node: SmallNode) -> None:
    async with connected(node) as worker:
        sizes = [part.row_bytes for part in LAYOUT.parts]
        counts = [len(await granted(worker, 1000, size)) for size in sizes]
        share = node.cache.arena.capacity_bytes // 2 * 3 // 4
        assert counts == [share // sum(sizes)] * 2


async def test_rows_that_wait_to_be_stored_count_as_staged_and_what_did_not_fit_comes_later(node: SmallNode) -> None:
    half = node.cache.arena.capacity_bytes // 2
    for number in range(half // ROW_BYTES):
        slab = node.cache.allocate(ROW_BYTES)
        assert slab is not None
        node.cache.keep(RowKey(bytes([number]) * 32), slab)
        node.cache.lease(RowKey(bytes([number]) * 32), UNSTORED)
    async with connected(node) as worker:
        assert await granted(worker, 5) == ()
        node.cache.end_leases(UNSTORED)
        assert len((await next_message(worker, StagingGranted)).slabs) == 5


async def test_without_the_kv_cache_nothing_is_staged_or_found(tmp_path: Path) -> None:
    async with small_node(tmp_path, kv_cache=False) as node, connected(node, "scheduler") as client:
        assert await granted(client, 4) == ()
        client.send(lookup(1))
        assert (await next_message(client, PrefixAnswer)).reason == "off"


async def test_goodbye_frees_what_was_granted_and_drops_what_was_not_named(node: SmallNode) -> None:
    async with connected(node) as worker:
        first, _second = await granted(worker, 2)
        worker.send(RowStaged("r", 0, 0, 0, first))
    await until(lambda: node.count(ClientGone) == 1)
    assert node.cache.arena.free_bytes == node.cache.arena.capacity_bytes
    assert node.metrics.staged_dropped_total.labels("client_gone")._value.get() == 1


async def test_the_network_hears_what_all_engines_serve_and_no_more_of_those_that_go(
    node: SmallNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "PEER_RECORD_AGAIN_MS", 200)
    keys = [SegmentKey(sha256(f"segment {number}".encode())) for number in range(3)]
    ids = [wire_id(network_id("default"), key) for key in keys]
    model = bytes([8]) * 32
    other = Layout(bytes([9]) * 32, 256, LAYOUT.parts, 1)
    async with connected(node, "scheduler") as stays, connected(node, "api", layout=None) as api:
        assert stays.send(PrefixesInMemory(400, (keys[0], keys[1]), ()))
        assert api.send(FindResponse(1, KEY, model, 100))
        await until(lambda: node.told)
        both = node.told[-1]
        assert (both.models, both.fingerprints, both.load_permille) == ((model,), (LAYOUT.fingerprint,), 400)
        assert overlap(both.vram_digest, ids) == 2
        async with connected(node, "scheduler", layout=other) as goes:
            assert goes.send(PrefixesInMemory(1000, (keys[0], keys[2]), ()))
            await until(lambda: node.told[-1] != both)
            assert node.told[-1].fingerprints == (LAYOUT.fingerprint, other.fingerprint)
            assert node.told[-1].load_permille == 700
            assert overlap(node.told[-1].vram_digest, ids) == 3
            assert stays.send(PrefixesInMemory(400, (), (keys[1],)))
        await until(lambda: node.told[-1].fingerprints == (LAYOUT.fingerprint,))
        assert node.told[-1].load_permille == 400
        assert overlap(node.told[-1].vram_digest, ids) == approximate_count(node.told[-1].vram_digest) == 1
    await until(lambda: node.told[-1] == ServedChanged((), (), 0, b""))


async def test_an_engine_is_gone_with_its_last_worker_or_its_scheduler(node: SmallNode) -> None:
    async with connected(node, "worker") as first:
        async with connected(node, "worker"):
            pass
        await until(lambda: node.server.engine_leases == 1)
        assert not node.count(ClientGone)
        async with connected(node, "scheduler"):
            pass
        await until(lambda: node.count(ClientGone) == 1)
        first.close()
        await until(lambda: node.count(ClientGone) == 2)


@pytest.mark.parametrize(
    "wrong",
    [
        "part",
        "rank",
        "length",
        "generation",
        "never granted",
        "another's",
        "row bytes",
        "lookup twice",
    ],
)
async def test_a_clients_mistake_is_rejected_and_harms_nobody(tmp_path: Path, wrong: str) -> None:
    async with small_node(tmp_path) as node, connected(node) as client, connected(node) as other:
        node.answers = False
        (slab,) = await granted(client)
        (others,) = await granted(other)
        forged = Slab(slab.slot, slab.offset, slab.length, slab.generation + 1)
        client.send(lookup(1))
        client.send(
            {
                "part": RowStaged("r", 0, 2, 0, slab),
                "rank": RowStaged("r", 0, 0, 1, slab),
                "length": RowStaged("r", 0, 1, 0, slab),
                "generation": RowStaged("r", 0, 0, 0, forged),
                "never granted": StagingUnused(Slab(60, 60 * PAGE_BYTES, ROW_BYTES, 1)),
                "another's": RowStaged("r", 0, 0, 0, others),
                "row bytes": WantStaging(12345, 1),
                "lookup twice": lookup(1),
            }[wrong]
        )
        assert (await next_message(client, Rejected)).detail
        assert not node.count(RowArrived)
        client.send(RowStaged("r", 0, 0, 0, slab))
        other.send(RowStaged("r", 1, 0, 0, others))
        await until(lambda: node.count(RowArrived) == 2)


async def test_nothing_that_depends_on_the_layout_comes_before_it(node: SmallNode) -> None:
    async with connected(node, "scheduler", layout=None) as client:
        for message in (WantStaging(ROW_BYTES, 1), lookup(1), SegmentNamed("r", 0, KEY, "network")):
            client.send(message)
            assert "register" in (await next_message(client, Rejected)).detail


@asynccontextmanager
async def raw_socket(node: SmallNode) -> AsyncIterator[zmq.asyncio.Socket]:
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(f"ipc://{node.config.socket_path}")
    try:
        yield socket
    finally:
        context.destroy(linger=0)


async def test_garbage_is_rejected_and_strangers_have_no_lease(node: SmallNode) -> None:
    async with raw_socket(node) as socket, asyncio.timeout(10):
        for frames in ([b"\xff\x00garbage"], [b""], [b"a", b"b"]):
            await socket.send_multipart(frames)
            assert isinstance(decode_node_message(await socket.recv()), Rejected)
        await socket.send(encode(GetStatus()))
        assert decode_node_message(await socket.recv()) == LeaseLost()
        await socket.send(encode(Hello(99, "api", bytes(16), "n")))
        assert "protocol" in decode_node_message(await socket.recv()).detail  # type: ignore[union-attr]
    assert node.metrics.failures_total.labels("local", "protocol")._value.get() == 4


async def test_a_session_belongs_to_one_connection(node: SmallNode) -> None:
    hello = encode(Hello(LOCAL_PROTOCOL, "worker", bytes(16), "n"))
    async with raw_socket(node) as first, raw_socket(node) as second, asyncio.timeout(10):
        await first.send(hello)
        assert isinstance(decode_node_message(await first.recv()), Welcome)
        await second.send(hello)
        assert "in use" in decode_node_message(await second.recv()).detail  # type: ignore[union-attr]


async def test_a_message_beyond_the_size_limit_is_never_queued(node: SmallNode) -> None:
    async with connected(node, "api") as client:
        huge = StoreResponse(bytes(32), "network", bytes(32), "v", 1, bytes(9 * MiB))
        assert not client.send(huge)
        assert client.connected


async def test_a_thousand_cycles_of_staging_and_leasing_leak_nothing(tmp_path: Path) -> None:
    """A worker and a scheduler; rows are named, dropped, returned unwritten, looked up and evicted."""
    async with small_node(tmp_path, size=2 * MiB) as node:
        capacity = node.cache.arena.capacity_bytes
        async with connected(node) as worker, connected(node, "scheduler") as scheduler:
            read = 0
            for cycle in range(1000):
                key = SegmentKey(cycle.to_bytes(32, "big"))
                (slab,) = await granted(worker)
                if cycle % 5 == 4:
                    worker.send(StagingUnused(slab))
                    continue
                worker.view(slab)[:8] = cycle.to_bytes(8, "big")
                worker.send(RowStaged(f"r{cycle}", 0, 0, 0, slab))
                await until(lambda n=f"r{cycle}": (ENGINE.hex(), n, 0) in node._staged)  # type: ignore[misc]
                scheduler.send(SegmentNamed(f"r{cycle}", 0, key, "network"))
                scheduler.send(lookup(cycle, key))
                (row,) = (await next_message(scheduler, PrefixAnswer)).rows
                copy = bytes(scheduler.view(row.slab)[:8])
                assert scheduler.is_current(row.slab)
                assert copy == cycle.to_bytes(8, "big")
                read += 1
                scheduler.send(ReleaseLookup(cycle))
            assert read == 800
            await until(lambda: node.count(PrefixReleased) == read)
            arena = node.cache.arena
            await until(lambda: arena.free_bytes + len(node.cache) * ROW_BYTES == capacity)
            assert node.cache.arena.quarantined_bytes == 0
            assert node.cache.allocate(capacity) is not None, "no row is pinned"
    assert not node.cache.arena.path.exists()


# --- processes that die, freeze and fork ----------------------------------------------------------

CLIENT = """
import sys, time
from pathlib import Path
from hyperspace_vllm.api.node_lookup import HINT_S, NodeLookup
from hyperspace_vllm.client import NodeClient
from hyperspace_vllm.config import Config
from hyperspace_vllm.core.records.layout import Layout, Part
from hyperspace_vllm.core.local.kv_messages import *

def receive(kind):
    while True:
        for message in client.receive():
            if isinstance(message, kind):
                return message
        time.sleep(0.001)

row_bytes = int(sys.argv[2])
client = NodeClient(Config(data_dir=Path(sys.argv[1])), "worker", "child")
assert client.wait_connected(60)
layout = Layout(bytes(32), 256, (Part(0, row_bytes), Part(512, row_bytes // 2)), 1)
client.send(RegisterLayout(layout, b"the childs token"))
client.send(WantStaging(row_bytes, 2))
slabs = receive(StagingGranted).slabs
client.send(LookupPrefix(1, "r", (bytes(range(32)),), 0, 0, 1000, "network"))
leased = receive(PrefixAnswer).rows
views = [client.view(slab) for slab in slabs]
epoch = client.epoch
print("ready", flush=True)
sys.stdin.readline()
# Resumed past its lease: it doesn't know yet, and goes on writing where it was writing.
for view in views:
    view[:] = b"X" * len(view)
print("torn" if any(not client.is_current(row.slab) for row in leased) else "whole", flush=True)
deadline = time.monotonic() + 10
while client.epoch == epoch and time.monotonic() < deadline:
    time.sleep(0.001)
print("new session" if client.epoch != epoch and client.connected else "never noticed", flush=True)
try:
    client.view(slabs[0])
except LookupError:
    print("slabs gone", flush=True)
sys.stdin.readline()
for lock in client.take_earlier_locks():
    lock.release()
sys.stdin.readline()
"""


class ClientProcess:
    """A worker process with two granted slabs and one leased row."""

    def __init__(self, data_dir: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(data_dir), str(ROW_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    async def line(self) -> str:
        assert self.process.stdout is not None
        async with asyncio.timeout(30):
            return (await asyncio.to_thread(self.process.stdout.readline)).strip()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
async def child(strict: SmallNode) -> AsyncIterator[ClientProcess]:
    slab = strict.cache.allocate(ROW_BYTES)
    assert slab is not None
    strict.cache.keep(RowKey(row_key(KEY, 0, 0)), slab)
    process = ClientProcess(strict.config.data_dir)
    try:
        assert await process.line() == "ready"
        yield process
    finally:
        process.kill()


async def test_a_client_frozen_past_its_lease_corrupts_nobody_and_notices(
    strict: SmallNode, child: ClientProcess
) -> None:
    arena = strict.cache.arena
    os.kill(child.process.pid, signal.SIGSTOP)
    await until(lambda: strict.server.engine_leases == 0)
    assert arena.quarantined_bytes == 2 * ROW_BYTES
    assert strict.count(PrefixReleased) == 1
    assert strict.events[-1] == ClientGone(b"the childs token".hex())
    # Everything that is left goes to others, the leased row's pages too, and they fill it.
    others: list[Slab] = []
    while (slab := strict.cache.allocate(PAGE_BYTES)) is not None:
        arena.view(slab)[:] = b"o" * PAGE_BYTES
        others.append(slab)
    assert len(others) * PAGE_BYTES == arena.capacity_bytes - arena.quarantined_bytes
    os.kill(child.process.pid, signal.SIGCONT)
    child.go_on()
    assert [await child.line() for _ in range(3)] == ["torn", "new session", "slabs gone"]
    assert all(bytes(arena.view(slab)) == b"o" * PAGE_BYTES for slab in others)
    # Its slabs stay out of use until it has said that it writes there no more.
    await asyncio.sleep(strict.lease_ms / 2000)
    assert arena.quarantined_bytes == 2 * ROW_BYTES
    child.go_on()
    await until(lambda: arena.free_bytes == 2 * ROW_BYTES)
    assert arena.quarantined_bytes == 0


async def test_a_killed_client_loses_its_lease_and_its_slabs_are_used_again(
    strict: SmallNode, child: ClientProcess
) -> None:
    child.kill()
    await until(lambda: strict.server.engine_leases == 0)
    await until(lambda: strict.cache.arena.quarantined_bytes == 0)
    assert strict.metrics.quarantined_bytes._value.get() == 0
    assert list((strict.config.data_dir / "sessions").iterdir()) == []


async def test_a_node_that_was_itself_paused_expires_nobody_whose_heartbeats_wait(strict: SmallNode) -> None:
    async with connected(strict, "worker") as worker:
        epoch = worker.epoch
        time.sleep(1.5 * strict.lease_ms / 1000)  # noqa: ASYNC251  # the pause itself, of the node's whole loop
        for _ in range(5):
            await asyncio.sleep(strict.lease_ms / 5000)
        assert (worker.connected, worker.epoch) == (True, epoch)


async def test_a_forked_child_has_a_session_of_its_own(node: SmallNode) -> None:
    async with connected(node, "worker") as client:
        child = os.fork()
        if child == 0:
            fine = not client.connected and client.wait_connected(60) and client.send(GetStatus())
            client.close()
            os._exit(0 if fine else 1)
        await until(lambda: node.server.engine_leases == 2)
        waited: list[tuple[int, int]] = []
        await until(lambda: waited.append(os.waitpid(child, os.WNOHANG)) or waited[-1][0])  # type: ignore[func-returns-value]
        assert os.waitstatus_to_exitcode(waited[-1][1]) == 0
        assert client.connected
        client.send(GetStatus())
        await next_message(client, Status)


async def test_without_a_node_a_client_neither_waits_nor_raises(tmp_path: Path) -> None:
    client = NodeClient(Config(data_dir=tmp_path), "worker", "n")
    calls: Counter[object] = Counter()
    quickest_s = 1.0
    for _ in range(200):
        began = time.monotonic()
        calls.update([client.send(GetStatus()), len(client.receive()), client.epoch, client.connected])
        quickest_s = min(quickest_s, time.monotonic() - began)
    assert quickest_s < 0.005
    assert calls == {False: 800}
    with pytest.raises(LookupError):
        client.view(Slab(0, 0, 1, 0))
    assert not client.is_current(Slab(0, 0, 1, 0))
    client.close()
    client.close()
    assert not client.send(GetStatus())


@pytest.mark.parametrize("arena_lies_in", ["/dev/shm", "the data directory"])
async def test_a_client_finds_the_next_node_and_drops_what_the_last_one_leased(
    tmp_path: Path, arena_lies_in: str
) -> None:
    client = NodeClient(Config(data_dir=tmp_path), "worker", "n")
    slabs: list[Slab] = []
    for epoch in (1, 2):
        async with small_node(tmp_path, shared_memory=Path(arena_lies_in)):
            await until(lambda e=epoch: client.connected and client.epoch == e)  # type: ignore[misc]
            assert not any(client.is_current(slab) for slab in slabs)
            client.send(RegisterLayout(LAYOUT, ENGINE))
            slabs = list(await granted(client, 2))
            assert all(client.is_current(slab) for slab in slabs)
    client.close()
