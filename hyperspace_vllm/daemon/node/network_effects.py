"""Performs what the core decides about the network with libp2p, loro and SQLite; what comes of it becomes events."""

import logging
from collections.abc import Callable
from typing import assert_never

from ...core.events.conduct import ChargePeer
from ...core.events.connections import (
    Connect,
    ConnectFailed,
    Disconnect,
)
from ...core.events.dht import NotProvided, Provide, SearchDht
from ...core.events.gossip import AuthorsChanged, Publish
from ...core.events.known_peers import KvPeersChanged, PeersChanged
from ...core.events.owner_documents import DeltasRefused, ForgetOwner, ImportDeltas, WriteRegistry
from ...core.events.peer_requests import Answered, Reply, RequestFailed, Send, ServeResponse
from ...core.events.response_reading import AnswerResponse, FetchResponse, HintResponse, ReadShared
from ...core.events.stored_responses import ResponsesGone, ResponseStored
from ...core.events.vocabulary import Event, NetworkEffect, NetworkEvent
from ...core.local.message_fields import Scope
from ...core.node.network_part import NetworkPart
from ...core.peers.trust import Trust
from ...core.records.ids import NetworkId
from ...core.records.peer_record import PeerRecord
from ...core.records.vram_digest import approximate_count
from .. import clock
from ..metrics import Metrics
from ..peer_failed import PeerFailed
from ..responses.fetched_response import Stored
from ..responses.response_lookups import Clients
from .joined_network import Documents, Joined, PeerHost
from .lookup_tasks import LookupTasks
from .network_lookups import NetworkLookups, SharedStore
from .open_requests import PeerRequests, ask_peer

log = logging.getLogger(__name__)

PROVIDE_S = 10.0


class NetworkEffects:
    """Everything happens on one event loop. What comes of effects goes to `submit`; lookups end at `clients`.

    libp2p has a thread of its own behind `Libp2pHost`, loro a process behind `RegistryDocuments`.
    """

    def __init__(
        self,
        network: NetworkId,
        trust: Trust,
        clients: Clients,
        store: Stored | None,
        scope: Scope,
        metrics: Metrics,
        submit: Callable[[NetworkEvent], None],
        shared: SharedStore | None = None,
    ) -> None:
        self._trust = trust
        self._metrics = metrics
        self._submit = submit
        self._tasks = LookupTasks("l1", metrics)
        self.requests = PeerRequests(trust, metrics, submit)
        self.lookups = NetworkLookups(network, trust, clients, store, scope, metrics, submit, self._tasks, shared)
        self._joined: Joined | None = None
        self._known: tuple[PeerRecord, ...] = ()
        self._provided = 0

    def join(self, joined: Joined) -> None:
        """What performs effects is there."""
        self._joined = joined
        self._metrics.connected_peers.set_function(lambda: len(joined.host.connected))

    async def leave(self) -> None:
        """End everything at once."""
        await self._tasks.close(patience_s=0)

    def status(self, node: NetworkPart) -> dict[str, object]:
        """What `hyperspace status` shows of the network."""
        assert self._joined is not None
        host, now = self._joined.host, clock.now()
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
            "last_response_lookup": self.lookups.last,
        }

    def note(self, event: Event) -> None:
        """The core is about to handle an event: write into Redis what this node can serve."""
        hints = self._joined.hints if self._joined is not None else None
        match event:
            case ResponseStored(name, expires_at_ms) if hints is not None:
                hints.note_stored(name, expires_at_ms)
            case ResponsesGone(names) if hints is not None:
                hints.note_gone(names)

    def charge(self, effect: ChargePeer) -> None:
        """A peer is charged."""
        self._metrics.failures_total.labels("l1", f"peer_{effect.reason}").inc()
        log.info("peer %s is charged: %s", effect.peer, effect.reason, extra={"peer": effect.peer})

    # --- effects --------------------------------------------------------------------------------

    def perform(self, effect: NetworkEffect) -> None:
        """Do what the core decided."""
        joined = self._joined
        match effect:
            case ReadShared():
                self.lookups.read_shared(effect, joined.hints if joined is not None else None)
            case HintResponse():
                self.lookups.hint(effect)
            case AnswerResponse():
                self.lookups.answer(effect)
            case _:
                assert joined is not None
                self._perform_in_network(effect, joined)

    def _perform_in_network(self, effect: NetworkEffect, joined: Joined) -> None:
        match effect:
            case Connect():
                self._tasks.spawn(self._connect(joined.host, effect))
            case Disconnect(peer):
                self._tasks.spawn(joined.host.disconnect(peer))
            case Send():
                self._tasks.spawn(self._send(joined.host, effect))
            case Reply(token, message):
                self.requests.reply(token, message)
            case ServeResponse():
                self._tasks.spawn(self.requests.serve(effect, joined.responses))
            case Publish(topic, payload):
                if not joined.host.publish(topic, payload):
                    self._metrics.failures_total.labels("l1", "gossip_full").inc()
            case PeersChanged(usable, addresses):
                self._known = usable
                joined.book.note(addresses)
            case AuthorsChanged(authors):
                joined.gate.authors = dict(authors)
            case FetchResponse():
                self.lookups.fetch(effect, joined.host)
            case SearchDht():
                self.lookups.search(effect, joined.host)
            case Provide(key):
                self._tasks.spawn(self._provide(joined.host, key))
            case WriteRegistry():
                self._tasks.spawn(self._write(joined.documents, effect))
            case ImportDeltas():
                self._tasks.spawn(self._import(joined.documents, effect))
            case ForgetOwner(owner):
                if joined.documents is not None:
                    self._tasks.spawn(joined.documents.forget(owner))
            case KvPeersChanged() | ChargePeer() | ReadShared() | HintResponse() | AnswerResponse():
                pass  # done elsewhere
            case _:
                assert_never(effect)

    async def _connect(self, host: PeerHost, effect: Connect) -> None:
        try:
            await host.connect(effect.peer, effect.address, effect.timeout_ms / 1000)
        except PeerFailed as failed:
            self._submit(ConnectFailed(effect.peer, failed.reason))

    async def _send(self, host: PeerHost, effect: Send) -> None:
        try:
            answer = await ask_peer(host, effect.peer, effect.message, effect.timeout_ms / 1000)
        except PeerFailed as failed:
            self._submit(RequestFailed(effect.request, effect.peer, failed.reason))
        else:
            self._submit(Answered(effect.request, effect.peer, answer))

    async def _provide(self, host: PeerHost, key: str) -> None:
        if await host.provide(key, PROVIDE_S):
            self._provided += 1
        else:
            self._submit(NotProvided(key))

    async def _write(self, documents: Documents | None, effect: WriteRegistry) -> None:
        if documents is not None:
            self._submit(await documents.write(effect))

    async def _import(self, documents: Documents | None, effect: ImportDeltas) -> None:
        if documents is None:
            self._submit(DeltasRefused(effect.owner, "worker"))
        else:
            self._submit(await documents.import_deltas(effect))


def _serves(record: PeerRecord) -> dict[str, object]:
    """What a node says in its record that it serves."""
    return {
        "peer_id": record.peer,
        "models": len(record.models),
        "fingerprints": len(record.fingerprints),
        "load_permille": record.load_permille,
        "segments_in_memory": approximate_count(record.vram_digest),
    }
