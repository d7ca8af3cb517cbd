"""For which peers a request may wait: peers that have delivered, and members that have not delivered yet.

Context: a hint is free, and a request that waits for it in vain loses that time. Choice: accounts in milliseconds. A
verified delivery earns the peer EARNED_MS; time that a request waited for a peer in vain is taken from that peer's
account, so a peer cannot waste more than it has earned. Members that have earned nothing share one account, because a
holder of the network key can have any number of identities. Rejected: the reputation's score, in which one silence
among a hundred deliveries hardly shows. Cost: a member's first answer may have to race the engine.
"""

from ..records.now import Now

EARNED_MS = 300  # the usual deadline: one delivery pays for one wait
EARNED_MAX_MS = 10 * EARNED_MS  # of one peer
LENT_MAX_MS = 3_000  # to all members together that have earned nothing
LENT_SHARE = 0.02  # of the time, once it is used up: a wait of 300 ms every 15 s


def earned_more(earned_ms: float) -> float:
    """What a peer has earned after one more delivery."""
    return min(earned_ms + EARNED_MS, EARNED_MAX_MS)


class Loan:
    """The shared account of members that have earned nothing."""

    def __init__(self) -> None:
        self._left_ms = float(LENT_MAX_MS)
        self._at_ms = 0

    def left_ms(self, now: Now) -> float:
        """How long requests may still wait for them."""
        return min(self._left_ms + LENT_SHARE * (now.mono_ms - self._at_ms), LENT_MAX_MS)

    def spend(self, lent_ms: float, now: Now) -> None:
        """A request waited for such members in vain."""
        self._left_ms, self._at_ms = self.left_ms(now) - lent_ms, now.mono_ms
