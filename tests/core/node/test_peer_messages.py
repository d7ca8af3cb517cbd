"""What peers ask and answer, and what becomes of those that break rules or forget this node."""

from typing import Literal

import pytest

from hyperspace_vllm.core.events.conduct import ChargePeer, PeerMisbehaved
from hyperspace_vllm.core.events.connections import Disconnect, PeerConnected, PeerDisconnected
from hyperspace_vllm.core.events.node_state import Tick
from hyperspace_vllm.core.events.peer_requests import (
    Answered,
    Reply,
    Send,
)
from hyperspace_vllm.core.node.network_part import NetworkPart
from hyperspace_vllm.core.node.own_requests import GREET_AGAIN_MS, REQUESTS_MAX
from hyperspace_vllm.core.peers.avoidance import LIAR_MS
from hyperspace_vllm.core.peers.reputation import score_of
from hyperspace_vllm.core.records.limits import (
    REGISTRY_TTL_MS,
)
from hyperspace_vllm.core.records.peer_wire import (
    Deltas,
    Greet,
    Greeting,
    Miss,
    PeerAnswer,
    PeerRequest,
    Peers,
    Ping,
    Pong,
    Refusal,
    WantDeltas,
    WantPeers,
)
from hyperspace_vllm.core.records.reason import Reason
from hyperspace_vllm.core.records.registry_delta import RegistryDelta, encode_delta
from hyperspace_vllm.core.registry.registry_sync import SYNC_AGAIN_MS
from tests.support.moments import at, dated
from tests.support.network_script import Script, asked, tick
from tests.support.network_world import (
    HOUR_MS,
    NETWORK,
    NOW_MS,
    SECOND_MS,
    Identity,
    make_node,
    only,
)


@pytest.mark.parametrize("message", [WantPeers(b""), WantDeltas(())])
def test_strangers_are_told_to_greet_first(message: PeerRequest) -> None:
    node = make_node()
    node.handle(PeerConnected(Identity(1).peer), dated(NOW_MS))
    assert asked(node, message) == [Reply(1, Refusal("stranger"))]
    asked(node, Greet(Identity(1).record()))
    assert not isinstance(only(asked(node, message), Reply)[0].message, Refusal)


def test_a_greeting_without_a_good_record_is_refused_and_the_connection_closed() -> None:
    node = make_node()
    peer = Identity(1).peer
    good = Identity(1).record()
    refused: tuple[tuple[bytes, Literal["protocol", "stranger"]], ...] = (
        (b"", "protocol"),
        (Identity(2).record(), "protocol"),
        (good[:-1] + bytes([good[-1] ^ 1]), "protocol"),
        (Identity(1).record(expires_at_ms=NOW_MS), "stranger"),
        (Identity(1).record(network_key=None), "stranger"),
    )
    for record, reason in refused:
        node = make_node()
        node.handle(PeerConnected(peer), dated(NOW_MS))
        effects = asked(node, Greet(record))
        assert only(effects, Reply) == [Reply(1, Refusal(reason))]
        assert only(effects, Disconnect) == [Disconnect(peer)]
        assert bool(only(effects, ChargePeer)) is (reason == "protocol")


def test_answers_of_the_wrong_kind_are_charged_and_unasked_ones_ignored() -> None:
    node = make_node()
    peer = Identity(1).peer
    (greet,) = only(node.handle(PeerConnected(peer), dated(NOW_MS)), Send)
    record = Identity(2).record()
    assert node.handle(Answered(greet.request + 1, peer, Greeting(record)), dated(NOW_MS)) == []
    assert node.handle(Answered(greet.request, Identity(2).peer, Greeting(record)), dated(NOW_MS)) == []
    (greet,) = only(node.handle(PeerConnected(peer), dated(NOW_MS)), Send)
    assert node.handle(Answered(greet.request, peer, Pong()), dated(NOW_MS)) == [ChargePeer(peer, Reason.PROTOCOL)]
    assert node.handle(Answered(greet.request, peer, Pong()), dated(NOW_MS)) == []


def test_who_goes_on_breaking_rules_is_cut_off() -> None:
    node = make_node()
    peer = Identity(1).peer
    sends = [send for _ in range(2) for send in only(node.handle(PeerConnected(peer), dated(NOW_MS)), Send)]
    first, second = (node.handle(Answered(send.request, peer, Miss("busy")), dated(NOW_MS)) for send in sends)
    assert first == [ChargePeer(peer, Reason.PROTOCOL)]
    assert second == [ChargePeer(peer, Reason.PROTOCOL), Disconnect(peer)]


