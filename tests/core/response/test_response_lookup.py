"""The machine of one response lookup, by its transcripts; what one cannot tell is here in Python."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperspace_vllm.core.response.lookup import (
    ATTEMPTS_MAX,
    DHT_MS,
    HEDGE_MS_MAX,
    HEDGE_MS_MIN,
    IN_FLIGHT_MAX,
    RACE_MS,
    hedge_delay_ms,
)
from tests.support.machines.response_script import DEADLINE_MS, Script
from tests.support.machines.transcripts import check, transcripts_of


@pytest.mark.parametrize("path", transcripts_of("core/response"), ids=lambda path: path.stem)
def test_a_lookup_does_what_its_transcript_says(path: Path) -> None:
    check(path)


def test_the_best_provider_is_asked_and_its_answer_ends_the_lookup() -> None:
    script = Script()
    script.run(
        """
        > want A B
        hinted
        fetch A for 300
        > at=12 hit A
        answer A hint hit
        """
    )
    assert script.lookup.over
    assert not script.searches


def test_an_unhinted_lookup_may_take_longer_because_nobody_waits_for_it() -> None:
    script = Script()
    script.run(
        f"""
        > want
        unhinted
        search for {DHT_MS}
        > at=1000 found A
        fetch A for {RACE_MS - 1000}
        > at={RACE_MS} tick
        answer None none deadline
        """
    )
    assert set(script.lookup.in_flight) == {"A"}


def test_what_the_dht_does_not_know_is_a_miss() -> None:
    script = Script()
    script.run(
        """
        > want
        unhinted
        search for 1500
        > at=100 found
        answer None none not_found
        """
    )
    assert script.lookup.searched


def test_a_lookup_that_may_not_search_ends_at_once_and_has_searched_nothing() -> None:
    script = Script(may_search=False)
    script.run(
        """
        > want
        unhinted
        answer None none not_found
        """
    )
    assert not script.lookup.searched


def test_the_budget_is_asked_only_when_a_search_begins() -> None:
    script = Script()
    script.run(
        """
        > want A
        hinted
        fetch A for 300
        > hit A
        answer A hint hit
        """
    )
    assert script.searches == 0


def test_at_most_so_many_providers_are_asked() -> None:
    names = " ".join(chr(ord("A") + index) for index in range(ATTEMPTS_MAX + 3))
    script = Script()
    script.event(["want", *names.split()])
    asked = 1
    for name in names.split():
        effects = script.event(["refused", name, "miss"])
        asked += sum(effect.startswith("fetch") for effect in effects)
        if script.lookup.over:
            break
    assert asked == ATTEMPTS_MAX
    assert script.lookup.over
    assert not script.searches


def test_a_clock_that_is_set_back_takes_nothing_from_the_lookup() -> None:
    script = Script()
    script.run("> at=1000 want A B\nhinted\nfetch A for 300")
    script.set_by_ms = -900
    assert script.lookup.next_deadline_ms() == 1030
    script.run("> at=1030 tick\nfetch B for 270\n> at=1300 tick\nanswer None none deadline")


@pytest.mark.parametrize(
    ("rtt_ms", "delay_ms"), [(0.0, HEDGE_MS_MIN), (5.0, HEDGE_MS_MIN), (20.0, 60), (100.0, HEDGE_MS_MAX)]
)
def test_the_hedge_waits_for_three_round_trips_within_bounds(rtt_ms: float, delay_ms: int) -> None:
    assert hedge_delay_ms(rtt_ms) == delay_ms


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.sampled_from("ABCDEFGH"), st.integers(0, 4)), max_size=60))
def test_whatever_comes_a_lookup_is_answered_once_in_time_and_never_ticks_in_vain(
    steps: list[tuple[int, str, int]],
) -> None:
    script = Script()
    answers = [effect for effect in script.event(["want", "A+", *"BCDEF"]) if effect.startswith("answer")]
    for delay_ms, name, kind in steps:
        target_ms = script.now_ms + delay_ms
        while not script.lookup.over and (due_ms := script.lookup.next_deadline_ms()) <= target_ms:
            assert due_ms >= script.now_ms
            answers += [e for e in script.event([f"at={due_ms}", "tick"]) if e.startswith("answer")]
            assert script.lookup.over or script.lookup.next_deadline_ms() > due_ms
        if script.lookup.over:
            break
        script.now_ms = target_ms
        word = (
            ["refused", name, ("miss", "unreachable")[kind % 2]]
            if kind < 3
            else ["found", name]
            if kind == 3
            else ["hit", name]
        )
        answers += [effect for effect in script.event(word) if effect.startswith("answer")]
        assert len(script.lookup.in_flight) <= IN_FLIGHT_MAX
        if script.lookup.over:
            break
    if not script.lookup.over:
        answers += script.event([f"at={DEADLINE_MS}", "tick"])
    assert len(answers) == 1
    assert script.now_ms <= DEADLINE_MS
