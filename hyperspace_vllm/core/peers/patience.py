"""For whom a request may wait: peers that have delivered, and members that have yet to.

Context: a hint costs nothing to give, and a request that waits for it in vain has lost that time. Choice: accounts in
milliseconds. A verified delivery earns its server EARNED_MS; what a request waited for a peer in vain is taken from
what that peer has earned, so none wastes more than it has earned. Members that have earned nothing draw on one account
for all of them, because a holder of the network key can be as many members as it likes. Rejected: a reputation's score,
which dilutes a silence among a hundred deliveries. Cost: a member's first answer may have to race the engine.
"""

from ..records.now import Now

EARNED_MS = 300  # the usual deadline: one delivery pays for one wait
EARNED_MAX_MS = 10 * EARNED_MS  # of one peer
LENT_MAX_MS = 3_000  # to all members together that have earned nothing
LENT_SHARE = 0.02  # of the time, when it was spent: a wait of 300 ms every 15 s


def earned_more(earned_ms: float) -> float:
    """What a peer has earned after one more delivery."""
    return min(earned_ms + EARNED_MS, EARNED_MAX_MS)


class Loan:
    """What is left of the account of all members that have earned nothing."""

    def __init__(self) -> None:
        self._left_ms = float(LENT_MAX_MS)
        self._at_ms = 0

    def left_ms(self, now: Now) -> float:
        """How long requests may yet wait for them."""
        return min(self._left_ms + LENT_SHARE * (now.mono_ms - self._at_ms), LENT_MAX_MS)

    def spend(self, lent_ms: float, now: Now) -> None:
        """A request waited so long for such members, in vain."""
        self._left_ms, self._at_ms = self.left_ms(now) - lent_ms, now.mono_ms
