"""What a node tells of itself and of its peers, and what it takes from the gossip of others."""

import pytest

from hyperspace_vllm.core.events.conduct import ChargePeer
from hyperspace_vllm.core.events.connections import Disconnect, PeerConnected
from hyperspace_vllm.core.events.dht import NotProvided, Provide
from hyperspace_vllm.core.events.gossip import AuthorsChanged, GossipReceived, GossipSpoiled, Publish
from hyperspace_vllm.core.events.known_peers import PeersChanged
from hyperspace_vllm.core.events.node_state import Tick
from hyperspace_vllm.core.events.peer_requests import (
    RequestFailed,
    RequestReceived,
    ServeResponse,
)
from hyperspace_vllm.core.events.prefix_writing import RowsStored
from hyperspace_vllm.core.events.response_reading import (
    ResponseFetched,
)
from hyperspace_vllm.core.events.stored_responses import ResponsesGone, ResponseStored, ResponsesUsed
from hyperspace_vllm.core.peers.introductions import TELL_AGAIN_MS
from hyperspace_vllm.core.records.announcement import (
    RESPONSE_TOPIC,
)
from hyperspace_vllm.core.records.limits import (
    CLOCK_SKEW_MS,
    REGISTRY_TTL_MS,
    RESPONSE_TTL_MS,
)
from hyperspace_vllm.core.records.peer_wire import (
    Greet,
    Query,
)
from hyperspace_vllm.core.records.rank import Acquaintance, Rank
from hyperspace_vllm.core.records.reason import Reason
from tests.support.moments import dated
from tests.support.network_script import Script, asked, gossip, response, tick
from tests.support.network_world import (
    NOW_MS,
    Identity,
    make_node,
    only,
)


def test_usable_peers_are_told_exactly_when_they_change() -> None:
    Script(also="peers").run(
        """
        > meet 1
        peers 1
        > at=1 meet 1
        > at=2 meet 2
        > at=99 meet 3
        > at=100 tick               # what changes within TELL_AGAIN_MS is told at once
        peers 1 2 3
        > at=101 gone 3
        > at=103 gone 1             # its record says where to dial it
        > at=1500 tick
        > at=4000 tick
        peers 1 3                   # 2 left its ping unanswered
        > at=4100 gossip 2 a        # through others: it is connected, and keeps silent itself
        > at=4200 meet 2
        peers 1 2 3
        > at=299000 meet 2
        > at=301100 tick
        peers 2
        """
    )


def test_what_was_computed_is_announced_and_provided_and_what_has_gone_no_more() -> None:
    script = Script(also="publish provide")
    node = script.node

    def store(letter: str, computed: bool = True) -> list[str]:
        event = ResponseStored(response(letter), script.now_ms + RESPONSE_TTL_MS, computed)
        effects = node.handle(event, dated(script.now_ms))
        return [script.told(effect) for effect in effects if script.told(effect).split()[0] in script.shown]

    assert store("a") == ["publish a"]
    assert store("b") == store("c") == []
    node.handle(ResponsesGone((response("a"), response("b"))), dated(script.now_ms))
    script.run("> at=100 tick\npublish c\nprovide c\n> at=60000 tick")


def test_an_object_is_provided_in_the_dht_by_its_first_row() -> None:
    node = Script().node
    rows = tuple(bytes([number]) * 32 for number in range(3))
    node.handle(RowsStored(bytes(32), b"f" * 32, bytes(48), rows, True), dated(NOW_MS))
    effects = [effect for at_ms in (NOW_MS, NOW_MS + 60_000) for effect in node.handle(Tick(), dated(at_ms))]
    keys = [effect.key for effect in effects if isinstance(effect, Provide)]
    assert keys == [f"/kv-prefix/{(b'f' * 32).hex()}/{rows[0].hex()}"]


def test_what_no_peer_took_is_provided_again_in_its_turn() -> None:
    node = Script().node
    node.handle(NotProvided("/cache/ab"), dated(NOW_MS))
    effects = [effect for at_ms in (NOW_MS, NOW_MS + 60_000) for effect in node.handle(Tick(), dated(at_ms))]
    assert [effect.key for effect in effects if isinstance(effect, Provide)] == ["/cache/ab"]


@pytest.mark.parametrize(
    ("providers", "claimed", "by_member", "announced"),
    [
        (1, 0, True, True),  # it was asked for here
        (2, 0, True, False),
        (2, 48, True, True),
        (2, 48, False, False),
        (3, 48, True, False),
        (3, 256, True, True),
        (7, 1 << 31, True, True),
        (7, 1 << 31, False, False),
        (8, 1 << 31, True, False),
    ],
)
def test_what_was_fetched_is_announced_while_the_popular_want_more_copies_as_members_say(
    providers: int, claimed: int, by_member: bool, announced: bool
) -> None:
    script = Script(make_node(network_key=None, listed=tuple(range(1, 9))), also="publish")
    script.run(f"> meet {' '.join(str(number) for number in range(1, 10))}")
    for number in range(1, providers + 1):
        script.act(f"gossip {number} a")
    script.act("want a")
    expires_at_ms = script.now_ms + RESPONSE_TTL_MS
    fetched = ResponseFetched(ord("a"), Identity(1 if by_member else 9).peer, 9, expires_at_ms, claimed)
    script.node.handle(fetched, dated(script.now_ms))
    stored = script.node.handle(ResponseStored(response("a"), expires_at_ms, False), dated(script.now_ms))
    assert bool(only(stored, Publish)) is announced


