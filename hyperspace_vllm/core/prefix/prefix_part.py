"""The part of a node that reads and writes prefixes: one machine for each lookup, one for all that is written."""

import itertools
import random
from collections.abc import Callable
from typing import assert_never

from ..events.conduct import ChargePeer
from ..events.node_state import Tick
from ..events.prefix_reading import (
    AnswerPrefix,
    ChunksVerified,
    EndLookup,
    HolderStalled,
    ManifestRefused,
    ManifestVerified,
    PrefixReleased,
    PrefixWanted,
    ProviderAnswered,
    ProviderFailed,
    RowFailed,
    RowReady,
    RowsFound,
)
from ..events.prefix_writing import ClientGone, ObjectEncoded, ObjectFailed, RequestOver, RowArrived, SegmentKeyKnown
from ..events.vocabulary import PrefixEffect, PrefixEvent
from ..peers.standing import Failed, Standings
from ..records.ids import NetworkId, PeerId, RowId
from ..records.limits import CLIENTS_MAX, LOOKUPS_PER_CLIENT_MAX
from ..records.now import Now
from ..records.reason import Reason
from .cost_model import RateEstimator
from .fetch import FetchMode, LookupEvent, PrefixLookup
from .plan import leading_rows
from .publish import Publisher

LOOKUPS_MAX = 1_024  # undecided at once, of all clients; more are answered `busy`
ANSWERED_MAX = CLIENTS_MAX * LOOKUPS_PER_CLIENT_MAX
ASKED_MAX = 8  # peers a lookup asks: what none of eight has is computed sooner than found


class PrefixPart:
    """Everything that a node decides about prefixes. `peers` may be asked.

    `hints` names peers that are said to serve a row; `has_standing` says for which peers a request may wait, as long as
    they have earned it or are lent it (peers/patience.py).
    """

    def __init__(
        self,
        network: NetworkId,
        peers: tuple[PeerId, ...],
        fetch: FetchMode,
        rng: random.Random,
        standings: Standings,
        hints: Callable[[RowId, Now], tuple[PeerId, ...]] = lambda row, now: (),
        has_standing: Callable[[PeerId], bool] = lambda peer: True,
    ) -> None:
        self._network = network
        self.peers = peers
        self._hints = hints
        self._has_standing = has_standing
        self._fetch: FetchMode = fetch
        self._rng = rng
        self.publisher = Publisher()
        self._rates = RateEstimator()
        self._lookups: dict[int, PrefixLookup] = {}
        self._answered: set[int] = set()
        self._standings = standings

    def handle(self, event: PrefixEvent | Tick, now: Now) -> list[PrefixEffect]:
        """What to do about `event`."""
        now_ms = now.mono_ms  # nothing here bears a date
        match event:
            case PrefixWanted():
                effects = self._wanted(event, now)
            case PrefixReleased():
                effects = self._released(event)
            case (
                RowsFound()
                | ProviderAnswered()
                | ProviderFailed()
                | ManifestVerified()
                | ManifestRefused()
                | ChunksVerified()
                | HolderStalled()
                | RowReady()
                | RowFailed()
            ):
                effects = self._of_lookup(event, now)
            case RowArrived() | SegmentKeyKnown() | RequestOver() | ClientGone() | ObjectEncoded() | ObjectFailed():
                effects = self.publisher.handle(event, now_ms)
            case Tick():
                effects = self._tick(event, now)
            case _:
                assert_never(event)
        for effect in effects:
            if isinstance(effect, ChargePeer):
                self._standings.note(Failed(effect.peer, effect.reason), now)
        return effects

    def set_peers(self, peers: tuple[PeerId, ...]) -> None:
        """The peers that later lookups may ask."""
        self.peers = peers

    def next_deadline_ms(self) -> int | None:
        """When to call `handle(Tick())`, if nothing else happens before; None: never."""
        times = [lookup.next_deadline_ms() for lookup in self._lookups.values()]
        times.append(self.publisher.next_deadline_ms())
        return min((time for time in times if time is not None), default=None)

    def _wanted(self, event: PrefixWanted, now: Now) -> list[PrefixEffect]:
        assert event.lookup not in self._lookups
        if len(self._lookups) >= LOOKUPS_MAX or len(self._answered) >= ANSWERED_MAX:
            return [AnswerPrefix(event.lookup, 0, (), "none", "busy")]
        asked = self._whom_to_ask(event, now)
        lookup = PrefixLookup(event, self._network, asked, self._fetch, self._rates, now.mono_ms)
        self._lookups[event.lookup] = lookup
        return self._settle(lookup, lookup.start(now.mono_ms), now)

    def _whom_to_ask(self, event: PrefixWanted, now: Now) -> tuple[PeerId, ...]:
        """At most ASKED_MAX: those with hints first, beginning with the longest prefix's."""
        peers = [peer for peer in self.peers if self._may_ask(peer, now)]
        self._rng.shuffle(peers)  # equally good holders share the load
        if len(peers) <= ASKED_MAX or not event.may_ask_peers:
            return tuple(peers)
        hinted: dict[PeerId, None] = {}
        usable = frozenset(peers)
        for row in leading_rows(self._network, event.layout, event.segment_keys, event.start_token):
            hinted |= dict.fromkeys(peer for peer in self._hints(row, now) if peer in usable)
            if len(hinted) >= ASKED_MAX:
                break
        return tuple(hinted | dict.fromkeys(peers))[:ASKED_MAX]

    def _may_ask(self, peer: PeerId, now: Now) -> bool:
        if self._standings.avoids_for_kv(peer, now) or not self._has_standing(peer):
            return False
        return self._standings.has_earned(peer) or self._standings.lends(now)

    def _released(self, event: PrefixReleased) -> list[PrefixEffect]:
        known = self._lookups.pop(event.lookup, None) is not None or event.lookup in self._answered
        self._answered.discard(event.lookup)
        return [EndLookup(event.lookup)] if known else []

    def _of_lookup(self, event: LookupEvent, now: Now) -> list[PrefixEffect]:
        lookup = self._lookups.get(event.lookup)
        if lookup is None:
            return []
        if isinstance(event, RowsFound):
            self.publisher.forget(lookup.absent(event))
        return self._settle(lookup, lookup.handle(event, now.mono_ms), now)

    def _tick(self, event: Tick, now: Now) -> list[PrefixEffect]:
        now_ms = now.mono_ms
        effects = self.publisher.handle(event, now_ms)
        for lookup in list(self._lookups.values()):
            due_ms = lookup.next_deadline_ms()
            if due_ms is not None and due_ms <= now_ms:
                effects += self._settle(lookup, lookup.handle(event, now_ms), now)
        return effects

    def _settle(self, lookup: PrefixLookup, effects: list[PrefixEffect], now: Now) -> list[PrefixEffect]:
        """An answered lookup only waits for its release: its machine can go. What it waited in vain is accounted."""
        if lookup.answered:
            self._standings.wasted(lookup.waited_ms, now)
            for peer in itertools.filterfalse(self._standings.has_earned, lookup.silent):
                self._standings.note(Failed(peer, Reason.STALLED), now)
            del self._lookups[lookup.lookup]
            self._answered.add(lookup.lookup)
        return effects
