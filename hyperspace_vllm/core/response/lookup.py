"""The machine of one L1 lookup: where to ask, which provider, when to hedge, when to give up.

    SHARED      the fleet's shared store is read, if there is one
      │ a miss
      ├─ a provider worth waiting for ──▶ HINTED: ask the best, hedge to the next, at most IN_FLIGHT_MAX at once
      │                                      │ none of those is left
      └─ none ──────────────────────────▶ RACING: the same with the others, while the engine computes
                                             │ none is left
                                          SEARCHING: the DHT names others
                                             │
                                          FOUND: the same with these

The client waits while the lookup is HINTED, and for the shared store, which answers or misses in one bounded command: a
hint as soon as the key exists would let a client that fills the store with invalid entries delay every request.

Another module decides which peers a request may wait for (peers/patience.py); the others are asked as well, but never
waited for. A refusal makes room for the next provider at once. A silent provider is hedged, first after
`hedge_delay_ms`, and again at half time, since by then the first two are more likely frozen than slow. A provider whose
connection breaks is asked once more over a new one, after the others: the other side may have closed it as idle or as
one too many at that moment. A hinted lookup ends by its request's deadline. An unhinted one delays no request, so it
may take RACE_MS; what it finds after the engine has won is stored for the next request.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum, auto

from ..events.dht import SearchDht
from ..events.response_reading import (
    AnswerResponse,
    FetchResponse,
    HintResponse,
    ReadShared,
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
SHARED_MS = 100  # connecting included
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


class Stage(Enum):
    """Where a lookup is."""

    SHARED = auto()
    HINTED = auto()
    RACING = auto()
    SEARCHING = auto()
    FOUND = auto()


class ResponseLookup:
    """One ResponseWanted, until its AnswerResponse: begins with `read_shared` or with `ask_peers`.

    `may_search(request_hash, now)` is asked once, when the DHT is wanted; saying yes pays for the search.
    """

    def __init__(self, wanted: ResponseWanted, may_search: Callable[[bytes, Now], bool], now: Now) -> None:
        self.number = wanted.lookup
        self.request_hash = wanted.request_hash
        self.told = wanted.told
        self.stage = Stage.SHARED
        self.over = False
        self._began_ms = now.mono_ms
        self._ends_ms = now.mono_ms + wanted.deadline_ms
        self._race_ends_ms = now.mono_ms + max(wanted.deadline_ms, RACE_MS)
        self._deadline_ms = self._ends_ms
        self._half_time_ms = 0
        self._waiting: list[ProviderCandidate] = []
        self._worth_waiting: set[PeerId] = set()
        self._waited_ms: dict[PeerId, int] = {}  # for those that refused, while the lookup was hinted
        self._in_flight: dict[PeerId, int] = {}  # since when
        self._asked: set[PeerId] = set()
        self._connected: dict[PeerId, ProviderCandidate] = {}  # those asked over a connection that was there, once each
        self._attempts = 0
        self._may_search = may_search
        self._hedge_at_ms: int | None = None
        self._source = "hint"
        self._reason = "not_found"

    @property
    def hinted(self) -> bool:
        """Whether the request waits for a peer."""
        return self.stage is Stage.HINTED

    @property
    def searched(self) -> bool:
        """Whether the DHT has answered."""
        return self.stage is Stage.FOUND

    @property
    def in_flight(self) -> dict[PeerId, int]:
        """The peers that were asked and have not answered, and since when."""
        return dict(self._in_flight)

    def read_shared(self) -> list[NetworkEffect]:
        """Begin with the shared store; `on_shared_hit` or `ask_peers` is next."""
        timeout_ms = min(self._ends_ms - self._began_ms, SHARED_MS)
        return [ReadShared(self.number, self.request_hash, timeout_ms)]

    def on_shared_hit(self) -> list[NetworkEffect]:
        """The shared store had a verified answer."""
        self._source = "redis"
        return self._end(None, "hit") if self.stage is Stage.SHARED else []

    def ask_peers(self, providers: list[ProviderCandidate], now: Now) -> list[NetworkEffect]:
        """The hint, and the first question. `providers` are the known ones, best first."""
        self._waiting = list(providers)
        self._worth_waiting = {provider.peer for provider in providers if provider.worth_waiting}
        self.stage = Stage.HINTED if self._worth_waiting else Stage.RACING
        self._deadline_ms = self._ends_ms if self.hinted else self._race_ends_ms
        self._half_time_ms = (now.mono_ms + self._deadline_ms) // 2
        hint: NetworkEffect = HintResponse(self.number, self.hinted)
        return [hint, *self._go_on(now)]

    def give_up(self, reason: str) -> list[NetworkEffect]:
        """End where there is no peer to ask."""
        return [HintResponse(self.number, False), *self._end(None, reason)]

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
        """The next one."""
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

    def on_providers(self, candidates: list[ProviderCandidate], now: Now) -> list[NetworkEffect]:
        """What the DHT knows, as far as it can be asked."""
        if self.stage is not Stage.SEARCHING:
            return []
        self.stage = Stage.FOUND
        self._source = "dht"
        self._waiting = [candidate for candidate in candidates if candidate.peer not in self._asked]
        return self._go_on(now)

    def waited_ms(self, now: Now) -> dict[PeerId, int]:
        """How long the request has waited for each peer that was worth it and has brought nothing so far."""
        in_flight = {peer: now.mono_ms - since_ms for peer, since_ms in self._in_flight.items()}
        return {peer: for_ms for peer, for_ms in (self._waited_ms | in_flight).items() if peer in self._worth_waiting}

    def _go_on(self, now: Now) -> list[NetworkEffect]:
        if now.mono_ms >= self._deadline_ms:
            return self._end(None, "deadline")
        match self.stage:
            case Stage.SHARED | Stage.SEARCHING:
                return []
            case Stage.HINTED if not self._is_worth_waiting():
                self.stage, self._deadline_ms = Stage.RACING, self._race_ends_ms
                return [HintResponse(self.number, False), *self._go_on(now)]
            case Stage.HINTED | Stage.RACING | Stage.FOUND:
                effects = self._ask(now)
                if effects or self._in_flight:
                    return effects
                return self._search(now) if self._may_still_search(now) else self._end(None, self._reason)

    def _is_worth_waiting(self) -> bool:
        return not self._worth_waiting.isdisjoint([*self._in_flight, *(each.peer for each in self._waiting)])

    def _may_still_search(self, now: Now) -> bool:
        left_ms = self._deadline_ms - now.mono_ms
        worth_it = not self.searched and self._attempts < ATTEMPTS_MAX and left_ms >= SEARCH_MS_MIN
        return worth_it and self._may_search(self.request_hash, now)

    def _search(self, now: Now) -> list[NetworkEffect]:
        self.stage = Stage.SEARCHING
        return [SearchDht(self.number, self.request_hash, min(self._deadline_ms - now.mono_ms, DHT_MS))]

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
        return [AnswerResponse(self.number, peer, self._source if reason == "hit" else "none", reason)]
