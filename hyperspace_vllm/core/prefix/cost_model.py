"""The cost model: whether to fetch, how long a search may take, and when to ask another peer. Its only state is rates.

All formulas follow one rule: a lookup never costs more than it can save (docs/design.md). A prefill estimate of 0 means
unknown: then FETCH_UNKNOWN_MS bounds a fetch, until the engine has measured one.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass

from ..records.ids import PeerId
from ..records.limits import FETCH_BYTES_PER_MS_MIN, FETCH_PREFILL_SHARE, FETCH_STALL_MS, UNHINTED_PREFILL_SHARE

# Assumed of an unmeasured peer: half of 1 Gbit/s. Too high costs half a prefill once; too low never measures.
RATE_BYTES_PER_MS_DEFAULT = 50_000
RATE_PEERS_MAX = 1024
RATE_FORGET_MS = 60_000  # after this, a peer that was slow gets another chance
RATE_SAMPLE_BYTES_MIN = 256 * 1024  # smaller transfers measure latency, not rate
RATE_WEIGHT = 0.5  # of the newest sample
SEARCH_MS_MIN = 5  # a question and its answer through two busy nodes on a LAN
SEARCH_MS_MAX = 1_000
PROGRESS_MS = FETCH_STALL_MS // 4  # how often a driver reports a row that grows (events.ChunksVerified)
HEDGE_MS_MIN = 90  # a report and a half: a row that grows must not be hedged because a report is due
HEDGE_MS_MAX = FETCH_STALL_MS // 2  # leaves a second holder as long as the first had
MANIFEST_HEDGE_MS = 60  # a manifest is 70 KiB and has no progress to report

assert PROGRESS_MS < HEDGE_MS_MIN <= HEDGE_MS_MAX


def transfer_ms(size: int, rate_bytes_per_ms: float, rtt_ms: int) -> int:
    """Estimated time to fetch `size` bytes."""
    return rtt_ms + math.ceil(size / rate_bytes_per_ms)


def saved_ms(prefill_ms: int, tokens: int, prefill_tokens: int) -> int:
    """The share of `prefill_ms`, the estimate for `prefill_tokens`, that `tokens` of them take; 0 if unknown."""
    return math.ceil(prefill_ms * tokens / prefill_tokens)


def fetch_budget_ms(saves_ms: int) -> int:
    """How long a fetch that saves `saves_ms` of prefill may take at most."""
    return int(FETCH_PREFILL_SHARE * saves_ms)


def worth_fetching(estimate_ms: int, saves_ms: int) -> bool:
    """Whether an estimated transfer fits the budget of what it saves (0: unknown, so yes)."""
    return saves_ms == 0 or estimate_ms <= fetch_budget_ms(saves_ms)


def least_rate(size: int, left_ms: int | None) -> float:
    """Bytes per ms below which a fetch of `size` bytes makes no progress: half of what ends it within `left_ms`."""
    return max(size / 2 / max(left_ms, 1), FETCH_BYTES_PER_MS_MIN) if left_ms is not None else FETCH_BYTES_PER_MS_MIN


def search_budget_ms(prefill_ms: int) -> int:
    """How long to search for unannounced providers; 0: not at all.

    5 % of the prefill. There is no minimum: if that is less than a round trip, a search could only delay the request,
    so a prefill below 100 ms is computed at once."""
    if prefill_ms == 0:
        return FETCH_STALL_MS
    budget = int(UNHINTED_PREFILL_SHARE * prefill_ms)
    return min(budget, SEARCH_MS_MAX) if budget >= SEARCH_MS_MIN else 0


def hedge_delay_ms(expected_ms: int) -> int:
    """How long a row may go without a newly verified column; `expected_ms` estimates its whole transfer."""
    return min(max(expected_ms, HEDGE_MS_MIN), HEDGE_MS_MAX)


@dataclass(slots=True)
class _Rate:
    bytes_per_ms: float
    measured_at_ms: int


class RateEstimator:
    """Each peer's recent rate in bytes per ms, measured by finished lookups; remembers 1,024 peers.

    An unmeasured peer is expected to have the rate of the last ones, because a new identity costs nothing.
    """

    def __init__(self) -> None:
        self._newcomers: _Rate | None = None
        self._rates: OrderedDict[PeerId, _Rate] = OrderedDict()

    def rate(self, peer: PeerId, now_ms: int) -> float:
        """Bytes per ms to expect of `peer`."""
        known = self._fresh(self._rates.get(peer), now_ms) or self._fresh(self._newcomers, now_ms)
        return known.bytes_per_ms if known is not None else RATE_BYTES_PER_MS_DEFAULT

    def measured(self, peer: PeerId, asked: int, verified: int, elapsed_ms: int, now_ms: int) -> None:
        """Record that `verified` of `asked` bytes came within `elapsed_ms`."""
        if asked < RATE_SAMPLE_BYTES_MIN:
            return
        sample = max(verified / max(elapsed_ms, 1), 1.0)
        rate = RATE_WEIGHT * sample + (1 - RATE_WEIGHT) * self.rate(peer, now_ms)
        if self._fresh(self._rates.get(peer), now_ms) is None:
            self._newcomers = _Rate(min(rate, RATE_BYTES_PER_MS_DEFAULT), now_ms)
        self._rates[peer] = _Rate(rate, now_ms)
        self._rates.move_to_end(peer)
        if len(self._rates) > RATE_PEERS_MAX:
            self._rates.popitem(last=False)

    def _fresh(self, rate: _Rate | None, now_ms: int) -> _Rate | None:
        return rate if rate is not None and now_ms - rate.measured_at_ms <= RATE_FORGET_MS else None
