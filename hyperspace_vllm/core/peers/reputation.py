"""How far a peer has earned belief: what it delivered, weighed against what it owed and what it lied about.

    reliability = (successes + 1) / (successes + failures + 20)        both halve every day; their sum is at most 200
    score       = reliability / 2^lies                                 lies halve every day too

A newcomer scores 0.05 and needs 56 verified deliveries to pass THRESHOLD. Failures are diluted by successes, lies are
not: whoever serves a thousand good chunks to have one bad one believed has lost half its score, and only time heals.
Rejected: counting a lie as a hundred failures, which a busy liar dilutes within minutes.
"""

from dataclasses import dataclass

from ..records.now import Now
from ..records.reason import Reason

THRESHOLD = 0.75
HALF_LIFE_MS = 24 * 3600 * 1000
EVIDENCE_MAX = 200.0  # one failure in ten is one failure in ten, of a hundred requests or of a million
_PRIOR_SUCCESSES = 1.0
_PRIOR_FAILURES = 19.0


def reliability(successes: float, failures: float) -> float:
    """Share of good deliveries in [0, 1], pulled towards a newcomer's."""
    return (successes + _PRIOR_SUCCESSES) / (successes + failures + _PRIOR_SUCCESSES + _PRIOR_FAILURES)


def score_of(successes: float, failures: float, lies: float) -> float:
    """What is believed of a peer with this record, in [0, 1]."""
    return float(reliability(successes, failures) * 0.5**lies)


@dataclass(slots=True)
class Reputation:
    """What one peer has earned; `now` only grows."""

    successes: float = 0.0
    failures: float = 0.0
    lies: float = 0.0
    _at_ms: int = 0

    def score(self, now: Now) -> float:
        """In [0, 1]; strangers have a newcomer's."""
        left = self._left(now)
        return score_of(self.successes * left, self.failures * left, self.lies * left)

    def served(self, now: Now) -> None:
        """The peer delivered something, and it was verified."""
        self._age(now)
        self.successes += 1
        self._dilute()

    def failed(self, reason: Reason, now: Now) -> None:
        """The peer didn't deliver, or delivered what an honest one can't."""
        self._age(now)
        if reason.is_lie:
            self.lies += 1
        else:
            self.failures += reason.severity.value
            self._dilute()

    def _age(self, now: Now) -> None:
        left = self._left(now)
        self.successes *= left
        self.failures *= left
        self.lies *= left
        self._at_ms = now.mono_ms

    def _left(self, now: Now) -> float:
        """What time has left of the record."""
        return float(0.5 ** ((now.mono_ms - self._at_ms) / HALF_LIFE_MS))

    def _dilute(self) -> None:
        evidence = self.successes + self.failures
        if evidence > EVIDENCE_MAX:
            self.successes *= EVIDENCE_MAX / evidence
            self.failures *= EVIDENCE_MAX / evidence


assert reliability(0, 0) < THRESHOLD < reliability(EVIDENCE_MAX, 0)
assert score_of(EVIDENCE_MAX, 0, 1) < THRESHOLD  # the best peer's first lie is enough
