"""NetworkPart as a whole: transcripts of events and their effects, and a few nodes that hand each other their messages.

In a transcript `> ` starts an event, the lines below it are its effects; time only moves by `at=`, in ms since the
start. Peers are numbers, responses are letters.
"""

import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperspace_vllm.core.events.conduct import AnswerAudited, ChargePeer, PeerMisbehaved
from hyperspace_vllm.core.events.connections import Connect, ConnectFailed, Disconnect, PeerConnected, PeerDisconnected
from hyperspace_vllm.core.events.dht import NotProvided, Provide, ProvidersFound, SearchDht
from hyperspace_vllm.core.events.gossip import AuthorsChanged, GossipReceived, GossipSpoiled, Publish
from hyperspace_vllm.core.events.known_peers import PeersChanged
from hyperspace_vllm.core.events.node_state import Tick
from hyperspace_vllm.core.events.owner_documents import DeltasImported, DeltasRefused, ImportDeltas
from hyperspace_vllm.core.events.peer_requests import (
    Answered,
    Reply,
    RequestFailed,
    RequestReceived,
    Send,
    ServeResponse,
)
from hyperspace_vllm.core.events.prefix_writing import RowsStored
from hyperspace_vllm.core.events.response_reading import (
    AnswerResponse,
    FetchResponse,
    HintResponse,
    ResponseFetched,
    ResponseRefused,
    ResponseReleased,
    ResponseWanted,
)
from hyperspace_vllm.core.events.stored_responses import ResponsesGone, ResponseStored, ResponsesUsed
from hyperspace_vllm.core.events.vocabulary import NetworkEffect, NetworkEvent
from hyperspace_vllm.core.node.network_part import NetworkPart
from hyperspace_vllm.core.node.own_requests import GREET_AGAIN_MS, REQUESTS_MAX
from hyperspace_vllm.core.peers.avoidance import LIAR_MS
from hyperspace_vllm.core.peers.introductions import TELL_AGAIN_MS
from hyperspace_vllm.core.peers.neighbours import DIALS_MAX
from hyperspace_vllm.core.peers.patience import LENT_MAX_MS, LENT_SHARE
from hyperspace_vllm.core.peers.reputation import score_of
from hyperspace_vllm.core.peers.standing import Delivered
from hyperspace_vllm.core.records.announcement import (
    RESPONSE_TOPIC,
    Announcement,
    EvidenceEntry,
    ResponseEntry,
    decode_announcement,
    encode_announcement,
)
from hyperspace_vllm.core.records.ids import PeerId, sha256
from hyperspace_vllm.core.records.limits import (
    CLOCK_SKEW_MS,
    PEER_RECORD_TTL_MS,
    PEERS_KNOWN_MAX,
    PEERS_OF_SOURCE_MAX,
    PEX_RECORDS_MAX,
    REGISTRY_INDEX_OF_SOURCE_MAX,
    REGISTRY_TTL_MS,
    RESPONSE_TTL_MS,
)
from hyperspace_vllm.core.records.peer_record import decode_peer_record
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
    Query,
    Refusal,
    WantDeltas,
    WantPeers,
)
from hyperspace_vllm.core.records.rank import Acquaintance, Rank
from hyperspace_vllm.core.records.reason import Reason
from hyperspace_vllm.core.records.registry_delta import RegistryDelta, encode_delta
from hyperspace_vllm.core.registry.registry_sync import SYNC_AGAIN_MS
from hyperspace_vllm.core.response.lookup import RACE_MS
from hyperspace_vllm.core.response.open_lookups import LOOKUPS_MAX
from tests.core.response.test_announcer import HOUR_MS
from tests.support.machines.registry_node import SECOND_MS
from tests.support.moments import at, dated
from tests.support.network_world import NETWORK, NETWORK_KEY, NOW_MS, Identity, World, make_node, only


def response(letter: str) -> bytes:
    return sha256(b"response", letter.encode())


def letter_of(name: bytes) -> str:
    return next(chr(code) for code in range(ord("a"), ord("z") + 1) if response(chr(code)) == name)


