"""The machine of one lookup, by its transcripts; what one cannot tell is here in Python."""

from pathlib import Path

import pytest

from hyperspace_vllm.core.events.prefix_reading import AnswerPrefix, FetchManifest, FetchRow, ProviderAnswered, RowOffer
from hyperspace_vllm.core.prefix.cost_model import RateEstimator
from hyperspace_vllm.core.records.ids import PeerId
from hyperspace_vllm.core.records.limits import MiB
from tests.support.machines.prefix_script import Script, manifest, mask
from tests.support.machines.transcripts import check, transcripts_of


@pytest.mark.parametrize("path", transcripts_of("core/prefix"), ids=lambda path: path.stem)
def test_a_lookup_does_what_its_transcript_says(path: Path) -> None:
    check(path)


@pytest.mark.parametrize(
    ("want", "reason"),
    [
        ("A segments=2 scope=private", "local_only"),
        ("A segments=2 fetch=never", "local_only"),
        ("segments=2", "no_peers"),
        ("A segments=2 prefill=99", "too_short"),
    ],
)
def test_nobody_is_asked_where_that_is_forbidden_or_cannot_pay(want: str, reason: str) -> None:
    Script().run(f"""
        > want {want}
        find-rows 2
        > found
        answer 0 none {reason} rows=0
    """)


def test_a_transfer_that_would_take_too_long_is_not_begun_unless_forced() -> None:
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


def test_a_holder_of_all_rows_is_asked_for_a_bounded_number_at_once() -> None:
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


def test_64_mib_take_at_most_200_events() -> None:
    """With the driver's contract at its worst: two ChunksVerified and a RowReady a row of 1 MiB."""
    script = Script()
    effects = [*script.act("want A segments=64"), *script.act("found")]
    offers = tuple(
        RowOffer(row.id, manifest("mn"[i // 32]), i % 32, mask("0..63")) for i, row in enumerate(script.rows)
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


@pytest.mark.parametrize("lie", ["rows=1", "rows=0 length=9", "rows=0 fingerprint=g", "rows=0 chunk=4194560"])
def test_an_offer_that_its_manifest_contradicts_is_charged(lie: str) -> None:
    Script().run(f"""
        > want A B segments=2
        find-rows 2
        > found memory=1
        find-providers A B rows=1 ms=250
        > offer A m rows=0 rtt=1
        load 1
        fetch-manifest A m
        > offer B n rows=0 rtt=9
        > manifest A m {lie}
        charge A false_offer
        fetch-manifest B n
    """)
