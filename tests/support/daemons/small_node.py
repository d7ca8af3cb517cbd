"""A LocalServer on its socket over a core that keeps every row in memory, and clients of it."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest
import zmq
import zmq.asyncio

from hyperspace_vllm.client import NodeClient
from hyperspace_vllm.config import Config
from hyperspace_vllm.core.events.node_state import ServedChanged
from hyperspace_vllm.core.events.prefix_reading import PrefixReleased, PrefixWanted
from hyperspace_vllm.core.events.prefix_writing import ClientGone, RowArrived, SegmentKeyKnown
from hyperspace_vllm.core.events.vocabulary import PrefixEvent
from hyperspace_vllm.core.local.kv_messages import LookupPrefix, RegisterLayout, StagingGranted, WantStaging
from hyperspace_vllm.core.local.response_cache_messages import FindResponse, StoreResponse
from hyperspace_vllm.core.local.slab import PAGE_BYTES, LoadedRow, Slab
from hyperspace_vllm.core.records.ids import RequestKey, SegmentKey, network_id, row_key
from hyperspace_vllm.core.records.layout import Layout, Part
from hyperspace_vllm.core.records.limits import MiB
from hyperspace_vllm.daemon.identity import Identity
from hyperspace_vllm.daemon.kv.arena import Arena
from hyperspace_vllm.daemon.kv.row_cache import RowCache
from hyperspace_vllm.daemon.local.engine_messages import EngineMessages
from hyperspace_vllm.daemon.local.local_server import LocalServer, make_welcome
from hyperspace_vllm.daemon.local.local_socket import LocalSocket
from hyperspace_vllm.daemon.local.prefix_lookups import PrefixLookups
from hyperspace_vllm.daemon.local.response_messages import ResponseMessages
from hyperspace_vllm.daemon.local.served import Served
from hyperspace_vllm.daemon.local.staging import Staging
from hyperspace_vllm.daemon.metrics import Metrics
from hyperspace_vllm.daemon.responses.response_lookups import FoundResponse, ResponseLookups
from tests.support.until import until_async

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


async def next_message(client: NodeClient, kind: type[M]) -> M:
    found = await until_async(client.receive)
    assert len(found) == 1, found
    assert isinstance(found[0], kind), found
    return found[0]


@asynccontextmanager
async def connected(
    node: SmallNode, role: str = "worker", engine: bytes = ENGINE, layout: Layout | None = LAYOUT
) -> AsyncIterator[NodeClient]:
    client = NodeClient(node.config, role, "engine")  # type: ignore[arg-type]
    try:
        await until_async(lambda: client.connected)
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


# --- responses of other nodes ---------------------------------------------------------------------

FOUND = FoundResponse(b"{}", b"proof", 1, 2, "12D3KooW", "gossip", "members")


def find(number: int) -> FindResponse:
    return FindResponse(number, bytes(32), bytes([1]) * 32, 300)


async def wanted(node: SmallNode, count: int = 1) -> Finder:
    finder = node.finder
    assert finder is not None
    await until_async(lambda: len(finder.wanted) >= count)
    return finder


@asynccontextmanager
async def raw_socket(node: SmallNode) -> AsyncIterator[zmq.asyncio.Socket]:
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(f"ipc://{node.config.socket_path}")
    try:
        yield socket
    finally:
        context.destroy(linger=0)
