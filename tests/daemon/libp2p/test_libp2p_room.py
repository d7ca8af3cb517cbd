"""Who makes room when peers hold as much as a node lets them."""

import pytest

from hyperspace_vllm.core.records.ids import PeerId
from hyperspace_vllm.core.records.rank import Tier
from hyperspace_vllm.daemon.libp2p.libp2p_room import Hold, PeerRoom

STRANGER, MEMBER, PROVEN = Tier


def fill(room: PeerRoom, tier: Tier, peers: int, size: int) -> list[Hold]:
    """Those of the holds that got in and lost theirs later are in the list that they empty."""
    holds: list[Hold] = []
    for number in range(peers):
        hold = Hold(PeerId(f"{tier.name} {number}"), tier, None)
        hold.lose = lambda hold=hold: holds.remove(hold)
        if room.take(hold, size):
            holds.append(hold)
    return holds


@pytest.mark.parametrize(("tier", "fits"), [(STRANGER, 4), (MEMBER, 8), (PROVEN, 8)])
def test_strangers_together_have_a_part_only(tier: Tier, fits: int) -> None:
    assert len(fill(PeerRoom(4, 8, 16), tier, 20, 2)) == fits


@pytest.mark.parametrize(
    ("holders", "newcomer", "size", "gets_in"),
    [
        (STRANGER, STRANGER, 1, True),  # it holds less
        (STRANGER, STRANGER, 2, False),  # as much: they would take turns in losing theirs
        (STRANGER, MEMBER, 4, True),
        (MEMBER, STRANGER, 1, False),
        (MEMBER, MEMBER, 1, True),
        (MEMBER, PROVEN, 4, True),
        (PROVEN, MEMBER, 1, False),
    ],
)
def test_who_counts_less_or_holds_more_makes_room(holders: Tier, newcomer: Tier, size: int, gets_in: bool) -> None:
    room = PeerRoom(4, 16, 16)
    holds = fill(room, holders, 8, 2)
    assert room.take(Hold(PeerId("newcomer"), newcomer, None), size) is gets_in
    assert len(holds) == 8 - (gets_in * (size + 1)) // 2


def test_what_is_taken_up_already_makes_no_room() -> None:
    room = PeerRoom(16, 16, 16)
    taken_up = Hold(PeerId("stranger"), STRANGER, None)
    assert room.take(taken_up, 16)
    assert not room.take(Hold(PeerId("proven"), PROVEN, None), 1)
    room.give_back(taken_up)
    room.give_back(taken_up)
    assert room.take(Hold(PeerId("proven"), PROVEN, None), 16)
    assert not room.take(Hold(PeerId("another"), PROVEN, None), 1)
