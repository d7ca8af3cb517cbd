"""Intake of registry deltas from neighbours' answers, a few at a time: a signature check costs 0.07 ms of the loop.

A turn takes one delta of each host's answer after another, as long as the allowance of all hosts lasts. One answer per
host waits at a time, up to the size of an honest one: the next exchange of heads brings what was left out.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass

from ..peers.allowance import Allowance
from ..records.ids import PeerId
from ..records.limits import (
    PEER_CONNECTIONS_MAX,
    REGISTRY_DELTAS_AT_ONCE,
    REGISTRY_DELTAS_PER_S,
    REGISTRY_REPLY_BYTES_MAX,
    KiB,
)
from ..records.now import Now
from ..records.peer_wire import Deltas

_TURN_MS = 50
_HASHED_BYTES = 32 * KiB  # take as long as a signature


@dataclass(slots=True)
class DeltaAnswer:
    """The rest of a neighbour's answer; `asks_again` if the neighbour has more and this part was useful."""

    peer: PeerId
    raws: deque[bytes]
    has_more: bool
    was_of_use: bool = False

    def drop(self) -> None:
        """Drop the rest, and do not ask for more."""
        self.raws.clear()
        self.has_more = False


class DeltaIntake:
    """The answers of all neighbours; `finished` are neighbours whose answer is used up and that have more."""

    def __init__(self, now: Now) -> None:
        self._answers: OrderedDict[str, DeltaAnswer] = OrderedDict()  # by host
        self._checks = Allowance(REGISTRY_DELTAS_PER_S, REGISTRY_DELTAS_AT_ONCE, now)
        self._turn_at_ms = 0
        self.finished: list[PeerId] = []

    def put(self, host: str, peer: PeerId, deltas: Deltas) -> None:
        """A neighbour at `host` has answered."""
        raws, room = deque[bytes](), REGISTRY_REPLY_BYTES_MAX
        for raw in deltas.deltas:
            room -= len(raw)
            if room < 0:
                break
            raws.append(raw)
        if raws and host not in self._answers and len(self._answers) < PEER_CONNECTIONS_MAX:
            self._answers[host] = DeltaAnswer(peer, raws, deltas.more)

    def turn(self, now: Now) -> Iterator[tuple[DeltaAnswer, bytes]]:
        """The deltas that may be checked now."""
        while self._answers and self._checks.left(now) >= 1:
            host, answer = self._answers.popitem(last=False)
            raw = answer.raws.popleft()
            self._checks.spend(1 + len(raw) // _HASHED_BYTES, now)
            yield answer, raw
            if answer.raws:
                self._answers[host] = answer
            elif answer.has_more and answer.was_of_use:
                self.finished.append(answer.peer)
        self._turn_at_ms = now.mono_ms + _TURN_MS

    def next_deadline_ms(self) -> int | None:
        """When to take the next turn; None: when an answer comes."""
        return self._turn_at_ms if self._answers else None