def gossip(number: int, letters: str, sequence: int, now_ms: int, ttl_ms: int = RESPONSE_TTL_MS) -> GossipReceived:
    """A peer's announcement."""
    who = Identity(number)
    entries = tuple(ResponseEntry(response(letter), now_ms + ttl_ms) for letter in letters)
    batch = Announcement(NETWORK, who.public_key, sequence, now_ms, entries)
    return GossipReceived(RESPONSE_TOPIC, who.peer, encode_announcement(batch, who.key))


class Script:
    """Runs a transcript against one NetworkPart; `silent` leaves out effects that are of no interest."""

    def __init__(self, node: NetworkPart | None = None, also: str = "") -> None:
        self.node = node or make_node()
        self.now_ms = NOW_MS
        self.shown = {"hint", "fetch", "search", "answer", "charge", "disconnect", *also.split()}
        self.sends: dict[int, Send] = {}

    def run(self, transcript: str) -> None:
        lines = [line.split("#")[0].rstrip() for line in textwrap.dedent(transcript).strip().splitlines()]
        turns: list[tuple[str, list[str]]] = []
        for line in (line for line in lines if line):
            if line.startswith("> "):
                turns.append((line[2:], []))
            else:
                turns[-1][1].append(line.strip())
        for command, expected in turns:
            assert self.act(command) == expected, f"after `{command}`"

    def act(self, command: str) -> list[str]:
        words = command.split()
        if words[0].startswith("at="):
            self.now_ms = NOW_MS + int(words.pop(0)[3:])
        effects: list[NetworkEffect] = []
        for event in self.events(words):
            new = self.node.handle(event, dated(self.now_ms))
            self.sends |= {effect.request: effect for effect in new if isinstance(effect, Send)}
            effects += new
        return [text for text in map(self.told, effects) if text.split()[0] in self.shown]

    def events(self, words: list[str]) -> list[NetworkEvent]:
        match words:
            case ["meet", *numbers]:
                return [event for number in numbers for event in self.meeting(int(number))]
            case ["gone", number]:
                return [PeerDisconnected(Identity(int(number)).peer)]
            case ["gossip", number, letters]:
                return [gossip(int(number), letters, self.now_ms, self.now_ms)]
            case ["want", letter, *numbers]:
                told = tuple(Identity(int(number)).peer for number in numbers)
                return [ResponseWanted(ord(letter), response(letter), 300, told)]
            case ["release", letter]:
                return [ResponseReleased(ord(letter))]
            case ["got", letter, number]:
                expires_at_ms = self.now_ms + RESPONSE_TTL_MS
                return [ResponseFetched(ord(letter), Identity(int(number)).peer, 9, expires_at_ms, 16)]
            case ["refused", letter, number, reason]:
                return [ResponseRefused(ord(letter), Identity(int(number)).peer, Reason(reason))]
            case ["found", letter, *numbers]:
                peers = tuple(Identity(int(number)).peer for number in numbers)
                return [ProvidersFound(ord(letter), peers, 10.0)]
            case ["tick"]:
                return [Tick()]
            case _:
                raise ValueError(words)

    def meeting(self, number: int) -> list[NetworkEvent]:
        who = Identity(number)
        record = who.record(self.now_ms, self.now_ms + PEER_RECORD_TTL_MS)
        return [PeerConnected(who.peer, who.host), RequestReceived(number, who.peer, Greet(record))]

    def told(self, effect: NetworkEffect) -> str:
        match effect:
            case HintResponse(_, hinted):
                return f"hint {'yes' if hinted else 'no'}"
            case FetchResponse(lookup, peer, _, _, timeout_ms):
                return f"fetch {chr(lookup)} from {number_of(peer)} for {timeout_ms}"
            case SearchDht(lookup):
                return f"search {chr(lookup)}"
            case AnswerResponse(lookup, peer, source, reason):
                return f"answer {chr(lookup)} {number_of(peer) if peer else 'none'} {source} {reason}"
            case ChargePeer(peer, reason):
                return f"charge {number_of(peer)} {reason}"
            case Disconnect(peer):
                return f"disconnect {number_of(peer)}"
            case PeersChanged(usable):
                return f"peers {' '.join(str(number_of(record.peer)) for record in usable)}".rstrip()
            case Publish(_, payload):
                entries = decode_announcement(payload).entries
                return "publish " + "".join(letter_of(e.request_hash) for e in entries if isinstance(e, ResponseEntry))
            case Provide(key):
                return f"provide {letter_of(bytes.fromhex(key.removeprefix('/cache/')))}"
            case Reply(_, message):
                return f"reply {type(message).__name__}"
            case Send(_, peer, message):
                return f"send {number_of(peer)} {type(message).__name__}"
            case _:
                return type(effect).__name__.lower()