def test_who_goes_on_sending_what_is_forbidden_is_let_in_no_more_for_a_while() -> None:
    node = make_node()
    peer, other = Identity(1).peer, Identity(2).peer
    node.handle(PeerConnected(peer), dated(NOW_MS))
    assert node.handle(PeerMisbehaved(peer), dated(NOW_MS)) == [ChargePeer(peer, Reason.PROTOCOL)]
    assert node.handle(PeerMisbehaved(peer), dated(NOW_MS)) == [ChargePeer(peer, Reason.PROTOCOL), Disconnect(peer)]
    node.handle(PeerDisconnected(peer), dated(NOW_MS))
    assert node.handle(PeerConnected(peer), dated(NOW_MS + LIAR_MS - 1)) == [Disconnect(peer)]
    assert only(node.handle(PeerConnected(other), dated(NOW_MS)), Disconnect) == []
    assert only(node.handle(PeerConnected(peer), dated(NOW_MS + LIAR_MS)), Disconnect) == []


def test_who_has_forgotten_us_is_greeted_again() -> None:
    node = make_node()
    peer = Identity(1).peer
    (greet,) = only(node.handle(PeerConnected(peer), dated(NOW_MS)), Send)
    (want,) = only(node.handle(Answered(greet.request, peer, Greeting(Identity(1).record())), dated(NOW_MS)), Send)
    (again,) = only(node.handle(Answered(want.request, peer, Refusal("stranger")), dated(NOW_MS)), Send)
    assert isinstance(again.message, Greet)
    assert node.handle(Answered(again.request, peer, Refusal("stranger")), dated(NOW_MS)) == []


def exchange(node: NetworkPart, sends: list[Send], refused: type[PeerRequest] | tuple[type[PeerRequest], ...]) -> list:  # type: ignore[type-arg]
    """What a node sends to peer 1, which answers at once, and those of a kind with "stranger"; and its charges."""
    happened: list[Send | ChargePeer] = []
    while sends and len(happened) < 1_000:
        send, *sends = sends
        happened.append(send)
        answers: dict[type, PeerAnswer] = {
            Greet: Greeting(Identity(1).record()),
            WantPeers: Peers(()),
            WantDeltas: Deltas((), ()),
            Ping: Pong(),
        }
        message = Refusal("stranger") if isinstance(send.message, refused) else answers[type(send.message)]
        effects = node.handle(Answered(send.request, send.peer, message), dated(NOW_MS))
        sends += only(effects, Send)
        happened += only(effects, ChargePeer)
    return happened


@pytest.mark.parametrize("refused", [WantDeltas, WantPeers, (WantPeers, WantDeltas)])
def test_who_says_again_that_it_does_not_know_us_gets_no_endless_exchange_out_of_it(
    refused: type[PeerRequest] | tuple[type[PeerRequest], ...],
) -> None:
    node = make_node(registry=True)
    peer = Identity(1).peer
    happened = exchange(node, only(node.handle(PeerConnected(peer), dated(NOW_MS)), Send), refused)
    sent = [type(each.message) for each in only(happened, Send)]
    assert sorted(kind.__name__ for kind in sent) == sorted(2 * ["Greet", "WantPeers", "WantDeltas"])
    assert set(only(happened, ChargePeer)) == {ChargePeer(peer, Reason.PROTOCOL)}


def test_who_knows_us_after_the_second_greeting_is_charged_nothing() -> None:
    node = make_node(registry=True)
    peer, now = Identity(1).peer, dated(NOW_MS)
    (greet,) = only(node.handle(PeerConnected(peer), now), Send)
    first, second = only(node.handle(Answered(greet.request, peer, Greeting(Identity(1).record())), now), Send)
    (again,) = node.handle(Answered(first.request, peer, Refusal("stranger")), now)
    assert isinstance(again, Send)
    asked = only(node.handle(Answered(again.request, peer, Greeting(Identity(1).record())), now), Send)
    assert [type(send.message) for send in asked] == [type(first.message)]  # the other question is still open
    assert node.handle(Answered(second.request, peer, Refusal("stranger")), now) == []  # it was under way before


def test_who_forgets_us_now_and_then_is_greeted_each_time() -> None:
    node = make_node()
    peer = Identity(1).peer
    (greet,) = only(node.handle(PeerConnected(peer), dated(NOW_MS)), Send)
    greeting = Greeting(Identity(1).record())
    for number in range(3):
        now = dated(NOW_MS + number * GREET_AGAIN_MS)
        (want,) = only(node.handle(Answered(greet.request, peer, greeting), now), Send)
        (greet,) = only(node.handle(Answered(want.request, peer, Refusal("stranger")), now), Send)
        assert isinstance(greet.message, Greet)


