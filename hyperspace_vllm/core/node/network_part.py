"""The part of a node that deals with other nodes, from NetworkJoined to NetworkLeft.

It finds peers, announces what this node can serve, keeps hints and the registry of what others can, and looks responses
up. It hands every event to the machine that it concerns, and merges their deadlines.
"""

import random
from typing import assert_never

from nacl.signing import SigningKey

from ..events.conduct import AnswerAudited, ChargePeer, PeerMisbehaved
from ..events.connections import ConnectFailed, Disconnect, PeerConnected, PeerDisconnected, PeerDiscovered
from ..events.dht import NotProvided, ProvidersFound
from ..events.gossip import GossipReceived, GossipSpoiled
from ..events.node_state import NetworkJoined, ServedChanged, Tick
from ..events.owner_documents import DeltasImported, DeltasRefused, OwnDeltaWritten
from ..events.peer_requests import Answered, RequestFailed, RequestReceived
from ..events.prefix_writing import RowsStored
from ..events.response_reading import (
    ResponseFetched,
    ResponseRefused,
    ResponseReleased,
    ResponseWanted,
    SharedRead,
)
from ..events.stored_responses import ResponsesGone, ResponseStored, ResponsesUsed
from ..events.vocabulary import NetworkEffect, NetworkEvent
from ..peers.dials import Dials
from ..peers.introductions import Introductions
from ..peers.membership import Membership
from ..peers.record_renewal import should_renew_record
from ..peers.standing import Failed
from ..peers.trust import Trust
from ..records.ids import peer_id
from ..records.now import Now
from ..records.peer_record import PeerRecord
from ..records.reason import Reason
from ..records.signing import NO_MEMBER_TAG, member_tag
from ..registry.registry import Registry
from ..registry.registry_sync import RegistrySync
from ..response.announcer import Outbox
from ..response.evidence import verdict
from ..response.gossip_intake import GossipIntake
from ..response.hints import Hints
from ..response.lookup_peers import LookupPeers
from ..response.open_lookups import OpenLookups
from ..response.popularity import Popularity
from ..response.providers import Providers
from .node_options import NodeOptions
from .own_requests import OwnRequests
from .peer_messages import PeerMessages
from .servable import Servable