def number_of(peer: PeerId) -> int:
    return next(number for number in range(100) if Identity(number).peer == peer)


def test_what_gossip_announced_is_fetched_from_who_announced_it() -> None:
    Script().run(
        """
        > meet 1 2
        > gossip 1 ab
        > want a
        hint yes
        fetch a from 1 for 300
        > at=10 got a 1
        answer a 1 hint hit
        > want c                    # nobody announced it: the engine begins while the DHT is asked
        hint no
        search c
        > at=60 found c
        answer c none none not_found
        > at=100 want c             # not again at once
        hint no
        answer c none none not_found
        > at=5000 want c            # and asking in vain doesn't put off the next search
        hint no
        answer c none none not_found
        > at=10100 want c
        hint no
        search c
        """
    )


def test_without_peers_no_lookup_begins() -> None:
    Script().run(
        """
        > want a
        hint no
        answer a none none no_peers
        """
    )


def test_a_liar_is_charged_and_not_asked_again_for_a_while() -> None:
    script = Script()
    script.run(
        """
        > meet 1 2
        > gossip 1 ab
        > want a
        hint yes
        fetch a from 1 for 300
        > refused a 1 bad_signature
        charge 1 bad_signature
        hint no
        search a
        > found a 1                 # the DHT knows nobody else
        answer a none none bad_signature
        > want b
        hint no
        search b
        > found b
        answer b none none not_found
        """
    )
    script.now_ms += LIAR_MS
    script.run(f"> meet 2\n> at={LIAR_MS} gossip 1 b\n> want b\nhint yes\nfetch b from 1 for 300")


def test_a_miss_takes_back_the_hint() -> None:
    Script().run(
        """
        > meet 1 2
        > gossip 1 a
        > want a
        hint yes
        fetch a from 1 for 300
        > refused a 1 miss
        hint no
        search a
        > found a
        answer a none none not_found
        > want a
        hint no
        answer a none none not_found
        """
    )


def test_whoever_said_so_first_is_asked_second_if_it_is_not_the_best() -> None:
    script = Script()
    script.run("> meet 1 2 3")
    script.node.members.on_record(Identity(4).record(), Identity(1).peer, dated(NOW_MS), own_word=False)
    script.run(
        """
        > gossip 4 a                # not connected, but heard before those who may merely repeat it
        > want a 4 1 2 3
        hint yes
        fetch a from 3 for 300
        > refused a 3 miss
        fetch a from 4 for 300
        """
    )


def test_a_connection_that_opened_just_before_the_deadline_costs_a_peer_nothing() -> None:
    script = Script()
    script.run("> meet 2")
    script.node.members.on_record(Identity(1).record(), Identity(2).peer, dated(NOW_MS), own_word=False)
    script.run(
        """
        > gossip 1 ab
        > want a
        hint yes
        fetch a from 1 for 300
        > at=290 meet 1
        > at=299 refused a 1 timeout
        hint no
        search a
        > at=299 want b
        hint yes
        fetch b from 1 for 300
        """
    )


def test_who_could_not_be_reached_in_time_is_not_asked_for_seconds() -> None:
    script = Script()
    script.node.handle(PeerConnected(Identity(2).peer, Identity(2).host), dated(NOW_MS))
    script.run("> meet 2")
    record = Identity(1).record()
    want = next(s for s in script.sends.values()) if script.sends else None
    assert want is None or want.peer == Identity(2).peer
    script.node.members.on_record(record, Identity(2).peer, dated(NOW_MS), own_word=False)
    script.run(
        """
        > gossip 1 ab
        > want a
        hint yes
        fetch a from 1 for 300      # not connected: nobody sends it heartbeats
        > at=300 tick
        answer a none none deadline
        > at=301 want b
        hint no
        search b
        """
    )


def test_a_released_lookup_that_was_hinted_is_over_and_a_race_goes_on() -> None:
    Script().run(
        """
        > meet 1
        > gossip 1 a
        > want a
        hint yes
        fetch a from 1 for 300
        > release a
        answer a none none released
        > got a 1                   # too late
        > want b
        hint no
        search b
        > release b                 # the engine won; what is found still serves the next request
        > at=50 found b 1
        fetch b from 1 for 2950
        > at=60 got b 1
        answer b 1 dht hit
        """
    )


def test_providers_that_the_shell_knows_of_are_hints_too() -> None:
    Script().run(
        """
        > meet 1
        > want a 1
        hint yes
        fetch a from 1 for 300
        """
    )


def test_a_hint_at_somebody_unknown_is_none() -> None:
    Script().run(
        """
        > meet 1
        > gossip 7 a                # a member, but nobody has shown its record
        > want a
        hint no
        search a
        """
    )


def test_a_stranger_makes_no_request_wait_until_it_has_delivered_nor_for_longer_than_that_earned_it() -> None:
    script = Script(make_node(network_key=None))
    script.run(
        f"""
        > meet 1
        > gossip 1 abcd
        > want a
        hint no
        fetch a from 1 for {RACE_MS}
        > at=40 got a 1
        answer a 1 hint hit
        > want b
        hint yes
        fetch b from 1 for 300
        > at=330 refused b 1 miss       # 290 of the 300 ms that its delivery earned it
        hint no
        search b
        > found b
        answer b none none not_found
        > want c
        hint yes
        fetch c from 1 for 300
        > at=340 refused c 1 miss
        hint no
        search c
        > found c
        answer c none none not_found
        > want d
        hint no
        fetch d from 1 for {RACE_MS}
        """
    )


def test_strangers_are_asked_after_those_a_request_waits_for() -> None:
    script = Script(make_node(network_key=None, listed=(2,)))
    script.run("> meet 1 2 3\n> want a 1 3 2\nhint yes\nfetch a from 2 for 300")


def test_members_that_never_delivered_waste_no_more_than_all_of_them_are_lent() -> None:
    """A holder of the network key can be as many members as it likes."""
    script = Script()
    waits = 0
    for number in range(1, 40):
        script.run(f"> meet {number}\n> gossip {number} a")
        hint, *_ = script.act(f"want a {number}")
        waits += hint == "hint yes"
        script.now_ms += 300
        script.act("tick")
        script.act("release a")
        script.act(f"refused a {number} timeout")
        script.act("found a")
        script.act(f"at={script.now_ms - NOW_MS + RACE_MS} tick")
    passed_ms = script.now_ms - NOW_MS
    assert LENT_MAX_MS // 300 <= waits <= (LENT_MAX_MS + LENT_SHARE * passed_ms) / 300 + 1


def test_what_a_convicted_peer_says_it_has_is_not_waited_for() -> None:
    script = Script()
    script.run("> meet 1")
    script.node._trust.standings.note(Delivered(Identity(1).peer, 1, 1), dated(NOW_MS))
    script.node._trust.standings.convict(Identity(1).public_key, dated(NOW_MS))
    script.run(f"> want a 1\nhint no\nfetch a from 1 for {RACE_MS}")


def test_hinted_lookups_leave_the_search_budget_alone() -> None:
    script = Script()
    script.run("> meet 1 2")
    for _ in range(100):
        script.run("> want a 1\nhint yes\nfetch a from 1 for 300\n> got a 1\nanswer a 1 hint hit")
    script.run("> want b\nhint no\nsearch b")


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


# --- hostile or odd peers -----------------------------------------------------------------------


