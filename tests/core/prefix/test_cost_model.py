"""The formulas of a fetch: what it may take, and what is expected of a peer."""

import pytest

from hyperspace_vllm.core.prefix.cost_model import (
    RATE_BYTES_PER_MS_DEFAULT,
    RATE_FORGET_MS,
    RateEstimator,
    fetch_budget_ms,
    hedge_delay_ms,
    least_rate,
    saved_ms,
    search_budget_ms,
    transfer_ms,
    worth_fetching,
)
from hyperspace_vllm.core.records.ids import PeerId
from hyperspace_vllm.core.records.limits import MiB


@pytest.mark.parametrize(
    ("size", "rate", "rtt", "expected"), [(0, 1000, 3, 3), (1, 1000, 0, 1), (MiB, MiB / 10, 2, 12)]
)
def test_transfer_time_is_a_round_trip_and_the_bytes(size: int, rate: float, rtt: int, expected: int) -> None:
    assert transfer_ms(size, rate, rtt) == expected


@pytest.mark.parametrize(
    ("estimate", "saves", "expected"), [(50, 100, True), (51, 100, False), (9_999, 0, True), (1, 1, False)]
)
def test_a_fetch_pays_when_it_takes_at_most_half_of_what_it_saves(estimate: int, saves: int, expected: bool) -> None:
    assert worth_fetching(estimate, saves) is expected


@pytest.mark.parametrize(("prefill", "expected"), [(0, 250), (1, 0), (99, 0), (100, 5), (2_000, 100), (600_000, 1_000)])
def test_looking_for_providers_waits_a_twentieth_of_the_prefill_or_not_at_all(prefill: int, expected: int) -> None:
    assert search_budget_ms(prefill) == expected


@pytest.mark.parametrize(("expected_ms", "delay"), [(0, 90), (90, 90), (100, 100), (9_999, 125)])
def test_hedging_waits_for_the_expected_transfer_within_bounds(expected_ms: int, delay: int) -> None:
    assert hedge_delay_ms(expected_ms) == delay


def test_savings_are_proportional_and_unknown_only_where_the_prefill_is() -> None:
    assert saved_ms(1000, 256, 1024) == 250
    assert saved_ms(1, 1, 1_000_000) == 1
    assert saved_ms(0, 256, 1024) == 0
    assert fetch_budget_ms(250) == 125


def test_rates_follow_measurements_and_are_forgotten() -> None:
    rates, peer = RateEstimator(), PeerId("A")
    assert rates.rate(peer, 0) == RATE_BYTES_PER_MS_DEFAULT
    rates.measured(peer, MiB, MiB, 1000, 0)
    slow = rates.rate(peer, 0)
    assert slow < RATE_BYTES_PER_MS_DEFAULT
    rates.measured(peer, MiB, 0, 1000, 10)
    assert rates.rate(peer, 10) < slow
    rates.measured(PeerId("B"), 1000, 0, 1000, 10)
    assert rates.rate(PeerId("B"), 10) == rates.rate(PeerId("C"), 10)  # too small to say anything
    assert rates.rate(peer, 11 + RATE_FORGET_MS) == RATE_BYTES_PER_MS_DEFAULT


@pytest.mark.parametrize(
    ("size", "left_ms", "expected"),
    [(4 * MiB, 1_024, 2_048), (4 * MiB, None, 250), (1, 1_000, 250), (1_000, 0, 500)],
)
def test_a_fetch_must_reach_half_of_the_rate_that_would_end_it_in_time(
    size: int, left_ms: int | None, expected: int
) -> None:
    assert least_rate(size, left_ms) == expected


def test_what_newcomers_deliver_is_expected_of_the_next_newcomer() -> None:
    rates = RateEstimator()
    rates.measured(PeerId("proven"), MiB, MiB, 1, 0)
    assert rates.rate(PeerId("new"), 0) == RATE_BYTES_PER_MS_DEFAULT, "a quick newcomer raises nothing"
    expected = [rates.rate(PeerId("new"), 0)]
    for number in range(4):
        rates.measured(PeerId(f"identity {number}"), MiB, MiB, 1000, 0)
        expected.append(rates.rate(PeerId("new"), 0))
    assert expected == sorted(expected, reverse=True)
    assert expected[-1] < RATE_BYTES_PER_MS_DEFAULT / 8
    assert rates.rate(PeerId("proven"), 0) > RATE_BYTES_PER_MS_DEFAULT
    rates.measured(PeerId("proven"), MiB, 0, 1000, 0)
    assert rates.rate(PeerId("new"), 0) == expected[-1], "who is known says nothing of others"
    assert rates.rate(PeerId("new"), 1 + RATE_FORGET_MS) == RATE_BYTES_PER_MS_DEFAULT
