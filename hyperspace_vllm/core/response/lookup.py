"""The machine of one L1 lookup across the network: which provider to ask, when to hedge, when to give up.

    start ── a provider worth waiting for ──▶ hinted: ask the best, hedge to the next, at most IN_FLIGHT_MAX at once
      └───── none ──▶ unhinted: the same with the others, then the DHT, while the engine computes ◀── none is left

peers/patience.py decides for which peers a request may wait; the others are asked too, but no request waits for them.
When a peer refuses, the next one is asked at once. A silent peer is hedged, first after `hedge_delay_ms`, and again at
half time, because by then the first two are more likely frozen than slow. A peer whose connection breaks is asked once
more over a new one, after the others: it may have closed the connection as idle, or as one too many, just then. A
hinted lookup ends by its request's deadline. An unhinted one delays no request, so it may take RACE_MS; a response that
it finds after the engine has won is stored for the next request.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..events.dht import ProvidersFound, SearchDht
from ..events.response_reading import (
    AnswerResponse,
    FetchResponse,
    HintResponse,
    ResponseFetched,
    ResponseRefused,
    ResponseWanted,
)
from ..events.vocabulary import NetworkEffect
from ..records.ids import PeerId
from ..records.limits import PROVIDERS_MAX
from ..records.now import Now
from ..records.reason import Reason

RACE_MS = 3_000
DHT_MS = 1_500
SEARCH_MS_MIN = 100  # a search and a fetch take longer
IN_FLIGHT_MAX = 3
ATTEMPTS_MAX = PROVIDERS_MAX
HEDGE_MS_MIN, HEDGE_MS_MAX = 25, 120


def hedge_delay_ms(rtt_ms: float) -> int:
    """When a second provider is asked: three usual round trips (0: unknown) without an answer are too many."""
    return round(min(max(3 * rtt_ms, HEDGE_MS_MIN), HEDGE_MS_MAX))


@dataclass(frozen=True, slots=True)
class ProviderCandidate:
    """A provider that may be asked; `address` '' if it can't be dialled."""

    peer: PeerId
    address: str
    rtt_ms: float
    connected: bool
    worth_waiting: bool


