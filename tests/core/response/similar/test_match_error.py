"""Measured match_error: its interval, the bound that is kept, and what becomes of entries that erred."""

import random

import pytest

from hyperspace_vllm.core.response.similar.match_error import (
    CHECK_EVERY,
    KINDS_MAX,
    NEVER,
    UNCHECKED_MAX,
    WINDOW,
    MatchErrors,
    floor_after,
    tells,
    wilson,
)

KIND = b"a tenant, a model, a mode and an embedder"


def known(is_wrong: bool) -> list[tuple[bytes, bytes, bool]]:
    """A full window of comparisons."""
    return [(KIND, b"%d" % number, is_wrong) for number in range(WINDOW)]


@pytest.mark.parametrize(
    ("wrong", "checked", "low", "high"),
    # by statsmodels' proportion_confint(method="wilson")
    [(0, 10, 0.0, 0.2775), (5, 100, 0.0215, 0.1118), (50, 100, 0.4038, 0.5962), (10, 10, 0.7225, 1.0)],
)
def test_the_interval_is_wilsons(wrong: int, checked: int, low: float, high: float) -> None:
    interval = wilson(wrong, checked)
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)
    assert interval.estimate == wrong / checked


def test_of_nothing_checked_nothing_is_known() -> None:
    assert (wilson(0, 0).low, wilson(0, 0).high) == (0, 1)


def served_wrongly(max_error: float, error: float, matches: int, seed: int) -> tuple[float, float]:
    """The share of matches that was served, and that of them which was wrong, with matches that err by chance."""
    rng = random.Random(seed)
    match_error = MatchErrors(random.Random(seed + 1))
    served = wrong = 0
    for number in range(matches):
        is_wrong = rng.random() < error
        verdict = match_error.judge(KIND, max_error)
        if verdict != "compute":
            served += 1
            wrong += is_wrong
        if verdict != "serve":
            match_error.add(KIND, b"%d" % number, is_wrong)
    return served / matches, wrong / max(served, 1)


@pytest.mark.parametrize("max_error", [0.01, 0.02, 0.05, 0.2])
@pytest.mark.parametrize("error", [0.0, 0.01, 0.03, 0.1, 0.5, 1.0])
def test_whatever_matches_are_worth_no_larger_share_of_the_served_is_wrong(max_error: float, error: float) -> None:
    runs = [served_wrongly(max_error, error, 2_000, seed) for seed in range(20)]
    mean_wrong = sum(wrong for _, wrong in runs) / len(runs)
    assert mean_wrong <= max_error
    if error <= max_error / 4:
        assert min(served for served, _ in runs) > 0.4, "it is served where it is safe"


def test_without_a_bound_all_is_served_and_a_small_share_checked() -> None:
    match_error = MatchErrors(random.Random(1))
    verdicts = [match_error.judge(KIND, 1.0) for _ in range(4_000)]
    assert "compute" not in verdicts
    assert verdicts.count("check") == pytest.approx(4_000 / CHECK_EVERY, rel=0.3)


def test_with_a_bound_of_zero_nothing_is_served() -> None:
    match_error = MatchErrors(random.Random(1), known(False))
    assert {match_error.judge(KIND, 0.0) for _ in range(1_000)} == {"compute"}


def test_what_is_known_of_one_kind_says_nothing_about_another() -> None:
    match_error = MatchErrors(random.Random(1), known(False))
    assert match_error.judge(KIND, 0.02) != "compute"
    assert match_error.judge(b"another", 0.02) == "compute"
    for number in range(KINDS_MAX):
        match_error.judge(b"%d" % number, 0.02)
    assert match_error.judge(KIND, 0.02) == "compute", "so many kinds are kept, and no more"


def test_while_no_check_comes_through_nothing_is_served_for_long() -> None:
    match_error = MatchErrors(random.Random(1), known(False))
    verdicts = [match_error.judge(KIND, 0.02) for _ in range(UNCHECKED_MAX + 10)]
    assert verdicts[UNCHECKED_MAX:] == ["compute"] * 10
    assert "compute" not in verdicts[:UNCHECKED_MAX]
    match_error.add(KIND, b"asked", False)
    assert match_error.judge(KIND, 0.02) != "compute"


def test_what_was_long_ago_is_forgotten() -> None:
    match_error = MatchErrors(random.Random(1), known(True))
    assert match_error.ratio.estimate == 1
    for number in range(WINDOW):
        match_error.add(KIND, b"new %d" % number, False)
    assert (match_error.ratio.estimate, match_error.checked) == (0, WINDOW)


@pytest.mark.parametrize(
    ("similarity", "floor", "after"),
    [(0.94, 0.0, 0.97), (0.92, 0.0, 0.96), (0.995, 0.0, NEVER), (1.0, 0.0, NEVER), (0.98, 0.97, NEVER)],
)
def test_an_error_raises_the_entrys_floor_and_the_second_is_its_last(
    similarity: float, floor: float, after: float
) -> None:
    assert floor_after(similarity, floor) == pytest.approx(after)


def test_a_question_that_is_compared_again_counts_once_by_its_last_comparison() -> None:
    match_error = MatchErrors(random.Random(1))
    for _ in range(WINDOW):
        match_error.add(KIND, b"asked", False)
    assert match_error.checked == 1
    assert match_error.judge(KIND, 0.02) == "compute"
    match_error.add(KIND, b"asked", True)
    assert (match_error.checked, match_error.ratio.estimate) == (1, 1)


def test_the_kind_that_was_asked_for_longest_ago_makes_room() -> None:
    match_error = MatchErrors(random.Random(1), known(False))
    for number in range(KINDS_MAX * 2):
        assert match_error.judge(b"%d" % number, 0.02) == "compute"
        assert match_error.judge(KIND, 0.02) != "compute" or number >= UNCHECKED_MAX


def test_answers_of_a_word_or_two_tell_nothing() -> None:
    assert not tells("The", "The")
    assert not tells("", "Yes, it is.")
    assert tells("I don't know.", "It is the powerhouse of the cell, mostly.")
