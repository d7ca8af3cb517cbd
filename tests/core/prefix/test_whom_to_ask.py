"""Which peers a prefix lookup asks: at most eight, those with hints for the longest prefix first."""

import random

import pytest

from hyperspace_vllm.core.events.node_state import Tick
from hyperspace_vllm.core.events.prefix_reading import FindRowHolders, PrefixWanted, RowsFound
from hyperspace_vllm.core.peers.avoidance import LIAR_MS
from hyperspace_vllm.core.peers.patience import EARNED_MS, LENT_MAX_MS, LENT_SHARE
from hyperspace_vllm.core.peers.standing import STALLED_MS, Delivered, Failed, Standings
from hyperspace_vllm.core.prefix.prefix_part import ASKED_MAX, PrefixPart
from hyperspace_vllm.core.records.ids import PeerId, RowId, SegmentKey, network_id, row_id, row_key, sha256
from hyperspace_vllm.core.records.layout import Layout, Part
from hyperspace_vllm.core.records.reason import Reason
from tests.support.moments import at

NETWORK = network_id("test")
WINDOWED = Layout(bytes(32), 256, (Part(512, 1000), Part(0, 1000)), 1)  # the second part is the full one
PEERS = tuple(PeerId(f"peer {number}") for number in range(50))
KEYS = tuple(SegmentKey(sha256(bytes([number]))) for number in range(6))
ROWS = tuple(row_id(NETWORK, row_key(key, 1, 0)) for key in KEYS)


def asked(node: PrefixPart, lookup: int = 1, may_ask_peers: bool = True, now_ms: int = 0) -> tuple[PeerId, ...]:
    """Whom the lookup of KEYS asks."""
    wanted = PrefixWanted(lookup, WINDOWED, KEYS, 0, 0, 5000, may_ask_peers)
    found = RowsFound(lookup, frozenset(), frozenset(), frozenset(), 1 << 62)
    effects = node.handle(wanted, at(now_ms)) + node.handle(found, at(now_ms))
    return next((effect.peers for effect in effects if isinstance(effect, FindRowHolders)), ())


def make(hints: dict[RowId, tuple[PeerId, ...]], peers: tuple[PeerId, ...] = PEERS) -> PrefixPart:
    return PrefixPart(
        NETWORK, peers, "always", random.Random(1), Standings(bytes(32)), lambda row, now: hints.get(row, ())
    )


def test_without_hints_eight_peers_are_asked_and_not_always_the_same() -> None:
    node = make({})
    first, second = asked(node, 1), asked(node, 2)
    assert len(set(first)) == len(set(second)) == ASKED_MAX
    assert first != second


def test_who_is_hinted_for_the_longest_prefix_is_asked_first() -> None:
    hints = {ROWS[1]: PEERS[:3], ROWS[4]: PEERS[40:42], ROWS[0]: PEERS[3:4]}
    peers = asked(make(hints))
    assert peers[:6] == PEERS[40:42] + PEERS[:4]
    assert len(set(peers)) == ASKED_MAX


def test_more_hints_than_may_be_asked_leave_out_those_of_shorter_prefixes() -> None:
    hints = {ROWS[5]: PEERS[10:15], ROWS[3]: PEERS[12:25], ROWS[0]: PEERS[:10]}
    peers = asked(make(hints))
    assert peers == PEERS[10 : 10 + ASKED_MAX]


def test_a_hint_at_somebody_who_may_not_be_asked_is_ignored() -> None:
    gone = PeerId("gone")
    assert gone not in asked(make({ROWS[5]: (gone, PEERS[7])}))
    assert asked(make({ROWS[5]: (gone, PEERS[7])}))[0] == PEERS[7]
    assert asked(make({ROWS[5]: PEERS}), may_ask_peers=False) == ()


def test_peers_that_come_and_go_are_asked_and_asked_no_more() -> None:
    node = make({}, ())
    assert asked(node, 1) == ()
    node.set_peers(PEERS[:2])
    assert set(asked(node, 2)) == set(PEERS[:2])
    node.set_peers(PEERS[1:2])
    assert asked(node, 3) == PEERS[1:2]