def test_copies_that_strangers_say_they_have_keep_nobody_from_announcing_its_own() -> None:
    script = Script(make_node(network_key=None), also="publish")
    script.run(f"> meet {' '.join(str(number) for number in range(1, 9))}")
    for number in range(1, 9):
        script.act(f"gossip {number} a")
    stored = ResponseStored(response("a"), script.now_ms + RESPONSE_TTL_MS, False)
    assert only(script.node.handle(stored, dated(script.now_ms)), Publish)


def test_popularity_grows_with_requests_of_clients_and_members_and_travels_with_the_response() -> None:
    node = make_node(network_key=None, listed=(1,))
    node.handle(ResponsesUsed((response("a"),) * 3), dated(NOW_MS))
    effects = node.handle(RequestReceived(5, Identity(1).peer, Query(response("a"))), dated(NOW_MS))
    assert effects == [ServeResponse(5, response("a"), 64)]
    for _ in range(100):
        effects = node.handle(RequestReceived(6, Identity(2).peer, Query(response("a"))), dated(NOW_MS))
    assert effects == [ServeResponse(6, response("a"), 64)]


def test_a_new_author_is_told_of_at_once() -> None:
    node = make_node()
    for number in (1, 2, 3):
        node.handle(PeerConnected(Identity(number).peer, Identity(number).host), dated(NOW_MS))
        (told,) = only(asked(node, Greet(Identity(number).record()), number), AuthorsChanged)
        assert len(told.authors) == number


def test_records_that_change_all_the_time_are_told_of_now_and_then() -> None:
    node = make_node(network_key=None)
    who = Identity(1)
    node.handle(PeerConnected(who.peer, who.host), dated(NOW_MS))
    told = []
    for number in range(1_000):
        record = who.record(number + 1, network_key=None, endpoint=f"{who.host}:{number + 1}")
        told += only(asked(node, Greet(record), now_ms=NOW_MS + number), PeersChanged)
    told += only(tick(node, NOW_MS + 1_000 + TELL_AGAIN_MS), PeersChanged)
    assert len(told) <= 2 + 1_000 // TELL_AGAIN_MS
    assert told[-1].usable[0].endpoint == f"{who.host}:1000"


def test_our_own_haste_makes_nobody_silent() -> None:
    script = Script(also="peers send")
    script.run("> meet 1\nsend 1 Greet\npeers 1")
    (request,) = script.sends
    assert script.node.handle(RequestFailed(request, Identity(1).peer, Reason.BUSY), dated(NOW_MS)) == []


def test_an_announcement_of_a_clock_a_little_ahead_counts() -> None:
    node = make_node()
    Script(node).run("> meet 1")
    node.handle(gossip(1, "a", 1, NOW_MS + CLOCK_SKEW_MS), dated(NOW_MS))
    assert node.providers.of(response("a"), dated(NOW_MS)) == (Identity(1).peer,)


def test_announcements_that_promise_too_much_are_no_hints() -> None:
    node = make_node()
    Script(node).run("> meet 1")
    node.handle(gossip(1, "a", 1, NOW_MS, REGISTRY_TTL_MS + CLOCK_SKEW_MS + 1), dated(NOW_MS))
    node.handle(gossip(1, "b", 2, NOW_MS, 0), dated(NOW_MS))
    assert len(node.hints) == 0


def test_in_a_network_without_a_key_only_those_who_greeted_are_heard() -> None:
    node = make_node(network_key=None)
    assert node.handle(gossip(1, "a", 1, NOW_MS), dated(NOW_MS)) == []
    assert node.gossip.refused == {"stranger": 1}
    asked(node, Greet(Identity(1).record(network_key=None)))
    node.handle(gossip(1, "a", 2, NOW_MS), dated(NOW_MS))
    assert node.providers.of(response("a"), dated(NOW_MS)) == (Identity(1).peer,)


def test_whose_gossip_is_taken_is_told_when_it_changes() -> None:
    node = make_node(listed=(4,))
    listed = (Identity(4).peer, Acquaintance(Rank.LISTED, ""))
    assert only(node.start(dated(NOW_MS)), AuthorsChanged) == [AuthorsChanged((listed,))]
    effects = node.handle(PeerConnected(Identity(1).peer, "192.0.2.1"), dated(NOW_MS))
    effects += node.handle(RequestReceived(1, Identity(1).peer, Greet(Identity(1).record())), dated(NOW_MS))
    met = (Identity(1).peer, Acquaintance(Rank.MET, "192.0.2.1"))
    assert only(effects, AuthorsChanged) == [AuthorsChanged((listed, met))]


def test_a_neighbour_that_passes_on_rubbish_is_charged_and_disconnected() -> None:
    node, peer = make_node(), Identity(1).peer
    node.handle(PeerConnected(peer, Identity(1).host), dated(NOW_MS))
    assert node.handle(GossipSpoiled(peer), dated(NOW_MS)) == [
        ChargePeer(peer, Reason.INVALID_GOSSIP),
        Disconnect(peer),
    ]


def test_gossip_that_is_garbage_harms_nobody() -> None:
    node = make_node()
    assert node.handle(GossipReceived(RESPONSE_TOPIC, Identity(1).peer, b"garbage"), dated(NOW_MS)) == []
    assert node.gossip.refused == {"malformed": 1}
