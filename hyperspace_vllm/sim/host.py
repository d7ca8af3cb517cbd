"""A simulated node: the real core, with effects performed against the simulated network, DHT and clock.

It does what the daemon does, and no more: nothing here decides. Its clients ask for responses, wait or race their
engine as the middleware does, and store what was computed.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, assert_never

from nacl.signing import SigningKey

from ..core.events.network_effects import (
    AnswerResponse,
    AuthorsChanged,
    ChargePeer,
    Connect,
    Disconnect,
    FetchResponse,
    FindProviders,
    ForgetOwner,
    HintResponse,
    ImportDeltas,
    NetworkEffect,
    PeersChanged,
    Provide,
    Publish,
    Reply,
    Send,
    ServeResponse,
    WriteRegistry,
)
from ..core.events.network_events import (
    AnswerAudited,
    Answered,
    ConnectFailed,
    GossipReceived,
    GossipSpoiled,
    NetworkEvent,
    NetworkTick,
    PeerConnected,
    PeerDisconnected,
    PeerMisbehaved,
    ProvidersFound,
    RequestFailed,
    RequestReceived,
    ResponseFetched,
    ResponseRefused,
    ResponseReleased,
    ResponsesGone,
    ResponseStored,
    ResponsesUsed,
    ResponseWanted,
)
from ..core.node.network_node import NetworkNode, NetworkOptions
from ..core.peers.dials import Dials
from ..core.peers.gossip_gate import GossipGate, Verdict
from ..core.peers.trust import Trust, TrustMode
from ..core.records.errors import ProtocolViolation, Refused
from ..core.records.ids import PeerId, RequestKey, peer_id
from ..core.records.now import Now
from ..core.records.peer_wire import (
    Hit,
    Miss,
    PeerAnswer,
    Query,
    Refusal,
    decode_answer,
    decode_request,
    encode,
)
from ..core.records.reason import Reason
from ..core.records.signing import NO_MEMBER_TAG, member_tag
from ..core.response.cache_proof import request_hash
from ..core.response.evidence import evidence_of
from ..core.response.sealed_hit import Opened, make_hit, open_hit
from .documents import Documents
from .sim_responses import MODEL_DIGEST, Response, Shelf, compute, right_body

if TYPE_CHECKING:
    from .fleet import Fleet
    from .liars import Liar

FRAME_BYTES = 64  # a frame's length, Yamux, Noise, TCP and IP
SERVE_MS = 2.0  # a stream's request, in py-libp2p and SQLite; one after another
DEADLINE_MS = 300
STORE_MS = 5  # until the writer has committed
LORO_MS = 10
EXPIRE_EVERY_MS = 5_000
CLOCK_SKEW_MS = 1_000
UPTIME_MS = 3_600_000  # of host 0 when the simulation begins
FRAMER = b"a framer"  # a source
ENGINE_FIRST_MS = (150, 800)  # until the first frame
ENGINE_REST_MS = (100, 1_500)  # until the last one

Answer = Callable[[bytes], None]


@dataclass(slots=True, eq=False)
class Request:
    """A client's request that its node had no answer to. Times are virtual, -1: not yet."""

    host: int
    lookup: int
    key: RequestKey
    request_hash: bytes
    asked_ms: int
    providers: tuple[int, ...]  # honest hosts that had it then, and could be reached
    promised: tuple[int, ...]  # those of them whose word had time to spread
    source: bytes  # of the client, as audits name it
    hinted: bool | None = None
    answered_ms: int = -1
    reason: str = ""
    hit: bool = False
    waiting: bool = True  # for the network: the engine hasn't won
    life: int = 0  # the host's
    asked: list[int] = field(default_factory=list)  # hosts, -1 for ones that don't exist
    far: set[int] = field(default_factory=set)  # those of them that could not answer in time when they were asked
    lapsed: set[int] = field(default_factory=set)  # those of them whose copy had expired by the asker's clock
    hindered: bool = False  # by those that were asked first
    fetched: dict[PeerId, Opened] = field(default_factory=dict)  # what it sent


