"""The shell of the network core: performs its effects with libp2p, loro and SQLite, and feeds back what came of them.

It exists from the start of its node. `run` joins the network, which takes seconds; what happens before waits for the
core. Everything happens on one event loop; `submit` is the core's door. libp2p has a thread of its own behind
`Libp2pHost`, loro a process behind `RegistryDocuments`.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AsyncExitStack
from typing import Literal, assert_never

from ...core.events.conduct import AnswerAudited, ChargePeer, PeerMisbehaved
from ...core.events.connections import (
    Connect,
    ConnectFailed,
    Disconnect,
    PeerConnected,
    PeerDisconnected,
    PeerDiscovered,
)
from ...core.events.dht import NotProvided, Provide, SearchDht
from ...core.events.gossip import AuthorsChanged, GossipReceived, GossipSpoiled, Publish
from ...core.events.known_peers import KvPeersChanged, PeersChanged
from ...core.events.node_state import ServedChanged, Tick
from ...core.events.owner_documents import DeltasRefused, ForgetOwner, ImportDeltas, WriteRegistry
from ...core.events.peer_requests import Answered, Reply, RequestFailed, Send, ServeResponse
from ...core.events.response_reading import AnswerResponse, FetchResponse, HintResponse
from ...core.events.stored_responses import ResponsesGone, ResponseStored
from ...core.events.vocabulary import NetworkEffect, NetworkEvent
from ...core.peers.trust import Trust
from ...core.records.ids import NetworkId, PeerId, RequestKey, RowId
from ...core.records.now import Now
from ...core.records.peer_record import PeerRecord
from ...core.records.rank import Tier
from ...core.records.reason import Reason
from ...core.records.vram_digest import approximate_count
from ...core.response.evidence import verdict
from .. import clock
from ..metrics import Metrics
from ..peer_failed import PeerFailed
from ..responses.fetched_response import Stored
from ..responses.response_lookups import Clients
from ..responses.store_changes import ServableEntry
from ..start_error import StartError
from .early_events import EarlyEvents
from .joined_network import Documents, Joined, PeerHost, SharedHints
from .lookup_tasks import LookupTasks
from .network_lookups import NetworkLookups
from .open_requests import PeerRequests, ask_peer

log = logging.getLogger(__name__)

JOIN_AGAIN_S = 10.0
PROVIDE_S = 10.0


class NetworkDriver:
    """One node's network shell; without `listens` it never joins. Lookups end at `clients`."""

    def __init__(
        self,
        network: NetworkId,
        trust: Trust,
        clients: Clients,
        store: Stored | None,
        metrics: Metrics,
        share: Literal["private", "network", "public"],
        listens: bool,
    ) -> None:
        self._trust = trust
        self._clients = clients
        self._metrics = metrics
        self._shares = share != "private"
        self._listens = listens
        self._loop = asyncio.get_running_loop()
        self._tasks = LookupTasks("l1", metrics)
        self._requests = PeerRequests(trust, metrics, self.submit)
        scope: Literal["network", "public"] = "public" if share == "public" else "network"
        self._lookups = NetworkLookups(network, trust, clients, store, scope, metrics, self.submit, self._tasks)
        self._early = EarlyEvents()
        self._joined: Joined | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._failure = ""
        self._known: tuple[PeerRecord, ...] = ()
        self._provided = 0

    async def run(
        self, join: Callable[[AsyncExitStack, "NetworkDriver"], Awaitable[Joined]], on_joined: Callable[[], None]
    ) -> None:
        """Join, and stay until cancelled. A listener that can't be had is tried again."""
        while self._listens:
            async with AsyncExitStack() as parts:
                try:
                    joined = await join(parts, self)
                except (StartError, OSError, ImportError) as error:
                    self._failure = str(error)
                    log.error("not joined, and tried again every %.0f s: %s", JOIN_AGAIN_S, error)
                else:
                    parts.push_async_callback(self._leave)
                    self._begin(joined)
                    on_joined()
                    await asyncio.Event().wait()
            await asyncio.sleep(JOIN_AGAIN_S)

    def submit(self, event: NetworkEvent | Tick) -> None:
        """Let the core handle an event, and perform what it decides; before the network is joined, keep it."""
        if self._closed:
            return
        if self._joined is None:
            self._early.add(event)
        else:
            self._handle(self._joined, event)

    @property
    def address(self) -> str:
        """host:port of libp2p's listener; '' before it listens."""
        return self._joined.host.address if self._joined else ""

    def status(self) -> dict[str, object] | None:
        """What `hyperspace status` shows of the network."""
        if not self._listens:
            return None
        if self._joined is None:
            return {"state": self._failure or "joining"}
        node, host, now = self._joined.node, self._joined.host, clock.now()
        registry = node.registry.stats()
        return {
            "address": host.address,
            "connected": sorted(host.connected),
            "known_peers": len(self._known),
            "usable": [record.peer for record in self._known],
            "serves": _serves(node.members.own),
            "peers": [_serves(record) for record in node.members.usable(now)],
            "registry_entries": registry.entries + registry.own_entries,
            "hints": len(node.hints),
            "provided": self._provided,
            "suspected_peers": self._trust.standings.suspected(now),
            "doubts_own_engine": self._trust.standings.doubts_itself(now),
            "gossip_refused": dict(node.gossip.refused),
            "last_response_lookup": self._lookups.last,
        }

    # --- the local side -------------------------------------------------------------------------

    def find(
        self,
        lookup: int,
        request_key: RequestKey,
        model_digest: bytes,
        deadline_ms: int,
        beside_redis: bool = False,
    ) -> None:
        """Look for a response at other nodes (response_lookups.ResponseFinder).

        `beside_redis`: the absence of a network is no reason for the client to stop asking.
        """
        if self._joined is not None and self._shares:
            hints = self._joined.hints
            self._lookups.find(lookup, request_key, model_digest, deadline_ms, beside_redis, hints)
        elif beside_redis:
            self._clients.answer(lookup, None, "not_found")
        else:
            self._clients.answer(lookup, None, "no_peers" if self._listens else "off")

    def release(self, lookup: int) -> None:
        """The client no longer waits for the lookup."""
        self._lookups.release(lookup)

    def used(self, keys: Iterable[bytes]) -> None:
        """Clients of this host had hits of these RequestKeys."""
        if self._joined is not None and self._shares:
            self._lookups.used(keys)

    def purge(self, keys: Iterable[bytes]) -> None:
        """The operator wants these gone, from lookups too: what peers have fetched stays there until it expires."""
        self._lookups.purge(keys)

    def heard(self, stored: tuple[ServableEntry, ...], gone: tuple[bytes, ...]) -> None:
        """What the response store can serve now, and what no more (store_changes.Listener); from any thread."""
        self._loop.call_soon_threadsafe(self._heard, stored, gone)

    def served(self, event: ServedChanged) -> None:
        """What the engines of this host serve now; a node that shares nothing tells no peer."""
        if self._shares:
            self.submit(event)

    def audited(self, event: AnswerAudited) -> bool:
        """An audit of this host; whether its signer is convicted. Peers hear of it, if this node shares with any."""
        evidence = event.evidence
        if self._joined is not None and self._shares:
            self.submit(event)
        else:
            found = verdict(evidence.far)
            self._trust.audited(evidence.signer, evidence.tokens, found, event.source, clock.now())
        return self._trust.is_convicted(evidence.signer, clock.now())

    def row_hints(self, row_id: RowId, now: Now) -> tuple[PeerId, ...]:
        """Who says that it serves a KV row."""
        return self._joined.node.providers.of(row_id, now) if self._joined else ()

    def _heard(self, stored: tuple[ServableEntry, ...], gone: tuple[bytes, ...]) -> None:
        if not self._shares:
            return
        if gone:
            self.submit(ResponsesGone(gone))
        for told in stored:
            self.submit(ResponseStored(told.request_hash, told.expires_at_ms, told.computed))

    # --- libp2p's side (libp2p_host.HostHandler) ------------------------------------------------

    async def on_request(self, peer: PeerId, protocol: str, frame: bytes) -> bytes | None:
        """Answer a peer's request; None resets its stream."""
        return await self._requests.answer(peer, protocol, frame)

    def on_gossip(self, topic: str, relay: PeerId, payload: bytes) -> None:
        """A message on one of the topics."""
        self.submit(GossipReceived(topic, relay, payload))

    def on_gossip_spoiled(self, relay: PeerId) -> None:
        """A neighbour passed on too much that is invalid."""
        self.submit(GossipSpoiled(relay))

    def on_connected(self, peer: PeerId, host: str) -> None:
        """A connection is open."""
        self.submit(PeerConnected(peer, host))

    def on_disconnected(self, peer: PeerId) -> None:
        """The last connection has closed."""
        self.submit(PeerDisconnected(peer))

    def on_violation(self, peer: PeerId) -> None:
        """It broke a rule of the streams, or the protocol of the bulk transport."""
        self.submit(PeerMisbehaved(peer))

    def tier(self, peer: PeerId) -> Tier:
        """Whose needs come first; looks into dicts alone, and so from any thread."""
        return self._trust.tier(peer)

    def on_discovered(self, peer: PeerId, address: str, told_from: str) -> None:
        """Multicast DNS has seen a node: who it is, its greeting will say."""
        self.submit(PeerDiscovered(peer, address, told_from))

    def may_dial(self, peer: PeerId, address: str, told_from: str) -> bool:
        """Whether a search of the DHT may dial a peer there; saying yes counts as a dial."""
        joined = self._joined
        return joined is not None and joined.node.members.may_dial_at(peer, address, told_from, clock.now())

    # --- effects --------------------------------------------------------------------------------

    def _begin(self, joined: Joined) -> None:
        self._joined = joined
        self._metrics.connected_peers.set_function(lambda: len(joined.host.connected))
        self._perform_all(joined, joined.node.start(clock.now()))
        self._set_timer(joined)
        for event in self._early.take():
            self.submit(event)

    async def _leave(self) -> None:
        """End everything at once."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        await self._tasks.close(patience_s=0)

    def _handle(self, joined: Joined, event: NetworkEvent | Tick) -> None:
        if joined.hints is not None:
            _note(joined.hints, event)
        self._perform_all(joined, joined.node.handle(event, clock.now()))
        self._set_timer(joined)

    def _perform_all(self, joined: Joined, effects: list[NetworkEffect]) -> None:
        for effect in effects:
            self._perform(joined, effect)

    def _perform(self, joined: Joined, effect: NetworkEffect) -> None:
        match effect:
            case Connect():
                self._tasks.spawn(self._connect(joined.host, effect))
            case Disconnect(peer):
                self._tasks.spawn(joined.host.disconnect(peer))
            case Send():
                self._tasks.spawn(self._send(joined.host, effect))
            case Reply(token, message):
                self._requests.reply(token, message)
            case ServeResponse():
                self._tasks.spawn(self._requests.serve(effect, joined.responses))
            case Publish(topic, payload):
                if not joined.host.publish(topic, payload):
                    self._metrics.failures_total.labels("l1", "gossip_full").inc()
            case PeersChanged(usable, addresses):
                self._known = usable
                joined.book.note(addresses)
            case KvPeersChanged(admitted, endpoints):
                joined.on_peers(admitted, endpoints)
            case AuthorsChanged(authors):
                joined.gate.authors = dict(authors)
            case ChargePeer(peer, reason):
                self._charge(peer, reason)
            case HintResponse():
                self._lookups.hint(effect)
            case FetchResponse():
                self._lookups.fetch(effect, joined.host)
            case SearchDht():
                self._lookups.search(effect, joined.host)
            case AnswerResponse():
                self._lookups.answer(effect)
            case Provide(key):
                self._tasks.spawn(self._provide(joined.host, key))
            case WriteRegistry():
                self._tasks.spawn(self._write(joined.documents, effect))
            case ImportDeltas():
                self._tasks.spawn(self._import(joined.documents, effect))
            case ForgetOwner(owner):
                if joined.documents is not None:
                    self._tasks.spawn(joined.documents.forget(owner))
            case _:
                assert_never(effect)

    async def _connect(self, host: PeerHost, effect: Connect) -> None:
        try:
            await host.connect(effect.peer, effect.address, effect.timeout_ms / 1000)
        except PeerFailed as failed:
            self.submit(ConnectFailed(effect.peer, failed.reason))

    async def _send(self, host: PeerHost, effect: Send) -> None:
        try:
            answer = await ask_peer(host, effect.peer, effect.message, effect.timeout_ms / 1000)
        except PeerFailed as failed:
            self.submit(RequestFailed(effect.request, effect.peer, failed.reason))
        else:
            self.submit(Answered(effect.request, effect.peer, answer))

    async def _provide(self, host: PeerHost, key: str) -> None:
        if await host.provide(key, PROVIDE_S):
            self._provided += 1
        else:
            self.submit(NotProvided(key))

    async def _write(self, documents: Documents | None, effect: WriteRegistry) -> None:
        if documents is not None:
            self.submit(await documents.write(effect))

    async def _import(self, documents: Documents | None, effect: ImportDeltas) -> None:
        if documents is None:
            self.submit(DeltasRefused(effect.owner, "worker"))
        else:
            self.submit(await documents.import_deltas(effect))

    # --- leaves ---------------------------------------------------------------------------------

    def _charge(self, peer: PeerId, reason: Reason) -> None:
        self._metrics.failures_total.labels("l1", f"peer_{reason}").inc()
        log.info("peer %s is charged: %s", peer, reason, extra={"peer": peer})

    def _set_timer(self, joined: Joined) -> None:
        if self._timer is not None:
            self._timer.cancel()
        deadline_ms = joined.node.next_deadline_ms()
        if deadline_ms is not None and not self._closed:
            delay_s = max(deadline_ms - clock.now().mono_ms, 1) / 1000
            self._timer = self._loop.call_later(delay_s, self.submit, Tick())


def _note(hints: SharedHints, event: NetworkEvent | Tick) -> None:
    """Write into Redis what this node can serve."""
    match event:
        case ResponseStored(name, expires_at_ms):
            hints.note_stored(name, expires_at_ms)
        case ResponsesGone(names):
            hints.note_gone(names)


def _serves(record: PeerRecord) -> dict[str, object]:
    """What a node says in its record that it serves."""
    return {
        "peer_id": record.peer,
        "models": len(record.models),
        "fingerprints": len(record.fingerprints),
        "load_permille": record.load_permille,
        "segments_in_memory": approximate_count(record.vram_digest),
    }
