"""Membership: whose records are believed, exchanged, renewed and forgotten, and what a wrong clock does to them."""

from hyperspace_vllm.core.events.conduct import ChargePeer
from hyperspace_vllm.core.events.connections import Connect, Disconnect
from hyperspace_vllm.core.peers.membership import EXCHANGE_MS, HEARTBEAT_MS
from hyperspace_vllm.core.peers.own_record import RENEW_MS
from hyperspace_vllm.core.records.ids import network_id
from hyperspace_vllm.core.records.limits import CLOCK_SKEW_MS, PEER_RECORD_TTL_MS, PEX_RECORDS_MAX
from hyperspace_vllm.core.records.peer_record import decode_peer_record
from hyperspace_vllm.core.records.peer_wire import Greet, Peers, Ping, WantPeers
from hyperspace_vllm.core.records.reason import Reason
from tests.support.machines.member_node import ME, Node, peers
from tests.support.moments import dated
from tests.support.network_world import HOUR_MS, NOW_MS, SECOND_MS, Identity, only

# --- whom it knew -------------------------------------------------------------------------------


def test_who_is_remembered_is_dialled_and_forgotten_when_gone() -> None:
    node = Node()
    node.members.remember([(Identity(1).peer, Identity(1).address), (ME.peer, ME.address)])
    effects = node.members.start(node.now)
    assert [effect.peer for effect in effects if isinstance(effect, Connect)] == [Identity(1).peer]
    assert node.usable() == set()
    node.members.on_connect_failed(Identity(1).peer, node.now)
    assert node.members.get(Identity(1).peer) is None


# --- records ------------------------------------------------------------------------------------


def test_a_greeted_peer_is_a_neighbour_and_usable() -> None:
    node = Node()
    node.connect(1)
    assert node.neighbours() == node.usable() == peers(1)
    (greeting,) = node.sent
    assert isinstance(greeting.message, Greet)
    assert decode_peer_record(greeting.message.record).peer == ME.peer


def test_a_greeting_must_be_with_the_peers_own_record() -> None:
    node = Node()
    raw = Identity(2).record()
    assert node.members.on_record(raw, Identity(1).peer, dated(NOW_MS), True) == [
        ChargePeer(Identity(1).peer, Reason.PROTOCOL)
    ]
    assert node.usable() == set()


def test_a_forged_or_foreign_record_is_charged_to_whoever_brought_it() -> None:
    node = Node()
    raw = Identity(2).record()
    forged = raw[:-1] + bytes([raw[-1] ^ 1])
    teller = Identity(1).peer
    assert node.members.on_record(forged, teller, dated(NOW_MS), False) == [ChargePeer(teller, Reason.BAD_SIGNATURE)]
    assert node.members.on_record(raw[:-1], teller, dated(NOW_MS), False) == [ChargePeer(teller, Reason.PROTOCOL)]
    assert node.learn(2, network=network_id("other")) == [ChargePeer(teller, Reason.OTHER_NETWORK)]
    assert node.usable() == set()


def test_nobody_is_blamed_for_clocks_that_differ() -> None:
    node = Node()
    too_far_ms = NOW_MS + PEER_RECORD_TTL_MS + CLOCK_SKEW_MS + 1
    for own_word in (False, True):
        assert node.learn(2, own_word, expires_at_ms=too_far_ms) == []
        assert node.learn(2, own_word, expires_at_ms=NOW_MS) == []
    assert node.usable() == set()


def test_where_there_is_a_network_key_records_without_its_tag_are_left_aside() -> None:
    node = Node()
    assert node.learn(2, network_key=None) == []
    assert node.learn(3, network_key=b"x" * 32) == []
    assert node.usable() == set()
    open_node = Node(network_key=None)
    assert open_node.learn(2, network_key=None) == []
    assert open_node.usable() == peers(2)


def test_an_older_record_changes_nothing() -> None:
    node = Node()
    node.connect(1)
    node.learn(2, sequence=5, address="10.9.9.9:1")
    node.learn(2, sequence=4)
    node.learn(2, sequence=5)
    known = node.members.get(Identity(2).peer)
    assert known is not None
    assert known.address == "10.9.9.9:1"


def test_a_record_expires_and_with_it_the_peer() -> None:
    node = Node()
    node.learn(2, expires_at_ms=NOW_MS + 5 * SECOND_MS)
    node.members.changed = False
    node.now_ms += 4 * SECOND_MS
    assert node.usable() == peers(2)
    node.run(3 * SECOND_MS)
    assert node.usable() == set()
    assert node.members.get(Identity(2).peer) is None
    assert node.members.changed


def test_a_record_of_an_earlier_life_of_ours_is_outbid() -> None:
    node = Node()
    ahead = NOW_MS + HOUR_MS  # the clock was wrong then
    assert node.members.on_record(ME.record(sequence=ahead), Identity(1).peer, dated(NOW_MS), False) == []
    node.run(HEARTBEAT_MS)
    assert node.members.own.sequence == ahead + 1
    assert node.members.get(ME.peer) is None


