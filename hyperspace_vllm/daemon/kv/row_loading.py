"""Loads rows from the disk into the arena: checked, opened, leased; a damaged object is thrown away."""

import asyncio
from collections.abc import Callable, Coroutine

from ...core.events.prefix_reading import LoadRow, RowFailed, RowReady
from ...core.events.vocabulary import PrefixEvent
from ...core.local.slab import Slab
from ...core.records.errors import Refused
from ...core.records.ids import ManifestDigest, NetworkId, row_id
from ...core.records.sealing import seal_key
from ..metrics import Metrics
from ..workers.compute_pool import ComputePool
from .chunk_store import ChunkStore
from .object_codec import ObjectRecord
from .row_cache import RowCache

Start = Callable[[int, Coroutine[None, None, None], PrefixEvent], asyncio.Task[None]]  # (lookup, work, event of a bug)


class RowLoading:
    """Performs LoadRow effects. `start` runs a lookup's work; `discard` throws away a damaged object."""

    def __init__(
        self,
        network: NetworkId,
        cache: RowCache,
        store: ChunkStore,
        compute: ComputePool,
        metrics: Metrics,
        submit: Callable[[PrefixEvent], None],
        start: Start,
        discard: Callable[[ManifestDigest], None],
    ) -> None:
        self._network = network
        self._cache = cache
        self._store = store
        self._compute = compute
        self._metrics = metrics
        self._submit = submit
        self._start = start
        self._discard = discard
        self._filling: set[Slab] = set()  # not yet the cache's

    def load(self, effect: LoadRow) -> None:
        """Make a row ready, at once if it is in the arena already."""
        if self._cache.lease(effect.row_key, effect.lookup) is not None:
            self._submit(RowReady(effect.lookup, effect.row_key))
            return
        found = self._store.find(row_id(self._network, effect.row_key))
        # Now, not in the task: rows get their room in the order in which the core asks for them.
        slab = self._cache.allocate(found[0].manifest.rows[found[1]].length) if found else None
        if found is None or slab is None:
            self._submit(RowFailed(effect.lookup, effect.row_key, "arena_full" if found else "evicted"))
            return
        self._filling.add(slab)
        bug = RowFailed(effect.lookup, effect.row_key, "bug")
        task = self._start(effect.lookup, self._load(effect, *found, slab), bug)
        task.add_done_callback(lambda _: self._free_unless_kept(slab))  # it may end before its first step

    async def _load(self, effect: LoadRow, record: ObjectRecord, row: int, slab: Slab) -> None:
        try:
            await self._open(effect, record, row, slab)
        except Refused as refused:
            self._submit(RowFailed(effect.lookup, effect.row_key, refused.reason))
            return
        self._cache.lease(effect.row_key, effect.lookup)
        self._submit(RowReady(effect.lookup, effect.row_key))

    async def _open(self, effect: LoadRow, record: ObjectRecord, row: int, slab: Slab) -> None:
        key = seal_key(effect.row_key, self._network)
        try:
            await self._compute.run(self._store.load_row, record, row, key, self._cache.view(slab))
        except Refused as refused:
            if refused.reason == "damaged":
                self._discard(record.digest)
            raise
        self._filling.remove(slab)
        self._cache.keep(effect.row_key, slab)
        self._metrics.bytes_total.labels("copied").inc(slab.length)

    def _free_unless_kept(self, slab: Slab) -> None:
        if slab in self._filling:
            self._filling.remove(slab)
            self._cache.free(slab)
