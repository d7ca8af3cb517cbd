"""Membership: who is connected to, believed, exchanged, noticed silent, redialled; and its tables and formulas."""

import random
from dataclasses import dataclass, field, replace

import pytest

from hyperspace_vllm.core.events.conduct import ChargePeer
from hyperspace_vllm.core.events.connections import Connect, Disconnect
from hyperspace_vllm.core.events.peer_requests import Send
from hyperspace_vllm.core.events.vocabulary import NetworkEffect
from hyperspace_vllm.core.peers.address import may_dial
from hyperspace_vllm.core.peers.avoidance import (
    AVOID_MS_MAX,
    LIAR_MS,
    MISSES_MAX,
    SILENT_MS,
    Avoidance,
    avoid_ms,
)
from hyperspace_vllm.core.peers.dials import Dials
from hyperspace_vllm.core.peers.membership import (
    EXCHANGE_MS,
    EXPLORE_MS,
    GREET_BY_MS,
    HEARTBEAT_MS,
    PING_MS,
    SILENT_DISCONNECT_MS,
    Membership,
)
from hyperspace_vllm.core.peers.neighbours import (
    CONNECT_MS,
    DIAL_AGAIN_MS,
    DIAL_AGAIN_MS_MAX,
    DIALS_MAX,
    NEIGHBOURS_MAX,
    OUTBOUND_MIN,
    TARGET_NEIGHBOURS,
    dial_delay_ms,
)
from hyperspace_vllm.core.peers.own_record import RENEW_MS
from hyperspace_vllm.core.peers.peer_table import Peer, PeerTable
from hyperspace_vllm.core.peers.standing import Delivered
from hyperspace_vllm.core.peers.trust import Trust
from hyperspace_vllm.core.records.ids import PeerId, network_id
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
    PEX_RECORDS_MAX,
    UNGREETED_INBOUND_MAX,
)
from hyperspace_vllm.core.records.now import Now
from hyperspace_vllm.core.records.peer_record import PeerRecord, decode_peer_record
from hyperspace_vllm.core.records.peer_wire import Greet, PeerRequest, Peers, Ping, WantPeers
from hyperspace_vllm.core.records.rank import Acquaintance, Rank
from hyperspace_vllm.core.records.reason import Reason
from hyperspace_vllm.core.records.signing import member_tag
from tests.support.moments import BOOTED_MS, at, dated
from tests.support.network_world import HOUR_MS, NETWORK, NETWORK_KEY, NOW_MS, SECOND_MS, Identity, only

ME = Identity(0)


@dataclass
class Node:
    """A Membership and its clock."""

    bootstrap: tuple[int, ...] = ()
    network_key: bytes | None = NETWORK_KEY
    now_ms: int = NOW_MS
    set_by_ms: int = 0  # the wall clock, forward or back
    address: str = ME.address
    sent: list[Send] = field(default_factory=list)

    @property
    def now(self) -> Now:
        return replace(dated(self.now_ms), wall_ms=self.now_ms + self.set_by_ms)

    def __post_init__(self) -> None:
        trust = Trust("members", ME.public_key, frozenset(), frozenset(), self.network_key)
        self.trust = trust
        addresses = tuple((Identity(number).peer, Identity(number).address) for number in self.bootstrap)
        self.members = Membership(
            NETWORK,
            ME.peer,
            self._own,
            addresses,
            trust,
            self._ask,
            self.network_key is not None,
            Dials(self.now),
            random.Random(1),
            self.now,
        )

    def _own(self, sequence: int, expires_at_ms: int) -> PeerRecord:
        tag = member_tag(NETWORK_KEY, ME.public_key)
        return PeerRecord(NETWORK, ME.public_key, sequence, expires_at_ms, self.address, member_tag=tag).sign(ME.key)

    def _ask(self, peer: PeerId, message: PeerRequest, timeout_ms: int, now: Now) -> list[Send]:
        self.sent.append(Send(len(self.sent), peer, message, timeout_ms))
        return self.sent[-1:]

    def connect(self, *numbers: int, chosen: bool = False) -> None:
        """Peers connect and greet."""
        for number in numbers:
            who = Identity(number)
            if chosen:
                known = self.members.get(who.peer)
                assert known is not None
                known.dialling = True
            self.members.on_connected(who.peer, who.host, self.now)
            assert self.learn(number, own_word=True) == []

    def learn(self, number: int, own_word: bool = False, told_by: int = 1, **said: object) -> list[NetworkEffect]:
        """A record comes, of the peer itself or through another."""
        who = Identity(number)
        said.setdefault("expires_at_ms", self.now.wall_ms + PEER_RECORD_TTL_MS)
        raw = who.record(**said)  # type: ignore[arg-type]
        return self.members.on_record(raw, who.peer if own_word else Identity(told_by).peer, self.now, own_word)

    def run(self, for_ms: int, answer: bool = True) -> list[NetworkEffect]:
        """Let time pass; `answer`: pings are answered at once, dials fail."""
        effects: list[NetworkEffect] = []
        until_ms = self.now_ms + for_ms
        while (due_ms := self.members.next_deadline_ms() + BOOTED_MS) <= until_ms:
            self.now_ms = max(self.now_ms, due_ms)
            new = self.members.on_tick(self.now)
            assert self.members.next_deadline_ms() > self.now.mono_ms
            effects += new
            for effect in new:
                if answer and isinstance(effect, Send) and isinstance(effect.message, Ping):
                    self.members.heard(effect.peer, self.now, 1)
                elif answer and isinstance(effect, Connect):
                    effects += self.members.on_connect_failed(effect.peer, self.now)
        self.now_ms = until_ms
        return effects

    def usable(self) -> set[PeerId]:
        return {record.peer for record in self.members.usable(self.now)}

    def neighbours(self) -> set[PeerId]:
        return {known.peer for known in self.members.neighbours()}