def asked(node: NetworkPart, message: PeerRequest, number: int = 1, now_ms: int = NOW_MS) -> list[NetworkEffect]:
    return node.handle(RequestReceived(1, Identity(number).peer, message), dated(now_ms))


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
    for record, reason in (
        (b"", "protocol"),
        (Identity(2).record(), "protocol"),
        (good[:-1] + bytes([good[-1] ^ 1]), "protocol"),
        (Identity(1).record(expires_at_ms=NOW_MS), "stranger"),
        (Identity(1).record(network_key=None), "stranger"),
    ):
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
        answers = {
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


def test_lookups_and_requests_are_bounded() -> None:
    script = Script()
    script.run("> meet 1 2")
    peer = Identity(1).peer
    for lookup in range(LOOKUPS_MAX):
        effects = script.node.handle(ResponseWanted(lookup, response("a"), 300, (peer,)), dated(NOW_MS))
        assert isinstance(effects[1], FetchResponse)
    busy = script.node.handle(ResponseWanted(LOOKUPS_MAX, response("a"), 300, (peer,)), dated(NOW_MS))
    assert busy == [HintResponse(LOOKUPS_MAX, False), AnswerResponse(LOOKUPS_MAX, None, "none", "busy")]
    answers = only(script.node.handle(Tick(), dated(NOW_MS + 300)), AnswerResponse)
    assert [answer.reason for answer in answers] == ["deadline"] * LOOKUPS_MAX
    for number in range(REQUESTS_MAX + 10):
        script.node.handle(PeerConnected(peer), dated(NOW_MS + number))
    assert len(script.node._requests._open) == REQUESTS_MAX


def test_a_peer_whose_ping_was_lost_sight_of_is_still_noticed_to_be_silent() -> None:
    node = make_node()
    Script(node).run("> meet 1")
    node.handle(Tick(), dated(NOW_MS + SECOND_MS))
    for number in range(REQUESTS_MAX):
        node.handle(PeerConnected(Identity(2).peer), dated(NOW_MS + SECOND_MS + number))
    tick(node, NOW_MS + SECOND_MS + REQUESTS_MAX)
    assert not any(known.peer == Identity(1).peer for known in node.members.neighbours())


# --- time ---------------------------------------------------------------------------------------


def tick(node: NetworkPart, now_ms: int, set_by_ms: int = 0) -> list[NetworkEffect]:
    """A tick, after which the next deadline must lie ahead; the wall clock was set by so much."""
    now = at(dated(now_ms).mono_ms, set_by_ms)
    effects = node.handle(Tick(), now)
    due_ms = node.next_deadline_ms()
    assert due_ms is None or due_ms > now.mono_ms
    return effects


@pytest.mark.parametrize("set_by_ms", [-5, -10 * SECOND_MS, -HOUR_MS, -24 * HOUR_MS, 24 * HOUR_MS])
def test_a_wall_clock_that_is_set_delays_no_deadline(set_by_ms: int) -> None:
    script = Script(make_node(bootstrap=(9,)))
    script.run("> meet 1\n> gossip 1 a\n> want a\nhint yes\nfetch a from 1 for 300")
    node = script.node
    now_ms = NOW_MS + 100
    tick(node, now_ms)
    assert only(tick(node, now_ms, set_by_ms), AnswerResponse) == []
    due_ms = node.next_deadline_ms()
    assert due_ms is not None
    assert due_ms <= dated(now_ms + 200).mono_ms
    assert [answer.reason for answer in only(tick(node, now_ms + 200, set_by_ms), AnswerResponse)] == ["deadline"]
    sent = [send for step in range(1, 5) for send in only(tick(node, now_ms + step * SECOND_MS, set_by_ms), Send)]
    assert any(isinstance(send.message, Ping) for send in sent)
    later = at(dated(now_ms + 4 * SECOND_MS).mono_ms, set_by_ms)
    assert node.handle(gossip(1, "b", 2, later.wall_ms), later) is not None
    stored = ResponseStored(response("c"), later.wall_ms + HOUR_MS, True)
    effects = node.handle(stored, later) + tick(node, now_ms + 6 * SECOND_MS, set_by_ms)
    assert only(effects, Publish)


def events_of_anybody() -> st.SearchStrategy[NetworkEvent]:
    """Whatever a shell may hand over, of peers that behave or don't."""
    peers = st.integers(1, 6).map(lambda number: Identity(number).peer)
    names = st.sampled_from("abc").map(response)
    records = st.tuples(
        st.integers(1, 6), st.integers(1, 5), st.sampled_from(["", "10.0.0.9:1", "x", "127.0.0.1:1"])
    ).map(lambda each: Identity(each[0]).record(each[1], NOW_MS + 40_000, each[2]))
    requests: st.SearchStrategy[PeerRequest] = st.one_of(
        records.map(Greet),
        st.just(Ping()),
        st.binary(max_size=40).map(WantPeers),
        st.just(WantDeltas(())),
        names.map(Query),
    )
    answers: st.SearchStrategy[PeerAnswer] = st.one_of(
        records.map(Greeting),
        st.just(Pong()),
        st.lists(records, max_size=4).map(lambda several: Peers(tuple(several))),
        st.booleans().map(lambda more: Deltas((b"garbage",), (), more)),
        st.just(Refusal("stranger")),
        st.just(Miss("unknown")),
    )
    evidence = st.builds(
        lambda number, name, far: EvidenceEntry(
            Identity(number).public_key, name, bytes(32), bytes(32), 0, bytes(64), 9, far
        ),
        st.integers(1, 6),
        names,
        st.integers(1, 9),
    )
    lookups, reasons = st.integers(1, 8), st.sampled_from(Reason)
    build: list[st.SearchStrategy[NetworkEvent]] = [
        st.just(Tick()),
        st.builds(PeerConnected, peers),
        st.builds(PeerDisconnected, peers),
        st.builds(PeerMisbehaved, peers),
        st.builds(ConnectFailed, peers, st.just(Reason.TIMEOUT)),
        st.builds(RequestReceived, st.integers(1, 99), peers, requests),
        st.builds(Answered, st.integers(1, 40), peers, answers),
        st.builds(RequestFailed, st.integers(1, 40), peers, reasons),
        st.builds(ResponseReleased, lookups),
        st.builds(ResponseFetched, lookups, peers, st.just(1), st.just(NOW_MS + HOUR_MS), st.integers(0, 1 << 32)),
        st.builds(ResponseRefused, lookups, peers, reasons),
        st.builds(ProvidersFound, lookups, st.lists(peers, max_size=3).map(tuple), st.just(5.0)),
        st.builds(ResponseStored, names, st.just(NOW_MS + HOUR_MS), st.booleans()),
        st.builds(AnswerAudited, evidence, st.sampled_from([b"", b"1", b"2"])),
        st.builds(ResponsesGone, st.lists(names, max_size=2).map(tuple)),
        st.builds(
            RowsStored,
            st.just(bytes(32)),
            st.just(bytes(32)),
            st.just(bytes(48)),
            st.just((bytes(32),)),
            st.just(NOW_MS + HOUR_MS),
        ),
        st.builds(DeltasRefused, st.just(bytes(32)), st.just("worker")),
        st.builds(GossipReceived, st.just(RESPONSE_TOPIC), peers, st.binary(max_size=200)),
        st.builds(gossip, st.integers(1, 6), st.sampled_from(["a", "bc"]), st.integers(1, 9), st.just(NOW_MS)),
    ]
    return st.one_of(build)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 3_000), events_of_anybody()),
        st.tuples(st.sampled_from([60 * SECOND_MS, HOUR_MS]), st.just(Tick())),
        st.tuples(st.sampled_from([-HOUR_MS, -7, 60 * SECOND_MS, HOUR_MS]), st.just("set")),  # the wall clock
        st.tuples(st.just(0), st.just("want")),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(STEPS, st.sampled_from([None, NETWORK_KEY]))
