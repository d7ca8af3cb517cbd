"""Producer A and fetcher B over real sockets, and a store that lies to peers."""

import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio
from nacl.signing import SigningKey

from hyperspace_vllm.core.prefix import deliveries, fetch
from hyperspace_vllm.core.records.ids import ManifestDigest, RowId, RowKey, row_id, row_key, sha256
from hyperspace_vllm.core.records.limits import TOTAL_CHUNKS, MiB
from hyperspace_vllm.core.records.manifest import Manifest
from hyperspace_vllm.core.records.reason import Reason
from hyperspace_vllm.core.records.wire import Offer
from hyperspace_vllm.daemon.identity import Identity
from hyperspace_vllm.daemon.kv.chunk_store import ChunkStore
from hyperspace_vllm.daemon.kv.object_codec import ObjectRecord
from tests.support.nodes import NETWORK, Answer, SharedPool, TestNode, keys, peer_of
from tests.support.until import until_async

KEYS = keys("document", 3)
NETWORK_KEY = sha256(b"network key")
ROWS_STORED = 3 * 2 * 2  # segments x parts x ranks
ROWS_NEEDED = 3 * 2 + 2 * 2  # all of the full part, the last two segments of the window part
# The core's tests check the stall limit of 250 ms on a simulated clock. Here the clock is that of a machine that may be
# busy, so peers have 2 s, and a fault must not cost the lookup's 20 s.
STALL_MS, FAULT_S = 2_000, 8.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool() -> AsyncIterator[SharedPool]:
    async with SharedPool.started() as pool:
        yield pool


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (fetch, deliveries):
        monkeypatch.setattr(module, "FETCH_STALL_MS", STALL_MS)


class Pair:
    """Producer A and fetcher B, created on first use."""

    def __init__(self, directory: Path, pool: SharedPool) -> None:
        self.directory = directory
        self.pool = pool
        self.nodes = AsyncExitStack()
        self.b_identity = Identity.load(self._at("b"))

    async def start(
        self,
        store: Callable[[Path, int], ChunkStore] = ChunkStore,
        arena_bytes: int = 64 * MiB,
        shareable: bool = True,
        b_disk_bytes: int = 64 * MiB,
    ) -> "tuple[TestNode, TestNode]":
        """A has the document on its disk, B is connected to A."""
        a = self.node("a", (peer_of(self.b_identity),), store=store)
        a.stage(KEYS, shareable=shareable)
        await until_async(lambda: a.store.rows == ROWS_STORED)
        b = self.node("b", (a.address,), arena_bytes=arena_bytes, disk_bytes=b_disk_bytes)
        await until_async(lambda: b.transport.is_connected(a.identity.peer_id))
        return a, b

    def node(self, name: str, peers: tuple[str, ...], **options: object) -> TestNode:
        node = TestNode(self._at(name), peers, compute=self.pool, **options)  # type: ignore[arg-type]
        self.nodes.push_async_callback(self._end, node)
        return node

    async def stop(self, node: TestNode) -> None:
        node.stopped = True
        await node.close()

    async def _end(self, node: TestNode) -> None:
        assert "bug" not in node.failures()
        if not node.stopped:
            await self.stop(node)

    def _at(self, name: str) -> Path:
        (self.directory / name).mkdir(exist_ok=True)
        return self.directory / name


@pytest_asyncio.fixture(loop_scope="module")
async def pair(tmp_path: Path, pool: SharedPool) -> AsyncIterator[Pair]:
    pair = Pair(tmp_path, pool)
    async with pair.nodes:
        yield pair


