"""Membership under floods: invented peers, many names of one host, strangers, connections beyond the bound."""

import pytest

from hyperspace_vllm.core.events.connections import Connect, Disconnect
from hyperspace_vllm.core.peers.membership import EXCHANGE_MS, GREET_BY_MS, HEARTBEAT_MS
from hyperspace_vllm.core.peers.neighbours import DIALS_MAX, NEIGHBOURS_MAX, OUTBOUND_MIN, TARGET_NEIGHBOURS
from hyperspace_vllm.core.peers.peer_table import Peer, PeerTable
from hyperspace_vllm.core.peers.standing import Delivered
from hyperspace_vllm.core.records.ids import PeerId
from hyperspace_vllm.core.records.limits import (
    CLOCK_SKEW_MS,
    DIALS_BURST_S,
    DIALS_OF_PEER_PER_S,
    DIALS_PER_S,
    DIALS_TO_HOST_PER_S,
    GREETED_INBOUND_MAX,
    PEER_RECORD_TTL_MS,
    PEERS_KNOWN_MAX,
    PEERS_OF_SOURCE_MAX,
    PEX_OF_SOURCE_MAX,
    UNGREETED_INBOUND_MAX,
)
from hyperspace_vllm.core.records.peer_record import decode_peer_record
from hyperspace_vllm.core.records.peer_wire import Ping, WantPeers
from hyperspace_vllm.core.records.rank import Acquaintance, Rank
from tests.support.machines.member_node import ME, Node, arrive, peers
from tests.support.moments import dated
from tests.support.network_world import NOW_MS, SECOND_MS, Identity, only


def test_a_neighbour_that_invents_peers_displaces_its_own_inventions() -> None:
    node = Node(network_key=None)
    node.connect(1, 2)
    honest = range(10, 40)
    for number in honest:
        node.learn(number, told_by=2, network_key=None)
    for number in range(100, 100 + PEERS_KNOWN_MAX + 200):
        node.learn(number, told_by=1, network_key=None, expires_at_ms=NOW_MS + PEER_RECORD_TTL_MS + CLOCK_SKEW_MS)
    assert len(node.members._peers) == len(honest) + 2 + PEERS_OF_SOURCE_MAX
    assert peers(1, 2, *honest) <= node.usable()


def test_what_one_host_brings_under_many_names_holds_a_quarter_of_the_table() -> None:
    node = Node(network_key=None)
    for number in range(10, 10 + 2 * PEERS_OF_SOURCE_MAX):
        who = Identity(number)
        node.members.on_connected(who.peer, "198.51.100.7", node.now)
        node.learn(number, own_word=True, network_key=None)
        node.members.on_disconnected(who.peer, node.now)
        node.learn(2_000 + number, told_by=number, network_key=None)  # by who has left: counted as that host's too
    assert len(node.members._peers) <= PEERS_OF_SOURCE_MAX + DIALS_MAX


def test_a_node_tells_others_of_a_few_of_those_that_it_met_at_one_host() -> None:
    node = Node()
    for number in range(10, 10 + 2 * PEX_OF_SOURCE_MAX):
        node.members.on_connected(Identity(number).peer, "10.7.7.7", node.now)
        node.learn(number, own_word=True)
        node.members.on_disconnected(Identity(number).peer, node.now)
    node.connect(1, 2)
    told = {decode_peer_record(raw).peer for raw in node.members.answer_peers(WantPeers(b""), dated(NOW_MS)).records}
    assert told == peers(1, 2, *range(10, 10 + PEX_OF_SOURCE_MAX))


def test_the_listed_and_those_who_were_met_outlive_those_that_others_tell_of() -> None:
    table = PeerTable()
    listed = Peer(PeerId("listed"), listed=True)
    met = Peer(PeerId("met"), heard_at_ms=1, source="a")
    configured = Peer(PeerId("configured"), configured="10.0.0.1:1")
    for peer in (listed, met, configured):
        assert table.add(peer)
    for number in range(2 * PEERS_KNOWN_MAX):
        table.add(Peer(PeerId(str(number)), source=str(number % 7)))
    assert len(table) == PEERS_KNOWN_MAX
    assert [peer for peer in table if not peer.peer.isdigit()] == [listed, met, configured]


