"""The memory tier: verified rows in the arena; the least recently used one is evicted first.

A row with a lease stays. Holders are opaque (the driver uses lookup numbers); a holder's leases end together.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from ...core.local.slab import Slab, pages_bytes
from ...core.records.ids import RowKey
from .arena import Arena

UNSTORED = "unstored"  # the holder of rows that wait to be written to the disk


@dataclass(slots=True)
class _Row:
    slab: Slab
    holders: set[Hashable] = field(default_factory=set)


class RowCache:
    """Rows by key over one arena. Not thread-safe: everything happens on the node's loop."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._rows: OrderedDict[RowKey, _Row] = OrderedDict()  # least recently used first
        self._leases: dict[Hashable, set[RowKey]] = {}
        self._idle_bytes = 0  # of rows without a lease

    def __contains__(self, row_key: RowKey) -> bool:
        return row_key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def allocate(self, length: int) -> Slab | None:
        """A slab of `length` bytes, evicting unleased rows if need be; None if leases and staging take everything."""
        if pages_bytes(length) > self.arena.capacity_bytes:
            return None  # evicting everything would not help
        slab = self.arena.allocate(length)
        while slab is None and (victim := self._least_recently_used()) is not None:
            evicted = self._rows.pop(victim).slab
            self._idle_bytes -= pages_bytes(evicted.length)
            self.arena.free(evicted)
            slab = self.arena.allocate(length)
        return slab

    def free(self, slab: Slab) -> None:
        """Give back a slab that is not (or not yet) a row's."""
        self.arena.free(slab)

    def keep(self, row_key: RowKey, slab: Slab) -> bool:
        """Index the filled slab as this row; False (and the slab is freed) if the row is known already."""
        if row_key in self._rows:
            self.arena.free(slab)
            return False
        self._rows[row_key] = _Row(slab)
        self._idle_bytes += pages_bytes(slab.length)
        return True

    def lease(self, row_key: RowKey, holder: Hashable) -> Slab | None:
        """The row's slab, pinned until the holder's leases end; None if the row is not here."""
        row = self._rows.get(row_key)
        if row is None:
            return None
        self._rows.move_to_end(row_key)
        if not row.holders:
            self._idle_bytes -= pages_bytes(row.slab.length)
        row.holders.add(holder)
        self._leases.setdefault(holder, set()).add(row_key)
        return row.slab

    def end_leases(self, holder: Hashable, keep: frozenset[RowKey] = frozenset()) -> None:
        """End the holder's leases, except on the rows in `keep`."""
        self.end_some(holder, self._leases.get(holder, set()) - keep)

    def end_some(self, holder: Hashable, row_keys: Iterable[RowKey]) -> None:
        """End the holder's leases on these rows, if it has any."""
        leased = self._leases.get(holder, set())
        for row_key in leased.intersection(row_keys):
            leased.discard(row_key)
            row = self._rows[row_key]
            row.holders.discard(holder)
            if not row.holders:
                self._idle_bytes += pages_bytes(row.slab.length)
        if not leased:
            self._leases.pop(holder, None)

    def is_leased(self, row_key: RowKey) -> bool:
        """Whether the row is here and leased."""
        row = self._rows.get(row_key)
        return row is not None and bool(row.holders)

    def leased_bytes(self, holder: Hashable) -> int:
        """Bytes of the arena under the holder's leases."""
        return sum(pages_bytes(self._rows[row_key].slab.length) for row_key in self._leases.get(holder, ()))

    @property
    def room_bytes(self) -> int:
        """Bytes that could be allocated if they were contiguous: free bytes, and rows without a lease."""
        return self.arena.free_bytes + self._idle_bytes

    def view(self, slab: Slab) -> memoryview:
        """The slab's bytes, writable."""
        return self.arena.view(slab)

    @property
    def row_bytes(self) -> int:
        """Payload bytes of all rows."""
        return sum(row.slab.length for row in self._rows.values())

    def _least_recently_used(self) -> RowKey | None:
        return next((row_key for row_key, row in self._rows.items() if not row.holders), None)
