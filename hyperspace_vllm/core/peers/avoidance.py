"""Whom not to ask for a while: peers that lied, kept silent, or hadn't what they had announced.

lied                           LIAR_MS
silent, unreachable            SILENT_MS, doubled every time in a row, AVOID_MS_MAX at most
a rule broken again meanwhile  it is let in no more for LIAR_MS
MISSES_MAX misses in a row     the same; an honest node's words go stale now and then, a boaster's always are
"""

from collections import OrderedDict
from dataclasses import dataclass

from ..records.ids import PeerId
from ..records.now import Now

LIAR_MS = 60_000
SILENT_MS = 3_000
AVOID_MS_MAX = 30_000
MISSES_MAX = 4
AVOIDED_MAX = 1_024


def avoid_ms(times: int) -> int:
    """For how long, after failing so often in a row."""
    return min(SILENT_MS << min(times - 1, 10), AVOID_MS_MAX)


@dataclass(slots=True)
class _Record:
    until_ms: int = 0
    for_ms: int = 0
    failures: int = 0
    misses: int = 0
    is_cut_off: bool = False


class Avoidance:
    """Of AVOIDED_MAX peers at most: those that failed longest ago are forgotten."""

    def __init__(self) -> None:
        self._records: OrderedDict[PeerId, _Record] = OrderedDict()

    def avoids(self, peer: PeerId, now: Now) -> bool:
        """Whether to leave it alone now."""
        record = self._records.get(peer)
        return record is not None and now.mono_ms < record.until_ms

    def cut_off(self, peer: PeerId, now: Now) -> None:
        """It goes on breaking rules: it is let in no more for LIAR_MS."""
        record = self._record(peer)
        record.is_cut_off = True
        self._avoid(record, now, LIAR_MS)

    def is_cut_off(self, peer: PeerId, now: Now) -> bool:
        """Whether to refuse its connections."""
        record = self._records.get(peer)
        if record is None or not record.is_cut_off:
            return False
        record.is_cut_off = self.avoids(peer, now)
        return record.is_cut_off

    def lied(self, peer: PeerId, now: Now) -> None:
        """It said what an honest one can't."""
        self._avoid(self._record(peer), now, LIAR_MS)

    def failed(self, peer: PeerId, now: Now) -> None:
        """It didn't answer, or not intelligibly."""
        record = self._record(peer)
        record.failures += 1
        self._avoid(record, now, avoid_ms(record.failures))

    def missed(self, peer: PeerId, now: Now) -> None:
        """It hadn't what it was said to have."""
        record = self._record(peer)
        record.misses += 1
        if record.misses >= MISSES_MAX:
            self._avoid(record, now, avoid_ms(1 + record.misses - MISSES_MAX))

    def served(self, peer: PeerId) -> None:
        """It gave a good answer: failures before it don't count any more."""
        record = self._records.get(peer)
        if record is not None:
            record.failures = record.misses = 0

    def back(self, peer: PeerId) -> None:
        """It was silent and speaks again. Whatever it lied about stays."""
        record = self._records.get(peer)
        if record is not None and record.for_ms < LIAR_MS:
            del self._records[peer]

    def _record(self, peer: PeerId) -> _Record:
        record = self._records.setdefault(peer, _Record())
        self._records.move_to_end(peer)
        if len(self._records) > AVOIDED_MAX:
            self._records.popitem(last=False)
        return record

    def _avoid(self, record: _Record, now: Now, for_ms: int) -> None:
        if now.mono_ms + for_ms >= record.until_ms:
            record.until_ms, record.for_ms = now.mono_ms + for_ms, for_ms


assert AVOID_MS_MAX < LIAR_MS
