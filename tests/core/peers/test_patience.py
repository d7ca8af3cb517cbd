"""For whom a request may wait: what a delivery earns, what a silence costs, and what members are lent."""

import pytest

from hyperspace_vllm.core.peers.patience import EARNED_MAX_MS, EARNED_MS, LENT_MAX_MS, LENT_SHARE
from hyperspace_vllm.core.peers.standing import Delivered, Standings
from hyperspace_vllm.core.records.ids import PeerId
from hyperspace_vllm.core.records.limits import PEERS_KNOWN_MAX
from tests.support.moments import at

PEER, OTHER = PeerId("peer"), PeerId("other")


@pytest.mark.parametrize(
    ("deliveries", "wasted_ms", "has_earned"),
    [
        (0, 0, False),
        (1, 0, True),
        (1, EARNED_MS - 1, True),
        (1, EARNED_MS, False),
        (2, EARNED_MS, True),
        (1_000, EARNED_MAX_MS - 1, True),
        (1_000, EARNED_MAX_MS, False),
    ],
)
def test_a_peer_may_waste_what_its_deliveries_earned(deliveries: int, wasted_ms: int, has_earned: bool) -> None:
    standings = Standings(bytes(32))
    for _ in range(deliveries):
        standings.note(Delivered(PEER, 1, 1), at(0))
    standings.wasted({PEER: wasted_ms}, at(0))
    assert standings.has_earned(PEER) is has_earned
    assert standings.lends(at(0))


def test_what_members_that_earned_nothing_waste_is_lent_once_however_many_they_are() -> None:
    standings = Standings(bytes(32))
    crowd = {PeerId(f"member {number}"): 300 for number in range(3)}
    for _ in range(LENT_MAX_MS // 300):
        assert standings.lends(at(0))
        standings.wasted(crowd, at(0))
    assert not standings.lends(at(0))
    assert standings.lends(at(round(1 / LENT_SHARE)))
    standings.wasted({}, at(10_000_000))
    standings.wasted({OTHER: LENT_MAX_MS}, at(10_000_000))
    assert not standings.lends(at(10_000_000))


def test_a_clock_that_is_set_back_lends_nothing_and_takes_nothing() -> None:
    standings = Standings(bytes(32))
    standings.wasted({OTHER: LENT_MAX_MS - 1}, at(1_000_000))
    assert standings.lends(at(1_000_000, -1_000_000))
    standings.wasted({OTHER: 1}, at(1_000_000, -1_000_000))
    assert not standings.lends(at(1_000_000, -1_000_000))
    assert standings.lends(at(1_001_000, -1_000_000))


def test_those_that_delivered_longest_ago_are_forgotten() -> None:
    standings = Standings(bytes(32))
    standings.note(Delivered(PEER, 1, 1), at(0))
    for number in range(PEERS_KNOWN_MAX - 1):
        standings.note(Delivered(PeerId(f"peer {number}"), 1, 1), at(1))
    standings.note(Delivered(OTHER, 1, 1), at(2))
    assert not standings.has_earned(PEER)
    assert standings.has_earned(OTHER)
