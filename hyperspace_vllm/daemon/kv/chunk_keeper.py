"""Writes the chunks of fetched rows to disk in the background: they are served to peers, and survive a restart."""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor

from ...core.records.errors import Refused
from ...core.records.ids import ManifestDigest
from ...core.records.limits import MiB
from ..metrics import Metrics
from .chunk_store import ChunkStore
from .object_codec import ObjectRecord

WAITING_BYTES_MAX = 128 * MiB  # chunks waiting for the disk; more are used but not kept


class ChunkKeeper:
    """Writes on its own thread, so that no fetch waits for the disk. `kept` is called with the rows it wrote."""

    def __init__(
        self, store: ChunkStore, metrics: Metrics, kept: Callable[[ObjectRecord, tuple[int, ...]], None]
    ) -> None:
        self._store = store
        self._kept = kept
        self._metrics = metrics
        self._thread = ThreadPoolExecutor(1, "hyperspace-disk")
        self._waiting_bytes = 0
        self._waiting: Counter[ManifestDigest] = Counter()
        self._written: dict[ManifestDigest, set[int]] = {}  # rows written since the object was last flushed

    def keep(self, record: ObjectRecord, row: int, chunks: dict[int, memoryview]) -> Coroutine[None, None, None] | None:
        """The write to run in the background; None when too many bytes wait already."""
        size = sum(len(chunk) for chunk in chunks.values())
        if self._waiting_bytes + size > WAITING_BYTES_MAX:
            self._metrics.failures_total.labels("l2", "disk_slow").inc()
            return None
        self._waiting_bytes += size
        self._waiting[record.digest] += 1
        return self._write(record, row, chunks, size)

    async def discard(self, digest: ManifestDigest) -> None:
        """Remove a worthless object."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._store.discard, digest)

    def close(self) -> None:
        """End the thread after its current write."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _write(self, record: ObjectRecord, row: int, chunks: dict[int, memoryview], size: int) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._thread, self._store.put_columns, record, row, chunks)
            self._written.setdefault(record.digest, set()).add(row)
        except Refused as refused:
            self._metrics.failures_total.labels("l2", refused.reason).inc()
        finally:
            self._waiting_bytes -= size
            self._waiting[record.digest] -= 1
        if not self._waiting[record.digest]:  # one sidecar write for many rows
            del self._waiting[record.digest]
            await self._flush(record)

    async def _flush(self, record: ObjectRecord) -> None:
        written = self._written.pop(record.digest, set())
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._store.flush, record.digest)
        except Refused as refused:
            self._metrics.failures_total.labels("l2", refused.reason).inc()
        if written:
            self._kept(record, tuple(sorted(written)))
