"""How much of something a peer, a host or everybody may do: a token bucket on the caller's clock."""


class Allowance:
    """At most `burst` at once and `per_s` a second in the long run."""

    def __init__(self, per_s: float, burst: float, now_ms: int) -> None:
        self._per_s = per_s
        self._burst = burst
        self._left = burst
        self._at_ms = now_ms

    def left(self, now_ms: int) -> float:
        """How much may be taken now."""
        earned = max(now_ms - self._at_ms, 0) * self._per_s / 1000  # the clock may have been set back
        self._left = min(self._left + earned, self._burst)
        self._at_ms = now_ms
        return self._left

    def spend(self, amount: float, now_ms: int) -> None:
        """Take `amount` even if there is less: what is owed is earned first."""
        self._left = self.left(now_ms) - amount

    def take(self, amount: float, now_ms: int, leave: float = 0.0) -> bool:
        """Take `amount`, unless less than `leave` would be left; whether it was taken."""
        if self.left(now_ms) - amount < leave:
            return False
        self._left -= amount
        return True
