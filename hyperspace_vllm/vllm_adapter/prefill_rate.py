"""How fast this engine prefills, measured from its own steps."""

from collections import deque

STEP_TOKENS_MIN = 128  # smaller steps are dominated by decoding
WEIGHT = 0.3  # of the newest step
STEPS_IN_FLIGHT_MAX = 64


class PrefillRate:
    """Tokens per ms over steps that prefilled at least 128 tokens. Steps end in the order in which they started."""

    def __init__(self) -> None:
        self.tokens_per_ms = 0.0
        self._steps: deque[tuple[float, int]] = deque(maxlen=STEPS_IN_FLIGHT_MAX)
        self._last_end_s = 0.0

    def started(self, now_s: float, tokens: int) -> None:
        """A step with `tokens` prompt tokens was scheduled."""
        self._steps.append((now_s, tokens))

    def ended(self, now_s: float) -> None:
        """The oldest step's output came back. Steps overlap under async scheduling: only its own time counts."""
        if not self._steps:
            return
        start_s, tokens = self._steps.popleft()
        elapsed_ms = (now_s - max(start_s, self._last_end_s)) * 1000
        self._last_end_s = now_s
        if tokens >= STEP_TOKENS_MIN and elapsed_ms > 0:
            rate = tokens / elapsed_ms
            self.tokens_per_ms = WEIGHT * rate + (1 - WEIGHT) * self.tokens_per_ms if self.tokens_per_ms else rate

    def estimate_ms(self, tokens: int) -> int:
        """Time to prefill `tokens`; 0 while nothing has been measured, otherwise at least 1."""
        return max(int(tokens / self.tokens_per_ms), 1) if self.tokens_per_ms else 0