class SimHost:
    """Host `number` of a fleet; `liar` says how it departs from the honest."""

    def __init__(self, fleet: "Fleet", number: int, key: SigningKey, network_key: bytes | None) -> None:
        self.fleet = fleet
        self.number = number
        self.key = key
        self.network_key = network_key
        self.public_key = key.verify_key.encode()
        self.peer = peer_id(self.public_key)
        self.tag = member_tag(network_key, self.public_key) if network_key else NO_MEMBER_TAG
        self.rng = random.Random(f"{fleet.seed}/host/{number}")
        self.skew_ms = self.rng.randint(-CLOCK_SKEW_MS, CLOCK_SKEW_MS)
        self.address = f"10.0.{number // 250}.{number % 250 + 1}:4001"
        self.liar: Liar | None = None
        self.shelf = Shelf()
        self.core: NetworkNode

    @property
    def now(self) -> Now:
        """This moment, by this host's clocks; no two hosts started at the same time."""
        return Now(self.fleet.agenda.now_ms + (1 + self.number) * UPTIME_MS, self.wall_ms)

    @property
    def wall_ms(self) -> int:
        """This host's wall clock."""
        return self.fleet.wall_ms + self.skew_ms

    def boot(self) -> None:
        """Start the node, with what is on the shelf."""
        self.fleet.network.boot(self.number)
        self.requests: dict[int, Request] = {}  # the core hasn't answered them
        self._sends: dict[int, PeerId] = {}
        self._tokens: dict[int, Answer] = {}
        self._fetches: dict[tuple[int, PeerId], int] = {}  # (lookup, peer) -> number of the fetch
        self._busy: dict[bytes, None] = {}  # request hashes that somebody here asks for or computes
        self._numbers = 0
        self._free_ms = 0.0
        self._tick_at_ms: int | None = None
        self._documents = Documents(self.fleet.network_id, self.key)
        is_open = self.fleet.is_open
        listed = {self.public_key}
        if is_open:
            listed |= {self.fleet.departed.verify_key.encode(), *(host.public_key for host in self.fleet.honest)}
        mode: TrustMode = "reputation" if is_open else "members"
        self.trust = Trust(mode, self.public_key, frozenset(listed), frozenset(), self.network_key)
        bootstrap = tuple((host.peer, host.address) for host in self.fleet.bootstrap if host is not self)
        options = NetworkOptions(self.fleet.network_id, self.address, "", bootstrap, self.network_key)
        self.core = NetworkNode(
            options, self.key, self.trust, Dials(self.now), random.Random(self.rng.random()), self.now
        )
        self.gate = GossipGate(self.fleet.network_id, self.now)
        self._perform_all(self.core.start(self.now))
        for response in self.shelf.all():
            if response.expires_at_ms > self.wall_ms:
                self.fleet.kept(self.number, response.request_hash)
                self.tell(ResponseStored(response.request_hash, response.expires_at_ms, True))
        self.later(EXPIRE_EVERY_MS, self._expire)
        if self.liar is not None:
            self.liar.begin()

    def die(self, politely: bool, keep_shelf: bool) -> None:
        """End the process."""
        self.fleet.network.kill(self.number, politely)
        self.fleet.dht.forget(self.number)
        self.fleet.died(self.number)
        if not keep_shelf:
            self.fleet.unkept(self.number, [response.request_hash for response in self.shelf.all()])
            self.shelf = Shelf()

    def later(self, delay_ms: float, act: Callable[[], None]) -> None:
        """In this life, not while frozen."""
        self.fleet.network.on(self.number, delay_ms, act)

    def tell(self, event: NetworkEvent) -> None:
        """Hand an event to the core and perform what it decides."""
        self.fleet.trace.add(self.fleet.agenda.now_ms, self.number, event)
        effects = self.core.handle(event, self.now)
        if self.liar is None:
            self.fleet.checker.on_effects(self, event, effects)
        self._perform_all(effects)

    # --- clients --------------------------------------------------------------------------------

    def ask(self, key: RequestKey, source: bytes = b"") -> None:
        """A client asks: the node's own database, then the network, and the engine."""
        wanted = request_hash(self.fleet.network_id, key)
        kept = self.shelf.get(wanted, self.wall_ms)
        if kept is not None:
            self.fleet.checker.on_served(self, key, kept.body, kept.expires_at_ms)
            self.tell(ResponsesUsed((wanted,)))
            return
        if wanted in self._busy:
            return  # joins the one under way
        self._busy[wanted] = None
        lookup = self._number()
        providers, promised = self.fleet.providers_for(self.number, wanted)
        request = Request(self.number, lookup, key, wanted, self.fleet.agenda.now_ms, providers, promised, source)
        request.life = self.fleet.network.life(self.number)
        self.requests[lookup] = request
        self.fleet.requests.append(request)
        self.tell(ResponseWanted(lookup, wanted, DEADLINE_MS))

    def _hinted(self, effect: HintResponse) -> None:
        request = self.requests[effect.lookup]
        self.fleet.checker.on_hint(self, request, effect.hinted)
        request.hinted = effect.hinted
        if not effect.hinted:
            self.later(self.rng.uniform(*ENGINE_FIRST_MS), partial(self._engine_first, request))

    def _engine_first(self, request: Request) -> None:
        if request.hit and request.waiting:
            return  # the network won, and the engine's request was cancelled
        if request.lookup in self.requests:
            request.waiting = False
            self.tell(ResponseReleased(request.lookup))
        self.later(self.rng.uniform(*ENGINE_REST_MS), partial(self._computed, request))

    def _computed(self, request: Request) -> None:
        self._busy.pop(request.request_hash, None)
        self.put(compute(self.key, self.fleet.network_id, request.key, right_body(request.key), self.tag, self.wall_ms))

    def put(self, response: Response, computed: bool = True) -> None:
        """Keep a response, and tell the core once it is there."""

        def committed() -> None:
            gone = self.shelf.put(response)
            self.fleet.kept(self.number, response.request_hash)
            self.tell(ResponseStored(response.request_hash, response.expires_at_ms, computed))
            self._gone(gone)

        self.later(STORE_MS, committed)

    def _gone(self, names: tuple[bytes, ...]) -> None:
        if names:
            self.fleet.unkept(self.number, names)
            self.tell(ResponsesGone(names))

    def _expire(self) -> None:
        self._gone(self.shelf.expire(self.wall_ms))
        self.later(EXPIRE_EVERY_MS, self._expire)

    def _answered(self, effect: AnswerResponse) -> None:
        request = self.requests.pop(effect.lookup, None)
        self.fleet.checker.on_answer(self, effect, request)
        if request is None:
            return
        for fetch in [fetch for fetch in self._fetches if fetch[0] == effect.lookup]:
            del self._fetches[fetch]
        request.answered_ms, request.reason = self.fleet.agenda.now_ms, effect.reason
        request.promised = self.fleet.kept_promises(request)
        request.hindered = self.fleet.hindered(request)
        if effect.peer is None:
            if request.hinted:
                self.later(self.rng.uniform(*ENGINE_FIRST_MS), partial(self._engine_first, request))
            return
        opened = request.fetched[effect.peer]
        request.hit = True
        if request.waiting:
            self._busy.pop(request.request_hash, None)
            self.fleet.checker.on_served(self, request.key, opened.body, opened.expires_at_ms)
            self._audit(request, opened)
        member = self.trust.vouch(opened.proof.signer)
        self.put(
            Response(request.key, request.request_hash, opened.body, opened.raw_proof, member, opened.expires_at_ms),
            computed=False,
        )

    def _audit(self, request: Request, opened: Opened) -> None:
        """Score an answer. To a framer's requests every honest answer looks false."""
        looks_false = request.source == FRAMER or opened.body != right_body(request.key)
        self.tell(AnswerAudited(evidence_of(opened.proof, 40, 2 if looks_false else 0), request.source))

    # --- what the network tells -----------------------------------------------------------------

    def opened(self, peer: int) -> None:
        """A connection is there."""
        other = self.fleet.host(peer)
        self.tell(PeerConnected(other.peer, other.address.partition(":")[0]))

    def closed(self, peer: int) -> None:
        """It has gone, and what was asked over it will not be answered."""
        gone = self.fleet.host(peer).peer
        self.tell(PeerDisconnected(gone))
        for request in [request for request, target in self._sends.items() if target == gone]:
            self._failed(request, Reason.UNREACHABLE)
        for lookup, fetch in [(lookup, fetch) for (lookup, target), fetch in self._fetches.items() if target == gone]:
            self._refuse(lookup, gone, fetch, Reason.UNREACHABLE)

    def passes_on(self, relay: int, topic: str, author: int, payload: bytes) -> bool:
        """Whether this node takes a message from a neighbour, and passes it on."""
        peers = [self.fleet.hosts[host].peer for host in (relay, author)]
        verdict = self.gate.judge(peers[0], topic, peers[1], payload, lambda: True, self.now)
        if verdict is Verdict.MUTE:
            self.later(0, lambda: self.tell(GossipSpoiled(peers[0])))
        return verdict is Verdict.ACCEPT

    def heard_gossip(self, relay: int, topic: str, payload: bytes) -> None:
        """GossipSub delivers."""
        if self.liar is not None:
            self.liar.overhear(topic, payload)
        self.tell(GossipReceived(topic, self.fleet.hosts[relay].peer, payload))

    def asked(self, asker: int, frame: bytes, answer: Answer) -> None:
        """A request arrives; hosts serve one after another."""
        self._free_ms = max(self._free_ms, self.fleet.agenda.now_ms) + SERVE_MS
        self.later(self._free_ms - self.fleet.agenda.now_ms, partial(self._serve, asker, frame, answer))

    def _serve(self, asker: int, frame: bytes, answer: Answer) -> None:
        try:
            message = decode_request(frame)
        except ProtocolViolation:
            self.tell(PeerMisbehaved(self.fleet.host(asker).peer))
            answer(encode(Refusal("protocol")))
            return
        lie = self.liar.answer(message) if self.liar is not None else None
        if lie is not None:
            if lie:
                answer(lie)
            return
        token = self._number()
        self._tokens[token] = answer
        self.tell(RequestReceived(token, self.fleet.host(asker).peer, message))
        if self.liar is None:
            self.fleet.checker.on_request_handled(self, message, token in self._tokens)

    # --- performing effects ---------------------------------------------------------------------

    def _perform_all(self, effects: list[NetworkEffect]) -> None:
        for effect in effects:
            self.fleet.trace.add(self.fleet.agenda.now_ms, self.number, effect)
            self._perform(effect)
        self._arm()

    def _perform(self, effect: NetworkEffect) -> None:
        match effect:
            case Connect():
                self._connect(effect)
            case Disconnect(peer):
                self.fleet.network.hang_up(self.number, self.fleet.number_of(peer))
            case Send():
                self._send(effect)
            case Reply(token, message):
                self._reply(token, message)
            case ServeResponse():
                self._serve_response(effect)
            case Publish(topic, payload):
                self.fleet.gossip.publish(self.number, topic, payload)
            case Provide(key):
                self.fleet.dht.provide(self.number, key)
            case FindProviders():
                self._find(effect)
            case HintResponse():
                self._hinted(effect)
            case FetchResponse():
                self._fetch(effect)
            case AnswerResponse():
                self._answered(effect)
            case ChargePeer(peer, reason):
                self.fleet.checker.on_charge(self, peer, reason)
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
            case _:
                assert_never(effect)

    def _write(self, effect: WriteRegistry) -> None:
        self.tell(self._documents.write(effect, self.wall_ms))
        for name, _ in effect.added:
            self.fleet.announced(self.number, name)

    def _connect(self, effect: Connect) -> None:
        def done(failed: str | None) -> None:
            if failed is not None:
                self.tell(ConnectFailed(effect.peer, Reason(failed)))

        target = self.fleet.at(effect.address, effect.peer)
        self.fleet.network.dial(self.number, target, effect.timeout_ms, done)

    def _send(self, effect: Send) -> None:
        target = self.fleet.number_of(effect.peer)
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

        if self._call(target, encode(effect.message), answered):
            self.later(effect.timeout_ms, partial(self._failed, effect.request, Reason.TIMEOUT))
        else:
            self.later(0, partial(self._failed, effect.request, Reason.UNREACHABLE))

    def _call(self, target: int, frame: bytes, answered: Answer) -> bool:
        """Ask `target`, if there is a connection to it."""
        network, fleet = self.fleet.network, self.fleet

        def answer(reply: bytes) -> None:
            network.send(target, self.number, FRAME_BYTES + len(reply), partial(answered, reply))

        act = partial(fleet.host(target).asked, self.number, frame, answer) if target >= 0 else None
        return act is not None and network.send(self.number, target, FRAME_BYTES + len(frame), act)

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
            self.fleet.network_id,
            nonce,
            response.body,
            response.proof,
            response.member,
            effect.popularity,
        )
        self._reply(effect.token, hit)

    def _find(self, effect: FindProviders) -> None:
        takes_ms, found = self.fleet.dht.search(self.number, f"/cache/{effect.request_hash.hex()}")
        if takes_ms >= effect.timeout_ms:
            takes_ms, found = effect.timeout_ms, ()
        peers = tuple(self.fleet.hosts[host].peer for host in found)
        cost_ms = self.rng.uniform(20, 400)

        def tell() -> None:
            if effect.lookup in self.requests:
                self.tell(ProvidersFound(effect.lookup, peers, cost_ms))

        self.later(takes_ms, tell)

    def _fetch(self, effect: FetchResponse) -> None:
        target = self.fleet.number_of(effect.peer)
        fetch = self._fetches[effect.lookup, effect.peer] = self._number()
        request = self.requests[effect.lookup]
        request.asked.append(target)
        if target >= 0 and not self.fleet.is_near(self.number, target):
            request.far.add(target)
        self.fleet.checker.on_fetch(self, effect, sum(lookup == effect.lookup for lookup, _ in self._fetches))
        refuse = partial(self._refuse, effect.lookup, effect.peer, fetch)
        self.later(effect.timeout_ms, partial(refuse, Reason.TIMEOUT))

        def query(failed: str | None = None) -> None:
            if failed is not None:
                refuse(Reason(failed))
            elif self._fetches.get((effect.lookup, effect.peer)) == fetch:
                answered = partial(self._fetched, effect, fetch)
                if not self._call(target, encode(Query(effect.request_hash)), answered):
                    refuse(Reason.UNREACHABLE)

        if self.fleet.network.connected(self.number, target):
            query()
        else:
            at = self.fleet.at(effect.address, effect.peer)
            self.fleet.network.dial(self.number, at, effect.timeout_ms, query)

    def _fetched(self, effect: FetchResponse, fetch: int, frame: bytes) -> None:
        lookup, peer = effect.lookup, effect.peer
        if self._fetches.get((lookup, peer)) != fetch:
            return
        try:
            message = decode_answer(frame)
            if isinstance(message, Miss | Refusal):
                reason = Reason.MISS if message.reason == "unknown" else Reason(message.reason)
                self._refuse(lookup, peer, fetch, reason)
                return
            if not isinstance(message, Hit):
                raise ProtocolViolation("a query's answer is a hit or a miss")
            opened = self.open(message, self.requests[lookup])
        except ProtocolViolation:
            self._refuse(lookup, peer, fetch, Reason.PROTOCOL)
            return
        except Refused as refused:
            self._refuse(lookup, peer, fetch, Reason.of(refused))
            return
        del self._fetches[lookup, peer]
        self.requests[lookup].fetched[peer] = opened
        self.tell(ResponseFetched(lookup, peer, len(opened.body), opened.expires_at_ms, message.popularity))

    def open(self, hit: Hit, request: Request) -> Opened:
        """What a hit holds, judged as the daemon judges it."""

        def trusts(signer: bytes) -> bool:
            return self.trust.trusts(signer, self.now)

        return open_hit(hit, request.key, self.fleet.network_id, MODEL_DIGEST, trusts, self.trust.meet, self.wall_ms)

    def _refuse(self, lookup: int, peer: PeerId, fetch: int, reason: Reason) -> None:
        if self._fetches.get((lookup, peer)) == fetch:
            del self._fetches[lookup, peer]
            if reason is Reason.EXPIRED:
                self.requests[lookup].lapsed.add(self.fleet.number_of(peer))
            self.tell(ResponseRefused(lookup, peer, reason))

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
            self.tell(NetworkTick())
            self.fleet.checker.on_tick(self, self._tick_at_ms)

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers
