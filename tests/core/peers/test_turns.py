"""Whose work is next: little waits for no more than a turn of each of the others, however much of theirs waits."""

import pytest

from hyperspace_vllm.core.peers.turns import Job, Line

RATE = 0.5
SLICE_S = 1e-3


class Clock:
    """Takes jobs as they are due."""

    def __init__(self, lines: Line) -> None:
        self._lines = lines
        self.now_s = 1000.0

    def run(self, until_s: float) -> None:
        while self.now_s <= until_s:
            found = self._lines.take(self.now_s)
            if isinstance(found, Job):
                found.begin()
            else:
                self.now_s = max(found, self.now_s)

    def wait(self, line: Line) -> float:
        """How long a short job of a line waits."""
        begun: list[float] = []
        asked_s = self.now_s
        line.add(Job(SLICE_S, lambda: begun.append(self.now_s)))
        while not begun:
            self.run(self.now_s)
        return begun[0] - asked_s


def busy(line: Line, done: list[Line]) -> None:
    """A line that always has jobs waiting."""

    def again() -> None:
        done.append(line)
        line.add(Job(SLICE_S, again))

    for _ in range(64):
        line.add(Job(SLICE_S, again))


@pytest.mark.parametrize(
    ("hosts", "peers", "own_peers", "turns"),
    [(1, 1, 0, 1), (3, 4, 0, 3), (12, 12, 0, 12), (0, 0, 2, 2), (3, 4, 3, 3 + 2 * 3)],
    ids=["one", "three hosts", "twelve hosts", "its own host", "both"],
)
def test_a_peer_that_uses_little_waits_for_one_turn_of_each_busy_host(
    hosts: int, peers: int, own_peers: int, turns: int
) -> None:
    everything = Line(RATE, 0.2)
    done: list[Line] = []
    for _ in range(hosts):
        host = Line(RATE / 2, 0.2, everything)
        for _ in range(peers):
            busy(Line(0.2, 0.2, host), done)
    own_host = Line(RATE / 2, 0.2, everything)
    for _ in range(own_peers):
        busy(Line(0.2, 0.2, own_host), done)
    clock, own = Clock(everything), Line(0.2, 0.2, own_host)
    clock.run(clock.now_s + 5)  # what was saved up is spent
    for _ in range(20):
        share_s = SLICE_S / (RATE / 2 if own_peers else RATE)
        assert clock.wait(own) <= (turns + 1) * share_s * 2
        clock.run(clock.now_s + 0.1)


def test_hosts_have_equal_parts_however_many_peers_and_jobs_each_has() -> None:
    everything = Line(0.3, 0.2)
    done: list[Line] = []
    for peers in (1, 2, 20):
        host = Line(0.25, 0.2, everything)
        for _ in range(peers):
            busy(Line(0.2, 0.2, host), done)
    clock = Clock(everything)
    clock.run(clock.now_s + 10)
    parts = [sum(line.parent is host for line in done) for host in {line.parent for line in done}]
    assert len(parts) == 3
    assert max(parts) < 1.1 * min(parts)


def test_what_a_line_may_not_use_is_the_others_and_it_gets_no_more_later() -> None:
    everything = Line(0.5, 0.0)
    done: list[Line] = []
    slow, fast = Line(0.05, 0.0, everything), Line(0.5, 0.0, everything)
    busy(slow, done)
    busy(fast, done)
    clock = Clock(everything)
    clock.run(clock.now_s + 10)
    assert done.count(slow) * SLICE_S == pytest.approx(0.5, rel=0.15)
    assert done.count(fast) * SLICE_S == pytest.approx(4.5, rel=0.15)
    late = Line(0.5, 0.0, everything)
    assert clock.wait(late) <= 3 * SLICE_S / 0.5


def test_a_job_that_is_given_up_takes_nothing() -> None:
    everything = Line(0.5, 0.0)
    line = Line(0.5, 0.0, everything)
    job = Job(10.0, lambda: pytest.fail("it was given up"))
    line.add(job)
    line.remove(job)
    assert everything.take(0.0) == float("inf")
    assert Clock(everything).wait(line) == 0


def test_a_little_work_goes_ahead_of_others_and_is_in_the_share_of_all() -> None:
    everything = Line(0.5, 0.0)
    done: list[Line] = []
    busy(Line(0.5, 0.0, Line(0.5, 0.0, everything)), done)
    host = Line(0.25, 0.2, everything, 0.01)
    line = Line(0.2, 0.2, host, 0.01)
    clock = Clock(everything)
    clock.run(clock.now_s + 1)
    went = sum(line.goes_ahead(SLICE_S, clock.now_s) for _ in range(100))
    assert 20 <= went <= 22
    assert not Line(0.2, 0.2, host, 0.01).goes_ahead(SLICE_S, clock.now_s)  # a new name brings the host nothing
    done.clear()
    clock.run(clock.now_s + went * SLICE_S / 0.5)
    assert len(done) <= 1  # the others wait for it
