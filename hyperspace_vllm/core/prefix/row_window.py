"""The rows of one lookup on their way into the arena: a window that moves along the queue of rows that it needs.

Rows come from the disk or from peers (transfers.py). A row that no known peer can complete is an *orphan* until a peer
that has not answered yet offers it, or the lookup gives it up.
"""

from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice

from ..events.prefix_reading import LoadRow
from ..events.vocabulary import PrefixEffect
from ..records.layout import Layout
from ..records.limits import MiB
from .plan import Row
from .transfers import Transfers

# What may be in flight at once: 16 MiB keep 1 Gbit/s busy over 100 ms, and two rows always overlap.
MOVING_BYTES_MAX = 16 * MiB
MOVING_ROWS_MAX = 16
MOVING_ROWS_MIN = 2


class RowWindow:
    """Effects go to `emit`; `orphans` are the rows that no known peer can complete."""

    def __init__(self, lookup: int, layout: Layout, transfers: Transfers, emit: Callable[[PrefixEffect], None]) -> None:
        self._lookup = lookup
        self._emit = emit
        self._transfers = transfers
        self._ahead = max(MOVING_ROWS_MAX, 2 * len(layout.parts) * layout.ranks)
        self._queue: deque[Row] = deque()
        self._loading: set[Row] = set()
        self.orphans: list[Row] = []

    def queue(self, rows: Iterable[Row]) -> None:
        """Of these rows, those that are idle are to come, in this order."""
        # Rows in memory are leased first: making room for the others must not evict them.
        self._queue = deque(sorted((row for row in rows if row.state == "idle"), key=lambda row: row.tier != "memory"))

    def arrived(self, row: Row) -> None:
        """The row is in the arena."""
        if row.state == "orphan":  # a peer delivered after all
            self.orphans.remove(row)
        row.state = "ready"
        self._loading.discard(row)

    def not_loaded(self, row: Row) -> None:
        """This node could not load the row."""
        self._loading.discard(row)

    def drop(self, row: Row) -> None:
        """The row is not needed for now."""
        row.state = "idle"
        self._loading.discard(row)
        if row.tier == "network":
            self._transfers.drop(row)

    def take_orphans(self) -> list[Row]:
        """The orphans, which the caller gives up."""
        orphans, self.orphans = self.orphans, []
        return orphans

    def fill(self, now_ms: int) -> None:
        """Start the next rows, orphans that a peer now offers among them, and set aside those that became orphans."""
        self._readmit_orphans()
        for row in list(islice(self._queue, self._ahead)):  # beyond the window, so that manifests arrive in time
            room = self._has_room(row)
            if not room and row.announced and row.tier != "memory":
                continue
            row.announced = True
            if row.tier != "network":
                if room or row.tier == "memory":
                    self._queue.remove(row)
                    row.state = "moving"
                    self._loading.add(row)
                    self._emit(LoadRow(self._lookup, row.key))
            elif self._transfers.begin(row, room, now_ms):
                self._queue.remove(row)
                row.state = "moving"
        self._set_orphans_aside()

    def _readmit_orphans(self) -> None:
        back = [row for row in self.orphans if self._transfers.fetchable(row)]
        for row in back:
            row.state = "idle"
            self.orphans.remove(row)
        self._queue.extendleft(reversed(back))

    def _set_orphans_aside(self) -> None:
        if not self._transfers.lost:
            return
        for row in self._transfers.lost:
            if row.state in ("idle", "moving"):
                row.state = "orphan"
                self.orphans.append(row)
        self._transfers.lost.clear()
        self._queue = deque(row for row in self._queue if row.state == "idle")

    def _has_room(self, row: Row) -> bool:
        count = len(self._loading) + self._transfers.moving_rows
        if count < MOVING_ROWS_MIN or count >= MOVING_ROWS_MAX:
            return count < MOVING_ROWS_MIN
        size = sum(r.length for r in self._loading) + self._transfers.moving_bytes
        return size + row.length <= MOVING_BYTES_MAX
