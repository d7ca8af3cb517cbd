"""Which rows a prefix needs, how far the rows at hand reach, and which holder sends which columns."""

from collections.abc import Callable, Collection

import pytest

from hyperspace_vllm.core.prefix.plan import assign_columns, needed, usable_end
from hyperspace_vllm.core.records.ids import PeerId
from tests.support.machines.prefix_script import MIXED


def test_columns_come_lowest_first_from_the_preferred_holder() -> None:
    a, b = PeerId("A"), PeerId("B")
    assert assign_columns(3, 0b1, [(a, 0b10101), (b, 0b11111)]) == {b: 0b1010, a: 0b100}
    assert assign_columns(32, 0, [(a, 0b111)]) == {a: 0b111}
    assert assign_columns(0, 0, [(a, 0b111)]) == {}


@pytest.mark.parametrize(
    ("missing", "start", "expected"),
    [
        ((), 0, 6),
        ({(0, 0)}, 0, 0),  # full attention needs the first segment
        ({(0, 0)}, 256, 6),  # unless the engine has it
        ({(4, 0)}, 0, 4),
        ({(0, 1), (1, 1)}, 0, 6),  # a window of 512 reads the last two segments only
        ({(5, 1)}, 0, 5),
        ({(4, 1)}, 0, 4),  # 6 and 5 need it, 4 doesn't
        ({(3, 1), (5, 0)}, 0, 3),
    ],
)
def test_the_longest_usable_prefix_needs_every_full_row_and_the_tail_of_windows(
    missing: Collection[tuple[int, int]], start: int, expected: int
) -> None:
    end = usable_end(MIXED, start, 6, lambda segment, part: (segment, part) not in missing)
    assert end == expected


def among(places: Collection[tuple[int, int]]) -> Callable[[int, int], bool]:
    return lambda segment, part: (segment, part) in places


def test_what_an_end_needs_is_what_makes_it_usable() -> None:
    for start in (0, 255, 256, 600):
        for end in range(start // 256 + 1, 7):
            places = set(needed(MIXED, start, end))
            assert usable_end(MIXED, start, end, among(places)) == end
            for hole in places:
                rest = places - {hole}
                assert usable_end(MIXED, start, end, among(rest)) != end
