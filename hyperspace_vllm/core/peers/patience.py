"""For whom a request may wait: peers that have delivered, and members that have yet to.

Context: a hint costs nothing to give, and a request that waits for it in vain has lost that time. Choice: accounts in
milliseconds. A verified delivery earns its server EARNED_MS; what a request waited for a peer in vain is taken from
what that peer has earned, so none wastes more than it has earned. Members that have earned nothing draw on one account
for all of them, because a holder of the network key can be as many members as it likes. Rejected: a reputation's score,
which dilutes a silence among a hundred deliveries. Cost: a member's first answer may have to race the engine.
"""

from collections import OrderedDict
from collections.abc import Mapping

from ..records.ids import PeerId
from ..records.limits import PEERS_KNOWN_MAX
from ..records.now import Now

EARNED_MS = 300  # the usual deadline: one delivery pays for one wait
EARNED_MAX_MS = 10 * EARNED_MS  # of one peer
LENT_MAX_MS = 3_000  # to all members together that have earned nothing
LENT_SHARE = 0.02  # of the time, when it was spent: a wait of 300 ms every 15 s


class Patience:
    """Accounts of PEERS_KNOWN_MAX peers at most; those that delivered longest ago are forgotten."""

    def __init__(self) -> None:
        self._earned_ms: OrderedDict[PeerId, float] = OrderedDict()
        self._lent_left_ms = float(LENT_MAX_MS)
        self._lent_at_ms = 0

    def has_earned(self, peer: PeerId) -> bool:
        """Whether the peer has delivered more than it has wasted."""
        return peer in self._earned_ms

    def lends(self, now: Now) -> bool:
        """Whether members that have earned nothing may make a request wait."""
        return self._lent_ms(now) > 0

    def delivered(self, peer: PeerId) -> None:
        """The peer sent something that was verified."""
        self._earned_ms[peer] = min(self._earned_ms.get(peer, 0) + EARNED_MS, EARNED_MAX_MS)
        self._earned_ms.move_to_end(peer)
        if len(self._earned_ms) > PEERS_KNOWN_MAX:
            self._earned_ms.popitem(last=False)

    def wasted(self, waited_ms: Mapping[PeerId, int], now: Now) -> None:
        """A request waited so long for each of these at once, and they brought nothing."""
        lent_ms = 0
        for peer, for_ms in waited_ms.items():
            if peer not in self._earned_ms:
                lent_ms = max(lent_ms, for_ms)
                continue
            self._earned_ms[peer] -= for_ms
            if self._earned_ms[peer] <= 0:
                del self._earned_ms[peer]
        self._lent_left_ms, self._lent_at_ms = self._lent_ms(now) - lent_ms, now.mono_ms

    def _lent_ms(self, now: Now) -> float:
        return min(self._lent_left_ms + LENT_SHARE * (now.mono_ms - self._lent_at_ms), LENT_MAX_MS)
