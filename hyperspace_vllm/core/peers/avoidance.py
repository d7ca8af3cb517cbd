"""For how long a peer isn't asked that lied, kept silent, or hadn't what it had announced.

lied                           LIAR_MS
silent, unreachable            SILENT_MS, doubled every time in a row, AVOID_MS_MAX at most
a rule broken again meanwhile  it is let in no more for LIAR_MS
MISSES_MAX misses in a row     the same; an honest node's words go stale now and then, a boaster's always are
"""

from dataclasses import dataclass

from ..records.now import Now

LIAR_MS = 60_000
SILENT_MS = 3_000
AVOID_MS_MAX = 30_000
MISSES_MAX = 4


def avoid_ms(times: int) -> int:
    """For how long, after failing so often in a row."""
    return min(SILENT_MS << min(times - 1, 10), AVOID_MS_MAX)


@dataclass(slots=True)
class Avoidance:
    """Of one peer."""

    until_ms: int = 0
    for_ms: int = 0
    failures: int = 0
    misses: int = 0
    _is_cut_off: bool = False

    def avoids(self, now: Now) -> bool:
        """Whether to leave it alone now."""
        return now.mono_ms < self.until_ms

    def cut_off(self, now: Now) -> None:
        """It goes on breaking rules: it is let in no more for LIAR_MS."""
        self._is_cut_off = True
        self._avoid(now, LIAR_MS)

    def is_cut_off(self, now: Now) -> bool:
        """Whether to refuse its connections."""
        if self._is_cut_off and not self.avoids(now):
            self._is_cut_off = False
        return self._is_cut_off

    def lied(self, now: Now) -> None:
        """It said what an honest one can't."""
        self._avoid(now, LIAR_MS)

    def failed(self, now: Now) -> None:
        """It didn't answer, or not intelligibly."""
        self.failures += 1
        self._avoid(now, avoid_ms(self.failures))

    def missed(self, now: Now) -> None:
        """It hadn't what it was said to have."""
        self.misses += 1
        if self.misses >= MISSES_MAX:
            self._avoid(now, avoid_ms(1 + self.misses - MISSES_MAX))

    def served(self) -> None:
        """It gave a good answer: failures before it don't count any more."""
        self.failures = self.misses = 0

    def back(self) -> None:
        """It was silent and speaks again. Whatever it lied about stays."""
        if self.for_ms < LIAR_MS:
            self.until_ms = self.for_ms = self.failures = self.misses = 0

    def _avoid(self, now: Now, for_ms: int) -> None:
        if now.mono_ms + for_ms >= self.until_ms:
            self.until_ms, self.for_ms = now.mono_ms + for_ms, for_ms


assert AVOID_MS_MAX < LIAR_MS
