"""Bounds on what peers make this node hold: in all, per peer, and for all strangers together.

When a bound is reached, a peer of a lower tier than the newcomer makes room, or one of the same tier that holds more,
and loses its unfinished work. So a peer that never finishes its work keeps no other peer out.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from ...core.records.ids import PeerId
from ...core.records.rank import Tier


@dataclass(eq=False, slots=True)
class Hold:
    """What one job of a peer holds; `lose` is called when it has to make room, and is None when it can't."""

    peer: PeerId
    tier: Tier
    lose: Callable[[], object] | None
    size: int = 0


class PeerRoom:
    """A bound for all peers, one for each peer, and one for all strangers together."""

    def __init__(self, peer_max: int, strangers_max: int, all_max: int) -> None:
        self._peer_max = peer_max
        self._strangers_max = strangers_max
        self._all_max = all_max
        self._held = self._strangers = 0
        self._of_peer: Counter[PeerId] = Counter()
        self._holds: dict[Hold, None] = {}  # the oldest first

    def is_over(self, peer: PeerId, size: int) -> bool:
        """Whether `size` more would exceed the peer's own bound."""
        return self._of_peer[peer] + size > self._peer_max

    def take(self, hold: Hold, size: int) -> bool:
        """Grow a hold by `size`, taking room from others if need be; False: there is no room."""
        if self.is_over(hold.peer, size):
            return False
        while not self._has_room(hold.tier, size):
            loser = self._loser(hold, size)
            if loser is None or loser.lose is None:
                return False
            self.give_back(loser)
            loser.lose()
        self._holds[hold] = None
        self._count(hold, size)
        return True

    def give_back(self, hold: Hold) -> None:
        """End the hold; ending it twice changes nothing."""
        if self._holds.pop(hold, hold) is None:
            self._count(hold, -hold.size)

    def _has_room(self, tier: Tier, size: int) -> bool:
        fits = self._held + size <= self._all_max
        return fits and (tier > Tier.STRANGER or self._strangers + size <= self._strangers_max)

    def _loser(self, newcomer: Hold, size: int) -> Hold | None:
        # Among peers of equal tier, only one that now holds more than the newcomer then does: otherwise they would take
        # room from each other in turns.
        def weight(hold: Hold) -> tuple[int, int]:
            return -hold.tier, self._of_peer[hold.peer]

        least = (-newcomer.tier, self._of_peer[newcomer.peer] + size)
        losers = (each for each in self._holds if each.lose is not None and weight(each) > least)
        return max(losers, key=weight, default=None)

    def _count(self, hold: Hold, size: int) -> None:
        hold.size += size
        self._held += size
        self._of_peer[hold.peer] += size
        if not self._of_peer[hold.peer]:
            del self._of_peer[hold.peer]
        if hold.tier is Tier.STRANGER:
            self._strangers += size
