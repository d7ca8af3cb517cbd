"""Whose work is next, where time is bounded in all, for a group, and for each of a group.

Lines form a tree: those at its ends hold jobs, each has a rate, and in each those below take turns (start-time fair
queueing). Who has taken least goes next; who comes after a pause has saved nothing up, but is behind nobody, so that it
waits for one job of each of the others at most, however many of theirs wait.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, eq=False, slots=True)
class Job:
    """Work of `cost_s`; `begin` is called when it may be done."""

    cost_s: float
    begin: Callable[[], object]


class Line:
    """One that waits in its parent: for its own jobs, or for those of the lines in it.

    `rate` is in seconds of work a second, of which it saves up `burst_s` of work.
    """

    def __init__(self, rate: float, burst_s: float, parent: "Line | None" = None) -> None:
        self._rate = rate
        self._saved_s = burst_s / rate
        self.parent = parent
        self.free_at_s = float("-inf")  # when the next job may begin
        self._taken_s = 0.0  # where it stands in its parent
        self._turn_s = 0.0  # where the line in it stood that went last
        self._waiting: dict[Line, None] = {}
        self._jobs: deque[Job] = deque()

    def add(self, job: Job) -> None:
        """A job waits at the end of this line."""
        self._jobs.append(job)
        line, parent = self, self.parent
        while parent is not None and line not in parent._waiting:
            line._taken_s = max(line._taken_s, parent._turn_s)
            parent._waiting[line] = None
            line, parent = parent, parent.parent

    def remove(self, job: Job) -> None:
        """A job is given up, unless it has begun."""
        if job in self._jobs:
            self._jobs.remove(job)
            self._leave()

    def take(self, now_s: float) -> Job | float:
        """The next job, which begins now; else the time when to ask again, infinite while no job waits."""
        if self.free_at_s > now_s:
            return self.free_at_s
        found = self._jobs.popleft() if self._jobs else self._take_from_lines(now_s)
        if isinstance(found, Job):
            self.free_at_s = max(self.free_at_s, now_s - self._saved_s) + found.cost_s / self._rate
        return found

    def _take_from_lines(self, now_s: float) -> Job | float:
        again_s = float("inf")
        for line in sorted(self._waiting, key=lambda line: line._taken_s):
            found = line.take(now_s)
            if isinstance(found, Job):
                self._turn_s = line._taken_s
                line._taken_s += found.cost_s
                line._leave()
                return found
            line._taken_s = max(line._taken_s, self._turn_s)  # what its own rate forbids it it does not make up for
            again_s = min(again_s, found)
        return again_s

    def _leave(self) -> None:
        line = self
        while line.parent is not None and not line._jobs and not line._waiting:
            line.parent._waiting.pop(line, None)
            line = line.parent
