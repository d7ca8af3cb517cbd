"""Reading large bodies and answers off the event loop, so that no other request waits for them.

Context: JSON, canonical fields, vLLM's own request model and the frames of a replay take time by the size of a body: up
to half a second for 4 MiB, in which no client of the server would get a token. Choice: two threads, each with a short
queue and a deadline; one is for the largest bodies, so that those of usual length do not wait behind them. A request
that has to wait longer bypasses the cache. Rejected: a process, which would have to import vLLM. Cost: C code holds the
GIL while it reads or writes JSON, so the loop still waits for each of these steps (as for vLLM's own reading of the
body), and for 5 ms at a time beside Python code.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from ..core.records.limits import INLINE_BODY_BYTES, LARGE_BODIES_BYTES_MAX, USUAL_BODY_BYTES

T = TypeVar("T")

_LOOK_S = 0.02  # how often the queue is checked, besides when work is done


class Busy(Exception):
    """There was no time for a large body."""


class _Line:
    """Work that waits for one thread."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, name)
        self._under_way: dict[Future[Any], int] = {}

    @property
    def waiting(self) -> int:
        """Bytes of the work that is not done, that which no request waits for any more included."""
        self._under_way = {job: size for job, size in self._under_way.items() if not job.done()}
        return sum(self._under_way.values())

    def submit(self, size: int, to_do: list[Callable[[], T]]) -> asyncio.Future[T]:
        """Return or raise the result of the work in `to_do`, if it is still there when its turn comes."""
        job = self._thread.submit(_do, to_do)
        self._under_way[job] = size
        answer: asyncio.Future[T] = asyncio.wrap_future(job)
        answer.add_done_callback(_retrieve_exception)
        return answer


class LargeBodies:
    """The threads of one server and their queues.

    `deadline_s` is for each piece of work; a request (a task) waits for its turns at most half of that in all, so that
    other bodies, which come between its steps, do not delay it longer.
    """

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._usual, self._largest = _Line("hyperspace-body"), _Line("hyperspace-largest-body")
        self._patience_s: WeakKeyDictionary[asyncio.Task[Any], float] = WeakKeyDictionary()

    @property
    def waiting(self) -> int:
        """Bytes of the work that is not done, that which no request waits for any more included."""
        return self._usual.waiting + self._largest.waiting

    async def work(self, size: int, work: Callable[[], T]) -> T:
        """Return or raise the result of `work`, whose time grows with `size` (bytes): a small one is done at once.

        `Busy` if the line is full or too slow. Work that no request waits for any more is not begun.
        """
        if size <= INLINE_BODY_BYTES:
            return work()
        task = asyncio.current_task()
        assert task is not None
        patience_s = self._patience_s.get(task, self._deadline_s / 2)
        line = self._line(size)
        if (waiting := line.waiting) and (waiting + size > LARGE_BODIES_BYTES_MAX or patience_s <= 0):
            raise Busy
        to_do = [work]
        answer = line.submit(size, to_do)
        came_s = time.monotonic()
        try:
            while to_do and not answer.done() and (left_s := came_s + patience_s - time.monotonic()) > 0:
                await asyncio.wait((answer,), timeout=min(left_s, _LOOK_S))
            self._patience_s[task] = patience_s - (time.monotonic() - came_s)
            if not to_do and not answer.done():
                await asyncio.wait((answer,), timeout=self._deadline_s)
        finally:
            to_do.clear()  # the line holds no body of a request that has left it
        if not answer.done():
            raise Busy
        return answer.result()

    async def always(self, size: int, work: Callable[[], T]) -> T:
        """The same for work that cannot be dropped: on the event loop if the threads are too busy."""
        try:
            return await self.work(size, work)
        except Busy:
            return work()

    async def in_turn(self, size: int, work: Callable[[], T]) -> T:
        """The same for an answer of the engine: it waits for its turn however long the queue is."""
        return work() if size <= INLINE_BODY_BYTES else await self._line(size).submit(size, [work])

    def _line(self, size: int) -> _Line:
        return self._usual if size <= USUAL_BODY_BYTES else self._largest


def _do(to_do: list[Callable[[], T]]) -> T:
    try:
        work = to_do.pop()
    except IndexError:
        raise Busy from None
    return work()


def _retrieve_exception(answer: asyncio.Future[Any]) -> None:
    """An error of work that no request waits for is not logged."""
    if not answer.cancelled():
        answer.exception()
