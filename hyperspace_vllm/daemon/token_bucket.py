"""A token bucket on the event loop's clock: how much a peer may use."""

import time


class TokenBucket:
    """At most `burst` at once and `per_s` a second in the long run."""

    def __init__(self, per_s: float, burst: float) -> None:
        self._per_s = per_s
        self._burst = burst
        self._tokens = burst
        self._at = time.monotonic()

    def take(self, amount: float) -> bool:
        """Whether `amount` may pass now."""
        now = time.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._per_s)
        self._at = now
        if amount > self._tokens:
            return False
        self._tokens -= amount
        return True