def peers(*numbers: int) -> set[PeerId]:
    return {Identity(number).peer for number in numbers}


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


# --- floods -------------------------------------------------------------------------------------


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
    node.learn(1, own_word=True, **said)
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


def arrive(node: Node, number: int, host: str) -> list[PeerId]:
    """A peer connects from a host and greets; whose connections close for that."""
    who = Identity(number)
    effects = node.members.on_connected(who.peer, host, node.now)
    effects += node.learn(number, own_word=True)
    closed = [effect.peer for effect in only(effects, Disconnect)]
    for peer in closed:
        node.members.on_disconnected(peer, node.now)
    return closed


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


# --- heartbeats ---------------------------------------------------------------------------------


def test_a_frozen_neighbour_is_noticed_within_five_seconds_and_used_again_once_heard() -> None:
    node = Node()
    node.connect(1)
    began_ms = node.now_ms
    while node.usable():
        node.run(100, answer=False)
    assert HEARTBEAT_MS < node.now_ms - began_ms < 5_000
    assert node.neighbours() == set()
    assert node.members.changed
    node.members.heard(Identity(1).peer, node.now)
    assert node.neighbours() == node.usable() == peers(1)


def test_a_failed_ping_tells_earlier_than_the_beat() -> None:
    node = Node()
    node.connect(1)
    node.run(HEARTBEAT_MS, answer=False)
    assert any(isinstance(send.message, Ping) for send in node.sent)
    node.members.unanswered(Identity(1).peer, Ping(), dated(node.now_ms + PING_MS))
    assert node.usable() == set()


def test_whoever_was_just_heard_is_not_pinged() -> None:
    node = Node()
    node.connect(1)
    for _ in range(10):
        node.members.heard(Identity(1).peer, node.now)
        node.run(900)
    assert not [send for send in node.sent if isinstance(send.message, Ping)]