def test_a_table_full_of_connected_peers_takes_nobody_else() -> None:
    table = PeerTable()
    for number in range(PEERS_KNOWN_MAX):
        assert table.add(Peer(PeerId(str(number)), connected=True))
    assert not table.add(Peer(PeerId("one more")))


def test_invented_peers_cause_no_more_than_so_many_dials() -> None:
    node = Node(network_key=None)
    node.connect(1)
    for number in range(100, 600):
        node.learn(number, network_key=None)
    effects = node.run(60 * SECOND_MS)  # each dial fails at once
    assert 60 < len(only(effects, Connect)) <= DIALS_PER_S * (DIALS_BURST_S + 60)


def test_a_third_party_that_many_peers_name_as_theirs_is_seldom_dialled() -> None:
    node = Node(network_key=None)
    node.connect(1)
    for number in range(100, 300):
        node.learn(number, network_key=None, address=f"203.0.113.9:{number}")
    effects = node.run(60 * SECOND_MS)
    assert 8 <= len(only(effects, Connect)) <= DIALS_TO_HOST_PER_S * (DIALS_BURST_S + 60)


def test_only_the_address_of_its_connection_is_a_peers_own() -> None:
    node = Node()
    node.connect(1, 2)
    for number, endpoint in ((1, Identity(1).host + ":9"), (2, "10.9.9.9:9"), (3, Identity(3).host + ":9")):
        node.learn(number, own_word=number < 3, sequence=2, endpoint=endpoint)
    node.learn(4, endpoint="127.0.0.1:9")
    told = {each.peer: (each.address, each.own) for each in node.members.endpoints(node.now)}
    assert told == {
        Identity(1).peer: (Identity(1).host + ":9", True),
        Identity(2).peer: ("10.9.9.9:9", False),
        Identity(3).peer: (Identity(3).host + ":9", False),
    }


def test_who_comes_from_elsewhere_leads_nobody_into_this_network() -> None:
    node = Node()
    stranger = Identity(1)
    node.members.on_connected(stranger.peer, "203.0.113.9", node.now)
    node.learn(1, own_word=True, address="10.0.0.9:22", endpoint="10.0.0.9:23")
    node.learn(2, told_by=1, address="10.0.0.9:24", endpoint="10.0.0.9:25")
    assert node.members.endpoints(node.now) == ()
    assert only(node.run(20 * SECOND_MS), Connect) == []


def test_who_was_only_heard_of_counts_as_its_least_crowded_tellers_host() -> None:
    """An attacker that tells of an honest peer first can't make it share the room of those that it invents."""
    node = Node(network_key=None)
    for number, host in ((1, "198.51.100.66"), (2, "198.51.100.5")):
        node.members.on_connected(Identity(number).peer, host, node.now)
        node.learn(number, own_word=True, network_key=None)
    honest = Identity(3).public_key
    node.learn(3, told_by=1, sequence=5, network_key=None)
    for number in range(100, 110):
        node.learn(number, told_by=1, network_key=None)
    node.members.changed = False
    node.learn(3, told_by=2, sequence=4, network_key=None)  # older: its signature isn't checked
    assert node.members.acquaintance(honest) == Acquaintance(Rank.TOLD, "198.51.100.66")
    node.learn(3, told_by=2, sequence=5, network_key=None)
    assert node.members.acquaintance(honest) == Acquaintance(Rank.TOLD, "198.51.100.5")
    assert node.members.changed
    node.learn(3, told_by=1, sequence=6, network_key=None)
    assert node.members.acquaintance(honest) == Acquaintance(Rank.TOLD, "198.51.100.5")
    node.learn(100, told_by=2, sequence=6, network_key=None)
    assert node.members.acquaintance(Identity(100).public_key) == Acquaintance(Rank.TOLD, "198.51.100.5")
    node.members.on_connected(Identity(3).peer, "203.0.113.3", node.now)
    node.learn(3, told_by=2, sequence=7, network_key=None)
    assert node.members.acquaintance(honest) == Acquaintance(Rank.MET, "203.0.113.3")


def test_no_path_on_which_addresses_come_leads_from_elsewhere_into_this_network() -> None:
    node = Node()
    for told_from in ("203.0.113.9", ""):
        node.members.on_discovered(Identity(1).peer, "10.0.0.9:22", told_from, node.now)
        assert not node.members.may_dial_at(Identity(2).peer, "10.0.0.9:22", told_from, node.now)
        assert node.members.may_dial_at(Identity(2).peer, "203.0.113.7:22", told_from, node.now)
    node.learn(3, own_word=True, address="10.0.0.9:22")  # the greeting of a peer whose connection is ending
    node.learn(4, told_by=5, address="10.0.0.9:22")
    assert only(node.run(20 * SECOND_MS), Connect) == []


@pytest.mark.parametrize("said", [{"address": "10.0.0.9:22"}, {"address": "203.0.113.9:1", "endpoint": "10.0.0.9:23"}])
def test_a_record_with_an_address_that_may_not_be_dialled_is_passed_on_to_nobody(said: dict[str, str]) -> None:
    node = Node()
    node.members.on_connected(Identity(1).peer, "203.0.113.9", node.now)
    node.learn(1, True, 1, **said)
    assert node.usable() == {Identity(1).peer}
    assert node.members.answer_peers(WantPeers(b""), node.now).records == ()
    assert Identity(1).peer not in {peer for peer, address in node.members.addresses(node.now) if ":22" in address}
    node.learn(1, own_word=True, sequence=2, address="203.0.113.9:1", endpoint="203.0.113.9:2")
    assert len(node.members.answer_peers(WantPeers(b""), node.now).records) == 1
    assert node.members.addresses(node.now) == ((Identity(1).peer, "203.0.113.9:1"),)


def test_what_mdns_sees_is_dialled_like_any_other_peer() -> None:
    node = Node()
    for number in range(100, 400):
        node.members.on_discovered(Identity(number).peer, f"10.0.0.9:{number}", "10.0.0.8", node.now)
    node.members.on_discovered(Identity(500).peer, "127.0.0.1:22", "10.0.0.8", node.now)
    node.members.on_discovered(Identity(501).peer, "metadata.internal:80", "10.0.0.8", node.now)
    assert len(node.members._peers) <= PEERS_OF_SOURCE_MAX + DIALS_MAX
    effects = node.run(30 * SECOND_MS)
    assert 8 <= len(only(effects, Connect)) <= DIALS_TO_HOST_PER_S * (DIALS_BURST_S + 30)
    assert {effect.address.partition(":")[0] for effect in only(effects, Connect)} == {"10.0.0.9"}


def test_a_search_of_the_dht_dials_within_the_same_budget() -> None:
    node = Node()
    peer = Identity(2).peer
    assert not node.members.may_dial_at(peer, "127.0.0.1:22", "10.0.0.8", node.now)
    allowed = [node.members.may_dial_at(peer, "10.0.0.9:22", "10.0.0.8", node.now) for _ in range(100)]
    assert sum(allowed) == DIALS_OF_PEER_PER_S * DIALS_BURST_S


def test_strangers_who_connect_do_not_keep_a_node_from_choosing_neighbours() -> None:
    node = Node()
    node.connect(*range(1, 2 * TARGET_NEIGHBOURS))
    for number in range(100, 110):
        node.learn(number)
    dialled = {effect.peer for effect in only(node.run(2 * HEARTBEAT_MS, answer=False), Connect)}
    assert len(dialled) == OUTBOUND_MIN
    assert dialled <= peers(*range(100, 110))


def test_connections_that_nobody_uses_are_closed_beyond_a_bound() -> None:
    node = Node()
    node.connect(*range(1, NEIGHBOURS_MAX + 7))
    used = peers(1, 2, 3)
    closed: set[PeerId] = set()
    for _ in range(20):
        for peer in used:
            node.members.used(peer, node.now)
        for effect in only(node.run(SECOND_MS), Disconnect):
            closed.add(effect.peer)
            node.members.on_disconnected(effect.peer, node.now)
    assert len(node.neighbours()) == NEIGHBOURS_MAX
    assert not closed & used


def test_a_peer_that_this_node_hung_up_on_is_not_taken_for_silent() -> None:
    node = Node()
    node.connect(*range(1, NEIGHBOURS_MAX + 2))
    closed = only(node.run(20 * SECOND_MS), Disconnect)[0].peer
    node.members.unanswered(closed, Ping(), node.now)  # a ping under way goes down with the connection
    node.members.on_disconnected(closed, node.now)
    node.members.unanswered(closed, Ping(), node.now)
    assert closed in node.usable()


