"""The one core of a node: what passes between its parts, and when its network begins and ends."""

import random

import pytest

from hyperspace_vllm.core.events.conduct import AnswerAudited, ChargePeer
from hyperspace_vllm.core.events.connections import PeerConnected
from hyperspace_vllm.core.events.gossip import GossipReceived, Publish
from hyperspace_vllm.core.events.known_peers import KvEndpoint, KvPeersChanged
from hyperspace_vllm.core.events.node_state import NetworkJoined, NetworkLeft, Tick
from hyperspace_vllm.core.events.peer_requests import RequestReceived
from hyperspace_vllm.core.events.prefix_reading import FindRowHolders, PrefixReleased, PrefixWanted, RowsFound
from hyperspace_vllm.core.events.prefix_writing import RowsStored
from hyperspace_vllm.core.events.vocabulary import Effect
from hyperspace_vllm.core.node.node import Node
from hyperspace_vllm.core.node.node_options import NodeOptions
from hyperspace_vllm.core.peers.dials import Dials
from hyperspace_vllm.core.peers.findings import FINDING_EVERY_MS, FINDINGS_MIN
from hyperspace_vllm.core.peers.introductions import TELL_AGAIN_MS
from hyperspace_vllm.core.peers.trust import Trust, TrustMode
from hyperspace_vllm.core.prefix.prefix_part import ASKED_MAX
from hyperspace_vllm.core.records.announcement import (
    PREFIX_TOPIC,
    Announcement,
    EvidenceEntry,
    PrefixEntry,
    decode_announcement,
    encode_announcement,
)
from hyperspace_vllm.core.records.ids import PeerId, RequestKey, SegmentKey, row_id, row_key, sha256
from hyperspace_vllm.core.records.layout import Layout, Part
from hyperspace_vllm.core.records.limits import REGISTRY_TTL_MS
from hyperspace_vllm.core.records.peer_wire import Greet
from hyperspace_vllm.core.response.cache_proof import make_proof
from hyperspace_vllm.core.response.evidence import evidence_of
from tests.support.moments import dated
from tests.support.network_world import NETWORK, NETWORK_KEY, NOW_MS, SECOND_MS, Identity, only

LAYOUT = Layout(bytes(32), 256, (Part(0, 1000),), 1)
KEY = SegmentKey(sha256(b"segment"))
ROW = row_id(NETWORK, row_key(KEY, 0, 0))
JOINED = NetworkJoined(Identity(0).address, "10.0.0.1:7790")


def make(
    listed: tuple[int, ...] = (),
    network_key: bytes | None = NETWORK_KEY,
    mode: TrustMode = "members",
    is_public: bool = False,
    shares: bool = True,
) -> Node:
    me = Identity(0)
    keys = frozenset(Identity(number).public_key for number in listed)
    kv_peers = tuple(Identity(number).peer for number in listed)
    trust = Trust(mode, me.public_key, keys, frozenset(), network_key, is_public)
    options = NodeOptions(NETWORK, network_key, kv_peers=kv_peers, fetch="always", shares=shares, registry=False)
    return Node(options, me.key, trust, Dials(dated(NOW_MS)), random.Random(1))


def meet(node: Node, number: int, network_key: bytes | None = NETWORK_KEY) -> list[Effect]:
    """A peer that serves KV at its own host greets the node, each at a time of its own; all effects until then."""
    who = Identity(number)
    record = who.record(endpoint=f"{who.host}:7790", network_key=network_key)
    met_ms = NOW_MS + number * TELL_AGAIN_MS
    effects = node.handle(PeerConnected(who.peer, who.host), dated(met_ms))
    effects += node.handle(RequestReceived(number, who.peer, Greet(record)), dated(met_ms))
    return effects + node.handle(Tick(), dated(met_ms + TELL_AGAIN_MS))


def asked(node: Node, lookup: int) -> tuple[PeerId, ...]:
    """The peers that a lookup of KEY asks."""
    effects = node.handle(PrefixWanted(lookup, LAYOUT, (KEY,), 0, 0, 5_000, True), dated(NOW_MS))
    effects += node.handle(RowsFound(lookup, frozenset(), frozenset(), frozenset(), 1 << 62), dated(NOW_MS))
    node.handle(PrefixReleased(lookup), dated(NOW_MS))
    return next((effect.peers for effect in effects if isinstance(effect, FindRowHolders)), ())


def announced(effects: list[Effect]) -> list[PrefixEntry]:
    batches = [decode_announcement(effect.payload) for effect in only(effects, Publish)]
    return [entry for batch in batches for entry in batch.entries if isinstance(entry, PrefixEntry)]


