"""How far a peer has earned belief: what it delivered, weighed against what it owed and what it lied about.

    reliability = (successes + 1) / (successes + failures + 20)        both halve every day; their sum is at most 200
    score       = reliability / 2^lies                                 lies halve every day too

A newcomer scores 0.05 and needs 56 verified deliveries to pass THRESHOLD. Failures are diluted by successes, lies are
not: whoever serves a thousand good chunks to have one bad one believed has lost half its score, and only time heals.
Rejected: counting a lie as a hundred failures, which a busy liar dilutes within minutes.
"""

from dataclasses import dataclass

from ..records.ids import PeerId
from ..records.limits import PEERS_KNOWN_MAX
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
class _Record:
    at_ms: int
    successes: float = 0.0
    failures: float = 0.0
    lies: float = 0.0


class Reputation:
    """What this node itself has seen of its peers; of PEERS_KNOWN_MAX at most."""

    def __init__(self) -> None:
        self._records: dict[PeerId, _Record] = {}

    def score(self, peer: PeerId, now: Now) -> float:
        """In [0, 1]; strangers have a newcomer's."""
        record = self._records.get(peer)
        if record is None:
            return score_of(0, 0, 0)
        left = _left(record, now)
        return score_of(record.successes * left, record.failures * left, record.lies * left)

    def served(self, peer: PeerId, now: Now) -> None:
        """The peer delivered something, and it was verified."""
        record = self._aged(peer, now)
        record.successes += 1
        _dilute(record)

    def failed(self, peer: PeerId, reason: Reason, now: Now) -> None:
        """The peer didn't deliver, or delivered what an honest one can't."""
        record = self._aged(peer, now)
        if reason.is_lie:
            record.lies += 1
        else:
            record.failures += reason.severity.value
            _dilute(record)

    def _aged(self, peer: PeerId, now: Now) -> _Record:
        record = self._records.get(peer)
        if record is None:
            if len(self._records) >= PEERS_KNOWN_MAX:  # new identities are free: let them push out each other
                del self._records[min(self._records, key=lambda known: self._records[known].successes)]
            record = self._records[peer] = _Record(now.mono_ms)
        left = _left(record, now)
        record.successes *= left
        record.failures *= left
        record.lies *= left
        record.at_ms = now.mono_ms
        return record


def _left(record: _Record, now: Now) -> float:
    """What time has left of the record."""
    return float(0.5 ** ((now.mono_ms - record.at_ms) / HALF_LIFE_MS))


def _dilute(record: _Record) -> None:
    evidence = record.successes + record.failures
    if evidence > EVIDENCE_MAX:
        record.successes *= EVIDENCE_MAX / evidence
        record.failures *= EVIDENCE_MAX / evidence


assert reliability(0, 0) < THRESHOLD < reliability(EVIDENCE_MAX, 0)
assert score_of(EVIDENCE_MAX, 0, 1) < THRESHOLD  # the best peer's first lie is enough
