"""Whole nodes without an engine: the real parts below LocalServer, driven by events as LocalServer would."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hyperspace_vllm.config import Config
from hyperspace_vllm.core.events.known_peers import KvEndpoint
from hyperspace_vllm.core.events.prefix_reading import PrefixReleased, PrefixWanted
from hyperspace_vllm.core.events.prefix_writing import RequestOver, RowArrived, RowsStored, SegmentKeyKnown
from hyperspace_vllm.core.events.vocabulary import Event
from hyperspace_vllm.core.local.slab import LoadedRow, Slab
from hyperspace_vllm.core.node.node import Node
from hyperspace_vllm.core.node.node_options import NodeOptions
from hyperspace_vllm.core.peers.dials import Dials
from hyperspace_vllm.core.peers.introductions import kv_peers
from hyperspace_vllm.core.peers.trust import Trust
from hyperspace_vllm.core.prefix.fetch import FetchMode
from hyperspace_vllm.core.records.ids import PeerId, RowKey, SegmentKey, network_id, public_key_of, row_key, sha256
from hyperspace_vllm.core.records.layout import Layout, Part
from hyperspace_vllm.core.records.limits import TOTAL_CHUNKS, GiB, MiB
from hyperspace_vllm.core.records.manifest import digest_blob
from hyperspace_vllm.core.records.peer_record import PeerRecord
from hyperspace_vllm.daemon import clock
from hyperspace_vllm.daemon.identity import Identity
from hyperspace_vllm.daemon.kv.arena import Arena
from hyperspace_vllm.daemon.kv.chunk_store import ChunkStore
from hyperspace_vllm.daemon.kv.chunk_transport import ChunkTransport
from hyperspace_vllm.daemon.kv.row_cache import RowCache
from hyperspace_vllm.daemon.metrics import Metrics
from hyperspace_vllm.daemon.node.driver import Driver
from hyperspace_vllm.daemon.node.network_effects import NetworkEffects
from hyperspace_vllm.daemon.node.prefix_effects import PrefixEffects
from hyperspace_vllm.daemon.responses.response_lookups import FoundResponse
from hyperspace_vllm.daemon.workers.compute_pool import ComputePool
from tests.support.until import until_async

NETWORK = network_id("test")
# A full-attention part and one with a window of two segments, on two ranks.
LAYOUT = Layout(bytes(32), 256, (Part(0, 60_000), Part(512, 100_000)), 2)


def keys(name: str, count: int) -> tuple[SegmentKey, ...]:
    return tuple(SegmentKey(sha256(f"{name} {segment}".encode())) for segment in range(count))


def trust_of(identity: Identity, peers: tuple[str, ...], network_key: bytes | None = None) -> Trust:
    """The trust of a node with these settings."""
    listed = frozenset(public_key_of(peer.partition("@")[0]) for peer in peers)
    return Trust("members", identity.public_key, listed, frozenset(), network_key)


def content(key: RowKey, length: int) -> bytes:
    return random.Random(key).randbytes(length)


@dataclass
class Answer:
    end_segment: int
    rows: tuple[LoadedRow, ...]
    source: str
    verified_by: str
    reason: str
    after_s: float


@dataclass
class Clients:
    """The staged slabs and the clients of a driver."""

    cache: RowCache
    staged: dict[int, Slab] = field(default_factory=dict)
    answers: dict[int, asyncio.Future[Answer]] = field(default_factory=dict)
    began: dict[int, float] = field(default_factory=dict)
    reached: bool = True  # by answers

    def answer(
        self,
        lookup: int,
        end_segment: int,
        rows: tuple[LoadedRow, ...],
        source: str,
        verified_by: str,
        reason: str,
    ) -> bool:
        after_s = asyncio.get_running_loop().time() - self.began[lookup]
        self.answers[lookup].set_result(Answer(end_segment, rows, source, verified_by, reason, after_s))
        return self.reached

    def take(self, staged: int) -> Slab | None:
        return self.staged.pop(staged, None)

    def drop(self, staged: int, reason: str) -> None:
        self.cache.free(self.staged.pop(staged))


class NoClients:
    """No client asks for responses here."""

    def hint(self, lookup: int, hinted: bool) -> None: ...

    def let_try(self, lookup: int, body: bytes, proof: bytes) -> None: ...

    def answer(self, lookup: int, found: FoundResponse | None, reason: str) -> None: ...


class SharedPool(ComputePool):
    """A pool that outlives its nodes: its workers take seconds to start."""

    async def close(self) -> None:
        """Do nothing: the pool stays open."""

    async def end(self) -> None:
        await super().close()

    @classmethod
    @asynccontextmanager
    async def started(cls) -> "AsyncIterator[SharedPool]":
        """A pool whose two worker processes run: a node without a verifier fetches no KV."""
        pool = cls()
        try:
            await pool.commit(digest_blob(bytes(TOTAL_CHUNKS * 32), 1))
            await until_async(lambda: pool.can_verify)
            yield pool
        finally:
            await pool.end()


class TestNode:
    """One node; `peers` as in the config. With a network key it also trusts other holders of that key."""

    __test__ = False

    def __init__(
        self,
        directory: Path,
        peers: tuple[str, ...] = (),
        arena_bytes: int = 64 * MiB,
        disk_bytes: int = GiB,
        store: Callable[[Path, int], ChunkStore] = ChunkStore,
        fetch: FetchMode = "always",
        compute: ComputePool | None = None,
        network_key: bytes | None = None,
    ) -> None:
        self.config = Config(data_dir=directory, peers=peers)
        self.identity = Identity.load(directory)
        self.metrics = Metrics()
        self.arena = Arena(directory / "arena", arena_bytes)
        self.cache = RowCache(self.arena)
        self.store = store(directory / "chunks", disk_bytes)
        self.trust = trust_of(self.identity, peers, network_key)
        self.transport = ChunkTransport(
            self.config, self.identity, self.store, self.metrics, self.trust, Dials(clock.now())
        )
        self.stored: list[RowsStored] = []
        self.compute = compute or ComputePool()
        options = NodeOptions(NETWORK, network_key, kv_peers=self.transport.peers, fetch=fetch)
        self.node = Node(options, self.identity.signing_key, self.trust, Dials(clock.now()), random.Random(1))
        self.clients = Clients(self.cache)
        self.driver = Driver(self.node)
        self.prefixes = PrefixEffects(
            self.cache,
            self.store,
            self.transport,
            self.compute,
            self.metrics,
            self.identity,
            NETWORK,
            self.trust,
            self.clients,
            self.clients,
            self._submit,
        )
        network = NetworkEffects(NETWORK, self.trust, NoClients(), None, "network", self.metrics, self.driver.submit)
        self.driver.begin(network, self.prefixes)
        self.stopped = False
        self._numbers = iter(range(1, 1 << 30))

    @property
    def address(self) -> str:
        """The node as an entry in another node's `peers`."""
        return f"{self.identity.peer_id}@{self.transport.endpoint}"

    @property
    def record(self) -> PeerRecord:
        """The node's record as others receive it."""
        key = self.identity.public_key
        endpoint, tag = self.transport.endpoint, self.trust.vouch(key)
        return PeerRecord(NETWORK, key, 1, 1 << 62, "127.0.0.1:1", endpoint, tag).sign(self.identity.signing_key)

    def introduce(self, *records: PeerRecord) -> None:
        """Tell the node of the peers that it has met and may use, at their own endpoints; of no others any more."""
        for record in records:
            self.trust.meet(record.public_key, record.member_tag)
        endpoints = tuple(KvEndpoint(each.peer, each.endpoint, own=True) for each in records)
        self.prefixes.perform(kv_peers(records, endpoints, self.trust))
        self.node.prefixes.set_peers(self.transport.peers)

    def _submit(self, event: Event) -> None:
        """Note what the node reports, and pass it on."""
        if isinstance(event, RowsStored):
            self.stored.append(event)
        self.driver.submit(event)

    def stage(
        self,
        segment_keys: tuple[SegmentKey, ...],
        layout: Layout = LAYOUT,
        shareable: bool = True,
        fill: Callable[[RowKey, int], bytes] = content,
    ) -> None:
        """Stage rows as the workers and scheduler of one engine would."""
        request = f"r{next(self._numbers)}"
        for number, segment_key in enumerate(segment_keys):
            for part, described in enumerate(layout.parts):
                for rank in range(layout.ranks):
                    slab = self.cache.allocate(described.row_bytes)
                    assert slab is not None
                    key = row_key(segment_key, part, rank)
                    self.cache.view(slab)[:] = fill(key, described.row_bytes)
                    staged = next(self._numbers)
                    self.clients.staged[staged] = slab
                    self.driver.submit(
                        RowArrived("engine", request, number, part, rank, staged, described.row_bytes, layout)
                    )
            self.driver.submit(SegmentKeyKnown("engine", request, number, segment_key, layout, shareable))
        self.driver.submit(RequestOver("engine", request))

    async def look_up(
        self,
        segment_keys: tuple[SegmentKey, ...],
        layout: Layout = LAYOUT,
        deadline_ms: int = 20_000,
        may_ask_peers: bool = True,
    ) -> Answer:
        lookup = next(self._numbers)
        loop = asyncio.get_running_loop()
        self.clients.answers[lookup] = loop.create_future()
        self.clients.began[lookup] = loop.time()
        self.driver.submit(PrefixWanted(lookup, layout, segment_keys, 0, 0, deadline_ms, may_ask_peers))
        async with asyncio.timeout(deadline_ms / 1000 + 1):
            answer = await self.clients.answers[lookup]
        self.last_lookup = lookup
        return answer

    def release(self) -> None:
        """Release the last lookup's rows."""
        self.driver.submit(PrefixReleased(self.last_lookup))

    def failures(self) -> dict[str, int]:
        """failures_total of L2 by reason."""
        return {
            sample.labels["reason"]: int(sample.value)
            for family in self.metrics.failures_total.collect()
            for sample in family.samples
            if sample.name.endswith("_total") and sample.labels["layer"] == "l2"
        }

    def rows_are_right(self, answer: Answer, segment_keys: tuple[SegmentKey, ...]) -> bool:
        """Whether every row of the answer holds what `stage` filled in."""
        return all(
            bytes(self.cache.view(row.slab))
            == content(row_key(segment_keys[row.segment], row.part, row.rank), row.slab.length)
            for row in answer.rows
        )

    async def close(self) -> None:
        await self.driver.close()
        self.arena.close()


def peer_of(identity: Identity, address: str = "127.0.0.1:1") -> str:
    """A `peers` entry for a node that needn't be reachable (but may connect)."""
    return f"{PeerId(identity.peer_id)}@{address}"
