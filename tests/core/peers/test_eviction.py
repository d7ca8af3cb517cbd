"""Who goes first where peers want more room than there is."""

import pytest

from hyperspace_vllm.core.peers.address import source_of
from hyperspace_vllm.core.peers.eviction import select_evicted
from hyperspace_vllm.core.records.rank import Acquaintance, Rank

Held = list[tuple[str, Acquaintance, int]]


def held(*rows: tuple[str, Rank, str, int]) -> Held:
    return [(name, Acquaintance(rank, source), size) for name, rank, source, size in rows]


LISTED, MET, TOLD = Rank.LISTED, Rank.MET, Rank.TOLD


@pytest.mark.parametrize(
    ("rows", "room", "source_room", "gone"),
    [
        (held(), 0, 0, []),
        (held(("a", TOLD, "x", 5)), 5, 5, []),
        # A source holds no more than its share, whatever room there is.
        (held(("a", TOLD, "x", 3), ("b", TOLD, "x", 3), ("c", TOLD, "y", 3)), 99, 5, ["b"]),
        # In its share the told go before the met, large ones before small ones, and of equals the newest.
        (held(("a", MET, "x", 3), ("b", TOLD, "x", 1), ("c", MET, "x", 9)), 99, 5, ["b", "c"]),
        (held(("a", TOLD, "x", 1), ("b", TOLD, "x", 4), ("c", TOLD, "x", 2)), 99, 3, ["b"]),
        (held(("a", TOLD, "x", 1), ("b", TOLD, "x", 1), ("c", TOLD, "x", 1)), 99, 1, ["c", "b"]),
        # Where all is full the told go first, of whatever source, and of those the ones of the largest source.
        (held(("a", MET, "x", 4), ("b", TOLD, "y", 1)), 4, 4, ["b"]),
        (held(("a", TOLD, "x", 3), ("b", TOLD, "y", 2), ("c", TOLD, "y", 2)), 5, 9, ["c"]),
        (held(("a", MET, "x", 3), ("b", MET, "y", 2), ("c", MET, "y", 2)), 3, 9, ["c", "a"]),
        # Many small ones of one source push out no large one of another.
        (held(("a", TOLD, "x", 10), *((f"{n}", TOLD, "y", 1) for n in range(12))), 20, 15, ["11", "10"]),
        # The listed are of no source and go last.
        (held(("a", LISTED, "x", 9), ("b", LISTED, "x", 9), ("c", MET, "x", 1)), 18, 5, ["c"]),
        (held(("a", LISTED, "x", 9), ("b", LISTED, "x", 9)), 10, 5, ["b"]),
    ],
)
def test_what_one_source_holds_makes_room_first(rows: Held, room: int, source_room: int, gone: list[str]) -> None:
    assert select_evicted(rows, room, source_room) == gone


@pytest.mark.parametrize(
    ("host", "source"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("", ""),
    ],
)
def test_a_machine_is_its_address_or_its_ipv6_subnet(host: str, source: str) -> None:
    assert source_of(host) == source
