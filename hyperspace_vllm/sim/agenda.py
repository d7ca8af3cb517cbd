"""Virtual time: a queue of callbacks. Callbacks of one moment run in the order in which they were added."""

import heapq
from collections.abc import Callable


class Agenda:
    """A queue of callbacks; `now_ms` is the virtual clock, which only `run` moves."""

    def __init__(self) -> None:
        self.now_ms = 0
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._order = 0

    def after(self, delay_ms: float, act: Callable[[], None]) -> None:
        """Run a callback later; a delay below a millisecond ends at the next millisecond."""
        self._order += 1
        heapq.heappush(self._queue, (self.now_ms + max(round(delay_ms), 0), self._order, act))

    def run(self, until_ms: int) -> None:
        """Advance the clock to `until_ms`."""
        while self._queue and self._queue[0][0] <= until_ms:
            self.now_ms, _, act = heapq.heappop(self._queue)
            act()
        self.now_ms = until_ms
