"""Network parts as a whole: clocks that are set, any events in any order, and several nodes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperspace_vllm.core.events.conduct import AnswerAudited, ChargePeer, PeerMisbehaved
from hyperspace_vllm.core.events.connections import Connect, ConnectFailed, PeerConnected, PeerDisconnected
from hyperspace_vllm.core.events.dht import ProvidersFound
from hyperspace_vllm.core.events.gossip import GossipReceived, Publish
from hyperspace_vllm.core.events.node_state import Tick
from hyperspace_vllm.core.events.owner_documents import DeltasImported, DeltasRefused, ImportDeltas
from hyperspace_vllm.core.events.peer_requests import (
    Answered,
    RequestFailed,
    RequestReceived,
    Send,
)
from hyperspace_vllm.core.events.prefix_writing import RowsStored
from hyperspace_vllm.core.events.response_reading import (
    AnswerResponse,
    HintResponse,
    ResponseFetched,
    ResponseRefused,
    ResponseReleased,
    ResponseWanted,
)
from hyperspace_vllm.core.events.stored_responses import ResponsesGone, ResponseStored
from hyperspace_vllm.core.events.vocabulary import NetworkEffect, NetworkEvent
from hyperspace_vllm.core.peers.neighbours import DIALS_MAX
from hyperspace_vllm.core.records.announcement import (
    RESPONSE_TOPIC,
    EvidenceEntry,
)
from hyperspace_vllm.core.records.ids import sha256
from hyperspace_vllm.core.records.limits import (
    PEERS_KNOWN_MAX,
    PEERS_OF_SOURCE_MAX,
    PEX_RECORDS_MAX,
    REGISTRY_INDEX_OF_SOURCE_MAX,
    REGISTRY_TTL_MS,
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
from hyperspace_vllm.core.records.reason import Reason
from hyperspace_vllm.core.records.registry_delta import RegistryDelta, encode_delta
from tests.support.moments import at, dated
from tests.support.network_script import Script, gossip, response, tick
from tests.support.network_world import (
    HOUR_MS,
    NETWORK,
    NETWORK_KEY,
    NOW_MS,
    SECOND_MS,
    Identity,
    World,
    make_node,
    only,
)


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


def events_of_anybody() -> st.SearchStrategy[NetworkEvent | Tick]:
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
    build: list[st.SearchStrategy[NetworkEvent | Tick]] = [
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
    steps: list[tuple[int, NetworkEvent | Tick | str]], network_key: bytes | None
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