def test_a_host_that_holds_every_place_makes_room_for_whoever_comes_from_elsewhere() -> None:
    node = Node()
    crowd = range(100, 100 + GREETED_INBOUND_MAX)
    assert [arrive(node, number, "198.51.100.7") for number in crowd] == [[]] * GREETED_INBOUND_MAX
    for number in range(1, 11):
        assert len(arrive(node, number, f"10.0.{number}.1")) == 1
    for number in range(200, 300):  # the crowd comes again, under other names
        assert not set(arrive(node, number, "198.51.100.7")) & peers(*range(1, 11))
    assert peers(*range(1, 11)) <= node.neighbours()
    assert len(node.neighbours()) == GREETED_INBOUND_MAX


def test_members_that_delivered_and_the_listed_keep_their_places_before_other_members() -> None:
    node = Node(bootstrap=(1,))
    node.members.on_connected(Identity(1).peer, "198.51.100.7", node.now)
    node.learn(1, own_word=True)
    arrive(node, 2, "198.51.100.7")
    node.trust.standings.note(Delivered(Identity(2).peer, 1, 1), node.now)
    for number in range(100, 100 + 3 * GREETED_INBOUND_MAX):
        arrive(node, number, f"10.1.{number % 256}.1")
    assert peers(1, 2) <= node.neighbours()


def test_those_who_have_not_greeted_take_no_place_of_those_who_have() -> None:
    node = Node()
    greeted = range(1, GREETED_INBOUND_MAX + 1)
    for number in greeted:
        arrive(node, number, "198.51.100.7")
    silent = []
    for number in range(1_000, 1_050):
        effects = node.members.on_connected(Identity(number).peer, "203.0.113.5", node.now)
        silent += [effect.peer for effect in only(effects, Disconnect)]
    assert silent == [Identity(number).peer for number in range(1_000, 1_050 - UNGREETED_INBOUND_MAX)]
    assert node.neighbours() == peers(*greeted)


def test_asking_keeps_no_connection_of_a_host_that_holds_several() -> None:
    node = Node()
    crowd, honest = range(100, 100 + NEIGHBOURS_MAX), range(1, 9)
    for number in honest:
        arrive(node, number, f"10.0.{number}.1")
    for number in crowd:
        arrive(node, number, "198.51.100.7")
    for _ in range(30):
        for number in crowd:
            node.members.used(Identity(number).peer, node.now)
        for effect in only(node.run(SECOND_MS), Disconnect):
            node.members.on_disconnected(effect.peer, node.now)
    assert peers(*honest) <= node.neighbours()
    assert len(node.neighbours()) == NEIGHBOURS_MAX


def test_who_connects_and_never_greets_is_disconnected() -> None:
    node = Node()
    node.members.on_connected(Identity(1).peer, Identity(1).host, node.now)
    effects = node.run(GREET_BY_MS + 2 * HEARTBEAT_MS)
    assert Disconnect(Identity(1).peer) in effects
    node.members.on_disconnected(Identity(1).peer, node.now)
    assert node.members.get(Identity(1).peer) is None


def test_a_node_does_not_talk_to_itself() -> None:
    node = Node()
    assert node.members.on_connected(ME.peer, ME.host, dated(NOW_MS)) == [Disconnect(ME.peer)]


def test_a_host_that_is_most_of_the_neighbours_is_asked_no_more_than_another() -> None:
    node = Node()
    for number in range(1, 5):
        arrive(node, number, f"10.0.{number}.1")
    for number in range(100, 116):
        arrive(node, number, "198.51.100.7")
    node.run(SECOND_MS)
    node.sent.clear()
    node.run(20 * EXCHANGE_MS)
    asked = [send.peer for send in node.sent if isinstance(send.message, WantPeers)]
    honest = peers(1, 2, 3, 4)
    assert sum(peer in honest for peer in asked) >= len(asked) * 3 // 4
    drawn = [node.members.any_neighbour() for _ in range(500)]
    assert sum(known is not None and known.peer in honest for known in drawn) > 350
