"""The network core of a node: hands every event to the machine that it concerns and merges their deadlines.

It finds peers, announces what this node can serve, keeps hints and the registry of what others can, and looks responses
up. The L2 core (node.py) is told of usable peers by the shell, through PeersChanged.
"""

import random
from dataclasses import dataclass
from functools import partial
from typing import assert_never

from nacl.signing import SigningKey

from ..events.conduct import AnswerAudited, ChargePeer, PeerMisbehaved
from ..events.connections import ConnectFailed, Disconnect, PeerConnected, PeerDisconnected, PeerDiscovered
from ..events.dht import NotProvided, Provide, ProvidersFound
from ..events.gossip import AuthorsChanged, GossipReceived, GossipSpoiled
from ..events.known_peers import PeersChanged
from ..events.node_state import ServedChanged, Tick
from ..events.owner_documents import DeltasImported, DeltasRefused, OwnDeltaWritten
from ..events.peer_requests import Answered, Reply, RequestFailed, RequestReceived, ServeResponse
from ..events.prefix_writing import RowsStored
from ..events.response_reading import (
    AnswerResponse,
    FetchResponse,
    HintResponse,
    ResponseFetched,
    ResponseRefused,
    ResponseReleased,
    ResponseWanted,
)
from ..events.stored_responses import ResponsesGone, ResponseStored, ResponsesUsed
from ..events.vocabulary import NetworkEffect, NetworkEvent
from ..peers.dials import Dials
from ..peers.membership import GREET_MS, Membership
from ..peers.record_renewal import should_renew_record
from ..peers.standing import Delivered, Failed
from ..peers.trust import Trust
from ..records.announcement import EvidenceEntry, PrefixEntry, ResponseEntry
from ..records.errors import Refused
from ..records.ids import NetworkId, PeerId, peer_id, public_key_of
from ..records.limits import CLOCK_SKEW_MS, REGISTRY_TTL_MS
from ..records.now import Now
from ..records.peer_record import PeerRecord
from ..records.peer_wire import (
    Deltas,
    Greet,
    Greeting,
    Peers,
    Ping,
    Pong,
    Query,
    Refusal,
    WantDeltas,
    WantPeers,
)
from ..records.rank import Acquaintance
from ..records.reason import Reason
from ..records.signing import NO_MEMBER_TAG, member_tag
from ..registry.registry import Registry
from ..response.announcer import Inbox, Outbox
from ..response.dht_use import ProvideQueue, SearchBudget
from ..response.evidence import check_evidence, verdict
from ..response.hints import Hints
from ..response.lookup import ProviderCandidate, ResponseLookup
from ..response.popularity import Popularity, replicas_wanted
from .own_requests import Asked, Forgotten, OwnRequests

LOOKUPS_MAX = 1_024
QUIET_MS, QUIET_MAX = 5_000, 4  # of who isn't connected, whoever was heard of lately is likelier to be reached
SYNC_MS = 2_000  # the registry, with one neighbour
SYNC_TIMEOUT_MS = 3_000
SYNC_AGAIN_MS = 100  # from an answer that was not all to the next question
TELL_AGAIN_MS = 100  # of the peers: 2 ms of work with a full table
FAIR_MS = 150  # half a deadline; a handshake with somebody far away takes longer than what others left of it


@dataclass(frozen=True, slots=True)
class NetworkOptions:
    """What a node tells of itself, and whom it knows from its configuration (peer, host:port of its libp2p)."""

    network: NetworkId
    address: str
    endpoint: str
    bootstrap: tuple[tuple[PeerId, str], ...] = ()
    network_key: bytes | None = None
    capacity_bytes: int = 0
    registry: bool = True  # False where a Redis registry replaces it
    remembered: tuple[tuple[PeerId, str], ...] = ()  # whom it knew when it last ran; nobody is trusted for that