def test_whatever_comes_time_goes_on_and_every_lookup_is_hinted_and_answered_once(
    steps: list[tuple[int, NetworkEvent | str]], network_key: bytes | None
) -> None:
    node = make_node(bootstrap=(1,), network_key=network_key)
    node.start(dated(NOW_MS))
    now_ms, set_by_ms, lookups = NOW_MS, 0, 0
    hinted: list[int] = []
    answered: list[int] = []
    for delay_ms, event in steps:
        if event == "set":
            set_by_ms, event = set_by_ms + delay_ms, Tick()
        else:
            now_ms += delay_ms
        if isinstance(event, str):
            lookups += 1
            event = ResponseWanted(lookups, response("a"), 300)
        now = at(dated(now_ms).mono_ms, set_by_ms)
        for effects in (node.handle(event, now), tick(node, now_ms, set_by_ms)):
            assert len(effects) < 100
            for effect in effects:
                if isinstance(effect, HintResponse):
                    withdrawn = effect.lookup in hinted and not effect.hinted
                    hinted += [] if withdrawn else [effect.lookup]
            answered += [effect.lookup for effect in effects if isinstance(effect, AnswerResponse)]
    answered += [effect.lookup for effect in only(tick(node, now_ms + 10 * SECOND_MS, set_by_ms), AnswerResponse)]
    assert sorted(hinted) == sorted(answered) == list(range(1, lookups + 1))


