"""Identities, records and the network parts of a few nodes, which hand each other their messages.

Time passes only when a test advances it; messages arrive at once, in order, except to and from nodes that are cut off.
"""

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from nacl.signing import SigningKey

from hyperspace_vllm.core.events.connections import Connect, ConnectFailed, Disconnect, PeerConnected, PeerDisconnected
from hyperspace_vllm.core.events.dht import ProvidersFound, SearchDht
from hyperspace_vllm.core.events.gossip import GossipReceived, Publish
from hyperspace_vllm.core.events.known_peers import PeersChanged
from hyperspace_vllm.core.events.node_state import NetworkJoined, Tick
from hyperspace_vllm.core.events.peer_requests import (
    Answered,
    Reply,
    RequestFailed,
    RequestReceived,
    Send,
    ServeResponse,
)
from hyperspace_vllm.core.events.response_reading import (
    AnswerResponse,
    FetchResponse,
    ResponseFetched,
    ResponseRefused,
    ResponseWanted,
)
from hyperspace_vllm.core.events.stored_responses import ResponseStored
from hyperspace_vllm.core.events.vocabulary import Effect, NetworkEffect, NetworkEvent
from hyperspace_vllm.core.node.network_part import NetworkPart
from hyperspace_vllm.core.node.node_options import NodeOptions
from hyperspace_vllm.core.peers.dials import Dials
from hyperspace_vllm.core.peers.gossip_gate import GossipGate, Verdict
from hyperspace_vllm.core.peers.trust import Trust
from hyperspace_vllm.core.records.ids import NetworkId, PeerId, network_id, peer_id, sha256
from hyperspace_vllm.core.records.limits import PEER_RECORD_TTL_MS, RESPONSE_TTL_MS
from hyperspace_vllm.core.records.now import Now
from hyperspace_vllm.core.records.peer_record import PeerRecord
from hyperspace_vllm.core.records.peer_wire import PeerAnswer
from hyperspace_vllm.core.records.reason import Reason
from hyperspace_vllm.core.records.signing import NO_MEMBER_TAG, member_tag
from hyperspace_vllm.core.response.open_lookups import OpenLookups
from tests.support.moments import BOOTED_MS, dated

NETWORK = network_id("test")
NETWORK_KEY = b"k" * 32
NOW_MS = 1_790_000_000_000
SECOND_MS, HOUR_MS = 1_000, 3_600_000


@dataclass(frozen=True)
class Identity:
    """A node's key and its claimed addresses."""

    number: int

    @property
    def key(self) -> SigningKey:
        return SigningKey(sha256(b"node", self.number.to_bytes(4, "big")))

    @property
    def public_key(self) -> bytes:
        return self.key.verify_key.encode()

    @property
    def peer(self) -> PeerId:
        return peer_id(self.public_key)

    @property
    def address(self) -> str:
        return f"10.0.{self.number // 250}.{self.number % 250 + 1}:4001"

    @property
    def host(self) -> str:
        return self.address.partition(":")[0]

    def record(
        self,
        sequence: int = 1,
        expires_at_ms: int = NOW_MS + PEER_RECORD_TTL_MS,
        address: str | None = None,
        network_key: bytes | None = NETWORK_KEY,
        network: NetworkId = NETWORK,
        endpoint: str = "",
    ) -> bytes:
        """A node's record of itself."""
        tag = member_tag(network_key, self.public_key) if network_key else NO_MEMBER_TAG
        at = self.address if address is None else address
        record = PeerRecord(network, self.public_key, sequence, expires_at_ms, at, endpoint, tag)
        return record.sign(self.key).encode()


def make_node(
    number: int = 0,
    bootstrap: tuple[int, ...] = (),
    network_key: bytes | None = NETWORK_KEY,
    now: Now | None = None,
    listed: tuple[int, ...] = (),
    registry: bool = False,
) -> NetworkPart:
    """A node of the test network."""
    me = Identity(number)
    known = frozenset(Identity(other).public_key for other in listed)
    trust = Trust("members", me.public_key, known, frozenset(), network_key)
    addresses = tuple((Identity(other).peer, Identity(other).address) for other in bootstrap)
    options = NodeOptions(NETWORK, network_key, addresses, registry=registry)
    now = dated(NOW_MS) if now is None else now
    lookups = OpenLookups(trust.standings, "no_peers")
    joined = NetworkJoined(me.address, "")
    return NetworkPart(options, joined, lookups, me.key, trust, Dials(now), random.Random(number), now)


