"""All L1 lookups of a node that are open."""

from typing import Literal, assert_never

from ..events.dht import ProvidersFound
from ..events.response_reading import (
    AnswerResponse,
    FetchResponse,
    HintResponse,
    ResponseFetched,
    ResponseRefused,
    ResponseReleased,
    ResponseWanted,
    SharedRead,
)
from ..events.vocabulary import NetworkEffect
from ..peers.standing import Standings
from ..records.now import Now
from ..records.reason import Reason
from .lookup import ResponseLookup, Stage
from .lookup_peers import LookupPeers

LOOKUPS_MAX = 1_024

LookupEvent = ResponseWanted | ResponseReleased | SharedRead | ResponseFetched | ResponseRefused | ProvidersFound


class OpenLookups:
    """ResponseWanted opens a lookup, its AnswerResponse ends it.

    `peers` is None while this node has not joined its network: only the shared store is asked then. `alone` is the
    reason for a miss in that time.
    """

    def __init__(self, standings: Standings, alone: Literal["no_peers", "off"]) -> None:
        self.peers: LookupPeers | None = None
        self._standings = standings
        self._alone = alone
        self._lookups: dict[int, ResponseLookup] = {}

    def handle(self, event: LookupEvent, now: Now) -> list[NetworkEffect]:
        """What to do about `event`."""
        lookup = self._lookups.get(event.lookup)
        match event:
            case ResponseWanted():
                assert lookup is None
                return self._wanted(event, now)
            case ResponseReleased():
                return self._released(lookup) if lookup is not None else []
            case SharedRead():
                return self._shared_read(lookup, event, now) if lookup is not None else []
            case ResponseFetched():
                if self.peers is not None:
                    self.peers.delivered(event, lookup, now)
                return self._settle(lookup, lookup.on_fetched(event), now) if lookup is not None else []
            case ResponseRefused():
                effects: list[NetworkEffect] = []
                if self.peers is not None:
                    effects += self.peers.refused(event, lookup, now)
                if lookup is not None:
                    effects += self._settle(lookup, lookup.on_refused(event, now), now)
                return effects
            case ProvidersFound():
                candidates = self.peers.found_providers(event, now) if self.peers is not None else []
                return self._settle(lookup, lookup.on_providers(candidates, now), now) if lookup is not None else []
            case _:
                assert_never(event)

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

    def _wanted(self, event: ResponseWanted, now: Now) -> list[NetworkEffect]:
        if self.peers is not None:
            self.peers.wanted(event.request_hash, now)
        if len(self._lookups) >= LOOKUPS_MAX:
            return [HintResponse(event.lookup, False), AnswerResponse(event.lookup, None, "none", "busy")]
        lookup = self._lookups[event.lookup] = ResponseLookup(event, self._may_search, now)
        effects = lookup.read_shared() if event.shared else self._ask_peers(lookup, self._alone, now)
        return self._settle(lookup, effects, now)

    def _shared_read(self, lookup: ResponseLookup, event: SharedRead, now: Now) -> list[NetworkEffect]:
        if lookup.stage is not Stage.SHARED:
            return []
        if event.reason == "hit":
            return self._settle(lookup, lookup.on_shared_hit(), now)
        lookup.told += event.told
        # Without peers, a client asks on for as long as the shared store is there.
        alone = self._alone if event.reason == "redis_away" else "not_found"
        return self._settle(lookup, self._ask_peers(lookup, alone, now), now)

    def _ask_peers(self, lookup: ResponseLookup, alone: str, now: Now) -> list[NetworkEffect]:
        if self.peers is not None and self.peers.any_usable(now):
            return lookup.ask_peers(self.peers.known_providers(lookup, now), now)
        return lookup.give_up(alone)

    def _released(self, lookup: ResponseLookup) -> list[NetworkEffect]:
        if lookup.stage not in (Stage.SHARED, Stage.HINTED):
            return []  # what a race finds after the engine has won serves the next request
        del self._lookups[lookup.number]
        return [AnswerResponse(lookup.number, None, "none", "released")]

    def _may_search(self, request_hash: bytes, now: Now) -> bool:
        return self.peers is not None and self.peers.may_search(request_hash, now)

    def _settle(self, lookup: ResponseLookup, effects: list[NetworkEffect], now: Now) -> list[NetworkEffect]:
        """What the lookup wants, as far as it may be done now."""
        settled: list[NetworkEffect] = []
        for effect in effects:
            match effect:
                case FetchResponse(_, peer) if self.peers is None or not self.peers.may_fetch(peer, now):
                    refused = ResponseRefused(lookup.number, peer, Reason.BUSY)
                    settled += self._settle(lookup, lookup.on_refused(refused, now), now)
                    continue
                case HintResponse(_, False):  # withdrawn; at the start none has waited
                    self._standings.wasted(lookup.waited_ms(now), now)
                case AnswerResponse():
                    if lookup.hinted:
                        self._standings.wasted(lookup.waited_ms(now), now)
                    del self._lookups[lookup.number]
                    if self.peers is not None:
                        self.peers.ended(lookup, effect, now)
            settled.append(effect)
        return settled