# --- several nodes ------------------------------------------------------------------------------


def test_whoever_knows_one_node_finds_everybody() -> None:
    world = World()
    world.boot(0)
    for number in range(1, 10):
        world.boot(number, bootstrap=(0,))
    world.run(10 * SECOND_MS)
    everybody = set(range(10))
    assert all(world.usable[number] == everybody - {number} for number in everybody)
    assert not [effect for _, effect in world.effects if isinstance(effect, ChargePeer)]


def test_what_one_node_computed_another_fetches() -> None:
    world = World()
    world.boot(0)
    world.boot(1, bootstrap=(0,))
    world.boot(2, bootstrap=(0,))
    world.run(5 * SECOND_MS)
    world.store(1, response("a"))
    world.run(SECOND_MS)
    world.want(2, 7, response("a"))
    world.run(SECOND_MS)
    assert world.answers[2, 7].peer == Identity(1).peer
    world.want(2, 8, response("b"))
    world.run(SECOND_MS)
    assert world.answers[2, 8].reason == "not_found"


def test_a_frozen_node_is_not_asked_and_once_it_thaws_it_is() -> None:
    world = World()
    world.boot(0)
    world.boot(1, bootstrap=(0,))
    world.run(5 * SECOND_MS)
    world.store(1, response("a"))
    world.run(SECOND_MS)
    world.cut = {1}
    world.run(5 * SECOND_MS)
    assert world.usable[0] == set()
    world.want(0, 1, response("a"))
    assert world.answers[0, 1].reason == "no_peers"
    world.cut = set()
    world.run(3 * SECOND_MS)
    world.want(0, 2, response("a"))
    world.run(SECOND_MS)
    assert world.answers[0, 2].peer == Identity(1).peer


def test_two_halves_of_a_parted_network_find_each_other_within_seconds() -> None:
    world = World()
    world.boot(0)
    for number in range(1, 6):
        world.boot(number, bootstrap=(0,))
    world.run(10 * SECOND_MS)
    world.cut = {5}  # nobody hears it, and it hears nobody
    world.run(60 * SECOND_MS)
    assert all(5 not in world.usable[number] for number in range(5))
    world.cut = set()
    world.run(20 * SECOND_MS)
    assert world.usable[5] == set(range(5))
    assert all(5 in world.usable[number] for number in range(5))


def test_a_node_that_comes_back_with_its_clock_behind_is_believed_soon() -> None:
    world = World()
    world.boot(0)
    world.boot(1, bootstrap=(0,))
    world.boot(2, bootstrap=(0,))
    world.run(5 * SECOND_MS)
    world.stop(2)
    world.run(5 * SECOND_MS)
    world.set_by_ms = -2 * 60 * SECOND_MS
    world.boot(2, bootstrap=(0,))
    world.run(20 * SECOND_MS)
    for number in (0, 1):
        known = world.nodes[number].members.get(Identity(2).peer)
        assert known is not None
        assert known.record is not None
        assert known.record.sequence == world.nodes[2].members.own.sequence


def test_a_crowd_of_invented_peers_leaves_the_honest_ones_connected() -> None:
    world = World()
    world.boot(0, network_key=None)
    for number in range(1, 5):
        world.boot(number, bootstrap=(0,), network_key=None)
    world.run(5 * SECOND_MS)
    node, liar = world.nodes[1], Identity(0).peer
    invented = iter(range(100, 100 + 8 * PEX_RECORDS_MAX))
    dials = 0
    for _ in range(8):
        world.run(SECOND_MS)
        ghosts = tuple(Identity(next(invented)).record(network_key=None) for _ in range(PEX_RECORDS_MAX))
        dials += len(only(node.members.on_peers(liar, Peers(ghosts), world.now), Connect))
    assert {0, 2, 3, 4} <= world.linked(1)
    assert dials <= 8 * DIALS_MAX


