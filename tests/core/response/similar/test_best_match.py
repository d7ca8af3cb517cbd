"""Which of the near candidates is served."""

import pytest

from hyperspace_vllm.core.records.ids import RequestKey
from hyperspace_vllm.core.response.similar.guards import Mode
from hyperspace_vllm.core.response.similar.semantic import Match, NoMatch, SimilarCandidate, best_match


def candidate(question: str, similarity: float) -> SimilarCandidate:
    return SimilarCandidate(question, similarity, RequestKey(question.encode()))


def test_the_nearest_candidate_that_no_guard_refuses_is_served() -> None:
    unsafe, safe = candidate("Is it unsafe to eat snow?", 0.98), candidate("Is it safe to eat some snow?", 0.95)
    assert best_match("Is it safe to eat snow?", [safe, unsafe], "balanced") == Match(safe)


@pytest.mark.parametrize(
    ("mode", "other", "needed"),
    [
        ("balanced", "Is it safe to eat the snow?", 0.92),
        ("balanced", "Is it safe for people to eat snow?", 0.92),
        ("balanced", "Is it safe to eat dirty snow?", 0.935),
        ("strict", "Is it safe to eat the snow?", 0.92),
    ],
)
def test_a_candidate_has_to_be_nearer_where_one_has_words_more(mode: Mode, other: str, needed: float) -> None:
    for one, two in (("Is it safe to eat snow?", other), (other, "Is it safe to eat snow?")):
        near, far = candidate(two, needed + 0.001), candidate(two, needed - 0.001)
        assert best_match(one, [near, far], mode) == Match(near)
        assert best_match(one, [far], mode) == NoMatch("far")


def test_the_refusal_of_the_nearest_is_named() -> None:
    candidates = [candidate("Is 7 prime?", 0.96), candidate("Is 9 not prime?", 0.94)]
    assert best_match("Is 9 prime?", candidates, "balanced") == NoMatch("numbers")
