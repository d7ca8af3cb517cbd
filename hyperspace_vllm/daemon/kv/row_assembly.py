"""Fetches rows from peers into the arena: chunks are collected, checked, and opened when any 32 are good.

All FetchRows of one row of one lookup meet here. Those under one manifest share its chunks; under different manifests
they race. A thread may be writing to a row's slab, so a slab is freed only when the row's last task has ended.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field

from ...core.events.prefix_reading import ChunksVerified, FetchRow, HolderStalled, RowFailed, RowReady
from ...core.events.vocabulary import PrefixEvent
from ...core.local.slab import Slab
from ...core.records.errors import Refused
from ...core.records.ids import ManifestDigest, NetworkId, PeerId, RowKey
from ...core.records.limits import DATA_CHUNKS, FETCH_STALL_MS, TOTAL_CHUNKS, MiB
from ...core.records.reason import Reason
from ...core.records.sealing import seal_key
from ..metrics import Metrics
from ..peer_failed import PeerFailed
from ..workers.compute_pool import ComputePool
from .chunk_transport import ChunkTransport
from .object_codec import ObjectRecord, good_chunks, open_row
from .peer_link import Chunks
from .row_cache import RowCache

FETCHING_BYTES_MAX = 256 * MiB  # chunks asked for and not yet opened, of all lookups: 16 at full speed
PROGRESS_S = FETCH_STALL_MS / 1000 / 4

Keep = Callable[[ObjectRecord, int, dict[int, memoryview]], None]
Condemn = Callable[[ManifestDigest], None]
Spawn = Callable[[Coroutine[None, None, None], PrefixEvent], asyncio.Task[None]]


@dataclass(slots=True)
class _Row:
    slab: Slab
    began_at: float
    reported_at: float
    chunks: dict[ManifestDigest, dict[int, memoryview]] = field(default_factory=dict)  # verified, by column
    columns: dict[PeerId, int] = field(default_factory=dict)  # verified, as bit masks
    unreported: set[PeerId] = field(default_factory=set)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    over: bool = False  # being opened, ready, failed or cancelled: no more chunks are needed
    kept: bool = False  # the slab now belongs to the cache

    def gain(self, peer: PeerId, columns: Iterable[int]) -> None:
        gained = sum(1 << column for column in columns)
        if gained:
            self.columns[peer] = self.columns.get(peer, 0) | gained
            self.unreported.add(peer)


class RowAssembly:
    """Performs FetchRow effects. `keep` takes a finished row's chunks for the disk, `condemn` a false manifest."""

    def __init__(
        self,
        network: NetworkId,
        cache: RowCache,
        transport: ChunkTransport,
        compute: ComputePool,
        metrics: Metrics,
        submit: Callable[[PrefixEvent], None],
        spawn: Spawn,
        keep: Keep,
        condemn: Condemn,
    ) -> None:
        self._network = network
        self._cache = cache
        self._transport = transport
        self._compute = compute
        self._metrics = metrics
        self._submit = submit
        self._spawn = spawn
        self._keep = keep
        self._condemn = condemn
        self._rows: dict[int, dict[RowKey, _Row]] = {}
        self._fetching_bytes = 0
        self._loop = asyncio.get_running_loop()

    def fetch(self, effect: FetchRow, record: ObjectRecord) -> None:
        """Start one FetchRow under its verified manifest."""
        assert record.manifest.rows[effect.row].length == effect.length
        rows = self._rows.setdefault(effect.lookup, {})
        row = rows.get(effect.row_key)
        if row is None:
            slab = self._cache.allocate(effect.length)
            if slab is None:
                self._submit(RowFailed(effect.lookup, effect.row_key, "arena_full"))
                return
            row = rows[effect.row_key] = _Row(slab, self._loop.time(), self._loop.time())
        if row.over:
            return
        asked_bytes = effect.columns.bit_count() * record.manifest.chunk_bytes
        if self._fetching_bytes and self._fetching_bytes + asked_bytes > FETCHING_BYTES_MAX:
            self._submit(RowFailed(effect.lookup, effect.row_key, "busy"))
            return
        self._fetching_bytes += asked_bytes
        bug = RowFailed(effect.lookup, effect.row_key, "bug")
        task = self._spawn(self._collect(effect, record, row), bug)
        row.tasks.add(task)
        task.add_done_callback(lambda _: self._task_ended(row, task, asked_bytes))

    def end(self, lookup: int) -> None:
        """Cancel everything that runs for the lookup. Rows that are ready belong to the cache."""
        self.end_some(lookup, list(self._rows.get(lookup, ())))
        self._rows.pop(lookup, None)

    def end_some(self, lookup: int, row_keys: Iterable[RowKey]) -> None:
        """Cancel everything that runs for these rows of the lookup; each may be fetched again, from its beginning."""
        rows = self._rows.get(lookup, {})
        for row in [rows.pop(row_key) for row_key in row_keys if row_key in rows]:
            self._end_row(row, None)
            if not row.tasks:
                self._free(row)

    def _task_ended(self, row: _Row, task: asyncio.Task[None], asked_bytes: int) -> None:
        self._fetching_bytes -= asked_bytes
        row.tasks.discard(task)
        if row.over and not row.tasks:
            self._free(row)

    def _free(self, row: _Row) -> None:
        row.chunks.clear()
        if not row.kept:
            row.kept = True
            self._cache.free(row.slab)

    def _end_row(self, row: _Row, spare: asyncio.Task[None] | None) -> None:
        row.over = True
        for task in row.tasks:
            if task is not spare:
                task.cancel()

    async def _collect(self, effect: FetchRow, record: ObjectRecord, row: _Row) -> None:
        """Collect one peer's chunks until the row has 32; then open it."""
        good = row.chunks.setdefault(record.digest, {})
        reason: Reason | None = None
        try:
            async with aclosing(self._ask(effect, record)) as arriving:
                async for batch in arriving:
                    self._metrics.bytes_total.labels("fetched").inc(sum(len(chunk) for _, chunk in batch))
                    checked = await self._compute.run(good_chunks, batch, record.row_digests(effect.row))
                    good |= checked
                    row.gain(effect.peer, checked)
                    if len(checked) < len(batch):
                        reason = Reason.BAD_DIGEST
                    if reason is not None or len(good) >= DATA_CHUNKS:
                        break
                    if self._loop.time() >= row.reported_at + PROGRESS_S:
                        self._report(effect, row)
        except (PeerFailed, Refused) as failed:
            reason = Reason(failed.reason)
        if len(good) >= DATA_CHUNKS:
            if reason is Reason.BAD_DIGEST:
                self._transport.charge(effect.peer, reason)
            await self._open(effect, record, row, good)
            return
        self._report(effect, row)
        if reason is not None:
            self._submit(HolderStalled(effect.lookup, effect.row_key, effect.peer, reason))

    def _ask(self, effect: FetchRow, record: ObjectRecord) -> AsyncGenerator[Chunks, None]:
        columns = tuple(c for c in range(TOTAL_CHUNKS) if effect.columns >> c & 1)
        return self._transport.chunks(
            effect.peer,
            effect.manifest,
            effect.row,
            columns,
            record.manifest.chunk_bytes,
            effect.timeout_ms / 1000,
        )

    def _report(self, effect: FetchRow, row: _Row) -> None:
        """Tell the core of columns that it doesn't know of yet."""
        if effect.peer in row.unreported:
            row.unreported.remove(effect.peer)
            row.reported_at = self._loop.time()
            columns = row.columns[effect.peer]
            self._submit(ChunksVerified(effect.lookup, effect.row_key, effect.peer, columns))

    async def _open(self, effect: FetchRow, record: ObjectRecord, row: _Row, good: dict[int, memoryview]) -> None:
        self._end_row(row, asyncio.current_task())
        manifest = record.manifest
        try:
            await self._compute.run(
                open_row,
                good,
                record.row_digests(effect.row),
                manifest.chunk_bytes,
                seal_key(effect.row_key, self._network),
                manifest.nonce,
                self._cache.view(row.slab),
            )
        except Refused as refused:
            del self._rows[effect.lookup][effect.row_key]  # another manifest may work, with a new slab
            if refused.reason == "condemned":
                self._condemn(record.digest)
            self._submit(RowFailed(effect.lookup, effect.row_key, refused.reason))
            return
        took_ms = round((self._loop.time() - row.began_at) * 1000)
        for peer, columns in row.columns.items():
            self._transport.credit(peer, columns.bit_count() * manifest.chunk_bytes, took_ms)
        row.kept = True
        self._cache.keep(effect.row_key, row.slab)
        self._cache.lease(effect.row_key, effect.lookup)
        self._metrics.bytes_total.labels("copied").inc(effect.length)
        self._keep(record, effect.row, dict(good))
        self._submit(RowReady(effect.lookup, effect.row_key))
