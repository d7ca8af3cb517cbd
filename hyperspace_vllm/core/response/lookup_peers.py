"""The peers that L1 lookups ask: which may be asked now, and what each lookup's course says of them."""

from ..events.conduct import ChargePeer
from ..events.dht import ProvidersFound
from ..events.response_reading import AnswerResponse, ResponseFetched, ResponseRefused
from ..peers.membership import Membership
from ..peers.standing import Delivered, Failed
from ..peers.trust import Trust
from ..records.ids import PeerId, public_key_of
from ..records.now import Now
from ..records.reason import Reason
from .dht_use import SearchBudget
from .hints import Hints
from .lookup import ProviderCandidate, ResponseLookup
from .popularity import Popularity
from .providers import Providers

FAIR_MS = 150  # half a deadline; a handshake with a distant peer takes longer than what others left of it


class LookupPeers:
    """Those of the network that this node has joined."""

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

    def wanted(self, request_hash: bytes, now: Now) -> None:
        """Count a request."""
        self._popularity.add(request_hash, now)

    def any_usable(self, now: Now) -> bool:
        """Whether there is a peer that could answer."""
        return self._members.any_usable(now)

    def known_providers(self, lookup: ResponseLookup, now: Now) -> list[ProviderCandidate]:
        """The providers that this node knows of, best first."""
        told = (*lookup.told, *self._providers.of(lookup.request_hash, now))
        return self._providers.best_first(told, now)

    def found_providers(self, event: ProvidersFound, now: Now) -> list[ProviderCandidate]:
        """The providers that a search has found, best first; its cost counts."""
        self._searches.cost(event.cost_ms)
        return self._providers.best_first(event.peers, now)

    def may_search(self, request_hash: bytes, now: Now) -> bool:
        """Whether to search the DHT; saying yes pays for it."""
        return bool(self._members.neighbours()) and self._searches.take(request_hash, now)

    def may_fetch(self, peer: PeerId, now: Now) -> bool:
        """Whether a peer is connected, or may be dialled now; saying yes counts as its use."""
        known = self._members.get(peer)
        if known is not None and not known.connected and not self._members.may_dial(known, now):
            return False
        self._members.used(peer, now)
        return True

    def delivered(self, event: ResponseFetched, lookup: ResponseLookup | None, now: Now) -> None:
        """A peer has answered with a response; `lookup` is None if it has ended."""
        asked_ms = lookup.in_flight.get(event.peer, now.mono_ms) if lookup is not None else now.mono_ms
        self._standings.note(Delivered(event.peer, event.size, now.mono_ms - asked_ms), now)
        if lookup is not None and self._trust.is_chosen(public_key_of(event.peer)):  # others may claim what they like
            self._popularity.claimed(lookup.request_hash, now, event.popularity / 16)

    def refused(self, event: ResponseRefused, lookup: ResponseLookup | None, now: Now) -> list[ChargePeer]:
        """A peer has not delivered; a charge if it is guilty."""
        timed_out = event.reason is Reason.TIMEOUT and self._had_time(event.peer, lookup, now)
        if timed_out or event.reason in (Reason.UNREACHABLE, Reason.MISS):
            self._standings.note(Failed(event.peer, event.reason), now)
        if lookup is not None and event.reason not in (Reason.TIMEOUT, Reason.UNREACHABLE, Reason.BUSY):
            self._hints.remove(lookup.request_hash, event.peer)
        return [ChargePeer(event.peer, event.reason)] if event.reason.is_guilty else []

    def ended(self, lookup: ResponseLookup, answer: AnswerResponse, now: Now) -> None:
        """A lookup is over."""
        if answer.reason == "deadline":
            for peer in lookup.in_flight:
                known = self._members.get(peer)
                # Heartbeats say it of those that are connected.
                if (known is None or not known.connected) and self._had_time(peer, lookup, now):
                    self._standings.note(Failed(peer, Reason.TIMEOUT), now)
        elif answer.reason != "hit" and lookup.searched:
            self._searches.not_found(lookup.request_hash, now)

    def _had_time(self, peer: PeerId, lookup: ResponseLookup | None, now: Now) -> bool:
        """Whether a peer's silence means something: it had FAIR_MS, and since a connection was open, if one is."""
        since_ms = lookup.in_flight.get(peer, now.mono_ms) if lookup is not None else now.mono_ms
        known = self._members.get(peer)
        if known is not None and known.connected:
            since_ms = max(since_ms, known.connected_at_ms)
        return now.mono_ms - since_ms >= FAIR_MS
