"""The digest of prefixes in VRAM: its size, its errors and its bytes, by tables and vectors."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperspace_vllm.core.records.ids import network_id, sha256, wire_id
from hyperspace_vllm.core.records.limits import VRAM_SEGMENTS_MAX
from hyperspace_vllm.core.records.peer_record import VRAM_DIGEST_BYTES_MAX
from hyperspace_vllm.core.records.vram_digest import (
    approximate_count,
    difference,
    digest_bytes,
    false_positives,
    make_digest,
    overlap,
    positions_each,
)
from tests.support.paths import VECTORS

CASES = json.loads((VECTORS / "vram_digest.json").read_text())


def ids(count: int, name: str = "segment") -> list[bytes]:
    return [sha256(f"{name} {number}".encode()) for number in range(count)]


@pytest.mark.parametrize(
    ("count", "size"),
    [
        (0, 0),
        (1, 64),
        (49, 64),
        (50, 128),
        (100, 128),
        (101, 256),
        (3275, 4096),
        (3276, 4096),
        (VRAM_SEGMENTS_MAX, 4096),
    ],
)
def test_a_digest_is_as_long_as_its_ids_need_and_never_too_long(count: int, size: int) -> None:
    assert digest_bytes(count) == len(make_digest(ids(count))) == size <= VRAM_DIGEST_BYTES_MAX


@pytest.mark.parametrize(
    ("bits", "count", "positions"), [(496, 1, 7), (496, 49, 7), (32752, 3275, 7), (32752, 4096, 6), (32752, 8192, 3)]
)
def test_ids_have_seven_positions_and_fewer_where_room_is_short(bits: int, count: int, positions: int) -> None:
    assert positions_each(bits, count) == positions


@pytest.mark.parametrize(
    ("bits", "positions", "count", "share"),
    [
        (496, 7, 0, 0.0),
        (496, 7, 49, 0.0078),
        (32752, 7, 3275, 0.0082),
        (32752, 6, 4096, 0.0216),
        (32752, 3, 8192, 0.147),
        (8, 1, 1000, 1.0),
    ],
)
def test_the_share_of_false_positives_by_the_formula(bits: int, positions: int, count: int, share: float) -> None:
    assert false_positives(bits, positions, count) == pytest.approx(share, abs=0.0005)


@pytest.mark.parametrize("count", [49, 400, 3275, VRAM_SEGMENTS_MAX])
def test_the_share_of_false_positives_is_what_the_formula_says(count: int) -> None:
    digest = make_digest(ids(count))
    wrong = sum(overlap(digest, [other]) for other in ids(20_000, "other")) / 20_000
    expected = false_positives(8 * (len(digest) - 2), digest[1], count)
    assert wrong == pytest.approx(expected, rel=0.5)


@given(st.integers(1, 300), st.data())
def test_every_id_that_was_put_in_is_found(count: int, data: st.DataObject) -> None:
    present = ids(count)
    digest = make_digest(data.draw(st.permutations(present)))
    assert overlap(digest, present) == count
    assert digest == make_digest(present)


@pytest.mark.parametrize(("missing", "leading"), [(0, 0), (1, 1), (7, 7), (None, 12)])
def test_overlap_counts_leading_segments_only(missing: int | None, leading: int) -> None:
    prompt = ids(12)
    digest = make_digest([each for number, each in enumerate(prompt) if number != missing])
    assert overlap(digest, prompt) == leading


@pytest.mark.parametrize("count", [0, 1, 10, 49, 400, 3275, VRAM_SEGMENTS_MAX])
def test_a_digest_tells_about_how_many_it_holds(count: int) -> None:
    assert approximate_count(make_digest(ids(count))) == pytest.approx(count, rel=0.06)


@pytest.mark.parametrize(
    "garbage",
    [b"", b"\x01", b"\x01\x07", b"\x02\x07\xff", b"\x00\x07\xff", b"\x01\x00\xff", b"\x01\x11\xff", b"bloom"],
)
def test_a_digest_that_cannot_be_read_says_nothing(garbage: bytes) -> None:
    assert overlap(garbage, ids(3)) == approximate_count(garbage) == 0


@given(st.binary(max_size=80))
def test_any_bytes_are_a_digest_of_something(raw: bytes) -> None:
    assert 0 <= overlap(raw, ids(3)) <= 3
    assert approximate_count(raw) >= 0


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [(40, 40, 0.0), (0, 0, 0.0), (0, 1, 1.0), (49, 50, 1.0), (400, 399, 0.003), (400, 360, 0.07), (3000, 2997, 0.001)],
)
def test_how_much_two_digests_differ(one: int, other: int, share: float) -> None:
    assert difference(make_digest(ids(one)), make_digest(ids(other))) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("vector", CASES["digests"])
def test_vectors(vector: dict[str, object]) -> None:
    network = network_id(str(CASES["network"]))
    keys = [sha256(name.encode()) for name in vector["key_names"]]  # type: ignore[attr-defined]
    present = [wire_id(network, key) for key in keys]
    assert [each.hex() for each in present] == vector["ids"]
    assert make_digest(present).hex() == vector["digest"]
