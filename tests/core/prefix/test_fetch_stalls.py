"""Lookups that wait, by transcripts: slow links, silent peers, hedging, budgets and deadlines."""

import pytest

from hyperspace_vllm.core.events.prefix_reading import AnswerPrefix
from hyperspace_vllm.core.prefix.cost_model import fetch_budget_ms
from hyperspace_vllm.core.records.ids import PeerId
from hyperspace_vllm.core.records.limits import FETCH_STALL_MS, FETCH_UNKNOWN_MS
from tests.support.machines.prefix_script import Script


def trickle(script: Script, segments: int, every_ms: int) -> list[str]:
    """One column of one row after another comes from A, which is asked for all; how the lookup ends."""
    for command in ("found", f"offer A m rows=0..{segments - 1}", f"manifest A m rows=0..{segments - 1}"):
        script.act(command)
    columns, effects = 0, []
    while not any(isinstance(effect, AnswerPrefix) for effect in effects):
        assert script.lookup is not None
        due_ms, next_ms = script.lookup.next_deadline_ms(), (columns + 1) * every_ms
        if due_ms is not None and due_ms < next_ms:
            effects = script.act(f"tick now={due_ms}")
            continue
        row, column = divmod(columns, 32)
        what = f"chunks A row={row} columns=0..{column}" if column < 31 else f"ready row={row}"
        effects = script.act(f"{what} now={next_ms}")
        columns += 1
    return [script.show(effect) for effect in effects]


def test_a_slow_link_is_no_stall():
    script = Script()
    script.act("want A segments=1 prefill=4000")
    assert trickle(script, 1, 20) == ["answer 1 network hit rows=1"]
    assert script.lookup is not None
    assert script.lookup.waited_ms == {}


def test_a_trickle_of_good_chunks_is_a_stall():
    script = Script()
    script.act("want A segments=1 prefill=4000")
    assert trickle(script, 1, 200) == ["charge A stalled", "answer 0 none stalled rows=0"]
    assert script.now < 4 * FETCH_STALL_MS
    assert script.lookup is not None
    assert script.lookup.waited_ms == {PeerId("A"): script.now}


@pytest.mark.parametrize("prefill", [4_000, 0])
def test_who_is_too_slow_is_charged_and_a_fetch_ends_also_where_no_prefill_was_measured(prefill):
    script = Script()
    script.act(f"want A segments=4 prefill={prefill}")
    assert trickle(script, 4, 30) == ["charge A too_slow", "answer 2 network too_slow rows=2"]
    assert script.now == FETCH_UNKNOWN_MS == fetch_budget_ms(4_000)
    assert script.lookup is not None
    assert script.lookup.waited_ms == {PeerId("A"): FETCH_UNKNOWN_MS}


def test_a_lookup_that_ends_at_its_deadline_accounts_for_who_kept_it_waiting():
    script = Script()
    script.act("want A segments=4 fetch=always deadline=1000")
    assert trickle(script, 4, 30) == ["answer 0 none deadline rows=0"]
    assert script.lookup is not None
    assert script.lookup.waited_ms == {PeerId("A"): 950}


def test_peers_that_are_silent_for_a_whole_search_are_accounted_and_late_ones_of_a_short_search_are_not_blamed():
    for prefill, waits_ms, silent in ((4_000, 200, ["B", "C"]), (1_000, 50, [])):
        script = Script()
        script.act(f"want A B C segments=1 prefill={prefill}")
        script.act("found")
        script.act("nothing A now=3")
        effects = script.act(f"silent B timeout now={waits_ms}")
        assert [script.show(effect) for effect in effects] == ["answer 0 none search_timeout rows=0"]
        assert script.lookup is not None
        assert script.lookup.waited_ms == {PeerId("B"): waits_ms, PeerId("C"): waits_ms}
        assert list(script.lookup.silent) == silent


def test_peers_are_not_blamed_for_a_search_in_which_this_node_did_not_run():
    script = Script()
    for command in ("want A segments=1 prefill=4000", "found", "tick now=400"):  # was due at 200
        script.act(command)
    assert script.lookup is not None
    assert (script.lookup.answered, script.lookup.waited_ms, script.lookup.silent) == (True, {}, {})


def test_a_silence_that_is_reported_late_counts_once():
    script = Script()
    for command in (
        "want A B segments=1 prefill=4000",
        "found",
        "offer A m rows=0 now=3",
        "tick now=200",
        "silent B timeout now=201",
    ):
        script.act(command)
    assert script.lookup is not None
    assert list(script.lookup.silent) == ["B"]


