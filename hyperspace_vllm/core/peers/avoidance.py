"""For how long a node does not ask a peer that lied, did not answer, or lacked what it had announced.

lied                           LIAR_MS
silent, unreachable            SILENT_MS, doubled every time in a row, at most AVOID_MS_MAX
a rule broken again meanwhile  its connections are refused for LIAR_MS
MISSES_MAX misses in a row     as for silence: an honest node's announcements are out of date now and then, not always

"""

from dataclasses import dataclass

from ..records.now import Now

LIAR_MS = 60_000
SILENT_MS = 3_000
AVOID_MS_MAX = 30_000
MISSES_MAX = 4


def avoid_ms(times: int) -> int:
    """For how long, after so many failures in a row."""
    return min(SILENT_MS << min(times - 1, 10), AVOID_MS_MAX)


@dataclass(slots=True)
class Avoidance:
    """The avoidance of one peer."""

    until_ms: int = 0
    for_ms: int = 0
    failures: int = 0
    misses: int = 0
    _is_cut_off: bool = False

    def avoids(self, now: Now) -> bool:
        """Whether the peer is not asked now."""
        return now.mono_ms < self.until_ms

    def cut_off(self, now: Now) -> None:
        """The peer keeps breaking rules: its connections are refused for LIAR_MS."""
        self._is_cut_off = True
        self._avoid(now, LIAR_MS)

    def is_cut_off(self, now: Now) -> bool:
        """Whether to refuse its connections."""
        if self._is_cut_off and not self.avoids(now):
            self._is_cut_off = False
        return self._is_cut_off

    def lied(self, now: Now) -> None:
        """The peer sent what an honest peer cannot send."""
        self._avoid(now, LIAR_MS)

    def failed(self, now: Now) -> None:
        """The peer did not answer, or its answer broke the protocol."""
        self.failures += 1
        self._avoid(now, avoid_ms(self.failures))

    def missed(self, now: Now) -> None:
        """The peer lacked what it was said to have."""
        self.misses += 1
        if self.misses >= MISSES_MAX:
            self._avoid(now, avoid_ms(1 + self.misses - MISSES_MAX))

    def served(self) -> None:
        """The peer gave a good answer: earlier failures no longer count."""
        self.failures = self.misses = 0

    def back(self) -> None:
        """The peer was silent and answers again. Its lies still count."""
        if self.for_ms < LIAR_MS:
            self.until_ms = self.for_ms = self.failures = self.misses = 0

    def _avoid(self, now: Now, for_ms: int) -> None:
        if now.mono_ms + for_ms >= self.until_ms:
            self.until_ms, self.for_ms = now.mono_ms + for_ms, for_ms


assert AVOID_MS_MAX < LIAR_MS
