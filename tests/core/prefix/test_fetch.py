"""The ordinary course of a lookup, by transcripts: what is here, what peers have, and how much is asked of whom."""

import pytest

from hyperspace_vllm.core.events.prefix_reading import AnswerPrefix, FetchManifest, FetchRow, ProviderAnswered, RowOffer
from hyperspace_vllm.core.prefix.cost_model import RateEstimator
from hyperspace_vllm.core.records.ids import PeerId
from hyperspace_vllm.core.records.limits import MiB
from tests.support.machines.prefix_script import Script, manifest, mask


def test_a_local_prefix_is_loaded_and_answered_without_asking_anybody():
    Script().run("""
        > want A segments=3
        find-rows 3
        > found memory=0,2 disk=1
        load 0  # at once: making room for row 1 must not take what is needed next
        load 2
        load 1
        > ready row=0
        > ready row=2
        > ready row=1
        answer 3 disk hit rows=3
        > ready row=1
    """)


def test_a_prefix_comes_from_a_peer():
    Script().run("""
        > want A segments=2 prefill=2000
        find-rows 2
        > found
        find-providers A rows=2 ms=100
        > offer A m rows=0..1 now=3
        fetch-manifest A m
        > manifest A m rows=0..1 now=8
        fetch A m row=0 0..31
        fetch A m row=1 0..31
        > ready row=0 now=20
        > ready row=1 now=30
        answer 2 network hit rows=2
    """)


def test_what_is_here_already_is_not_fetched():
    Script().run("""
        > want A segments=3 prefill=3000
        find-rows 3
        > found memory=0
        find-providers A rows=2 ms=100
        > offer A m rows=1..2 base=1
        load 0
        fetch-manifest A m
        > ready row=0
        > manifest A m rows=1..2
        fetch A m row=1 0..31
        fetch A m row=2 0..31
        > ready row=1
        > ready row=2
        answer 3 network hit rows=3
    """)


def test_the_search_ends_when_its_share_of_the_prefill_is_spent():
    Script().run("""
        > want A B segments=2 prefill=2000
        find-rows 2
        > found memory=0
        find-providers A B rows=1 ms=50
        > nothing A now=2
        > tick now=50
        load 0
        > ready row=0
        answer 1 memory hit rows=1
    """)
    Script().run("""
        > want A segments=2 prefill=2000
        find-rows 2
        > found
        find-providers A rows=2 ms=100
        > tick now=100
        answer 0 none search_timeout rows=0
    """)


def test_a_frozen_peer_does_not_hold_up_one_who_has_everything():
    Script().run("""
        > want A B segments=1 prefill=2000
        find-rows 1
        > found
        find-providers A B rows=1 ms=100
        > offer B m rows=0 now=2
        fetch-manifest B m
    """)


@pytest.mark.parametrize(
    ("want", "reason"),
    [
        ("A segments=2 scope=private", "local_only"),
        ("A segments=2 fetch=never", "local_only"),
        ("segments=2", "no_peers"),
        ("A segments=2 prefill=99", "too_short"),
    ],
)
def test_nobody_is_asked_where_that_is_forbidden_or_cannot_pay(want, reason):
    Script().run(f"""
        > want {want}
        find-rows 2
        > found
        answer 0 none {reason} rows=0
    """)


def test_a_start_beyond_the_last_segment_is_answered_at_once():
    Script().run("""
        > want A segments=2 start=512
        answer 0 none nothing_beyond rows=0
    """)


def test_a_transfer_that_would_take_too_long_is_not_begun_unless_forced():
    rates = RateEstimator()
    rates.measured(PeerId("A"), MiB, 0, 1000, 0)
    rates.measured(PeerId("A"), MiB, 0, 1000, 0)
    rates.measured(PeerId("A"), MiB, 0, 1000, 0)
    Script(rates=rates).run("""
        > want A segments=2 prefill=300
        find-rows 2
        > found
        find-providers A rows=2 ms=15
        > offer A m rows=0..1
        answer 0 none not_worth rows=0
    """)
    Script(rates=rates).run("""
        > want A segments=2 prefill=300 fetch=always
        find-rows 2
        > found
        find-providers A rows=2 ms=1000
        > offer A m rows=0..1
        fetch-manifest A m
    """)


def test_data_columns_are_preferred_and_put_together_from_several_holders():
    Script().run("""
        > want A B segments=1
        find-rows 1
        > found
        find-providers A B rows=1 ms=250
        > offer A m rows=0 columns=0..15,32..40
        > offer B m rows=0 columns=8..40
        fetch-manifest A m
        > manifest A m rows=0
        fetch A m row=0 0..15
        fetch B m row=0 16..31
        > ready row=0
        answer 1 network hit rows=1
    """)


def test_holders_that_lack_32_columns_between_them_are_a_miss():
    Script().run("""
        > want A B segments=1
        find-rows 1
        > found
        find-providers A B rows=1 ms=250
        > offer A m rows=0 columns=0..15
        > offer B n rows=0 columns=0..30
        answer 0 none not_found rows=0
    """)


def test_a_holder_of_all_rows_is_asked_for_a_bounded_number_at_once():
    script = Script()
    script.run("""
        > want A segments=64
        find-rows 64
        > found
        find-providers A rows=64 ms=250
    """)
    script.run("""
        > offer A m rows=0..31
        fetch-manifest A m
    """)
    effects = script.act("manifest A m rows=0..31")
    assert len([e for e in effects if isinstance(e, FetchRow)]) == 16
    assert [script.show(e) for e in script.act("ready row=0")] == ["fetch A m row=16 0..31"]


def test_64_mib_take_at_most_200_events():
    """With the driver's contract at its worst: two ChunksVerified and a RowReady a row of 1 MiB."""
    script = Script()
    effects = [*script.act("want A segments=64"), *script.act("found")]
    offers = tuple(
        RowOffer(row.id, manifest("mn"[i // 32])[:32], i % 32, mask("0..63")) for i, row in enumerate(script.rows)
    )
    assert script.lookup is not None
    effects += script.lookup.handle(ProviderAnswered(1, PeerId("A"), offers, 2), 0)
    script.events += 1
    answer: AnswerPrefix | None = None
    while effects:
        effect = effects.pop(0)
        match effect:
            case FetchManifest():
                rows = "0..31" if effect.manifest == manifest("m") else "32..63"
                effects += script.act(f"manifest A {effect.manifest[:1].decode()} rows={rows}")
            case FetchRow():
                row = script.numbers[effect.row_key]
                effects += script.act(f"chunks A row={row} columns=0..15")
                effects += script.act(f"chunks A row={row} columns=0..30")
                effects += script.act(f"ready row={row}")
            case AnswerPrefix():
                answer = effect
    assert answer is not None
    assert (answer.end_segment, answer.reason) == (64, "hit")
    assert script.events <= 200