def test_a_silent_neighbour_is_replaced_pinged_on_and_at_last_disconnected() -> None:
    node = Node()
    for number in range(1, 20):
        node.learn(number, address=f"203.0.113.{number}:1")
    node.connect(*range(1, TARGET_NEIGHBOURS + 1), chosen=True)
    known = node.members.get(Identity(1).peer)
    assert known is not None
    effects: list[NetworkEffect] = []
    for _ in range(SILENT_DISCONNECT_MS // SECOND_MS + 6):
        for number in range(2, TARGET_NEIGHBOURS + 1):
            node.members.heard(Identity(number).peer, node.now)
        effects += node.run(SECOND_MS, answer=False)
    assert len([send for send in node.sent if send.peer == Identity(1).peer and isinstance(send.message, Ping)]) > 5
    assert Disconnect(Identity(1).peer) in effects
    assert only(effects, Connect)


def test_a_process_that_was_stopped_for_a_minute_disconnects_nobody() -> None:
    node = Node()
    node.connect(1, 2)
    node.run(HEARTBEAT_MS, answer=False)  # pings are on their way
    node.now_ms += 60 * SECOND_MS
    assert not only(node.run(HEARTBEAT_MS), Disconnect)
    node.run(2 * HEARTBEAT_MS)
    assert node.neighbours() == peers(1, 2)


# --- dialling -----------------------------------------------------------------------------------


def test_the_bootstrap_list_is_dialled_first_and_again_for_ever() -> None:
    node = Node(bootstrap=(1,))
    assert node.members.start(dated(NOW_MS)) == [Connect(Identity(1).peer, Identity(1).address, CONNECT_MS)]
    node.members.on_connect_failed(Identity(1).peer, dated(NOW_MS))
    dials = only(node.run(10 * 60 * SECOND_MS), Connect)
    assert len(dials) >= 10 * 60 * SECOND_MS / (DIAL_AGAIN_MS_MAX + HEARTBEAT_MS)
    assert len(dials) <= 10 * 60 * SECOND_MS / (DIAL_AGAIN_MS_MAX / 2) + 5


@pytest.mark.parametrize(("failures", "delay_ms"), [(0, DIAL_AGAIN_MS), (1, 4_000), (2, 8_000), (3, DIAL_AGAIN_MS_MAX)])
def test_dials_are_repeated_later_and_later_up_to_a_bound(failures: int, delay_ms: int) -> None:
    assert dial_delay_ms(failures) == delay_ms
    assert dial_delay_ms(1_000) == DIAL_AGAIN_MS_MAX


def test_a_dial_that_nobody_answers_for_is_given_up() -> None:
    node = Node(bootstrap=(1,))
    node.members.start(dated(NOW_MS))
    dials = only(node.run(4 * CONNECT_MS, answer=False), Connect)
    assert dials  # the first was never answered


def test_a_restarted_peer_is_dialled_at_its_new_address_at_once() -> None:
    node = Node()
    node.learn(1, address="203.0.113.1:9")
    (dial,) = only(node.run(HEARTBEAT_MS, answer=False), Connect)
    node.members.on_connect_failed(dial.peer, node.now)
    assert node.usable() == set()
    node.learn(1, sequence=2, address="203.0.113.2:9")
    assert node.usable() == peers(1)
    (dial,) = only(node.run(HEARTBEAT_MS, answer=False), Connect)
    assert dial.address == "203.0.113.2:9"


def test_a_bootstrap_node_is_dialled_where_it_says_and_where_it_was_configured() -> None:
    node = Node(bootstrap=(1,))
    node.learn(1, address="203.0.113.1:9")
    addresses = {effect.address for effect in only(node.run(60 * SECOND_MS), Connect)}
    assert addresses == {"203.0.113.1:9", Identity(1).address}


def test_who_takes_connections_only_to_close_them_is_left_alone() -> None:
    node = Node()
    node.learn(1)
    dials = 0
    for _ in range(60):
        for effect in only(node.run(SECOND_MS, answer=False), Connect):
            dials += 1
            node.members.on_connected(effect.peer, Identity(1).host, node.now)
            node.members.on_disconnected(effect.peer, node.now)
    assert dials <= 60 * SECOND_MS / (DIAL_AGAIN_MS_MAX / 2) + 3


def test_a_node_with_neighbours_enough_still_looks_around() -> None:
    node = Node()
    for number in range(1, 20):
        node.learn(number, address=f"203.0.113.{number}:1")
    node.connect(*range(1, TARGET_NEIGHBOURS + 1), chosen=True)
    dials = only(node.run(3 * EXPLORE_MS), Connect)
    assert len(dials) == 3
    assert {dial.peer for dial in dials} <= peers(*range(TARGET_NEIGHBOURS + 1, 20))


def test_a_sign_of_life_makes_a_peer_usable_that_could_not_be_dialled() -> None:
    node = Node()
    node.learn(1)
    node.members.on_connect_failed(Identity(1).peer, node.now)
    assert node.usable() == set()
    node.members.is_alive(Identity(1).peer, node.now)
    assert node.usable() == peers(1)


@pytest.mark.parametrize(
    ("address", "own", "dialled"),
    [
        ("10.0.0.1:4001", "10.0.0.2:4001", True),
        ("203.0.113.9:65535", "10.0.0.2:4001", True),
        ("[2a00::1]:4001", "10.0.0.2:4001", True),
        ("127.0.0.1:22", "10.0.0.2:4001", False),
        ("[::1]:22", "10.0.0.2:4001", False),
        ("[::ffff:127.0.0.1]:22", "10.0.0.2:4001", False),
        ("127.0.0.1:4001", "127.0.0.1:4002", True),
        ("10.0.0.1:4001", "127.0.0.1:4002", True),
        ("169.254.169.254:80", "10.0.0.2:4001", False),
        ("0.0.0.0:4001", "10.0.0.2:4001", False),
        ("[::]:4001", "10.0.0.2:4001", False),
        ("224.0.0.1:4001", "10.0.0.2:4001", False),
        ("255.255.255.255:4001", "10.0.0.2:4001", False),
        ("localhost:22", "10.0.0.2:4001", False),
        ("metadata.internal:80", "10.0.0.2:4001", False),
        ("10.0.0.1:0", "10.0.0.2:4001", False),
        ("10.0.0.1:65536", "10.0.0.2:4001", False),
        ("10.0.0.1:-1", "10.0.0.2:4001", False),
        ("10.0.0.1", "10.0.0.2:4001", False),
        ("", "10.0.0.2:4001", False),
        (":4001", "10.0.0.2:4001", False),
    ],
)
def test_only_addresses_that_can_be_another_machine_are_dialled(address: str, own: str, dialled: bool) -> None:
    assert may_dial(address, own, None) is dialled
    node = Node(address=own)
    node.members.on_connected(Identity(2).peer, own.partition(":")[0], node.now)
    node.learn(2, own_word=True)
    node.learn(1, told_by=2, address=address)
    assert bool(only(node.run(HEARTBEAT_MS), Connect)) is dialled


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


# --- whom not to ask ----------------------------------------------------------------------------


@pytest.mark.parametrize(("times", "wait_ms"), [(1, SILENT_MS), (2, 6_000), (3, 12_000), (5, AVOID_MS_MAX)])
def test_the_silent_are_avoided_longer_and_longer(times: int, wait_ms: int) -> None:
    assert avoid_ms(times) == wait_ms
    avoidance = Avoidance()
    for _ in range(times):
        avoidance.failed(dated(NOW_MS))
    assert avoidance.avoids(dated(NOW_MS + wait_ms - 1))
    assert not avoidance.avoids(dated(NOW_MS + wait_ms))


def test_a_good_answer_wipes_out_failures_before_it() -> None:
    avoidance = Avoidance()
    avoidance.failed(dated(NOW_MS))
    avoidance.served()
    avoidance.failed(dated(NOW_MS + HOUR_MS))
    assert not avoidance.avoids(dated(NOW_MS + HOUR_MS + SILENT_MS))


def test_who_is_back_is_forgiven_its_silence_and_not_its_lies() -> None:
    avoidance = Avoidance()
    avoidance.failed(dated(NOW_MS))
    avoidance.back()
    assert not avoidance.avoids(dated(NOW_MS))
    avoidance.lied(dated(NOW_MS))
    avoidance.failed(dated(NOW_MS))
    avoidance.back()
    assert avoidance.avoids(dated(NOW_MS + LIAR_MS - 1))
    assert not avoidance.avoids(dated(NOW_MS + LIAR_MS))


def test_a_stale_word_is_forgiven_and_a_boaster_is_not() -> None:
    avoidance = Avoidance()
    for _ in range(MISSES_MAX - 1):
        avoidance.missed(dated(NOW_MS))
    assert not avoidance.avoids(dated(NOW_MS))
    avoidance.missed(dated(NOW_MS))
    assert avoidance.avoids(dated(NOW_MS))


@pytest.mark.parametrize("set_by_ms", [-HOUR_MS, HOUR_MS])
def test_avoidance_lasts_as_long_whatever_the_wall_clock_shows(set_by_ms: int) -> None:
    avoidance = Avoidance()
    avoidance.lied(at(0))
    assert avoidance.avoids(at(LIAR_MS - 1, set_by_ms))
    assert not avoidance.avoids(at(LIAR_MS, set_by_ms))


def test_a_silent_peer_is_asked_again_once_it_was_heard_of_or_may_be_dialled() -> None:
    known = Peer(PeerId("a"), advertised="10.0.0.1:1", silent=True, silent_at_ms=100, dial_at_ms=500)
    assert not known.may_be_asked(at(499))
    assert known.may_be_asked(at(500))
    known.alive_at_ms = 101
    assert known.may_be_asked(at(102))
    known.connected = True  # over which it keeps silent
    assert not known.may_be_asked(at(1_000))


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
