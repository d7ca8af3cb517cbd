"""The measured error of semantic hits, and which further matches are served.

Some matches are also computed, and the two answers compared. While more than `max_error` of the matches may be wrong,
at 95 % confidence, all are computed: the client gets the engine's answer, and that is compared. Afterwards matches are
served, and one in CHECK_EVERY is also computed. Results for one tenant, model, mode or embedder do not apply to
another: each combination is a separate kind.

The bound protects against chance and other tenants, not against the clients of one tenant, which choose what is
compared. To make it costly to influence, only greedy answers of TELLING_WORDS or more count, and only the last
comparison of each question.

Context: vCache (Schroeder et al., "vCache: Verified Semantic Prompt Caching", 2025): a bound that the user sets, kept
by computing while the cache is uncertain. Choice: one binomial over the last WINDOW comparisons of a kind, and a
separate threshold for an entry that was wrong. Rejected: vCache's model of each entry, which takes about ten
computations per entry before it serves: here the guards have removed most of the differences that a cosine does not
show. Cost: with max_error = 0.02 and no error, the matches of the first 189 questions are computed, and all of them if
no request is greedy.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import sqrt
from typing import Literal

Verdict = Literal["serve", "check", "compute"]

WINDOW = 1_000
KINDS_MAX = 64
CHECK_EVERY = 20
UNCHECKED_MAX = 8 * CHECK_EVERY  # matches served under a bound without a check: then checks seem to fail
TELLING_WORDS = 8  # comparing "The" or "Yes." says little about other answers
SAME = 0.99  # nearer than this nothing tells a right match from a wrong one
NEVER = 2.0  # a floor above every similarity
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


def floor_after(similarity: float, floor: float) -> float:
    """The similarity from which an entry that was wrong at `similarity` may be served again.

    It had `floor` before, 0 if it was never wrong: after the second error it is not served again.
    """
    return NEVER if floor > 0 or similarity >= SAME else similarity + (1 - similarity) / 2


def tells(one: str, other: str) -> bool:
    """Whether two answers are long enough for their comparison to count."""
    return max(len(one.split()), len(other.split())) >= TELLING_WORDS


@dataclass(slots=True)
class _Kind:
    wrong: dict[bytes, bool] = field(default_factory=dict)  # by question, the oldest comparison first
    unchecked: int = 0  # matches served since the last comparison


class MatchErrors:
    """The comparisons of one node. `checks`: those of earlier, as of `add`, the oldest first."""

    def __init__(self, rng: random.Random, checks: Iterable[tuple[bytes, bytes, bool]] = ()) -> None:
        self._rng = rng
        self._kinds: dict[bytes, _Kind] = {}
        for kind, asked, is_wrong in checks:
            self.add(kind, asked, is_wrong)

    @property
    def checked(self) -> int:
        """Comparisons that count, of all kinds."""
        return sum(len(kind.wrong) for kind in self._kinds.values())

    @property
    def ratio(self) -> Interval:
        """The share of wrong matches among the checked ones of all kinds."""
        return wilson(sum(sum(kind.wrong.values()) for kind in self._kinds.values()), self.checked)

    def add(self, kind: bytes, asked: bytes, is_wrong: bool) -> None:
        """The answer of a match for the question `asked` was compared with the engine's."""
        known = self._known(kind)
        known.wrong.pop(asked, None)
        known.wrong[asked] = is_wrong
        if len(known.wrong) > WINDOW:
            del known.wrong[next(iter(known.wrong))]
        known.unchecked = 0

    def judge(self, kind: bytes, max_error: float) -> Verdict:
        """What to do with a match."""
        known = self._known(kind)
        if max_error < 1 and (
            known.unchecked >= UNCHECKED_MAX or wilson(sum(known.wrong.values()), len(known.wrong)).high > max_error
        ):
            return "compute"
        known.unchecked += 1
        return "check" if self._rng.randrange(CHECK_EVERY) == 0 else "serve"

    def _known(self, kind: bytes) -> _Kind:
        known = self._kinds[kind] = self._kinds.pop(kind, _Kind())
        if len(self._kinds) > KINDS_MAX:
            del self._kinds[next(iter(self._kinds))]
        return known
