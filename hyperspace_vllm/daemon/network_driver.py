"""The shell of the network core: performs its effects with libp2p, loro and SQLite, and feeds back what came of them.

Everything happens on one event loop; `submit` is the core's door. libp2p has a thread of its own behind `Libp2pHost`,
loro a process behind `RegistryDocuments`.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, assert_never

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
    KvEndpoint,
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
    Answered,
    ConnectFailed,
    DeltasRefused,
    GossipReceived,
    GossipSpoiled,
    NetworkEvent,
    NetworkTick,
    NotProvided,
    PeerConnected,
    PeerDisconnected,
    PeerDiscovered,
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
from ..core.local.messages import Scope
from ..core.node.network_node import NetworkNode
from ..core.peers.gossip_gate import GossipGate
from ..core.peers.trust import Trust
from ..core.records.errors import ProtocolViolation, Refused
from ..core.records.ids import NetworkId, PeerId, RequestKey, RowId, public_key_of
from ..core.records.limits import PROVIDERS_MAX
from ..core.records.peer_record import PeerRecord
from ..core.records.peer_wire import (
    Hit,
    Miss,
    PeerAnswer,
    PeerRequest,
    Query,
    Refusal,
    decode_answer,
    decode_request,
    encode,
    protocol_of,
)
from ..core.records.rank import Tier
from ..core.records.reason import Reason
from ..core.records.vram_digest import approximate_count
from ..core.response.cache_proof import request_hash
from ..core.response.sealed_hit import Opened
from . import clock
from .metrics import Metrics
from .peer_failed import PeerFailed
from .responses.answer_places import AskingPeer
from .responses.fetched_response import Stored, found_response, keep, open_fetched
from .responses.response_lookups import FoundResponse
from .responses.response_server import ResponseServer
from .responses.store_changes import ServableEntry

if TYPE_CHECKING:  # optional, or slow to import: join.py builds them
    from .libp2p.libp2p_host import Libp2pHost
    from .redis.redis_registry import RedisRegistry
    from .workers.registry_documents import RegistryDocuments

log = logging.getLogger(__name__)

REPLY_S = 5.0  # the core answers at once; serving a response reads the disk
PROVIDE_S = 10.0


class Clients(Protocol):
    """Where lookups are answered (LocalServer)."""

    def hint_response(self, lookup: int, hinted: bool) -> None:
        """Say whether waiting is worth while."""

    def try_response(self, lookup: int, body: bytes, proof: bytes) -> None:
        """Have a response audited that isn't served."""

    def answer_response(self, lookup: int, found: FoundResponse | None, reason: str) -> None:
        """End a lookup."""


@dataclass(slots=True)
class _NetworkLookup:
    key: RequestKey
    model_digest: bytes
    began_s: float
    released: bool = False


