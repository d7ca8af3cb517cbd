"""How much of the arena one lookup may take: the size of its rows, and how long it waits when none fits.

Room is free, or held by rows that no lookup, encoder or worker has leased. A lookup takes it row by row, so that
several lookups share it. It releases rows that it cannot use, and a waiting lookup without rows holds nothing.
"""

from collections.abc import Iterable

from ..events.prefix_reading import RowsFound
from ..local.slab import pages_bytes
from ..records.ids import RowKey
from ..records.limits import FETCH_STALL_MS
from .plan import Row

AGAIN_MS = 20  # between two checks for room: a lease on an answer lasts about as long as a copy
WAIT_MS = FETCH_STALL_MS  # as long as for a peer that delivers nothing


class ArenaRoom:
    """The room of one lookup, as the node last counted it."""

    def __init__(self) -> None:
        self.bytes = 0
        self.look_at_ms: int | None = None  # when to check again; None: not waiting, or already checking
        self._leased: frozenset[RowKey] = frozenset()
        self._until_ms: int | None = None

    def found(self, event: RowsFound) -> None:
        """Take the node's count, made while the lookup held nothing."""
        self.bytes, self._leased = event.room_bytes, event.leased

    def cost(self, row: Row) -> int:
        """Bytes of the room that the row takes; 0 where another lease keeps it in the arena anyway."""
        return 0 if row.key in self._leased else pages_bytes(row.length)

    def shrink(self, held: Iterable[Row]) -> None:
        """There is no gap for one more row: reduce the room to what the lookup holds."""
        self.bytes = sum(map(self.cost, held))

    def wait(self, now_ms: int, until_ms: int) -> bool:
        """Whether the lookup may check again in a moment: for WAIT_MS in all, and not after `until_ms`."""
        if self._until_ms is None:
            self._until_ms = min(now_ms + WAIT_MS, until_ms)
        if now_ms >= self._until_ms:
            return False
        self.look_at_ms = min(now_ms + AGAIN_MS, self._until_ms)
        return True