@pytest.mark.parametrize("network_key", [None, NETWORK_KEY])
def test_one_connection_that_brings_a_thousand_owners_takes_a_quarter_of_the_registry(
    network_key: bytes | None,
) -> None:
    node = make_node(network_key=network_key, listed=(4,), registry=True)
    expires_at_ms = NOW_MS + REGISTRY_TTL_MS

    def meet(number: int) -> None:
        who = Identity(number)
        node.handle(PeerConnected(who.peer, who.host), dated(NOW_MS))
        node.handle(RequestReceived(number, who.peer, Greet(who.record(network_key=network_key))), dated(NOW_MS))

    def answer(number: int, message: WantPeers | WantDeltas, with_: PeerAnswer) -> None:
        """What `number` answers when it is asked."""
        (send,) = node._requests.ask(Identity(number).peer, message, 1_000, dated(NOW_MS))
        imports = only(node.handle(Answered(send.request, send.peer, with_), dated(NOW_MS)), ImportDeltas)
        while (due_ms := node.registry._intake.next_deadline_ms()) is not None:
            imports += only(node.registry.on_tick(at(due_ms)), ImportDeltas)
        while imports:  # a document here is a hundred ids of its owner's
            imports = [new for each in imports for new in imported(each)]

    def imported(done: ImportDeltas) -> list[ImportDeltas]:
        ids = tuple((sha256(done.owner, bytes([number])), expires_at_ms) for number in range(200))
        node.handle(DeltasImported(done.owner, done.epoch, done.sequence, ids, (), True), dated(NOW_MS))
        return only(node.registry.on_tick(dated(NOW_MS)), ImportDeltas)

    def document(number: int) -> bytes:
        who = Identity(number)
        delta = RegistryDelta(NETWORK, who.public_key, NOW_MS, 0, "snapshot", expires_at_ms, b"document")
        return encode_delta(delta, who.key)

    def is_provider(number: int) -> bool:
        who = Identity(number)
        return node.providers.of(sha256(who.public_key, bytes(1)), dated(NOW_MS)) == (who.peer,)

    for honest in (1, 2):
        meet(honest)
        answer(honest, WantDeltas(()), Deltas((document(honest),), ()))
    meet(9)  # who brings them
    invented = range(10, 10 + PEERS_KNOWN_MAX, PEX_RECORDS_MAX)
    for first in invented:
        crowd = range(first, first + PEX_RECORDS_MAX)
        answer(9, WantPeers(b""), Peers(tuple(Identity(n).record(network_key=network_key) for n in crowd)))
    for first in invented:
        answer(9, WantDeltas(()), Deltas(tuple(document(n) for n in range(first, first + PEX_RECORDS_MAX)), ()))
    for late in (3, 4):  # 4 is on this node's own list
        meet(late)
        answer(late, WantDeltas(()), Deltas((document(late),), ()))
    assert all(is_provider(number) for number in (1, 2, 3, 4))
    assert 100 <= sum(is_provider(number) for number in range(10, 10 + PEERS_KNOWN_MAX)) <= PEERS_OF_SOURCE_MAX
    assert node.registry.entries <= REGISTRY_INDEX_OF_SOURCE_MAX + 4 * 200
    told = node.members.answer_peers(WantPeers(b""), dated(NOW_MS)).records
    assert {decode_peer_record(raw).peer for raw in told} == {Identity(n).peer for n in (1, 2, 3, 4, 9)}


def test_the_same_events_have_the_same_effects() -> None:
    def effects() -> list[tuple[int, NetworkEffect]]:
        world = World()
        world.boot(0)
        for number in range(1, 5):
            world.boot(number, bootstrap=(0,))
        world.run(20 * SECOND_MS)
        return world.effects

    assert effects() == effects()


def test_a_member_that_was_listed_needs_no_network_key() -> None:
    node = make_node(network_key=None, listed=(1,))
    assert node.handle(gossip(1, "a", 1, NOW_MS), dated(NOW_MS)) == []
    assert node.gossip.refused == {}
    assert node.providers.of(response("a"), dated(NOW_MS)) == (Identity(1).peer,)


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