class NetworkDriver:
    """One node's network shell. `clients` and `host` are set by whoever builds them all."""

    clients: Clients
    host: "Libp2pHost"

    def __init__(
        self,
        node: NetworkNode,
        network: NetworkId,
        trust: Trust,
        store: Stored | None,
        responses: ResponseServer | None,
        documents: "RegistryDocuments | None",
        redis: "RedisRegistry | None",
        metrics: Metrics,
        on_peers: Callable[[tuple[PeerRecord, ...], tuple[KvEndpoint, ...]], None],
        scope: Scope,
        gate: GossipGate,
    ) -> None:
        self._node = node
        self._network = network
        self._trust = trust
        self._store = store
        self._responses = responses
        self._documents = documents
        self._redis = redis
        self._metrics = metrics
        self._on_peers = on_peers
        self._scope = scope
        self._gate = gate
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._tokens = 0
        self._replies: dict[int, asyncio.Future[PeerAnswer]] = {}
        self._askers: dict[int, PeerId] = {}
        self._lookups: dict[int, _NetworkLookup] = {}
        self._opened: dict[tuple[int, PeerId], Opened] = {}
        self._tasks: dict[int, set[asyncio.Task[None]]] = {}
        self._background: set[asyncio.Task[None]] = set()
        self.known: tuple[PeerRecord, ...] = ()
        self.last_lookup: dict[str, object] = {}
        self._provided = 0

    def start(self) -> None:
        """Begin to join the network; `host` has started."""
        self._perform_all(self._node.start(clock.now()))
        self._set_timer()

    def submit(self, event: NetworkEvent) -> None:
        """Let the core handle an event, and perform what it decides."""
        if self._closed:
            return
        self._perform_all(self._node.handle(event, clock.now()))
        self._set_timer()

    async def close(self) -> None:
        """End everything at once."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)

    def status(self) -> dict[str, object]:
        """What `hyperspace status` shows of the network."""
        registry = self._node.registry.stats()
        return {
            "address": self.host.address,
            "connected": sorted(self.host.connected),
            "known_peers": len(self.known),
            "usable": [record.peer for record in self.known],
            "serves": _serves(self._node.members.own),
            "peers": [_serves(record) for record in self._node.members.usable(clock.now())],
            "registry_entries": registry.entries + registry.own_entries,
            "hints": len(self._node.hints),
            "provided": self._provided,
            "suspected_peers": self._trust.standings.suspected(clock.now()),
            "doubts_own_engine": self._trust.standings.doubts_itself(clock.now()),
            "gossip_refused": dict(self._node.gossip_refused),
            "last_response_lookup": self.last_lookup,
        }

    # --- the local side -------------------------------------------------------------------------

    def find(self, lookup: int, request_key: RequestKey, model_digest: bytes, deadline_ms: int) -> None:
        """Look for a response at other nodes (local_server.ResponseFinder)."""
        self._lookups[lookup] = _NetworkLookup(request_key, model_digest, self._loop.time())
        name = request_hash(self._network, request_key)
        if self._redis is None:
            self.submit(ResponseWanted(lookup, name, deadline_ms))
        else:
            self._start(lookup, self._find_with_redis(self._redis, lookup, name, deadline_ms))

    def release(self, lookup: int) -> None:
        """The client waits no longer; a search may go on for the next request's sake."""
        if lookup in self._lookups:
            self._lookups[lookup].released = True
            self.submit(ResponseReleased(lookup))

    def purge(self, keys: Iterable[bytes]) -> None:
        """Lookups of these come to nothing at once: what is being fetched for them would be stored again."""
        purged = set(keys)
        for number in [number for number, lookup in self._lookups.items() if lookup.key in purged]:
            del self._lookups[number]  # the core ends its own by the deadline
            self.clients.answer_response(number, None, "not_found")

    def heard(self, stored: tuple[ServableEntry, ...], gone: tuple[bytes, ...]) -> None:
        """What the store can serve now, and what no more."""
        if self._redis is not None:
            self._redis.note_gone(gone)
        if gone:
            self.submit(ResponsesGone(gone))
        for told in stored:
            if self._redis is not None:
                self._redis.note_stored(told.request_hash, told.expires_at_ms)
            self.submit(ResponseStored(told.request_hash, told.expires_at_ms, told.computed))

    def row_hints(self, row_id: RowId) -> tuple[PeerId, ...]:
        """Who says that it serves a KV row."""
        return self._node.providers(row_id, clock.now())

    def used(self, keys: Iterable[bytes]) -> None:
        """Clients of this host had hits."""
        self.submit(ResponsesUsed(tuple(request_hash(self._network, RequestKey(key)) for key in keys)))

    async def _find_with_redis(self, redis: "RedisRegistry", lookup: int, name: bytes, deadline_ms: int) -> None:
        told = await redis.providers(name)
        self.submit(ResponseWanted(lookup, name, deadline_ms, told))

    # --- libp2p's side (libp2p_host.HostHandler) ------------------------------------------------

    async def on_request(self, peer: PeerId, protocol: str, frame: bytes) -> bytes | None:
        """Answer a peer's request; None resets its stream."""
        try:
            message = decode_request(frame)
            if protocol_of(message) != protocol:
                raise ProtocolViolation(f"{type(message).__name__} on {protocol}")
        except ProtocolViolation as violation:
            log.info("peer %s broke the protocol: %s", peer, violation, extra={"peer": peer})
            self.submit(PeerMisbehaved(peer))
            return None
        self._tokens += 1
        token = self._tokens
        reply = self._replies[token] = self._loop.create_future()
        self._askers[token] = peer
        try:
            self.submit(RequestReceived(token, peer, message))
            async with asyncio.timeout(REPLY_S):
                return encode(await reply)
        except TimeoutError:
            return encode(Refusal("busy"))
        finally:
            del self._replies[token], self._askers[token]

    def on_gossip(self, topic: str, relay: PeerId, payload: bytes) -> None:
        """A message on one of the topics."""
        self.submit(GossipReceived(topic, relay, payload))

    def on_gossip_spoiled(self, relay: PeerId) -> None:
        """A neighbour passed on too much that is invalid."""
        self.submit(GossipSpoiled(relay))

    def on_connected(self, peer: PeerId) -> None:
        """A connection is open."""
        self.submit(PeerConnected(peer, self.host.host_of(peer)))

    def on_disconnected(self, peer: PeerId) -> None:
        """The last connection has closed."""
        self.submit(PeerDisconnected(peer))

    def on_violation(self, peer: PeerId) -> None:
        """It broke a rule of the streams."""
        self.submit(PeerMisbehaved(peer))

    def tier(self, peer: PeerId) -> Tier:
        """Whose needs come first; looks into dicts alone, and so from any thread."""
        return self._trust.tier(peer)

    def on_discovered(self, peer: PeerId, address: str, told_from: str) -> None:
        """Multicast DNS has seen a node: who it is, its greeting will say."""
        self.submit(PeerDiscovered(peer, address, told_from))

    def may_dial(self, peer: PeerId, address: str, told_from: str) -> bool:
        """Whether a search of the DHT may dial a peer there; saying yes counts as a dial."""
        return self._node.may_dial(peer, address, told_from, clock.now())

    # --- effects --------------------------------------------------------------------------------

    def _perform_all(self, effects: list[NetworkEffect]) -> None:
        for effect in effects:
            self._perform(effect)

    def _perform(self, effect: NetworkEffect) -> None:
        match effect:
            case Connect():
                self._spawn(self._connect(effect))
            case Disconnect(peer):
                self._spawn(self.host.disconnect(peer))
            case Send():
                self._spawn(self._send(effect))
            case Reply(token, message):
                self._reply(token, message)
            case ServeResponse():
                self._spawn(self._serve(effect))
            case Publish(topic, payload):
                if not self.host.publish(topic, payload):
                    self._metrics.failures_total.labels("l1", "gossip_full").inc()
            case PeersChanged(usable, endpoints):
                self.known = usable
                self._on_peers(usable, endpoints)
            case AuthorsChanged(authors):
                self._gate.authors = dict(authors)
            case ChargePeer(peer, reason):
                self._charge(peer, reason)
            case HintResponse(lookup, hinted):
                if lookup in self._lookups:
                    self.clients.hint_response(lookup, hinted)
            case FetchResponse():
                self._start(effect.lookup, self._fetch(effect))
            case FindProviders():
                self._start(effect.lookup, self._search(effect))
            case AnswerResponse():
                self._answer(effect)
            case Provide(key):
                self._spawn(self._provide(key))
            case WriteRegistry():
                self._spawn(self._write(effect))
            case ImportDeltas():
                self._spawn(self._import(effect))
            case ForgetOwner(owner):
                if self._documents is not None:
                    self._spawn(self._documents.forget(owner))
            case _:
                assert_never(effect)

    async def _connect(self, effect: Connect) -> None:
        try:
            await self.host.connect(effect.peer, effect.address, effect.timeout_ms / 1000)
        except PeerFailed as failed:
            self.submit(ConnectFailed(effect.peer, failed.reason))

    async def _send(self, effect: Send) -> None:
        try:
            answer = await self._ask(effect.peer, effect.message, effect.timeout_ms / 1000)
        except PeerFailed as failed:
            self.submit(RequestFailed(effect.request, effect.peer, failed.reason))
        else:
            self.submit(Answered(effect.request, effect.peer, answer))

    async def _ask(self, peer: PeerId, message: PeerRequest, timeout_s: float) -> PeerAnswer:
        frame = await self.host.request(peer, protocol_of(message), encode(message), timeout_s)
        try:
            return decode_answer(frame)
        except ProtocolViolation as violation:
            log.info("peer %s broke the protocol: %s", peer, violation, extra={"peer": peer})
            raise PeerFailed(Reason.PROTOCOL) from violation

    async def _serve(self, effect: ServeResponse) -> None:
        answer: Hit | Miss = Miss("unknown")
        peer = self._askers.get(effect.token)
        if self._responses is not None and peer is not None:
            asker = AskingPeer(peer, self._trust.is_chosen(public_key_of(peer)), self._trust.has_standing(peer))
            answer = await self._responses.answer(effect.request_hash, effect.popularity, asker)
        if isinstance(answer, Hit):
            self._metrics.bytes_total.labels("served").inc(len(answer.sealed))
        self._reply(effect.token, answer)

    def _reply(self, token: int, message: PeerAnswer) -> None:
        reply = self._replies.get(token)
        if reply is not None and not reply.done():
            reply.set_result(message)

    # --- lookups --------------------------------------------------------------------------------

    async def _fetch(self, effect: FetchResponse) -> None:
        lookup = self._lookups.get(effect.lookup)
        if lookup is None:
            return
        deadline = self._loop.time() + effect.timeout_ms / 1000
        try:
            if effect.peer not in self.host.connected:
                if not effect.address:
                    raise PeerFailed(Reason.UNREACHABLE)
                await self.host.connect(effect.peer, effect.address, effect.timeout_ms / 1000)
            answer = await self._ask(effect.peer, Query(effect.request_hash), deadline - self._loop.time())
            if not isinstance(answer, Hit):
                raise PeerFailed(_reason_of(answer))
            opened = await self._open(effect.lookup, lookup, answer)
        except PeerFailed as failed:
            self._refused(effect, failed.reason)
        except Refused as refused:
            self._refused(effect, Reason.of(refused))
        except ProtocolViolation:
            self._refused(effect, Reason.PROTOCOL)
        else:
            self._metrics.bytes_total.labels("fetched").inc(len(answer.sealed))
            self._opened[effect.lookup, effect.peer] = opened
            size, expires_at_ms = len(opened.body), opened.expires_at_ms
            self.submit(ResponseFetched(effect.lookup, effect.peer, size, expires_at_ms, answer.popularity))

    async def _open(self, number: int, lookup: _NetworkLookup, hit: Hit) -> Opened:
        """What a hit holds. Of a signer that isn't trusted it goes to be audited, now and then."""
        asked_for = hit, lookup.key, self._network, lookup.model_digest, self._trust, clock.now()
        try:
            return await open_fetched(*asked_for)
        except Refused as refused:
            if refused.reason == "untrusted_signer":
                tried = await open_fetched(*asked_for, on_trial=True)
                self.clients.try_response(number, tried.body, tried.raw_proof)
            raise

    def _refused(self, effect: FetchResponse, reason: Reason) -> None:
        if reason is not Reason.MISS:
            self._metrics.failures_total.labels("l1", reason).inc()
        self.submit(ResponseRefused(effect.lookup, effect.peer, reason))

    async def _search(self, effect: FindProviders) -> None:
        key = f"/cache/{effect.request_hash.hex()}"
        try:
            peers, cost_ms = await self.host.find_providers(key, PROVIDERS_MAX, effect.timeout_ms / 1000)
        except PeerFailed:
            peers, cost_ms = (), 0.0
        if cost_ms:
            self._metrics.search_cpu_seconds.observe(cost_ms / 1000)
        self.submit(ProvidersFound(effect.lookup, peers, cost_ms))

    def _answer(self, effect: AnswerResponse) -> None:
        lookup = self._lookups.pop(effect.lookup, None)
        for task in self._tasks.pop(effect.lookup, ()):
            if task is not asyncio.current_task():
                task.cancel()
        opened = self._opened.pop((effect.lookup, effect.peer), None) if effect.peer else None
        for at in [at for at in self._opened if at[0] == effect.lookup]:
            del self._opened[at]
        if lookup is None:
            return
        if opened is not None and self._store is not None:
            keep(self._store, lookup.key, opened, self._scope)
        self._note(lookup, effect)
        answer = found_response(opened, effect.source, self._trust, clock.now()) if opened is not None else None
        self.clients.answer_response(effect.lookup, answer, effect.reason)

    def _note(self, lookup: _NetworkLookup, effect: AnswerResponse) -> None:
        took_s = self._loop.time() - lookup.began_s
        result = "hit" if effect.peer else "miss"
        self._metrics.lookups_total.labels("l1", result, effect.reason).inc()
        self._metrics.lookup_seconds.labels("l1").observe(took_s)
        self.last_lookup = {
            "result": result,
            "reason": effect.reason,
            "source": effect.source,
            "peer": effect.peer,
            "took_ms": round(took_s * 1000, 1),
        }

    # --- DHT and registry -----------------------------------------------------------------------

    async def _provide(self, key: str) -> None:
        if await self.host.provide(key, PROVIDE_S):
            self._provided += 1
        else:
            self.submit(NotProvided(key))

    async def _write(self, effect: WriteRegistry) -> None:
        if self._documents is not None:
            self.submit(await self._documents.write(effect))

    async def _import(self, effect: ImportDeltas) -> None:
        if self._documents is None:
            self.submit(DeltasRefused(effect.owner, "worker"))
        else:
            self.submit(await self._documents.import_deltas(effect))

    # --- leaves ---------------------------------------------------------------------------------

    def _charge(self, peer: PeerId, reason: Reason) -> None:
        self._metrics.failures_total.labels("l1", f"peer_{reason}").inc()
        log.info("peer %s is charged: %s", peer, reason, extra={"peer": peer})

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        deadline_ms = self._node.next_deadline_ms()
        if deadline_ms is not None and not self._closed:
            delay_s = max(deadline_ms - clock.now().mono_ms, 1) / 1000
            self._timer = self._loop.call_later(delay_s, self.submit, NetworkTick())

    def _start(self, lookup: int, work: Coroutine[None, None, None]) -> None:
        tasks = self._tasks.setdefault(lookup, set())
        task = self._spawn(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def _spawn(self, work: Coroutine[None, None, object]) -> asyncio.Task[None]:
        task = asyncio.create_task(self._watch(work))
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        task.add_done_callback(lambda _: work.close())  # cancelled before its first step, it would never be awaited
        return task

    async def _watch(self, work: Coroutine[None, None, object]) -> None:
        try:
            await work
        except PeerFailed as failed:
            log.debug("asking a peer failed: %s", failed.reason)
        except Exception:
            log.exception("a bug in Hyperspace: please report it")
            self._metrics.failures_total.labels("l1", "bug").inc()


def _reason_of(answer: PeerAnswer) -> Reason:
    """Why an answer to a query is no hit."""
    match answer:
        case Miss("busy"):
            return Reason.BUSY
        case Miss():
            return Reason.MISS
        case Refusal(reason):
            return Reason(reason)
        case _:
            return Reason.PROTOCOL


def _serves(record: PeerRecord) -> dict[str, object]:
    """What a node says in its record that it serves."""
    return {
        "peer_id": record.peer,
        "models": len(record.models),
        "fingerprints": len(record.fingerprints),
        "load_permille": record.load_permille,
        "segments_in_memory": approximate_count(record.vram_digest),
    }
