"""A peer's score: what it delivered, weighed against its failures and its lies.

    reliability = (successes + 1) / (successes + failures + 20)        both halve every day; their sum is at most 200
    score       = reliability / 2^lies                                 lies halve every day too

A new peer scores 0.05 and needs 56 verified deliveries to pass THRESHOLD. Successes outweigh failures, but not lies: a
peer that serves a thousand good chunks and one false one loses half its score, and only time restores it. Rejected:
counting a lie as a hundred failures, which a busy peer makes up for within minutes.
"""

from dataclasses import dataclass

from ..records.now import Now
from ..records.reason import Reason

THRESHOLD = 0.75
HALF_LIFE_MS = 24 * 3600 * 1000
EVIDENCE_MAX = 200.0  # a failure rate of 10 % weighs the same over a hundred requests and over a million
_PRIOR_SUCCESSES = 1.0
_PRIOR_FAILURES = 19.0


def reliability(successes: float, failures: float) -> float:
    """Share of good deliveries in [0, 1], pulled towards a new peer's."""
    return (successes + _PRIOR_SUCCESSES) / (successes + failures + _PRIOR_SUCCESSES + _PRIOR_FAILURES)


def score_of(successes: float, failures: float, lies: float) -> float:
    """The score of a peer with this record, in [0, 1]."""
    return float(reliability(successes, failures) * 0.5**lies)


@dataclass(slots=True)
class Reputation:
    """The record of one peer; `now` only grows."""

    successes: float = 0.0
    failures: float = 0.0
    lies: float = 0.0
    _at_ms: int = 0

    def score(self, now: Now) -> float:
        """The score, in [0, 1]; an unknown peer has a new peer's."""
        left = self._left(now)
        return score_of(self.successes * left, self.failures * left, self.lies * left)

    def served(self, now: Now) -> None:
        """The peer delivered something that was verified."""
        self._age(now)
        self.successes += 1
        self._dilute()

    def failed(self, reason: Reason, now: Now) -> None:
        """The peer did not deliver, or delivered what an honest peer cannot send."""
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
        """The share of the record that has not decayed."""
        return float(0.5 ** ((now.mono_ms - self._at_ms) / HALF_LIFE_MS))

    def _dilute(self) -> None:
        evidence = self.successes + self.failures
        if evidence > EVIDENCE_MAX:
            self.successes *= EVIDENCE_MAX / evidence
            self.failures *= EVIDENCE_MAX / evidence


assert reliability(0, 0) < THRESHOLD < reliability(EVIDENCE_MAX, 0)
assert score_of(EVIDENCE_MAX, 0, 1) < THRESHOLD  # the best peer's first lie is enough
