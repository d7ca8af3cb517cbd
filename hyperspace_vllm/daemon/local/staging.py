"""The slabs that workers fill with rows on their way into the node.

A slab is granted to one session, then staged (it belongs to the node and waits for its name), then kept as a row or
dropped. Together with the rows that wait to be stored, slabs take at most half of the arena; the other half is for rows
that can be served. A session gets at most three quarters of the rest of the first half, so that another engine always
finds some. Its share is divided among the sizes of rows as a segment needs them, because a segment is stored when all
its rows are here.
"""

from collections.abc import Callable
from itertools import count
from typing import Literal

from ...core.local.slab import Slab, pages_bytes
from ...core.records.errors import ProtocolViolation
from ...core.records.layout import Layout
from ..kv.row_cache import UNSTORED, RowCache
from ..metrics import Metrics


class Staging:
    """Which session may write which slab. Not thread-safe: everything happens on the node's loop."""

    def __init__(self, cache: RowCache, metrics: Metrics) -> None:
        self._cache = cache
        self._metrics = metrics
        self._bytes = 0
        self._bytes_max = cache.arena.capacity_bytes // 2
        self._granted: dict[bytes, dict[int, Slab]] = {}  # session -> slot -> slab
        self._staged: dict[int, Slab] = {}
        self._ended: dict[bytes, list[Slab]] = {}  # session -> slabs that it may still write
        self._numbers = count(1)

    def grant(self, session: bytes, length: int, wanted: int, layout: Layout) -> tuple[Slab, ...]:
        """Up to `wanted` slabs of `length` bytes that only this session, one of its engine's ranks, may write."""
        granted = self._granted.setdefault(session, {})
        size = pages_bytes(length)
        own = sum(pages_bytes(slab.length) for slab in granted.values())
        own_of_size = sum(size for slab in granted.values() if slab.length == length)
        others = self._bytes - own + self._cache.leased_bytes(UNSTORED)
        share = (self._bytes_max - others) * 3 // 4 // layout.ranks
        segment = sum(pages_bytes(part.row_bytes) for part in layout.parts)
        share_of_size = share * sum(size for part in layout.parts if part.row_bytes == length) // segment
        room = min(share - own, share_of_size - own_of_size)
        slabs: list[Slab] = []
        while len(slabs) < min(wanted, room // size):
            slab = self._cache.allocate(length)
            if slab is None:
                break
            self._bytes += size
            granted[slab.slot] = slab
            slabs.append(slab)
        return tuple(slabs)

    def give_back(self, session: bytes, slab: Slab) -> None:
        """The session never wrote the slab; `ProtocolViolation` if it isn't the session's."""
        self._take_granted(session, slab)
        self._free(slab)

    def accept(self, session: bytes, slab: Slab) -> int:
        """The slab becomes the node's; its number. `ProtocolViolation` if it isn't the session's."""
        self._take_granted(session, slab)
        staged = next(self._numbers)
        self._staged[staged] = slab
        return staged

    def take(self, staged: int) -> Slab | None:
        """The staged slab, now the caller's to keep or free; None if it was taken or dropped before."""
        slab = self._staged.pop(staged, None)
        if slab is not None:
            self._bytes -= pages_bytes(slab.length)
        return slab

    def drop(self, staged: int, reason: str) -> None:
        """Free a staged slab; `reason` is the metric's label."""
        slab = self._staged.pop(staged, None)
        if slab is not None:
            self._free(slab)
            self._metrics.staged_dropped_total.labels(reason).inc()

    def end(self, session: bytes, vanished: bool) -> None:
        """End the session's grants; a session that `vanished` may still write, so its slabs wait for `reclaim`."""
        granted = self._granted.pop(session, None)
        if granted is None:
            return
        self._ended[session] = list(granted.values()) if vanished else []
        for slab in granted.values():
            if vanished:
                self._bytes -= pages_bytes(slab.length)
                self._cache.arena.quarantine(slab)
            else:
                self._free(slab)
        self._metrics.quarantined_bytes.set(self._cache.arena.quarantined_bytes)

    def reclaim(self, look: Callable[[bytes], Literal["held", "over", "unknown"]]) -> None:
        """Reuse the slabs of ended sessions whose workers have ended them too (see session_lock)."""
        for session, slabs in list(self._ended.items()):
            state = look(session)
            if state == "held":
                continue
            del self._ended[session]
            if state == "over":
                for slab in slabs:
                    self._cache.arena.release(slab)
        self._metrics.quarantined_bytes.set(self._cache.arena.quarantined_bytes)

    def _take_granted(self, session: bytes, slab: Slab) -> None:
        granted = self._granted.get(session, {})
        if granted.get(slab.slot) != slab:
            raise ProtocolViolation(f"slab {slab.slot}/{slab.generation}: not granted to this session")
        del granted[slab.slot]

    def _free(self, slab: Slab) -> None:
        self._bytes -= pages_bytes(slab.length)
        self._cache.free(slab)