def test_one_question_of_a_kind_is_open_to_a_peer_until_its_time_is_over() -> None:
    node = make_node(registry=True)
    peer = Identity(1).peer

    def greeted(now_ms: int) -> list[str]:
        (greet, *_) = only(node.handle(PeerConnected(peer), dated(now_ms)), Send)
        answer = Answered(greet.request, peer, Greeting(Identity(1).record()))
        return [type(send.message).__name__ for send in only(node.handle(answer, dated(now_ms)), Send)]

    assert greeted(NOW_MS) == ["WantPeers", "WantDeltas"]
    assert greeted(NOW_MS + 1) == []
    assert greeted(NOW_MS + 3 * SECOND_MS) == ["WantPeers", "WantDeltas"]


def test_who_has_more_of_the_registry_is_asked_again_after_a_while() -> None:
    node = make_node(registry=True)
    Script(node).run("> meet 1")
    peer = Identity(1).peer
    (send,) = node._requests.ask(peer, WantDeltas(()), 1_000, dated(NOW_MS))
    delta = RegistryDelta(NETWORK, Identity(1).public_key, 1, 0, "snapshot", NOW_MS + HOUR_MS, b"x")
    answer = Deltas((encode_delta(delta, Identity(1).key),), (), more=True)
    assert only(node.handle(Answered(send.request, peer, answer), dated(NOW_MS)), Send) == []
    assert node.next_deadline_ms() is not None
    assert only(tick(node, NOW_MS + SYNC_AGAIN_MS - 1), Send) == []
    (again,) = only(tick(node, NOW_MS + SYNC_AGAIN_MS), Send)
    assert isinstance(again.message, WantDeltas)


def test_a_peer_whose_ping_was_lost_sight_of_is_still_noticed_to_be_silent() -> None:
    node = make_node()
    Script(node).run("> meet 1")
    node.handle(Tick(), dated(NOW_MS + SECOND_MS))
    for number in range(REQUESTS_MAX):
        node.handle(PeerConnected(Identity(2).peer), dated(NOW_MS + SECOND_MS + number))
    tick(node, NOW_MS + SECOND_MS + REQUESTS_MAX)
    assert not any(known.peer == Identity(1).peer for known in node.members.neighbours())


def says_who_is_charged(node: NetworkPart, number: int, message: PeerRequest, answer: PeerAnswer) -> list[ChargePeer]:
    """What `number` answers to a question of the node's, and whom that charges."""
    (send,) = node._requests.ask(Identity(number).peer, message, 1_000, dated(NOW_MS))
    charged = only(node.handle(Answered(send.request, send.peer, answer), dated(NOW_MS)), ChargePeer)
    while (due_ms := node.registry._intake.next_deadline_ms()) is not None:
        charged += only(node.handle(Tick(), at(due_ms)), ChargePeer)
    return charged


def is_judged_a_liar(node: NetworkPart, number: int) -> bool:
    """Whether it has lost belief and service, which go together when one lies."""
    peer, newcomer = Identity(number).peer, score_of(0, 0, 0)
    scores = node._trust.standings.word(peer, dated(NOW_MS)), node._trust.standings.service(peer, dated(NOW_MS))
    assert scores in ((newcomer, newcomer), (newcomer / 2, newcomer / 2))
    return scores[0] < newcomer


def test_who_passes_on_a_forged_record_is_judged_for_it() -> None:
    node, forged = make_node(), bytearray(Identity(3).record())
    forged[-1] ^= 1
    for number in (1, 2):
        node.handle(PeerConnected(Identity(number).peer, Identity(number).host), dated(NOW_MS))
        asked(node, Greet(Identity(number).record()), number)
    charged = says_who_is_charged(node, 1, WantPeers(b""), Peers((bytes(forged),)))
    assert charged == [ChargePeer(Identity(1).peer, Reason.BAD_SIGNATURE)]
    assert [is_judged_a_liar(node, number) for number in (1, 2, 3)] == [True, False, False]


def test_who_signs_two_documents_of_one_number_is_judged_for_it_and_no_relay() -> None:
    node = make_node(registry=True)
    for number in (1, 2):
        node.handle(PeerConnected(Identity(number).peer, Identity(number).host), dated(NOW_MS))
        asked(node, Greet(Identity(number).record()), number)
    owner, charged = Identity(2), []
    for payload in (b"one", b"another"):
        delta = RegistryDelta(NETWORK, owner.public_key, NOW_MS, 0, "snapshot", NOW_MS + REGISTRY_TTL_MS, payload)
        deltas = Deltas((encode_delta(delta, owner.key),), ())
        charged += says_who_is_charged(node, 1, WantDeltas(()), deltas)
    assert charged == [ChargePeer(owner.peer, Reason.REGISTRY_EQUIVOCATION)]
    assert [is_judged_a_liar(node, number) for number in (1, 2)] == [False, True]
