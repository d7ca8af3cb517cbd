"""Fair queueing: which job is next, where time is bounded in all, for a group, and for each line of a group.

Lines form a tree: its leaves hold jobs, each line has a rate, and the lines in one take turns (start-time fair
queueing): the line that has used least time is next. A line that was idle has no credit and starts level with the
others, so it waits for at most one job of each of them, however many jobs they have waiting.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

AHEAD_SAVED_S = 2.0  # for how long a line saves up work that it may do out of turn
AHEAD_DEBT_S = 0.5  # by how much other lines may wait longer because of that


@dataclass(frozen=True, eq=False, slots=True)
class Job:
    """Work of `cost_s`; `begin` is called when it may be done."""

    cost_s: float
    begin: Callable[[], object]


class Line:
    """Waits in its parent, with jobs of its own or with the lines in it.

    `rate` is in seconds of work a second; it saves up `burst_s` of work. The share `ahead` of it is done out of turn.
    """

    def __init__(self, rate: float, burst_s: float, parent: "Line | None" = None, ahead: float = 0.0) -> None:
        self._rate = rate
        self._saved_s = burst_s / rate
        self.parent = parent
        self.free_at_s = float("-inf")  # when the next job may begin
        self._ahead = ahead
        self._ahead_at_s = float("-inf")  # when more may be done out of turn
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

    def goes_ahead(self, cost_s: float, now_s: float) -> bool:
        """Whether work of a leaf may begin out of turn, because the leaf and its parent use so little time."""
        both = [line for line in (self, self.parent) if line is not None]
        if self._jobs or self.free_at_s > now_s or any(not line._ahead or line._ahead_at_s > now_s for line in both):
            return False
        path: list[Line] = []
        line: Line | None = self
        while line is not None:
            path.append(line)
            line = line.parent
        if any(each.free_at_s > now_s + AHEAD_DEBT_S for each in path):
            return False
        for each in both:
            each._ahead_at_s = max(each._ahead_at_s, now_s - AHEAD_SAVED_S) + cost_s / each._ahead
        for each in path:
            each._charge(cost_s, now_s)
        return True

    def remove(self, job: Job) -> None:
        """Remove a job, unless it has begun."""
        if job in self._jobs:
            self._jobs.remove(job)
            self._leave()

    def take(self, now_s: float) -> Job | float:
        """The next job, which begins now; otherwise the time to ask again, infinite while no job waits."""

        if self.free_at_s > now_s:
            return self.free_at_s
        found = self._jobs.popleft() if self._jobs else self._take_from_lines(now_s)
        if isinstance(found, Job):
            self._charge(found.cost_s, now_s)
        return found

    def _charge(self, cost_s: float, now_s: float) -> None:
        self.free_at_s = max(self.free_at_s, now_s - self._saved_s) + cost_s / self._rate

    def _take_from_lines(self, now_s: float) -> Job | float:
        again_s = float("inf")
        for line in sorted(self._waiting, key=lambda line: line._taken_s):
            found = line.take(now_s)
            if isinstance(found, Job):
                self._turn_s = line._taken_s
                line._taken_s += found.cost_s
                line._leave()
                return found
            line._taken_s = max(line._taken_s, self._turn_s)  # time that its own rate denies a line is lost
            again_s = min(again_s, found)
        return again_s

    def _leave(self) -> None:
        line = self
        while line.parent is not None and not line._jobs and not line._waiting:
            line.parent._waiting.pop(line, None)
            line = line.parent
