"""All L1 lookups of a node that are open: which may fetch and search now, and what each one's end says of peers."""

from functools import partial

from ..events.conduct import ChargePeer
from ..events.dht import ProvidersFound
from ..events.response_reading import (
    AnswerResponse,
    FetchResponse,
    HintResponse,
    ResponseFetched,
    ResponseRefused,
    ResponseReleased,
    ResponseWanted,
)
from ..events.vocabulary import NetworkEffect
from ..peers.membership import Membership
from ..peers.standing import Delivered, Failed
from ..peers.trust import Trust
from ..records.ids import PeerId, public_key_of
from ..records.now import Now
from ..records.reason import Reason
from .dht_use import SearchBudget
from .hints import Hints
from .lookup import ResponseLookup
from .popularity import Popularity
from .providers import Providers

LOOKUPS_MAX = 1_024
FAIR_MS = 150  # half a deadline; a handshake with a distant peer takes longer than what others left of it


class OpenLookups:
    """ResponseWanted opens a lookup, its AnswerResponse ends it."""

    def __init__(
        self,
        members: Membership,
        providers: Providers,
        hints: Hints,
        popularity: Popularity,
        trust: Trust,
        now: Now,
    ) -> None:
        self._members = members
        self._providers = providers
        self._hints = hints
        self._popularity = popularity
        self._trust = trust
        self._standings = trust.standings
        self._searches = SearchBudget(now)
        self._lookups: dict[int, ResponseLookup] = {}

    def on_wanted(self, event: ResponseWanted, now: Now) -> list[NetworkEffect]:
        """Open a lookup, if there is a peer that could answer it."""
        assert event.lookup not in self._lookups
        self._popularity.add(event.request_hash, now)
        if len(self._lookups) >= LOOKUPS_MAX:
            return [HintResponse(event.lookup, False), AnswerResponse(event.lookup, None, "none", "busy")]
        if not self._members.any_usable(now):
            return [HintResponse(event.lookup, False), AnswerResponse(event.lookup, None, "none", "no_peers")]
        told = (*event.told, *self._providers.of(event.request_hash, now))
        candidates = self._providers.best_first(told, now)
        lookup = ResponseLookup(event, candidates, partial(self._may_search, event.request_hash), now)
        self._lookups[event.lookup] = lookup
        return self._settle(lookup, lookup.start(now), now)

    def on_released(self, event: ResponseReleased) -> list[NetworkEffect]:
        """End a lookup that was hinted."""
        lookup = self._lookups.get(event.lookup)
        if lookup is None or not lookup.hinted:
            return []  # what a race finds after the engine has won serves the next request
        del self._lookups[event.lookup]
        return [AnswerResponse(event.lookup, None, "none", "released")]

    def on_fetched(self, event: ResponseFetched, now: Now) -> list[NetworkEffect]:
        """A peer has delivered."""
        lookup = self._lookups.get(event.lookup)
        asked_ms = lookup.in_flight.get(event.peer, now.mono_ms) if lookup is not None else now.mono_ms
        self._standings.note(Delivered(event.peer, event.size, now.mono_ms - asked_ms), now)
        if lookup is None:
            return []
        if self._trust.is_chosen(public_key_of(event.peer)):  # others may claim what they like
            self._popularity.claimed(lookup.request_hash, now, event.popularity / 16)
        return self._settle(lookup, lookup.on_fetched(event), now)

    def on_refused(self, event: ResponseRefused, now: Now) -> list[NetworkEffect]:
        """A peer has not delivered."""
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
            self._hints.remove(lookup.request_hash, event.peer)
        return charges + self._settle(lookup, lookup.on_refused(event, now), now)

    def on_found(self, event: ProvidersFound, now: Now) -> list[NetworkEffect]:
        """The DHT has answered."""
        self._searches.cost(event.cost_ms)
        lookup = self._lookups.get(event.lookup)
        if lookup is None:
            return []
        candidates = self._providers.best_first(event.peers, now)
        return self._settle(lookup, lookup.on_providers(event, candidates, now), now)

    def on_tick(self, now: Now) -> list[NetworkEffect]:
        """Hedge, or give up, whatever is due."""
        effects: list[NetworkEffect] = []
        for lookup in list(self._lookups.values()):
            if lookup.next_deadline_ms() <= now.mono_ms:
                effects += self._settle(lookup, lookup.on_tick(now), now)
        return effects

    def next_deadline_ms(self) -> int | None:
        """When `on_tick` has something to do."""
        return min((lookup.next_deadline_ms() for lookup in self._lookups.values()), default=None)

    def _settle(self, lookup: ResponseLookup, effects: list[NetworkEffect], now: Now) -> list[NetworkEffect]:
        settled: list[NetworkEffect] = []
        for effect in effects:
            if isinstance(effect, FetchResponse):
                if not self._may_fetch(effect.peer, now):
                    refused = ResponseRefused(lookup.number, effect.peer, Reason.BUSY)
                    settled += self._settle(lookup, lookup.on_refused(refused, now), now)
                    continue
                self._members.used(effect.peer, now)
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
        known = self._members.get(peer)
        return known is None or known.connected or self._members.may_dial(known, now)

    def _may_search(self, request_hash: bytes, now: Now) -> bool:
        return bool(self._members.neighbours()) and self._searches.take(request_hash, now)

    def _over(self, lookup: ResponseLookup, answer: AnswerResponse, now: Now) -> None:
        self._lookups.pop(lookup.number, None)
        if answer.reason == "deadline":
            for peer in lookup.in_flight:
                known = self._members.get(peer)
                # Heartbeats say it of those that are connected.
                if (known is None or not known.connected) and self._had_time(peer, lookup, now):
                    self._standings.note(Failed(peer, Reason.TIMEOUT), now)
        elif answer.peer is None and lookup.searched:
            self._searches.not_found(lookup.request_hash, now)

    def _had_time(self, peer: PeerId, lookup: ResponseLookup | None, now: Now) -> bool:
        """Whether a peer's silence means something: it had FAIR_MS, and since a connection was open, if one is."""
        since_ms = lookup.in_flight.get(peer, now.mono_ms) if lookup is not None else now.mono_ms
        known = self._members.get(peer)
        if known is not None and known.connected:
            since_ms = max(since_ms, known.connected_at_ms)
        return now.mono_ms - since_ms >= FAIR_MS