def test_a_member_that_greets_is_served_and_asked_for_kv() -> None:
    node, who = make(), Identity(1)
    node.handle(JOINED, dated(NOW_MS))
    assert asked(node, 1) == ()
    told = only(meet(node, 1), KvPeersChanged)[-1]
    assert told == KvPeersChanged((who.peer,), (KvEndpoint(who.peer, f"{who.host}:7790", True),))
    assert asked(node, 2) == (who.peer,)


def test_strangers_are_asked_for_kv_by_reputation_and_served_where_the_node_shares_with_everybody() -> None:
    for is_public in (False, True):
        node = make(network_key=None, mode="reputation", is_public=is_public)
        node.handle(JOINED, dated(NOW_MS))
        told = only(meet(node, 1, None), KvPeersChanged)[-1]
        assert told.admitted == ((Identity(1).peer,) if is_public else ())
        assert [endpoint.peer for endpoint in told.endpoints] == [Identity(1).peer]


def test_by_members_a_stranger_is_neither_served_nor_asked_for_kv() -> None:
    node = make(network_key=None)
    node.handle(JOINED, dated(NOW_MS))
    assert only(meet(node, 1, None), KvPeersChanged)[-1] == KvPeersChanged((), ())
    assert asked(node, 1) == ()


def test_configured_peers_are_asked_before_and_after_the_network_and_its_peers_only_with_it() -> None:
    node, listed = make((7,)), Identity(7).peer
    assert asked(node, 1) == (listed,)
    node.handle(JOINED, dated(NOW_MS))
    meet(node, 1)
    assert set(asked(node, 2)) == {listed, Identity(1).peer}
    assert node.handle(NetworkLeft(), dated(NOW_MS)) == [KvPeersChanged((), ())]
    assert asked(node, 3) == (listed,)


def test_hints_that_gossip_brings_say_which_peers_a_prefix_lookup_asks_first() -> None:
    node = make()
    node.handle(JOINED, dated(NOW_MS))
    for number in range(1, 4 + ASKED_MAX):
        meet(node, number)
    hinted = Identity(9)
    entry = PrefixEntry(ROW, bytes(32), bytes(48), NOW_MS + REGISTRY_TTL_MS)
    batch = Announcement(NETWORK, hinted.public_key, 1, NOW_MS, (entry,))
    for lookup in range(5):
        node.handle(GossipReceived(PREFIX_TOPIC, hinted.peer, encode_announcement(batch, hinted.key)), dated(NOW_MS))
        assert asked(node, lookup)[0] == hinted.peer


def test_rows_are_announced_for_the_life_of_a_registry_entry_and_private_ones_never() -> None:
    node = make()
    node.handle(JOINED, dated(NOW_MS))
    node.handle(RowsStored(bytes(32), bytes(32), bytes(48), (bytes(32),), shareable=False), dated(NOW_MS))
    node.handle(RowsStored(bytes(32), bytes(32), bytes(48), (ROW,), shareable=True), dated(NOW_MS))
    (entry,) = announced(node.handle(Tick(), dated(NOW_MS + SECOND_MS)))
    assert (entry.row_id, entry.expires_at_ms) == (ROW, NOW_MS + REGISTRY_TTL_MS)


def test_before_it_joins_and_after_it_has_left_nothing_happens_in_the_network() -> None:
    node = make()
    assert meet(node, 1) == []
    assert node.next_deadline_ms() is None
    node.handle(JOINED, dated(NOW_MS))
    assert node.next_deadline_ms() is not None
    node.handle(NetworkLeft(), dated(NOW_MS))
    assert meet(node, 1) == []
    assert node.next_deadline_ms() is None
    assert not node.may_dial(Identity(2).peer, Identity(2).address, Identity(1).host, dated(NOW_MS))


@pytest.mark.parametrize(("joins", "shares", "tells"), [(True, True, True), (True, False, False), (False, True, False)])
def test_an_audit_convicts_a_signer_with_or_without_a_network_and_peers_hear_of_it_where_the_node_shares(
    joins: bool, shares: bool, tells: bool
) -> None:
    node, signer = make(shares=shares), Identity(1)
    if joins:
        node.handle(JOINED, dated(NOW_MS))
    effects: list[Effect] = []
    for number in range(FINDINGS_MIN):
        now = dated(NOW_MS + number * FINDING_EVERY_MS)
        key = RequestKey(sha256(bytes([number])))
        evidence = evidence_of(make_proof(signer.key, NETWORK, key, b"{}", bytes(32), "vllm", now.wall_ms), 40, 2)
        effects += node.handle(AnswerAudited(evidence, bytes([number])), now)
    assert node._trust.is_convicted(signer.public_key, now)
    entries = [entry for effect in only(effects, Publish) for entry in decode_announcement(effect.payload).entries]
    assert any(isinstance(entry, EvidenceEntry) for entry in entries) is tells
    assert bool(only(effects, ChargePeer)) is tells