def test_a_forged_record_of_ours_is_charged_and_not_outbid() -> None:
    node = Node()
    raw = ME.record(sequence=NOW_MS + HOUR_MS)
    effects = node.members.on_record(raw[:-1] + bytes([raw[-1] ^ 1]), Identity(1).peer, dated(NOW_MS), False)
    assert effects == [ChargePeer(Identity(1).peer, Reason.BAD_SIGNATURE)]
    node.run(2 * HEARTBEAT_MS)
    assert node.members.own.sequence < NOW_MS + HOUR_MS


def test_the_own_record_is_renewed_in_time_and_told_to_neighbours() -> None:
    node = Node()
    node.connect(1)
    before = node.members.own
    node.sent.clear()
    node.run(RENEW_MS)
    assert node.members.own.sequence > before.sequence
    assert node.members.own.expires_at_ms >= before.expires_at_ms + RENEW_MS
    assert [send.message for send in node.sent if isinstance(send.message, Greet)] == [Greet(node.members.own_raw)]


# --- peer exchange ------------------------------------------------------------------------------


def test_peers_that_the_asker_lacks_are_told_and_silent_ones_not() -> None:
    node = Node()
    for number in (1, 2, 3, 4):
        node.connect(number)
        node.learn(number, sequence=7)
    node.learn(5)  # whom others told it of, and it hasn't met
    silent = node.members.get(Identity(4).peer)
    assert silent is not None
    silent.silent = True
    has = Identity(2).public_key[:8] + (7).to_bytes(8, "big") + Identity(3).public_key[:8] + (6).to_bytes(8, "big")
    told = node.members.answer_peers(WantPeers(has), dated(NOW_MS))
    assert {decode_peer_record(raw).peer for raw in told.records} == peers(1, 3)


def test_at_most_so_many_records_travel_at_once_and_not_always_the_same() -> None:
    node = Node()
    for number in range(1, 2 * PEX_RECORDS_MAX):
        node.connect(number)
        node.members.on_disconnected(Identity(number).peer, node.now)
    first, second = (node.members.answer_peers(WantPeers(b""), dated(NOW_MS)).records for _ in range(2))
    assert len(first) == len(second) == PEX_RECORDS_MAX
    assert set(first) != set(second)


def test_a_question_that_is_no_multiple_of_an_entry_is_answered_too() -> None:
    node = Node()
    node.connect(1)
    assert len(node.members.answer_peers(WantPeers(b"x" * 23), dated(NOW_MS)).records) == 1


def test_a_node_says_that_it_has_its_own_record() -> None:
    node = Node()
    node.connect(1)
    node.run(EXCHANGE_MS)
    want = next(send.message for send in node.sent if isinstance(send.message, WantPeers))
    known = [want.known[at : at + 16] for at in range(0, len(want.known), 16)]
    assert ME.public_key[:8] + node.members.own.sequence.to_bytes(8, "big") in known
    assert len(known) == 2


def test_the_rest_of_an_answer_with_one_lie_is_not_looked_at() -> None:
    node = Node()
    raw = Identity(2).record()
    lies = Peers(tuple(raw[:-1] + bytes([raw[-1] ^ 1]) for _ in range(5)))
    assert node.members.on_peers(Identity(1).peer, lies, dated(NOW_MS)) == [
        ChargePeer(Identity(1).peer, Reason.BAD_SIGNATURE)
    ]


def test_something_new_is_followed_by_another_exchange_soon() -> None:
    node = Node()
    node.connect(1)
    node.run(2 * EXCHANGE_MS)
    node.sent.clear()
    node.members.on_peers(Identity(1).peer, Peers((Identity(2).record(expires_at_ms=node.now_ms + 1000),)), node.now)
    node.run(1_100)
    assert any(isinstance(send.message, WantPeers) for send in node.sent)


# --- the clock ----------------------------------------------------------------------------------


def test_a_clock_that_is_set_back_stops_neither_heartbeats_nor_dials() -> None:
    node = Node(bootstrap=(2,))
    node.connect(1)
    node.run(3 * SECOND_MS)
    before = node.members.own
    node.set_by_ms = -HOUR_MS
    node.sent.clear()
    effects = node.run(12 * SECOND_MS, answer=False)
    assert [send for send in node.sent if isinstance(send.message, Ping)]
    assert only(effects, Connect)
    assert node.neighbours() == set()  # it was silent all the while
    # Others don't believe a record that is dated so far ahead.
    assert node.members.own.sequence > before.sequence
    assert node.members.own.expires_at_ms < before.expires_at_ms - HOUR_MS // 2


def test_a_clock_that_jumps_ahead_costs_the_records_and_no_connection() -> None:
    node = Node()
    node.connect(1)
    before = node.members.own
    node.set_by_ms = HOUR_MS
    effects = node.run(2 * HEARTBEAT_MS)
    assert not only(effects, Disconnect)
    assert len([send for send in node.sent if isinstance(send.message, Greet)]) > 1  # it asks for the record again
    assert node.members.own.expires_at_ms >= before.expires_at_ms + HOUR_MS
    node.learn(1, own_word=True, sequence=2)
    assert node.neighbours() == peers(1)
