"""Reputation: newcomers earn it slowly, failures are diluted, lies are not, and time heals both."""

import pytest

from hyperspace_vllm.core.peers.reputation import (
    EVIDENCE_MAX,
    HALF_LIFE_MS,
    THRESHOLD,
    Reputation,
    score_of,
)
from hyperspace_vllm.core.records.reason import Reason
from tests.support.moments import at


@pytest.mark.parametrize(
    ("successes", "failures", "lies", "score", "believed"),
    [
        (0, 0, 0, 0.05, False),  # a newcomer
        (0, 10, 0, 0.033, False),
        (20, 0, 0, 0.525, False),
        (55, 0, 0, 0.747, False),
        (56, 0, 0, 0.75, True),
        (200, 0, 0, 0.914, True),
        (180, 20, 0, 0.823, True),  # one timeout in ten
        (150, 50, 0, 0.686, False),  # one in four
        (200, 0, 1, 0.457, False),  # the best peer, after one lie
        (200, 0, 0.25, 0.768, True),  # and two days later
        (200, 0, 5, 0.029, False),  # worth less than a newcomer
    ],
)
def test_the_score_of_a_record(successes: float, failures: float, lies: float, score: float, believed: bool) -> None:
    assert score_of(successes, failures, lies) == pytest.approx(score, abs=0.001)
    assert (score_of(successes, failures, lies) >= THRESHOLD) is believed


def test_a_peer_that_serves_passes_the_threshold_and_one_lie_takes_it_down_again() -> None:
    reputation = Reputation()
    for _ in range(56):
        assert reputation.score(at(0)) < THRESHOLD
        reputation.served(at(0))
    assert reputation.score(at(0)) >= THRESHOLD
    reputation.failed(Reason.TIMEOUT, at(0))
    assert 0.73 < reputation.score(at(0)) < THRESHOLD
    for _ in range(10_000):
        reputation.served(at(0))
    reputation.failed(Reason.BAD_DIGEST, at(0))
    for _ in range(10_000):
        reputation.served(at(0))  # buys nothing back
    assert reputation.score(at(0)) < THRESHOLD


def test_time_heals_a_lie_and_forgets_merits() -> None:
    reputation = Reputation()
    for _ in range(1000):
        reputation.served(at(0))
    best = reputation.score(at(0))
    reputation.failed(Reason.FORGED, at(0))
    assert reputation.score(at(0)) == pytest.approx(best / 2)
    assert reputation.score(at(HALF_LIFE_MS)) == pytest.approx(score_of(EVIDENCE_MAX / 2, 0, 0.5))
    assert reputation.score(at(50 * HALF_LIFE_MS)) == pytest.approx(score_of(0, 0, 0))


def test_a_busy_peers_share_of_failures_counts_and_not_their_number() -> None:
    reputation = Reputation()
    for _ in range(1000):
        for _ in range(19):
            reputation.served(at(0))
        reputation.failed(Reason.TIMEOUT, at(0))
    assert reputation.score(at(0)) > 0.85


def test_a_clock_that_goes_back_does_no_harm() -> None:
    reputation = Reputation()
    reputation.served(at(1_000_000))
    before = reputation.score(at(1_000_000))
    assert reputation.score(at(1_000_000, -1_000_000)) == before
    reputation.served(at(1_000_000, -1_000_000))
    assert reputation.score(at(1_000_000, -1_000_000)) > before
