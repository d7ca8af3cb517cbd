"""A token bucket: how much a peer, a host or all peers together may use."""

from ..records.now import Now


class Allowance:
    """At most `burst` at once and `per_s` a second in the long run."""

    def __init__(self, per_s: float, burst: float, now: Now) -> None:
        self._per_s = per_s
        self._burst = burst
        self._left = burst
        self._at_ms = now.mono_ms

    def left(self, now: Now) -> float:
        """How much may be taken now."""
        earned = (now.mono_ms - self._at_ms) * self._per_s / 1000
        self._left = min(self._left + earned, self._burst)
        self._at_ms = now.mono_ms
        return self._left

    def spend(self, amount: float, now: Now) -> None:
        """Take `amount` even if there is less: the debt is paid off first."""
        self._left = self.left(now) - amount

    def take(self, amount: float, now: Now, leave: float = 0.0) -> bool:
        """Take `amount` unless less than `leave` would be left; returns whether it was taken."""
        if self.left(now) - amount < leave:
            return False
        self._left -= amount
        return True