def test_strangers_are_not_asked_for_kv() -> None:
    known = PEERS[3:5]
    node = PrefixPart(
        NETWORK,
        PEERS,
        "always",
        random.Random(1),
        Standings(bytes(32)),
        lambda row, now: PEERS,
        lambda peer: peer in known,
    )
    assert set(asked(node)) == set(known)


@pytest.mark.parametrize(
    ("reason", "for_ms"),
    [(Reason.BAD_SIGNATURE, LIAR_MS), (Reason.PROTOCOL, LIAR_MS), (Reason.STALLED, STALLED_MS), (Reason.TIMEOUT, 0)],
)
def test_who_lied_anywhere_or_stalled_is_not_asked_for_kv_for_a_while(reason: Reason, for_ms: int) -> None:
    """`Reason.TIMEOUT` is of a request for a response: another connection, which says nothing of this one."""
    standings, guilty = Standings(bytes(32)), PEERS[0]
    node = PrefixPart(NETWORK, PEERS[:2], "always", random.Random(1), standings)
    standings.note(Failed(guilty, reason), at(0))
    assert (guilty in asked(node, 1)) is (for_ms == 0)
    assert (guilty in asked(node, 2, now_ms=max(for_ms - 1, 0))) is (for_ms == 0)
    assert guilty in asked(node, 3, now_ms=for_ms)


def silent_lookup(node: PrefixPart, lookup: int, now_ms: int) -> tuple[PeerId, ...]:
    """A lookup that waits its search out for peers that say nothing; whom it asked."""
    wanted = PrefixWanted(lookup, WINDOWED, KEYS, 0, 4000, 5000, True)
    found = RowsFound(lookup, frozenset(), frozenset(), frozenset(), 1 << 62)
    effects = node.handle(wanted, at(now_ms)) + node.handle(found, at(now_ms))
    node.handle(Tick(), at(now_ms + 200))
    return next((effect.peers for effect in effects if isinstance(effect, FindRowHolders)), ())


def test_a_peer_that_does_not_say_what_it_has_is_avoided_for_longer_every_time() -> None:
    node = PrefixPart(NETWORK, PEERS[:1], "auto", random.Random(1), Standings(bytes(32)))
    asked_at = [now for now in range(0, 60_000, 1_000) if silent_lookup(node, now, now)]
    assert asked_at == [0, 6_000, 17_000, 38_000]


def test_a_peer_that_has_delivered_may_be_silent_for_as_long_as_that_earned_it() -> None:
    standings = Standings(bytes(32))
    for _ in range(2):
        standings.note(Delivered(PEERS[0], 1, 1), at(0))
    node = PrefixPart(NETWORK, PEERS[:1], "auto", random.Random(1), standings)
    asked_at = [now for now in range(0, 6_000, 300) if silent_lookup(node, now, now)]
    assert asked_at == [0, 300, 600]
    assert 200 * len(asked_at) == EARNED_MS * 2


def test_members_that_bring_nothing_make_requests_wait_no_longer_than_they_are_lent_however_many_they_are() -> None:
    members = tuple(PeerId(f"member {number}") for number in range(1_000))
    standings = Standings(bytes(32))
    earned = PeerId("earned")
    standings.note(Delivered(earned, 1, 1), at(0))
    node = PrefixPart(NETWORK, (*members, earned), "auto", random.Random(1), standings)
    waits = 0
    for lookup in range(100):
        peers = silent_lookup(node, lookup, 300 * lookup)
        waits += bool(set(peers) - {earned})
    assert 200 * waits <= LENT_MAX_MS + LENT_SHARE * 30_000 + 200
    assert not standings.lends(at(30_000))
    standings.note(Delivered(earned, 1, 1), at(200_000 - 1))
    node.set_peers((*members[500:], earned))
    assert standings.lends(at(200_000))
