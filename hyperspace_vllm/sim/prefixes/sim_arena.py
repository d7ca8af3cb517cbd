"""A host's arena: rows in memory with their leases, slabs that are being filled, and what gives way to them."""

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from ...core.local.slab import pages_bytes
from ...core.records.ids import RowKey
from .kv_load import ROW_BYTES

UNSTORED = "unstored"  # holds rows that wait for the disk


@dataclass(slots=True)
class _Kept:
    """`holds` is the key of the row that the bytes really are; None: garbage."""

    holds: RowKey | None
    holders: set[Hashable] = field(default_factory=set)


class SimArena:
    """Room for `capacity` rows; the least recently used one without a lease is evicted first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._rows: OrderedDict[RowKey, _Kept] = OrderedDict()
        self.filling = 0  # slabs that are not yet rows

    def __contains__(self, key: RowKey) -> bool:
        return key in self._rows

    def allocate(self) -> bool:
        """Take a slab, if there is one or a row gives way."""
        if self.filling + len(self._rows) >= self._capacity:
            victim = next((key for key, row in self._rows.items() if not row.holders), None)
            if victim is None:
                return False
            del self._rows[victim]
        self.filling += 1
        return True

    def free(self) -> None:
        """Give back a slab that is no row."""
        assert self.filling > 0
        self.filling -= 1

    def keep(self, key: RowKey, holds: RowKey | None) -> None:
        """A filled slab is a row now; one that was here already stays instead."""
        self.free()
        self._rows.setdefault(key, _Kept(holds))

    def lease(self, key: RowKey, holder: Hashable) -> bool:
        """Keep the row here for `holder`; False if it isn't here."""
        if key not in self._rows:
            return False
        self._rows[key].holders.add(holder)
        self._rows.move_to_end(key)
        return True

    def end_some(self, holder: Hashable, keys: Iterable[RowKey]) -> None:
        """End leases of a holder."""
        for key in keys:
            if key in self._rows:
                self._rows[key].holders.discard(holder)

    def end_all(self, holder: Hashable, but: frozenset[RowKey] = frozenset()) -> None:
        """End the holder's leases on all rows `but` these."""
        for key, row in self._rows.items():
            if key not in but:
                row.holders.discard(holder)

    def is_leased(self, key: RowKey) -> bool:
        """Whether the row stays."""
        return key in self._rows and bool(self._rows[key].holders)

    def holds(self, key: RowKey) -> RowKey | None:
        """The key of the row that the bytes under `key` really are; None: garbage."""
        return self._rows[key].holds

    @property
    def leases(self) -> int:
        """Of all holders."""
        return sum(len(row.holders) for row in self._rows.values())

    @property
    def room_bytes(self) -> int:
        """Free, or held by rows without a lease."""
        idle = sum(not row.holders for row in self._rows.values())
        return (self._capacity - self.filling - len(self._rows) + idle) * pages_bytes(ROW_BYTES)
