"""How often semantic hits are wrong, measured, and what follows from it for the next ones.

Some matches are computed as well, and the two answers compared. While more than `max_error` of the matches may be
wrong, at 95 % confidence, all are computed: the client gets the engine's answer, and that is compared. Afterwards they
are served, and one in CHECK_EVERY is computed too.

Context: vCache (Schroeder et al., "vCache: Verified Semantic Prompt Caching", 2025): a bound that the user sets, kept
by computing where the cache isn't sure yet. Choice: one binomial over the last WINDOW comparisons of the node, and a
threshold of its own for an entry that erred. Rejected: vCache's model of each entry, which takes some ten computations
of each before it serves: here the guards have taken out most of what a cosine can't see. Cost: with max_error = 0.02
and no error, the first 189 matches are computed.
"""

import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt
from typing import Literal

Verdict = Literal["serve", "check", "compute"]

WINDOW = 1_000
CHECK_EVERY = 20
# Nearer than this nothing tells a right match from a wrong one.
SAME = 0.99
_Z = 1.96  # 95 %, two-sided


@dataclass(frozen=True, slots=True)
class Interval:
    """A ratio, measured as `estimate`, that lies between `low` and `high` with 95 % confidence."""

    low: float
    estimate: float
    high: float


def wilson(wrong: int, checked: int) -> Interval:
    """Wilson's score interval of wrong / checked (JASA 22, 1927); of nothing checked it is all of [0, 1]."""
    if not checked:
        return Interval(0.0, 0.0, 1.0)
    ratio, z2 = wrong / checked, _Z * _Z
    center = (ratio + z2 / (2 * checked)) / (1 + z2 / checked)
    half = _Z / (1 + z2 / checked) * sqrt(ratio * (1 - ratio) / checked + z2 / (4 * checked * checked))
    return Interval(max(center - half, 0.0), ratio, min(center + half, 1.0))


def floor_after(similarity: float, floor: float) -> float | None:
    """From what similarity on an entry that erred at `similarity` may be served again; None: never.

    It had `floor` before, 0 if it never erred: the second error is its last.
    """
    if floor > 0 or similarity >= SAME:
        return None
    return similarity + (1 - similarity) / 2


class Wrongness:
    """The comparisons of one node. `wrong`: those of earlier, the oldest first."""

    def __init__(self, max_error: float, rng: random.Random, wrong: Iterable[bool] = ()) -> None:
        self._max_error = max_error
        self._rng = rng
        self._wrong = deque(wrong, WINDOW)

    @property
    def checked(self) -> int:
        """Comparisons that count."""
        return len(self._wrong)

    @property
    def ratio(self) -> Interval:
        """Of the matches that would have been wrong."""
        return wilson(sum(self._wrong), len(self._wrong))

    def add(self, is_wrong: bool) -> None:
        """A match's answer was compared with the engine's."""
        self._wrong.append(is_wrong)

    def judge(self) -> Verdict:
        """What to do with a match."""
        if self.ratio.high > self._max_error:
            return "compute"
        return "check" if self._rng.randrange(CHECK_EVERY) == 0 else "serve"