def test_a_slow_row_is_hedged_by_further_columns_of_its_only_holder():
    Script().run("""
        > want A segments=1
        find-rows 1
        > found
        find-providers A rows=1 ms=250
        > offer A m rows=0 now=0
        fetch-manifest A m
        > manifest A m rows=0 now=0
        fetch A m row=0 0..31
        > chunks A row=0 columns=0..9 now=30
        > tick now=120
        > tick now=155  # asking the same holder for more may only slow it down
        fetch A m row=0 32..63
        > ready row=0 now=100
        answer 1 network hit rows=1
    """)


def test_a_slow_row_is_hedged_by_another_producers_manifest():
    Script().run("""
        > want A B segments=1
        find-rows 1
        > found
        find-providers A B rows=1 ms=250
        > offer A m rows=0 rtt=2
        fetch-manifest A m
        > offer B n rows=0 rtt=9
        > manifest A m rows=0
        fetch A m row=0 0..31
        > tick now=90
        fetch-manifest B n
        > manifest B n rows=0 now=100
        fetch B n row=0 0..31
        > ready row=0 now=110
        answer 1 network hit rows=1
    """)


def test_a_slow_row_is_hedged_by_a_holder_of_the_same_columns():
    Script().run("""
        > want A B segments=1
        find-rows 1
        > found
        find-providers A B rows=1 ms=250
        > offer A m rows=0 rtt=2
        fetch-manifest A m
        > offer B m rows=0 rtt=9 columns=0..34
        > manifest A m rows=0
        fetch A m row=0 0..31
        > chunks A row=0 columns=0..9 now=2
        > tick now=92
        fetch B m row=0 10..28,32..34
        > ready row=0 now=80
        answer 1 network hit rows=1
    """)


def test_a_slow_manifest_is_asked_of_others_and_then_replaced():
    Script().run("""
        > want A B C segments=1
        find-rows 1
        > found
        find-providers A B C rows=1 ms=250
        > offer A m rows=0 rtt=2
        fetch-manifest A m
        > offer B m rows=0 rtt=3
        > offer C n rows=0 rtt=40
        > tick now=60
        fetch-manifest B m
        > tick now=120
        fetch-manifest C n
        > manifest C n rows=0 now=160
        fetch C n row=0 0..31
        > ready row=0 now=220
        answer 1 network hit rows=1
    """)


def test_a_stall_falls_back_to_what_is_ready_or_here():
    Script().run("""
        > want A segments=4
        find-rows 4
        > found memory=0,2
        find-providers A rows=2 ms=250
        > offer A m rows=1,3 columns=0..31
        load 0
        load 2
        fetch-manifest A m
        > ready row=0
        > ready row=2
        > manifest A m rows=0..3 now=10
        fetch A m row=1 0..31
        fetch A m row=3 0..31
        > ready row=1 now=50
        > tick now=140
        > tick now=175
        > tick now=300
        charge A stalled
        answer 3 network stalled rows=3
    """)


def test_the_budget_of_a_fetch_is_half_of_what_it_saves():
    Script().run("""
        > want A segments=1 prefill=400
        find-rows 1
        > found
        find-providers A rows=1 ms=20
        > offer A m rows=0 columns=0..31
        fetch-manifest A m
        > manifest A m rows=0
        fetch A m row=0 0..31
        > chunks A row=0 columns=0 now=100
        > tick now=190
        > tick now=200
        answer 0 none too_slow rows=0
    """)


def test_time_in_which_this_node_did_not_run_is_nobodys_stall():
    Script().run("""
        > want A segments=1
        find-rows 1
        > found
        find-providers A rows=1 ms=250
        > offer A m rows=0 columns=0..31
        fetch-manifest A m
        > manifest A m rows=0
        fetch A m row=0 0..31
        > tick now=290  # was due at 90
        > chunks A row=0 columns=0..20 now=291
        > tick now=900  # was due at 381; 50 ms may still be forgiven
        charge A stalled
        answer 0 none stalled rows=0
    """)


def test_the_deadline_is_kept_whatever_happens():
    Script().run("""
        > want A segments=2 deadline=100
        find-rows 2
        > found memory=0
        find-providers A rows=1 ms=90
        > offer A m rows=1 base=1
        load 0
        fetch-manifest A m
        > ready row=0 now=20
        > tick now=60
        > tick now=90
        answer 1 memory deadline rows=1
    """)
