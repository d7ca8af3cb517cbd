"""A simulated node: the real core, with effects performed against the simulated network, DHT and clock.

It does what the daemon does, and no more: nothing here decides. What its clients do is in sim_clients.py.
"""

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from nacl.signing import SigningKey

from ..core.events.conduct import ChargePeer, PeerMisbehaved
from ..core.events.connections import Connect, ConnectFailed, Disconnect, PeerConnected, PeerDisconnected
from ..core.events.dht import Provide, ProvidersFound, SearchDht
from ..core.events.gossip import AuthorsChanged, GossipReceived, GossipSpoiled, Publish
from ..core.events.known_peers import KvPeersChanged, PeersChanged
from ..core.events.node_state import NetworkJoined, Tick
from ..core.events.owner_documents import ForgetOwner, ImportDeltas, WriteRegistry
from ..core.events.peer_requests import Answered, Reply, RequestFailed, RequestReceived, Send, ServeResponse
from ..core.events.response_reading import AnswerResponse, FetchResponse, HintResponse, ReadShared
from ..core.events.stored_responses import ResponsesGone, ResponseStored
from ..core.events.vocabulary import Effect, Event
from ..core.node.node import Node
from ..core.node.node_options import NodeOptions
from ..core.peers.dials import Dials
from ..core.peers.gossip_gate import GossipGate, Verdict
from ..core.peers.trust import Trust, TrustMode
from ..core.records.errors import ProtocolViolation
from ..core.records.ids import PeerId, peer_id
from ..core.records.now import Now
from ..core.records.peer_wire import Miss, PeerAnswer, Refusal, decode_answer, decode_request, encode
from ..core.records.reason import Reason
from ..core.records.signing import NO_MEMBER_TAG, member_tag
from ..core.response.sealed_hit import make_hit
from .checkers import Checker
from .documents import Documents
from .liars import Kind, Liar
from .prefixes.kv_fleet import KvFleet
from .prefixes.sim_prefixes import SimPrefixes
from .setting import Setting
from .sim_clients import SimClients, SourceOfTruth
from .sim_fetches import Directory, SimFetches
from .sim_responses import Response, Shelf

FRAME_BYTES = 64  # a frame's length, Yamux, Noise, TCP and IP
SERVE_MS = 2.0  # a stream's request, in py-libp2p and SQLite; one after another
STORE_MS = 5  # until the writer has committed
LORO_MS = 10
EXPIRE_EVERY_MS = 5_000
CLOCK_SKEW_MS = 1_000
UPTIME_MS = 3_600_000  # of host 0 when the simulation begins

Answer = Callable[[bytes], None]


class Neighbour(Protocol):
    """Another host as this one reaches it (SimHost, Holder)."""

    @property
    def peer(self) -> PeerId: ...
    @property
    def address(self) -> str: ...
    def asked(self, asker: int, frame: bytes, answer: Answer) -> None: ...


class Listed(Neighbour, Protocol):
    """A host that may be listed by others, or joined through (SimHost)."""

    @property
    def public_key(self) -> bytes: ...


class Surroundings(SourceOfTruth, Directory, Protocol):
    """The other hosts, and what a host tells those who keep the truth (Fleet)."""

    @property
    def honest(self) -> Sequence[Listed]: ...
    @property
    def bootstrap(self) -> Sequence[Listed]: ...
    @property
    def kv(self) -> KvFleet | None: ...
    def host(self, number: int) -> Neighbour: ...
    def kept(self, host: int, name: bytes) -> None: ...
    def announced(self, host: int, name: bytes) -> None: ...
    def unkept(self, host: int, names: Sequence[bytes]) -> None: ...
    def died(self, host: int) -> None: ...


