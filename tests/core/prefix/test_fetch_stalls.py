"""Lookups that wait for slow links and silent peers, and whom they blame."""

import pytest

from hyperspace_vllm.core.events.prefix_reading import AnswerPrefix
from hyperspace_vllm.core.events.vocabulary import PrefixEffect
from hyperspace_vllm.core.prefix.cost_model import fetch_budget_ms
from hyperspace_vllm.core.records.ids import PeerId
from hyperspace_vllm.core.records.limits import FETCH_STALL_MS, FETCH_UNKNOWN_MS
from tests.support.machines.prefix_script import Script


def trickle(script: Script, segments: int, every_ms: int) -> list[str]:
    """One column of one row after another comes from A, which is asked for all; how the lookup ends."""
    for command in ("found", f"offer A m rows=0..{segments - 1}", f"manifest A m rows=0..{segments - 1}"):
        script.act(command)
    columns = 0
    effects: list[PrefixEffect] = []
    while not any(isinstance(effect, AnswerPrefix) for effect in effects):
        assert script.lookup is not None
        due_ms, next_ms = script.lookup.next_deadline_ms(), (columns + 1) * every_ms
        if due_ms is not None and due_ms < next_ms:
            effects = script.act(f"at={due_ms} tick")
            continue
        row, column = divmod(columns, 32)
        what = f"chunks A row={row} columns=0..{column}" if column < 31 else f"ready row={row}"
        effects = script.act(f"at={next_ms} {what}")
        columns += 1
    return [script.show(effect) for effect in effects]


def test_a_slow_link_is_no_stall() -> None:
    script = Script()
    script.act("want A segments=1 prefill=4000")
    assert trickle(script, 1, 20) == ["answer 1 network hit rows=1"]
    assert script.lookup is not None
    assert script.lookup.waited_ms == {}


def test_a_trickle_of_good_chunks_is_a_stall() -> None:
    script = Script()
    script.act("want A segments=1 prefill=4000")
    assert trickle(script, 1, 200) == ["charge A stalled", "answer 0 none stalled rows=0"]
    assert script.now < 4 * FETCH_STALL_MS
    assert script.lookup is not None
    assert script.lookup.waited_ms == {PeerId("A"): script.now}


@pytest.mark.parametrize("prefill", [4_000, 0])
def test_who_is_too_slow_is_charged_and_a_fetch_ends_also_where_no_prefill_was_measured(prefill: int) -> None:
    script = Script()
    script.act(f"want A segments=4 prefill={prefill}")
    assert trickle(script, 4, 30) == ["charge A too_slow", "answer 2 network too_slow rows=2"]
    assert script.now == FETCH_UNKNOWN_MS == fetch_budget_ms(4_000)
    assert script.lookup is not None
    assert script.lookup.waited_ms == {PeerId("A"): FETCH_UNKNOWN_MS}


def test_a_lookup_that_ends_at_its_deadline_accounts_for_who_kept_it_waiting() -> None:
    script = Script()
    script.act("want A segments=4 fetch=always deadline=1000")
    assert trickle(script, 4, 30) == ["answer 0 none deadline rows=0"]
    assert script.lookup is not None
    assert script.lookup.waited_ms == {PeerId("A"): 950}


def test_peers_that_are_silent_for_a_whole_search_are_accounted_and_late_ones_of_a_short_search_are_not_blamed() -> (
    None
):
    for prefill, waits_ms, silent in ((4_000, 200, ["B", "C"]), (1_000, 50, [])):
        script = Script()
        script.act(f"want A B C segments=1 prefill={prefill}")
        script.act("found")
        script.act("at=3 nothing A")
        effects = script.act(f"at={waits_ms} silent B timeout")
        assert [script.show(effect) for effect in effects] == ["answer 0 none search_timeout rows=0"]
        assert script.lookup is not None
        assert script.lookup.waited_ms == {PeerId("B"): waits_ms, PeerId("C"): waits_ms}
        assert list(script.lookup.silent) == silent


def test_peers_are_not_blamed_for_a_search_in_which_this_node_did_not_run() -> None:
    script = Script()
    for command in ("want A segments=1 prefill=4000", "found", "at=400 tick"):  # was due at 200
        script.act(command)
    assert script.lookup is not None
    assert (script.lookup.answered, script.lookup.waited_ms, script.lookup.silent) == (True, {}, {})


def test_a_silence_that_is_reported_late_counts_once() -> None:
    script = Script()
    for command in (
        "want A B segments=1 prefill=4000",
        "found",
        "at=3 offer A m rows=0",
        "at=200 tick",
        "at=201 silent B timeout",
    ):
        script.act(command)
    assert script.lookup is not None
    assert list(script.lookup.silent) == ["B"]