def only(effects: Sequence[Effect], kind: type) -> list:  # type: ignore[type-arg]
    """The effects of one kind."""
    return [effect for effect in effects if isinstance(effect, kind)]


class OpenGate(GossipGate):
    """Accepts all gossip, to test what is below it and next to it."""

    def __init__(self) -> None:
        super().__init__(NETWORK, dated(NOW_MS))

    def judge(
        self, link: PeerId, topic: str, author: PeerId, payload: bytes, signed: Callable[[], bool], now: Now
    ) -> Verdict:
        return Verdict.ACCEPT


@dataclass
class World:
    """Nodes by number; `cut` ones neither send nor receive, `has` lists which node serves which responses."""

    now_ms: int = NOW_MS  # by a wall clock that nobody sets
    set_by_ms: int = 0  # every wall clock, forward or back
    nodes: dict[int, NetworkPart] = field(default_factory=dict)
    cut: set[int] = field(default_factory=set)
    links: set[frozenset[int]] = field(default_factory=set)
    has: dict[int, set[bytes]] = field(default_factory=dict)
    effects: list[tuple[int, NetworkEffect]] = field(default_factory=list)
    answers: dict[tuple[int, int], AnswerResponse] = field(default_factory=dict)
    usable: dict[int, set[int]] = field(default_factory=dict)
    _queue: deque[tuple[int, NetworkEvent | Tick]] = field(default_factory=deque)
    _tokens: dict[int, tuple[int, int]] = field(default_factory=dict)
    _pending: list[tuple[int, int, NetworkEvent]] = field(default_factory=list)  # when, to whom
    _answered: set[tuple[int, int]] = field(default_factory=set)

    @property
    def now(self) -> Now:
        """This moment, for every node."""
        return replace(dated(self.now_ms), wall_ms=self.now_ms + self.set_by_ms)

    def boot(self, number: int, bootstrap: tuple[int, ...] = (), **options: object) -> NetworkPart:
        """Start a node."""
        node = self.nodes[number] = make_node(number, bootstrap, now=self.now, **options)  # type: ignore[arg-type]
        self.has.setdefault(number, set())
        self._perform_all(number, node.start(self.now))
        self._settle()
        return node

    def stop(self, number: int) -> None:
        """End a node; its connections close."""
        del self.nodes[number]
        for link in [link for link in self.links if number in link]:
            (other,) = link - {number}
            self.links.discard(link)
            self._queue.append((other, PeerDisconnected(Identity(number).peer)))
        self._settle()

    def tell(self, number: int, event: NetworkEvent) -> None:
        """Give an event to a node, and let everything happen that follows at once."""
        self._queue.append((number, event))
        self._settle()

    def store(self, number: int, name: bytes) -> None:
        """A node has computed a response."""
        self.has[number].add(name)
        self.tell(number, ResponseStored(name, self.now.wall_ms + RESPONSE_TTL_MS, True))

    def want(self, number: int, lookup: int, name: bytes, deadline_ms: int = 300) -> None:
        """A node's client wants a response."""
        self.tell(number, ResponseWanted(lookup, name, deadline_ms))

    def run(self, for_ms: int) -> None:
        """Let time pass."""
        until_ms = self.now_ms + for_ms
        while True:
            due = [
                (_wall(node.next_deadline_ms()), number)
                for number, node in self.nodes.items()
                if number not in self.cut
            ]
            due += [(at_ms, -1) for at_ms, _, _ in self._pending]
            at_ms = min((at for at, _ in due if at is not None), default=until_ms + 1)
            if at_ms > until_ms:
                break
            self.now_ms = max(self.now_ms, at_ms)
            for number in [number for at, number in due if at is not None and at <= self.now_ms and number >= 0]:
                self._queue.append((number, Tick()))
            ready = [each for each in self._pending if each[0] <= self.now_ms]
            self._pending = [each for each in self._pending if each[0] > self.now_ms]
            self._queue.extend((number, event) for _, number, event in ready)
            self._settle()
        self.now_ms = until_ms

    def linked(self, number: int) -> set[int]:
        """The nodes connected to a node."""
        return {other for link in self.links if number in link for other in link - {number}}

    # --- effects --------------------------------------------------------------------------------

    def _settle(self) -> None:
        turns = 0
        while self._queue:
            turns += 1
            assert turns < 10_000, "messages without end"
            number, event = self._queue.popleft()
            if number in self.nodes and number not in self.cut:
                if isinstance(event, Answered | RequestFailed):
                    if (number, event.request) in self._answered:
                        continue
                    self._answered.add((number, event.request))
                self._perform_all(number, self.nodes[number].handle(event, self.now))

    def _perform_all(self, number: int, effects: list[NetworkEffect]) -> None:
        for effect in effects:
            self.effects.append((number, effect))
            self._perform(number, effect)

    def _perform(self, number: int, effect: NetworkEffect) -> None:
        me = Identity(number).peer
        tell_me = partial(self._later, number)
        match effect:
            case Connect(peer, address):
                other = self._at(address)
                if other is None or Identity(other).peer != peer or other in self.cut or number in self.cut:
                    tell_me(SECOND_MS, ConnectFailed(peer, Reason.UNREACHABLE))
                else:
                    self.links.add(frozenset({number, other}))
                    self._queue.append((number, PeerConnected(peer, Identity(other).host)))
                    self._queue.append((other, PeerConnected(me, Identity(number).host)))
            case Disconnect(peer):
                other = self._number(peer)
                if frozenset({number, other}) in self.links:
                    self.links.discard(frozenset({number, other}))
                    self._queue.extend([(number, PeerDisconnected(peer)), (other, PeerDisconnected(me))])
            case Send(request, peer, message, timeout_ms):
                other = self._number(peer)
                tell_me(timeout_ms, RequestFailed(request, peer, Reason.TIMEOUT))
                if frozenset({number, other}) in self.links and other not in self.cut:
                    token = len(self._tokens)
                    self._tokens[token] = number, request
                    self._queue.append((other, RequestReceived(token, me, message)))
            case Reply(token, message):
                self._reply(number, token, message)
            case FetchResponse(lookup, peer, _, request_hash, timeout_ms):
                other = self._number(peer)
                if other in self.cut or other not in self.nodes:
                    tell_me(timeout_ms, ResponseRefused(lookup, peer, Reason.TIMEOUT))
                elif request_hash in self.has[other]:
                    tell_me(5, ResponseFetched(lookup, peer, 100, self.now.wall_ms + RESPONSE_TTL_MS, 16))
                else:
                    tell_me(5, ResponseRefused(lookup, peer, Reason.MISS))
            case SearchDht(lookup):
                tell_me(50, ProvidersFound(lookup, (), 20.0))
            case AnswerResponse(lookup):
                assert (number, lookup) not in self.answers, "answered twice"
                self.answers[number, lookup] = effect
            case Publish(topic, payload):
                for other in self.nodes:
                    if other != number and number not in self.cut:
                        self._queue.append((other, GossipReceived(topic, me, payload)))
            case PeersChanged(usable):
                self.usable[number] = {self._number(record.peer) for record in usable}
            case ServeResponse() | _:
                pass

    def _later(self, number: int, delay_ms: int, event: NetworkEvent) -> None:
        self._pending.append((self.now_ms + delay_ms, number, event))

    def _reply(self, number: int, token: int, message: PeerAnswer) -> None:
        asker, request = self._tokens[token]
        if frozenset({number, asker}) in self.links and asker not in self.cut:
            self._queue.append((asker, Answered(request, Identity(number).peer, message)))

    def _number(self, peer: PeerId) -> int:
        return next((number for number in range(2_000) if _peer(number) == peer), -1)

    def _at(self, address: str) -> int | None:
        return next((number for number, node in self.nodes.items() if _address_of(node) == address), None)


_PEERS: dict[int, PeerId] = {}


def _peer(number: int) -> PeerId:
    if number not in _PEERS:
        _PEERS[number] = Identity(number).peer
    return _PEERS[number]


def _wall(mono_ms: int | None) -> int | None:
    return None if mono_ms is None else mono_ms + BOOTED_MS


def _address_of(node: NetworkPart) -> str:
    return node.members.own.address