class Tampered(ChunkStore):
    """A store that lies to peers: about chunks, about records, or consistently, under another digest."""

    def __init__(self, directory: Path, quota_bytes: int) -> None:
        super().__init__(directory, quota_bytes)
        self.lost: frozenset[int] = frozenset()
        self.admits = True
        self.on_chunk: Callable[[int, bytearray], None] | None = None
        self.on_record: Callable[[ObjectRecord], ObjectRecord] | None = None
        self.rewritten: dict[ManifestDigest, ObjectRecord] = {}
        self.originals: dict[ManifestDigest, ManifestDigest] = {}
        self.stall_after: int | None = None
        self.stalled_at = 0.0
        self.go_on = threading.Event()

    def rewrite(self, change: Callable[[ObjectRecord], ObjectRecord]) -> None:
        """Offer changed objects under digests that match them."""
        for digest in list(self._objects):
            record = super().record(digest)
            assert record is not None
            changed = change(record)
            self.rewritten[changed.digest] = changed
            self.originals[changed.digest] = digest

    def offers(self, row_ids: Sequence[bytes]) -> tuple[Offer, ...]:
        fakes = {original: fake for fake, original in self.originals.items()}
        mask = sum(1 << column for column in range(TOTAL_CHUNKS) if not (self.admits and column in self.lost))
        return tuple(
            Offer(o.index, fakes.get(ManifestDigest(o.manifest), o.manifest), o.row, mask.to_bytes(8, "big"))
            for o in super().offers(row_ids)
        )

    def record(self, digest: ManifestDigest, for_peer: bool = False) -> ObjectRecord | None:
        record = self.rewritten.get(digest) or super().record(digest, for_peer)
        return self.on_record(record) if record and for_peer and self.on_record else record

    def read_chunks(self, digest: ManifestDigest, row: int, columns: Sequence[int]) -> list[tuple[int, memoryview]]:
        original = self.originals.get(digest, digest)
        chunks = []
        for column, chunk in super().read_chunks(original, row, [c for c in columns if c not in self.lost]):
            if self.stall_after is not None:
                self.stall_after -= 1
                if self.stall_after < 0:
                    self.stalled_at = self.stalled_at or time.monotonic()
                    self.go_on.wait(10)
            changed = bytearray(chunk)
            if self.on_chunk:
                self.on_chunk(column, changed)
            chunks.append((column, memoryview(bytes(changed))))
        return chunks


def is_whole(node: TestNode, answer: Answer) -> bool:
    return answer.end_segment == len(KEYS) and len(answer.rows) == ROWS_NEEDED and node.rows_are_right(answer, KEYS)


def keys_by_id() -> dict[RowId, RowKey]:
    places = [(key, part, rank) for key in KEYS for part in range(2) for rank in range(2)]
    row_keys = [row_key(*place) for place in places]
    return {row_id(NETWORK, key): key for key in row_keys}


def flip(data: bytes, position: int, bit: int = 1) -> bytes:
    changed = bytearray(data)
    changed[position] ^= bit
    return bytes(changed)


# --- nodes that found each other ----------------------------------------------------------------


def introduce(*nodes: TestNode) -> None:
    """Tell every node of every other, as discovery would."""
    for node in nodes:
        node.introduce(*(other.record for other in nodes if other is not node))


async def has_document(node: TestNode) -> None:
    node.stage(KEYS)
    await until_async(lambda: node.store.rows == ROWS_STORED)


def signed_by(manifest: Manifest, key: SigningKey, record: ObjectRecord) -> ObjectRecord:
    signed = manifest.sign(key)
    return ObjectRecord(signed.digest, signed.encode(), signed, record.digests, record.proof)


async def refused(a: TestNode, b: TestNode, *reasons: str) -> None:
    """B's lookup misses in time, for one of these reasons; guilty peers are charged."""
    answer = await b.look_up(KEYS)
    assert answer.end_segment == 0
    assert answer.after_s < FAULT_S
    seen = set(reasons) & b.failures().keys()
    assert seen, b.failures()
    guilty = seen - {"untrusted_producer", "wrong_network", "from_the_future"}
    assert all(b.transport.charges[a.identity.peer_id, Reason(reason)] for reason in guilty)
    assert len(b.cache) == 0
    assert b.store.rows == 0