class ResponseLookup:
    """One ResponseWanted, until its AnswerResponse. `providers` are the known ones, best first.

    `may_search(now)` is asked once, when the DHT is wanted; saying yes pays for the search.
    """

    def __init__(
        self, wanted: ResponseWanted, providers: list[ProviderCandidate], may_search: Callable[[Now], bool], now: Now
    ) -> None:
        self.number = wanted.lookup
        self.request_hash = wanted.request_hash
        self.hinted = any(provider.worth_waiting for provider in providers)
        self.over = False
        self.searched = False  # the DHT has answered
        self._race_ends_ms = now.mono_ms + max(wanted.deadline_ms, RACE_MS)
        self._deadline_ms = now.mono_ms + wanted.deadline_ms if self.hinted else self._race_ends_ms
        self._half_time_ms = (now.mono_ms + self._deadline_ms) // 2
        self._waiting = list(providers)
        self._worth_waiting = {provider.peer for provider in providers if provider.worth_waiting}
        self._waited_ms: dict[PeerId, int] = {}  # for those that refused, while the lookup was hinted
        self._in_flight: dict[PeerId, int] = {}  # since when
        self._asked: set[PeerId] = set()
        self._connected: dict[PeerId, ProviderCandidate] = {}  # those asked over a connection that was there, once each
        self._attempts = 0
        self._may_search = may_search
        self._searching = False
        self._hedge_at_ms: int | None = None
        self._source = "hint"
        self._reason = "not_found"

    @property
    def in_flight(self) -> dict[PeerId, int]:
        """The peers that were asked and have not answered, and since when."""
        return dict(self._in_flight)

    def start(self, now: Now) -> list[NetworkEffect]:
        """The hint, and the first request."""
        hint: NetworkEffect = HintResponse(self.number, self.hinted)
        return [hint, *self._go_on(now)]

    def next_deadline_ms(self) -> int:
        """When to call `on_tick`."""
        return self._deadline_ms if self._hedge_at_ms is None else min(self._deadline_ms, self._hedge_at_ms)

    def on_tick(self, now: Now) -> list[NetworkEffect]:
        """Give up, or hedge."""
        if now.mono_ms >= self._deadline_ms:
            return self._end(None, "deadline")
        if self._hedge_at_ms is not None and now.mono_ms >= self._hedge_at_ms:
            return self._ask(now)
        return []

    def on_fetched(self, event: ResponseFetched) -> list[NetworkEffect]:
        """A verified answer."""
        return self._end(event.peer, "hit") if self._in_flight.pop(event.peer, None) is not None else []

    def on_refused(self, event: ResponseRefused, now: Now) -> list[NetworkEffect]:
        """The peer refused, or failed: ask the next one."""
        if event.peer not in self._in_flight:
            return []
        asked_ms = self._in_flight.pop(event.peer)
        if self.hinted:
            self._waited_ms[event.peer] = now.mono_ms - asked_ms
        self._reason = event.reason if event.reason is not Reason.MISS else self._reason
        broken = self._connected.pop(event.peer, None) if event.reason is Reason.UNREACHABLE else None
        if broken is not None and broken.address:
            self._waiting.append(replace(broken, connected=False))
        return self._go_on(now)

    def on_providers(self, event: ProvidersFound, candidates: list[ProviderCandidate], now: Now) -> list[NetworkEffect]:
        """The DHT's providers, as far as they can be asked."""
        if not self._searching:
            return []
        self._searching, self.searched = False, True
        self._source = "dht"
        self._waiting = [candidate for candidate in candidates if candidate.peer not in self._asked]
        return self._go_on(now)

    def waited_ms(self, now: Now) -> dict[PeerId, int]:
        """How long the request has waited for each hinted peer that has delivered nothing so far."""
        in_flight = {peer: now.mono_ms - since_ms for peer, since_ms in self._in_flight.items()}
        return {peer: for_ms for peer, for_ms in (self._waited_ms | in_flight).items() if peer in self._worth_waiting}

    def _go_on(self, now: Now) -> list[NetworkEffect]:
        if now.mono_ms >= self._deadline_ms:
            return self._end(None, "deadline")
        if self.hinted and self._worth_waiting.isdisjoint([*self._in_flight, *(each.peer for each in self._waiting)]):
            self.hinted, self._deadline_ms = False, self._race_ends_ms
            return [HintResponse(self.number, False), *self._go_on(now)]
        effects = self._ask(now)
        if effects or self._in_flight or self._searching:
            return effects
        left_ms = self._deadline_ms - now.mono_ms
        worth_it = not self.searched and self._attempts < ATTEMPTS_MAX and left_ms >= SEARCH_MS_MIN
        if worth_it and self._may_search(now):
            self._searching = True
            return [SearchDht(self.number, self.request_hash, min(left_ms, DHT_MS))]
        return self._end(None, self._reason)

    def _ask(self, now: Now) -> list[NetworkEffect]:
        if not self._waiting or len(self._in_flight) >= IN_FLIGHT_MAX or self._attempts >= ATTEMPTS_MAX:
            self._hedge_at_ms = None
            return []
        candidate = self._waiting.pop(0)
        self._asked.add(candidate.peer)
        self._attempts += 1
        if candidate.connected:
            self._connected[candidate.peer] = candidate
        self._in_flight[candidate.peer] = now.mono_ms
        self._hedge_at_ms = self._hedge_after(candidate, now) if self._waiting else None
        left_ms = self._deadline_ms - now.mono_ms
        return [FetchResponse(self.number, candidate.peer, candidate.address, self.request_hash, left_ms)]

    def _hedge_after(self, candidate: ProviderCandidate, now: Now) -> int:
        if len(self._in_flight) == 1:
            return now.mono_ms + hedge_delay_ms(candidate.rtt_ms)
        return max(now.mono_ms + HEDGE_MS_MIN, self._half_time_ms)

    def _end(self, peer: PeerId | None, reason: str) -> list[NetworkEffect]:
        self.over = True
        return [AnswerResponse(self.number, peer, self._source if peer else "none", reason)]