class SimHost:
    """Host `number` of a fleet; one with a `kind` departs from the honest in that way."""

    def __init__(
        self,
        setting: Setting,
        fleet: Surroundings,
        checker: Checker,
        number: int,
        key: SigningKey,
        network_key: bytes | None,
        kind: Kind | None,
    ) -> None:
        self._setting = setting
        self._network = setting.network
        self._fleet = fleet
        self._checker = checker
        self.number = number
        self.key = key
        self.network_key = network_key
        self.public_key = key.verify_key.encode()
        self.peer = peer_id(self.public_key)
        self.tag = member_tag(network_key, self.public_key) if network_key else NO_MEMBER_TAG
        self.rng = random.Random(f"{setting.seed}/host/{number}")
        self.skew_ms = self.rng.randint(-CLOCK_SKEW_MS, CLOCK_SKEW_MS)
        self.address = f"10.0.{number // 250}.{number % 250 + 1}:4001"
        self.liar = Liar(setting, self, kind) if kind is not None else None
        self.clients = SimClients(setting, fleet, checker, self)
        self._fetches = SimFetches(setting, fleet, checker, self, self.clients.waiting)
        self.shelf = Shelf()
        self.core: Node
        self.prefixes = SimPrefixes(setting, fleet.kv, self) if fleet.kv is not None else None

    @property
    def now(self) -> Now:
        """This moment, by this host's clocks; no two hosts started at the same time."""
        return Now(self._setting.agenda.now_ms + (1 + self.number) * UPTIME_MS, self.wall_ms)

    @property
    def wall_ms(self) -> int:
        """This host's wall clock."""
        return self._setting.wall_ms + self.skew_ms

    def boot(self) -> None:
        """Start the node, with what is on the shelf."""
        self._network.boot(self.number)
        self.clients.restart()
        self._fetches.restart()
        self._sends: dict[int, PeerId] = {}
        self._tokens: dict[int, Answer] = {}
        self._numbers = 0
        self._free_ms = 0.0
        self._tick_at_ms: int | None = None
        self._documents = Documents(self._setting.network_id, self.key)
        is_open = self._setting.is_open
        listed = {self.public_key}
        if is_open:
            listed |= {self._setting.departed.verify_key.encode(), *(host.public_key for host in self._fleet.honest)}
        mode: TrustMode = "reputation" if is_open else "members"
        self.trust = Trust(mode, self.public_key, frozenset(listed), frozenset(), self.network_key)
        bootstrap = tuple((host.peer, host.address) for host in self._fleet.bootstrap if host is not self)
        endpoint = self.address.replace("4001", "7790") if self.prefixes is not None else ""
        options = NodeOptions(self._setting.network_id, self.network_key, bootstrap)
        self.core = Node(options, self.key, self.trust, Dials(self.now), random.Random(self.rng.random()))
        self.gate = GossipGate(self._setting.network_id, self.now)
        if self.prefixes is not None:
            self.prefixes.boot()
        self.tell(NetworkJoined(self.address, endpoint))
        for response in self.shelf.all():
            if response.expires_at_ms > self.wall_ms:
                self._fleet.kept(self.number, response.request_hash)
                self.tell(ResponseStored(response.request_hash, response.expires_at_ms, True))
        self.later(EXPIRE_EVERY_MS, self._expire)
        if self.liar is not None:
            self.liar.begin()

    def die(self, politely: bool, keep_shelf: bool) -> None:
        """End the process."""
        self._network.kill(self.number, politely)
        self._setting.dht.forget(self.number)
        self._fleet.died(self.number)
        if self.prefixes is not None:
            self.prefixes.died(politely, keep_shelf)
        if not keep_shelf:
            self._fleet.unkept(self.number, [response.request_hash for response in self.shelf.all()])
            self.shelf = Shelf()

    def later(self, delay_ms: float, act: Callable[[], None]) -> None:
        """In this life, not while frozen."""
        self._network.on(self.number, delay_ms, act)

    def tell(self, event: Event) -> None:
        """Hand an event to the core and perform what it decides."""
        self._setting.trace.add(self._setting.agenda.now_ms, self.number, event)
        effects = self.core.handle(event, self.now)
        if self.liar is None:
            self._checker.on_effects(self, event, effects)
        self.perform_all(effects)

    # --- what it keeps --------------------------------------------------------------------------

    def put(self, response: Response, computed: bool) -> None:
        """Keep a response, and tell the core once it is there."""

        def committed() -> None:
            gone = self.shelf.put(response)
            self._fleet.kept(self.number, response.request_hash)
            self.tell(ResponseStored(response.request_hash, response.expires_at_ms, computed))
            self._gone(gone)

        self.later(STORE_MS, committed)

    def _gone(self, names: tuple[bytes, ...]) -> None:
        if names:
            self._fleet.unkept(self.number, names)
            self.tell(ResponsesGone(names))

    def _expire(self) -> None:
        self._gone(self.shelf.expire(self.wall_ms))
        self.later(EXPIRE_EVERY_MS, self._expire)

    # --- what the network tells -----------------------------------------------------------------

    def opened(self, peer: int) -> None:
        """A connection is there."""
        other = self._fleet.host(peer)
        self.tell(PeerConnected(other.peer, other.address.partition(":")[0]))

    def closed(self, peer: int) -> None:
        """It has gone, and what was asked over it will not be answered."""
        gone = self._fleet.host(peer).peer
        self.tell(PeerDisconnected(gone))
        for request in [request for request, target in self._sends.items() if target == gone]:
            self._failed(request, Reason.UNREACHABLE)
        self._fetches.disconnected(gone)

    def passes_on(self, relay: int, topic: str, author: int, payload: bytes) -> bool:
        """Whether this node takes a message from a neighbour, and passes it on."""
        peers = [self._fleet.host(host).peer for host in (relay, author)]
        verdict = self.gate.judge(peers[0], topic, peers[1], payload, lambda: True, self.now)
        if verdict is Verdict.MUTE:
            self.later(0, lambda: self.tell(GossipSpoiled(peers[0])))
        return verdict is Verdict.ACCEPT

    def heard_gossip(self, relay: int, topic: str, payload: bytes) -> None:
        """GossipSub delivers."""
        if self.liar is not None:
            self.liar.overhear(topic, payload)
            if self.prefixes is not None:
                self.prefixes.overhear(topic, payload)
        self.tell(GossipReceived(topic, self._fleet.host(relay).peer, payload))

    def asked(self, asker: int, frame: bytes, answer: Answer) -> None:
        """A request arrives; hosts serve one after another."""
        self._free_ms = max(self._free_ms, self._setting.agenda.now_ms) + SERVE_MS
        self.later(self._free_ms - self._setting.agenda.now_ms, partial(self._serve, asker, frame, answer))

    def _serve(self, asker: int, frame: bytes, answer: Answer) -> None:
        try:
            message = decode_request(frame)
        except ProtocolViolation:
            self.tell(PeerMisbehaved(self._fleet.host(asker).peer))
            answer(encode(Refusal("protocol")))
            return
        lie = self.liar.answer(message) if self.liar is not None else None
        if lie is not None:
            if lie:
                answer(lie)
            return
        token = self.next_number()
        self._tokens[token] = answer
        self.tell(RequestReceived(token, self._fleet.host(asker).peer, message))
        if self.liar is None:
            self._checker.on_request_handled(self, message, token in self._tokens)

    # --- performing effects ---------------------------------------------------------------------

    def perform_all(self, effects: list[Effect]) -> None:
        """Do what the core has decided."""
        for effect in effects:
            self._setting.trace.add(self._setting.agenda.now_ms, self.number, effect)
            self._perform(effect)
        self._arm()

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Connect():
                self._connect(effect)
            case Disconnect(peer):
                self._network.hang_up(self.number, self._fleet.number_of(peer))
            case Send():
                self._send(effect)
            case Reply(token, message):
                self._reply(token, message)
            case ServeResponse():
                self._serve_response(effect)
            case Publish(topic, payload):
                self._setting.gossip.publish(self.number, topic, payload)
            case Provide(key):
                self._setting.dht.provide(self.number, key)
            case SearchDht():
                self._find(effect)
            case ReadShared():
                raise AssertionError("no simulated host has a shared store")
            case HintResponse():
                self.clients.hinted(effect)
            case FetchResponse():
                self._fetches.begin(effect)
            case AnswerResponse():
                self._answered(effect)
            case ChargePeer(_, reason) if self.prefixes is not None and not reason.is_guilty:
                self.prefixes.perform(effect)  # slow: L2 alone charges for that
            case ChargePeer(peer, reason):
                self._checker.on_charge(self, peer, reason)
            case WriteRegistry():
                self.later(LORO_MS, partial(self._write, effect))
            case ImportDeltas():
                self.later(LORO_MS, lambda: self.tell(self._documents.take(effect)))
            case ForgetOwner(owner):
                self._documents.forget(owner)
            case AuthorsChanged(authors):
                self.gate.authors = dict(authors)
            case PeersChanged():
                pass
            case KvPeersChanged():
                if self.prefixes is not None:
                    self.prefixes.set_peers(effect)
            case _:
                assert self.prefixes is not None
                self.prefixes.perform(effect)

    def _write(self, effect: WriteRegistry) -> None:
        self.tell(self._documents.write(effect, self.wall_ms))
        for name, _ in effect.added:
            self._fleet.announced(self.number, name)

    def _connect(self, effect: Connect) -> None:
        def done(failed: str | None) -> None:
            if failed is not None:
                self.tell(ConnectFailed(effect.peer, Reason(failed)))

        target = self._fleet.at(effect.address, effect.peer)
        self._network.dial(self.number, target, effect.timeout_ms, done)

    def _send(self, effect: Send) -> None:
        target = self._fleet.number_of(effect.peer)
        self._sends[effect.request] = effect.peer

        def answered(frame: bytes) -> None:
            if effect.request not in self._sends:
                return
            try:
                message = decode_answer(frame)
            except ProtocolViolation:
                self._failed(effect.request, Reason.PROTOCOL)
                return
            del self._sends[effect.request]
            self.tell(Answered(effect.request, effect.peer, message))

        if self.call(target, encode(effect.message), answered):
            self.later(effect.timeout_ms, partial(self._failed, effect.request, Reason.TIMEOUT))
        else:
            self.later(0, partial(self._failed, effect.request, Reason.UNREACHABLE))

    def call(self, target: int, frame: bytes, answered: Answer) -> bool:
        """Ask `target`; False if there is no connection to it."""

        def answer(reply: bytes) -> None:
            self._network.send(target, self.number, FRAME_BYTES + len(reply), partial(answered, reply))

        act = partial(self._fleet.host(target).asked, self.number, frame, answer) if target >= 0 else None
        return act is not None and self._network.send(self.number, target, FRAME_BYTES + len(frame), act)

    def _failed(self, request: int, reason: Reason) -> None:
        peer = self._sends.pop(request, None)
        if peer is not None:
            self.tell(RequestFailed(request, peer, reason))

    def _reply(self, token: int, message: PeerAnswer) -> None:
        self._tokens.pop(token)(encode(message))

    def _serve_response(self, effect: ServeResponse) -> None:
        response = self.shelf.get(effect.request_hash, self.wall_ms)
        if response is None:
            self._reply(effect.token, Miss("unknown"))
            return
        nonce = self.rng.randbytes(12)
        hit = make_hit(
            response.key,
            self._setting.network_id,
            nonce,
            response.body,
            response.proof,
            response.member,
            effect.popularity,
        )
        self._reply(effect.token, hit)

    def _find(self, effect: SearchDht) -> None:
        takes_ms, found = self._setting.dht.search(self.number, f"/cache/{effect.request_hash.hex()}")
        if takes_ms >= effect.timeout_ms:
            takes_ms, found = effect.timeout_ms, ()
        peers = tuple(self._fleet.host(host).peer for host in found)
        cost_ms = self.rng.uniform(20, 400)

        def tell() -> None:
            if effect.lookup in self.clients.waiting:
                self.tell(ProvidersFound(effect.lookup, peers, cost_ms))

        self.later(takes_ms, tell)

    def _answered(self, effect: AnswerResponse) -> None:
        self._fetches.forget(effect.lookup)
        self.clients.answered(effect)

    # --- leaves ---------------------------------------------------------------------------------

    def _arm(self) -> None:
        """Keep one timer, as the driver does; one that was moved comes and goes."""
        due_ms = self.core.next_deadline_ms()
        if due_ms is not None and due_ms != self._tick_at_ms:
            self.later(due_ms - self.now.mono_ms, partial(self._tick, due_ms))
        self._tick_at_ms = due_ms

    def _tick(self, due_ms: int) -> None:
        if self._tick_at_ms == due_ms:
            self._tick_at_ms = None
            self.tell(Tick())
            self._checker.on_tick(self, self._tick_at_ms)

    def next_number(self) -> int:
        """A number that is new in this life."""
        self._numbers += 1
        return self._numbers