class NetworkPart:
    """Everything that a node decides about its network."""

    def __init__(
        self,
        options: NodeOptions,
        joined: NetworkJoined,
        lookups: OpenLookups,
        signing_key: SigningKey,
        trust: Trust,
        dials: Dials,
        rng: random.Random,
        now: Now,
    ) -> None:
        self._options = options
        self._joined = joined
        self._key = signing_key
        self._public_key = signing_key.verify_key.encode()
        self._me = peer_id(self._public_key)
        self._trust = trust
        key = options.network_key
        self._tag = member_tag(key, self._public_key) if key else NO_MEMBER_TAG
        self._requests = OwnRequests()
        self._served = ServedChanged((), (), 0, b"")
        self.members = Membership(
            options.network,
            self._me,
            self._own_record,
            options.bootstrap,
            trust,
            self._requests.ask,
            key is not None,
            dials,
            rng,
            now,
        )
        self.registry = Registry(options.network, self._public_key, self.members.acquaintance, rng, now)
        self.hints = Hints(trust.has_standing)
        self.gossip = GossipIntake(options.network, self._public_key, self.members, self.hints, trust)
        self.providers = Providers(self._me, self.members, self.registry, self.hints, trust, rng)
        popularity = self._popularity = Popularity()
        self._lookups = lookups
        if options.shares:
            lookups.peers = LookupPeers(self.members, self.providers, self.hints, popularity, trust, now)
        self._outbox = Outbox(options.network, signing_key, now)
        registry = self.registry if options.registry else None
        self._servable = Servable(self._outbox, registry, self.providers, popularity, trust, now)
        self._sync = RegistrySync(self.registry, self.members, self._requests.ask, options.registry, now)
        self._messages = PeerMessages(self._requests, self.members, self.registry, self._sync, popularity, trust)
        self._introductions = Introductions(self.members, trust, now)
        self._standings = trust.standings

    def start(self, now: Now) -> list[NetworkEffect]:
        """What to do first."""
        self.members.remember(self._joined.remembered)
        return self.members.start(now) + self._introductions.tell(now)

    def handle(self, event: NetworkEvent | Tick, now: Now) -> list[NetworkEffect]:
        """What to do about `event`."""
        effects = self._dispatch(event, now)
        effects += [consequence for effect in effects for consequence in self._charged(effect, now)]
        return effects + self._introductions.due(now)

    def next_deadline_ms(self) -> int | None:
        """When to call `handle(Tick())`, if nothing else happens before."""
        times: list[int | None] = [self.members.next_deadline_ms(), self._sync.next_deadline_ms()]
        times += [self._lookups.next_deadline_ms(), self.registry.next_deadline_ms()]
        times += [self._introductions.next_deadline_ms()]
        times += self._servable.next_deadlines_ms()
        return min((time for time in times if time is not None), default=None)

    # --- events ---------------------------------------------------------------------------------

    def _dispatch(self, event: NetworkEvent | Tick, now: Now) -> list[NetworkEffect]:
        match event:
            case PeerConnected(peer) if self._standings.is_cut_off(peer, now):
                return [Disconnect(peer)]
            case PeerConnected(peer, host):
                return self.members.on_connected(peer, host, now)
            case PeerDiscovered(peer, address, told_from):
                return self.members.on_discovered(peer, address, told_from, now)
            case PeerDisconnected(peer):
                return self.members.on_disconnected(peer, now)
            case ConnectFailed(peer):
                return self.members.on_connect_failed(peer, now)
            case RequestReceived():
                return self._messages.on_request(event, now)
            case Answered():
                return self._messages.on_answer(event, now)
            case RequestFailed():
                return self._messages.on_failed(event, now)
            case GossipReceived():
                self.gossip.on_gossip(event, now)
                return []
            case GossipSpoiled(relay):
                return [ChargePeer(relay, Reason.INVALID_GOSSIP), *self.members.shun(relay, now)]
            case ResponseFetched(_, peer):
                self._messages.heard(peer, now)
                return self._lookups.handle(event, now)
            case ResponseWanted() | ResponseReleased() | SharedRead() | ResponseRefused() | ProvidersFound():
                return self._lookups.handle(event, now)
            case NotProvided(key):
                self._servable.on_not_provided(key)
                return []
            case ResponseStored():
                return self._servable.on_stored(event, now)
            case ResponsesGone(hashes):
                self._servable.on_gone(hashes)
                return []
            case ResponsesUsed(hashes):
                for request_hash in hashes:
                    self._popularity.add(request_hash, now)
                return []
            case AnswerAudited():
                return self._audited(event, now)
            case RowsStored():
                self._servable.on_rows_stored(event, now)
                return []
            case ServedChanged():
                self._served = event
                if should_renew_record(self.members.own, event):
                    self.members.renew_soon()
                return []
            case OwnDeltaWritten():
                return self.registry.on_own_delta(event, now)
            case DeltasImported():
                self.registry.on_imported(event)
                return []
            case DeltasRefused():
                return self.registry.on_refused(event)
            case PeerMisbehaved(peer):
                return [ChargePeer(peer, Reason.PROTOCOL)]
            case Tick():
                return self._tick(now)
            case _:
                assert_never(event)

    def _tick(self, now: Now) -> list[NetworkEffect]:
        effects = self._outbox.flush(now) + self._lookups.on_tick(now)
        due_ms = self.registry.next_deadline_ms()
        if (due_ms is not None and due_ms <= now.mono_ms) or self.registry.is_misdated(now):
            effects += self.registry.on_tick(now)
        effects += [*self._sync.on_tick(now), *self._servable.provide(now)]
        if self.members.next_deadline_ms() <= now.mono_ms:
            effects += self.members.on_tick(now)
        return effects

    # --- audits ---------------------------------------------------------------------------------

    def _audited(self, event: AnswerAudited, now: Now) -> list[NetworkEffect]:
        """What our own audit found: others hear of those that it convicts."""
        evidence = event.evidence
        found = verdict(evidence.far)
        if not self._trust.audited(evidence.signer, evidence.tokens, found, event.source, now):
            return []
        self._outbox.accuse(evidence)
        return [ChargePeer(peer_id(evidence.signer), Reason.FALSE_RESPONSE), *self._outbox.flush(now)]

    # --- leaves ---------------------------------------------------------------------------------

    def _own_record(self, sequence: int, expires_at_ms: int) -> PeerRecord:
        options, served = self._options, self._served
        return PeerRecord(
            options.network,
            self._public_key,
            sequence,
            expires_at_ms,
            self._joined.address,
            self._joined.endpoint,
            self._tag,
            options.capacity_bytes,
            served.load_permille,
            served.models,
            served.fingerprints,
            served.vram_digest,
        ).sign(self._key)

    def _charged(self, effect: NetworkEffect, now: Now) -> list[NetworkEffect]:
        """Judge a peer that broke a rule; cut it off when it goes on."""
        if not isinstance(effect, ChargePeer) or effect.reason is Reason.FALSE_RESPONSE:  # an audit has judged it
            return []
        goes_on = self._standings.avoids(effect.peer, now)
        self._standings.note(Failed(effect.peer, effect.reason), now)
        if not goes_on:
            return []
        self._standings.goes_on(effect.peer, now)
        return self.members.shun(effect.peer, now)
