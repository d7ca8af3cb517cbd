"""Tasks beside an event loop's events: those of a lookup end with it, and a bug in one costs that one alone."""

import asyncio
import logging
from collections.abc import Callable, Coroutine

from ..metrics import Metrics

log = logging.getLogger(__name__)

Work = Coroutine[None, None, object]


class LookupTasks:
    """The tasks of one driver; bugs are counted as the failures of its `layer`."""

    def __init__(self, layer: str, metrics: Metrics) -> None:
        self._layer = layer
        self._metrics = metrics
        self._of_lookup: dict[int, set[asyncio.Task[None]]] = {}
        self._all: set[asyncio.Task[None]] = set()

    @property
    def lookups(self) -> list[int]:
        """Those that have had tasks, and have not ended."""
        return list(self._of_lookup)

    def start(self, lookup: int, work: Work, on_bug: Callable[[], None] | None = None) -> asyncio.Task[None]:
        """Run a lookup's work until it ends or the lookup does."""
        tasks = self._of_lookup.setdefault(lookup, set())
        task = self.spawn(work, on_bug)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return task

    def spawn(self, work: Work, on_bug: Callable[[], None] | None = None) -> asyncio.Task[None]:
        """Run work that belongs to no lookup."""
        task = asyncio.create_task(self._watch(work, on_bug))
        self._all.add(task)
        task.add_done_callback(self._all.discard)
        task.add_done_callback(lambda _: work.close())  # cancelled before its first step, it would never be awaited
        return task

    def end(self, lookup: int) -> None:
        """Cancel what runs for a lookup, except the task that ends it."""
        for task in self._of_lookup.pop(lookup, ()):
            if task is not asyncio.current_task():
                task.cancel()

    async def close(self, patience_s: float) -> None:
        """Give everything that long, then cancel it."""
        if self._all:
            _, late = await asyncio.wait(self._all, timeout=patience_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _watch(self, work: Work, on_bug: Callable[[], None] | None) -> None:
        try:
            await work
        except Exception:
            log.exception("a bug in Hyperspace: please report it")
            self._metrics.failures_total.labels(self._layer, "bug").inc()
            if on_bug is not None:
                on_bug()