class NetworkNode:
    """Everything that a node decides about its network."""

    def __init__(
        self,
        options: NetworkOptions,
        signing_key: SigningKey,
        trust: Trust,
        dials: Dials,
        rng: random.Random,
        now: Now,
    ) -> None:
        self._options = options
        self._key = signing_key
        self._public_key = signing_key.verify_key.encode()
        self._me = peer_id(self._public_key)
        self._trust = trust
        self._rng = rng
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
        self._outbox = Outbox(options.network, signing_key, now)
        self._inbox = Inbox(options.network, self._public_key, self._counts)
        self._popularity = Popularity()
        self._lookups: dict[int, ResponseLookup] = {}
        self._standings = trust.standings
        self._searches = SearchBudget(now)
        self._provides = ProvideQueue(now)
        self._sync_at_ms = now.mono_ms + SYNC_MS
        self._sync_again: dict[PeerId, int] = {}  # when
        self._tell_at_ms = now.mono_ms  # not before
        self._told: tuple[object, ...] = ()  # by the last PeersChanged
        self._authors: tuple[tuple[PeerId, Acquaintance], ...] = ()  # by the last AuthorsChanged
        self.gossip_refused: dict[str, int] = {}

    def start(self, now: Now) -> list[NetworkEffect]:
        """What to do first."""
        self.members.remember(self._options.remembered)
        return self.members.start(now) + self._tell_peers(now)

    def handle(self, event: NetworkEvent | Tick, now: Now) -> list[NetworkEffect]:
        """What to do about `event`."""
        effects = self._dispatch(event, now)
        effects += [consequence for effect in effects for consequence in self._charged(effect, now)]
        if self.members.changed and now.mono_ms >= self._tell_at_ms:
            self.members.changed = False
            self._tell_at_ms = now.mono_ms + TELL_AGAIN_MS
            effects += self._tell_peers(now)
        elif self.members.has_new:  # whose announcements may come at once
            effects += self._tell_authors()
        return effects

    def next_deadline_ms(self) -> int | None:
        """When to call `handle(Tick())`, if nothing else happens before."""
        times = [lookup.next_deadline_ms() for lookup in self._lookups.values()]
        times += [self.members.next_deadline_ms(), self._sync_at_ms, *self._sync_again.values()]
        times += [self._tell_at_ms] if self.members.changed else []
        others = self._outbox.next_deadline_ms(), self.registry.next_deadline_ms(), self._provides.next_deadline_ms()
        return min([*times, *(time for time in others if time is not None)])

    def providers(self, name: bytes, now: Now) -> tuple[PeerId, ...]:
        """Others that say they serve an id (request hash or row id); hints."""
        told = (*self.hints.providers(name, now.wall_ms), *self.registry.providers(name, now.wall_ms))
        return tuple(peer for peer in dict.fromkeys(told) if peer != self._me)

    def may_dial(self, peer: PeerId, address: str, told_from: str, now: Now) -> bool:
        """Whether to dial a peer where an answer of the DHT says that it is; saying yes counts as a dial."""
        return self.members.may_dial_at(peer, address, told_from, now)

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
                return self._received(event, now)
            case Answered():
                return self._answered(event, now)
            case RequestFailed():
                return self._failed(event, now)
            case GossipReceived():
                return self._gossip(event, now)
            case GossipSpoiled(relay):
                return [ChargePeer(relay, Reason.INVALID_GOSSIP), *self.members.shun(relay, now)]
            case ResponseWanted():
                return self._wanted(event, now)
            case ResponseReleased():
                return self._released(event)
            case ResponseFetched():
                return self._fetched(event, now)
            case ResponseRefused():
                return self._refused(event, now)
            case NotProvided(key):
                self._provides.add(key, 0.0)
                return []
            case ProvidersFound():
                return self._found(event, now)
            case ResponseStored():
                return self._stored(event, now)
            case ResponsesGone(hashes):
                self.registry.note_gone(hashes)
                self._outbox.remove(frozenset(hashes))
                self._provides.remove(_dht_key(request_hash) for request_hash in hashes)
                return []
            case ResponsesUsed(hashes):
                for request_hash in hashes:
                    self._popularity.add(request_hash, now)
                return []
            case AnswerAudited():
                return self._audited(event, now)
            case RowsStored():
                return self._rows_stored(event)
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
        effects = self._outbox.flush(now)
        for lookup in list(self._lookups.values()):
            if lookup.next_deadline_ms() <= now.mono_ms:
                effects += self._settle(lookup, lookup.on_tick(now), now)
        due_ms = self.registry.next_deadline_ms()
        if (due_ms is not None and due_ms <= now.mono_ms) or self.registry.is_misdated(now):
            effects += self.registry.on_tick(now)
        effects += self._sync_on(now)
        if now.mono_ms >= self._sync_at_ms:
            self._sync_at_ms = now.mono_ms + SYNC_MS
            effects += self._sync(now)
        key = self._provides.due(now)
        if key is not None:
            effects.append(Provide(key))
        if self.members.next_deadline_ms() <= now.mono_ms:
            effects += self.members.on_tick(now)
        return effects

    # --- messages -------------------------------------------------------------------------------

    def _received(self, event: RequestReceived, now: Now) -> list[NetworkEffect]:
        peer, token, message = event.peer, event.token, event.message
        self._heard(peer, now)
        if isinstance(message, Query):
            self.members.used(peer, now)
            if self._trust.is_chosen(
                public_key_of(peer)
            ):  # a stranger asks as often as it likes, for whatever it likes
                self._popularity.add(message.id, now)
            return [ServeResponse(token, message.id, self._popularity.sixteenths(message.id, now))]
        if isinstance(message, Greet):
            charges = self.members.on_record(message.record, peer, now, own_word=True)
            if charges or not self.members.greeted(peer):
                reason = Refusal("protocol" if charges else "stranger")
                return [*charges, Reply(token, reason), Disconnect(peer)]
            return [Reply(token, Greeting(self.members.own_raw))]
        if isinstance(message, Ping):
            return [Reply(token, Pong())]
        if not self.members.greeted(peer):
            return [Reply(token, Refusal("stranger"))]
        if isinstance(message, WantPeers):
            return [Reply(token, self.members.answer_peers(message, now))]
        return [Reply(token, self.registry.answer(message, now))]

    def _answered(self, event: Answered, now: Now) -> list[NetworkEffect]:
        asked = self._requests.take(event.request)
        if asked is None or asked.peer != event.peer:
            return []
        self._heard(event.peer, now, now.mono_ms - asked.at_ms)
        match asked.message, event.message:
            case Greet(), Greeting(record):
                charges = self.members.on_record(record, event.peer, now, own_word=True)
                if not self.members.greeted(event.peer):
                    return [*charges, Disconnect(event.peer)]
                self._requests.greeted(event.peer)
                return charges + self.members.on_greeted(event.peer, now) + self._sync_with(event.peer, now)
            case WantPeers(), Peers():
                return self.members.on_peers(event.peer, event.message, now)
            case WantDeltas(), Deltas():
                return self.registry.on_deltas(event.peer, event.message, now) + self._sync_on(now)
            case Ping(), Pong():
                return []
            case WantPeers() | WantDeltas(), Refusal("stranger"):
                return self._forgotten(asked, now)
            case _, Refusal():
                return []
            case _:
                return [ChargePeer(event.peer, Reason.PROTOCOL)]

    def _forgotten(self, asked: Asked, now: Now) -> list[NetworkEffect]:
        match self._requests.forgotten(asked, now):
            case Forgotten.GREET:
                return [*self._requests.ask(asked.peer, Greet(self.members.own_raw), GREET_MS, now)]
            case Forgotten.CHARGE:
                return [ChargePeer(asked.peer, Reason.PROTOCOL)]
            case Forgotten.WAIT:
                return []

    def _failed(self, event: RequestFailed, now: Now) -> list[NetworkEffect]:
        asked = self._requests.take(event.request)
        if asked is None:
            return []
        if event.reason is Reason.PROTOCOL:
            return [ChargePeer(asked.peer, Reason.PROTOCOL)]
        if event.reason is Reason.BUSY:
            self.members.unread(asked.peer)
        else:
            self.members.unanswered(asked.peer, asked.message, now)
        return []

    def _gossip(self, event: GossipReceived, now: Now) -> list[NetworkEffect]:
        batch = self._inbox.open(event.topic, event.payload, now)
        if isinstance(batch, Refused):
            self._count_refused(batch)
            return []
        sender = peer_id(batch.sender)
        self.members.is_alive(sender, now)
        for entry in batch.entries:
            if isinstance(entry, EvidenceEntry):
                self._hear_evidence(batch.sender, entry, now)
            elif now.wall_ms < entry.expires_at_ms <= now.wall_ms + REGISTRY_TTL_MS + CLOCK_SKEW_MS:
                name = entry.request_hash if isinstance(entry, ResponseEntry) else entry.row_id
                self.hints.add(name, sender, entry.expires_at_ms, now.wall_ms)
        return []

    # --- audits ---------------------------------------------------------------------------------

    def _audited(self, event: AnswerAudited, now: Now) -> list[NetworkEffect]:
        """What our own audit found: others hear of those that it convicts."""
        evidence = event.evidence
        found = verdict(evidence.far)
        if not self._trust.audited(evidence.signer, evidence.tokens, found, event.source, now):
            return []
        self._outbox.accuse(evidence)
        return [ChargePeer(peer_id(evidence.signer), Reason.FALSE_RESPONSE), *self._outbox.flush(now)]

    def _hear_evidence(self, accuser: bytes, evidence: EvidenceEntry, now: Now) -> None:
        """What others' audits found can't be checked: it is worth audits of our own, and nothing else."""
        try:
            if not self._trust.trusts(accuser, now):
                raise Refused("untrusted_accuser")
            if evidence.signer == self._public_key:
                raise Refused("about_us")
            check_evidence(evidence, now.wall_ms)
        except Refused as refused:
            self._count_refused(refused)
        else:
            self._standings.accuse(accuser, evidence.signer, now)

    def _count_refused(self, refused: Refused) -> None:
        self.gossip_refused[refused.reason] = self.gossip_refused.get(refused.reason, 0) + 1

    # --- lookups --------------------------------------------------------------------------------

    def _wanted(self, event: ResponseWanted, now: Now) -> list[NetworkEffect]:
        assert event.lookup not in self._lookups
        self._popularity.add(event.request_hash, now)
        if len(self._lookups) >= LOOKUPS_MAX:
            return [HintResponse(event.lookup, False), AnswerResponse(event.lookup, None, "none", "busy")]
        if not self.members.any_usable(now):
            return [HintResponse(event.lookup, False), AnswerResponse(event.lookup, None, "none", "no_peers")]
        told = (*event.told, *self.providers(event.request_hash, now))
        providers = self._candidates(told, now)
        lookup = ResponseLookup(event, providers, partial(self._may_search, event.request_hash), now)
        self._lookups[event.lookup] = lookup
        return self._settle(lookup, lookup.start(now), now)

    def _released(self, event: ResponseReleased) -> list[NetworkEffect]:
        lookup = self._lookups.get(event.lookup)
        if lookup is None or not lookup.hinted:
            return []  # what a race finds after the engine has won serves the next request
        del self._lookups[event.lookup]
        return [AnswerResponse(event.lookup, None, "none", "released")]

    def _fetched(self, event: ResponseFetched, now: Now) -> list[NetworkEffect]:
        lookup = self._lookups.get(event.lookup)
        asked_ms = lookup.in_flight.get(event.peer, now.mono_ms) if lookup is not None else now.mono_ms
        self._standings.note(Delivered(event.peer, event.size, now.mono_ms - asked_ms), now)
        self._heard(event.peer, now)
        if lookup is None:
            return []
        if self._trust.is_chosen(public_key_of(event.peer)):  # others may claim what they like
            self._popularity.claimed(lookup.request_hash, now, event.popularity / 16)
        return self._settle(lookup, lookup.on_fetched(event), now)

    def _refused(self, event: ResponseRefused, now: Now) -> list[NetworkEffect]:
        charges: list[NetworkEffect] = []
        if event.reason.is_guilty:
            charges.append(ChargePeer(event.peer, event.reason))
        lookup = self._lookups.get(event.lookup)
        timed_out = event.reason is Reason.TIMEOUT and self._had_time(event.peer, lookup, now)
        if timed_out or event.reason in (Reason.UNREACHABLE, Reason.MISS):
            self._standings.note(Failed(event.peer, event.reason), now)
        if lookup is None:
            return charges
        if event.reason not in (Reason.TIMEOUT, Reason.UNREACHABLE, Reason.BUSY):
            self.hints.remove(lookup.request_hash, event.peer)
        return charges + self._settle(lookup, lookup.on_refused(event, now), now)

    def _found(self, event: ProvidersFound, now: Now) -> list[NetworkEffect]:
        self._searches.cost(event.cost_ms)
        lookup = self._lookups.get(event.lookup)
        if lookup is None:
            return []
        candidates = self._candidates(event.peers, now)
        return self._settle(lookup, lookup.on_providers(event, candidates, now), now)

    def _settle(self, lookup: ResponseLookup, effects: list[NetworkEffect], now: Now) -> list[NetworkEffect]:
        settled: list[NetworkEffect] = []
        for effect in effects:
            if isinstance(effect, FetchResponse):
                if not self._may_fetch(effect.peer, now):
                    refused = ResponseRefused(lookup.number, effect.peer, Reason.BUSY)
                    settled += self._settle(lookup, lookup.on_refused(refused, now), now)
                    continue
                self.members.used(effect.peer, now)
            elif isinstance(effect, HintResponse) and not effect.hinted:  # withdrawn; at the start none has waited
                self._standings.wasted(lookup.waited_ms(now), now)
            elif isinstance(effect, AnswerResponse):
                if lookup.hinted:
                    self._standings.wasted(lookup.waited_ms(now), now)
                self._over(lookup, effect, now)
            settled.append(effect)
        return settled

    def _may_fetch(self, peer: PeerId, now: Now) -> bool:
        """Whether it is connected, or may be dialled now."""
        known = self.members.get(peer)
        return known is None or known.connected or self.members.may_dial(known, now)

    def _over(self, lookup: ResponseLookup, answer: AnswerResponse, now: Now) -> None:
        self._lookups.pop(lookup.number, None)
        if answer.reason == "deadline":
            for peer in lookup.in_flight:
                known = self.members.get(peer)
                # Heartbeats say it of those that are connected.
                if (known is None or not known.connected) and self._had_time(peer, lookup, now):
                    self._standings.note(Failed(peer, Reason.TIMEOUT), now)
        elif answer.peer is None and lookup.searched:
            self._searches.not_found(lookup.request_hash, now)

    def _had_time(self, peer: PeerId, lookup: ResponseLookup | None, now: Now) -> bool:
        """Whether a peer's silence means something: it had FAIR_MS, and since a connection was open, if one is."""
        since_ms = lookup.in_flight.get(peer, now.mono_ms) if lookup is not None else now.mono_ms
        known = self.members.get(peer)
        if known is not None and known.connected:
            since_ms = max(since_ms, known.connected_at_ms)
        return now.mono_ms - since_ms >= FAIR_MS

    def _candidates(self, told: tuple[PeerId, ...], now: Now) -> list[ProviderCandidate]:
        """Providers that can be asked now, the best first: worth waiting for, good, connected, lately heard of, near.

        The second is whoever said so first: those who claim what others have are heard after them, and with a fifth of
        the network doing so, one provider in twenty that claim it is the one that has it.
        """
        found = []
        for peer in dict.fromkeys(told):
            known = self.members.get(peer)
            if peer == self._me or known is None or not known.may_be_asked(now) or self._standings.avoids(peer, now):
                continue
            score = round(self._standings.service(peer, now), 1)
            quiet = min((now.mono_ms - known.alive_at_ms) // QUIET_MS, QUIET_MAX)
            waited_for = self._trust.may_be_waited_for(peer, now)
            standing = not waited_for, known.silent, -score, not known.connected, quiet
            candidate = ProviderCandidate(known.peer, known.address, known.rtt_ms, known.connected, waited_for)
            found.append(((*standing, known.rtt_ms, self._rng.random()), candidate))
        best = [candidate for _, candidate in sorted(found, key=lambda each: each[0])]
        spoken = [candidate for (_, silent, *_), candidate in found if not silent]
        first = min(spoken, key=lambda each: not each.worth_waiting, default=None)
        if first is not None and first is not best[0]:
            best = [best[0], first, *(candidate for candidate in best[1:] if candidate is not first)]
        return best

    def _may_search(self, request_hash: bytes, now: Now) -> bool:
        return bool(self.members.neighbours()) and self._searches.take(request_hash, now)

    # --- what this node has ---------------------------------------------------------------------

    def _stored(self, event: ResponseStored, now: Now) -> list[NetworkEffect]:
        """Announce what was computed; what was fetched only while the popular want more copies than there are."""
        if not event.computed:
            told = self.providers(event.request_hash, now)
            copies = sum(self._trust.is_chosen(public_key_of(peer)) for peer in told)  # a stranger's may be none
            if copies >= replicas_wanted(self._popularity.requests(event.request_hash, now)):
                return []
        self._register(event.request_hash, event.expires_at_ms)
        self._outbox.add(ResponseEntry(event.request_hash, event.expires_at_ms))
        requests = self._popularity.requests(event.request_hash, now)
        self._provides.add(_dht_key(event.request_hash), requests)
        return self._outbox.flush(now)

    def _rows_stored(self, event: RowsStored) -> list[NetworkEffect]:
        for row_id in event.row_ids:
            self._register(row_id, event.expires_at_ms)
            self._outbox.add(PrefixEntry(row_id, event.manifest, event.commitment, event.expires_at_ms))
        # One record an object: who has a prefix asks its holders for the rest.
        self._provides.add(f"/kv-prefix/{event.fingerprint.hex()}/{event.row_ids[0].hex()}", 0.0)
        return []

    def _register(self, name: bytes, expires_at_ms: int) -> None:
        if self._options.registry:
            self.registry.note_stored(name, expires_at_ms)

    # --- leaves ---------------------------------------------------------------------------------

    def _sync(self, now: Now) -> list[NetworkEffect]:
        neighbour = self.members.any_neighbour()
        return self._sync_with(neighbour.peer, now) if neighbour is not None else []

    def _sync_on(self, now: Now) -> list[NetworkEffect]:
        for peer in self.registry.whom_to_ask_again():
            self._sync_again.setdefault(peer, now.mono_ms + SYNC_AGAIN_MS)
        due = [peer for peer, at_ms in self._sync_again.items() if at_ms <= now.mono_ms]
        for peer in due:
            del self._sync_again[peer]
        return [effect for peer in due for effect in self._sync_with(peer, now)]

    def _sync_with(self, peer: PeerId, now: Now) -> list[NetworkEffect]:
        if not self._options.registry:
            return []
        return [*self._requests.ask(peer, self.registry.want(), SYNC_TIMEOUT_MS, now)]

    def _counts(self, public_key: bytes) -> bool:
        """Whether what this peer announces is heard: its record is here, or it is on this node's lists."""
        return self.members.acquaintance(public_key) is not None

    def _own_record(self, sequence: int, expires_at_ms: int) -> PeerRecord:
        options, served = self._options, self._served
        return PeerRecord(
            options.network,
            self._public_key,
            sequence,
            expires_at_ms,
            options.address,
            options.endpoint,
            self._tag,
            options.capacity_bytes,
            served.load_permille,
            served.models,
            served.fingerprints,
            served.vram_digest,
        ).sign(self._key)

    def _heard(self, peer: PeerId, now: Now, rtt_ms: int | None = None) -> None:
        known = self.members.get(peer)
        if known is not None and known.silent:
            self._standings.spoke(peer)
        self.members.heard(peer, now, rtt_ms)

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

    def _tell_authors(self) -> list[NetworkEffect]:
        self.members.has_new = False
        authors = self.members.authors()
        if authors == self._authors:
            return []
        self._authors = authors
        return [AuthorsChanged(authors)]

    def _tell_peers(self, now: Now) -> list[NetworkEffect]:
        effects = self._tell_authors()
        usable = self.members.usable(now)
        endpoints = self.members.endpoints(now)
        said = ((record.peer, record.address, record.endpoint) for record in usable)
        told = (*said, endpoints, self.members.addresses(now))
        if told != self._told:
            self._told = told
            effects.append(PeersChanged(usable, endpoints))
        return effects


def _dht_key(request_hash: bytes) -> str:
    return f"/cache/{request_hash.hex()}"
