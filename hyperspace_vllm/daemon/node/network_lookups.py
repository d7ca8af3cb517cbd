"""Responses looked for elsewhere: which clients wait, what is read and opened for them, and how each lookup ends."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from ...core.events.dht import ProvidersFound, SearchDht
from ...core.events.response_reading import (
    AnswerResponse,
    FetchResponse,
    HintResponse,
    ReadShared,
    ResponseFetched,
    ResponseRefused,
    ResponseReleased,
    ResponseWanted,
    SharedRead,
)
from ...core.events.stored_responses import ResponsesUsed
from ...core.events.vocabulary import NetworkEvent
from ...core.local.message_fields import Scope
from ...core.peers.trust import Trust
from ...core.records.errors import ProtocolViolation, Refused
from ...core.records.ids import NetworkId, PeerId, RequestKey
from ...core.records.limits import PROVIDERS_MAX
from ...core.records.peer_wire import Hit, Miss, PeerAnswer, Query, Refusal
from ...core.records.reason import Reason
from ...core.response.cache_proof import request_hash
from ...core.response.sealed_hit import Opened
from .. import clock
from ..metrics import Metrics
from ..peer_failed import PeerFailed
from ..responses.fetched_response import Stored, found_response, keep, open_fetched
from ..responses.response_lookups import Clients
from .lookup_tasks import LookupTasks
from .open_requests import Asks, ask_peer

SHARED_READS_MAX = 8  # at once, of at most 8 MiB each; further lookups pass by the shared store


class Providers(Asks, Protocol):
    """What reaches the peers that may have a response (Libp2pHost)."""

    @property
    def connected(self) -> frozenset[PeerId]:
        """Peers with an open connection."""

    async def connect(self, peer: PeerId, address: str, timeout_s: float) -> None:
        """Open a connection; `PeerFailed`."""

    async def find_providers(self, key: str, count: int, timeout_s: float) -> tuple[tuple[PeerId, ...], float]:
        """Peers said to provide `key`, and the search's cost in ms; `PeerFailed`."""


class Hints(Protocol):
    """Who has what, by another way than gossip and the DHT (RedisRegistry)."""

    async def providers(self, id: bytes) -> tuple[PeerId, ...]:
        """Peers that can serve it."""


@dataclass(slots=True)
class _Lookup:
    key: RequestKey
    model_digest: bytes
    began_s: float


class SharedStore(Protocol):
    """The fleet's shared store of responses (RedisResponses)."""

    @property
    def is_away(self) -> bool:
        """Whether it failed a moment ago, and is not asked now."""

    def is_purged(self, request_hash: bytes) -> bool:
        """Whether a response is about to be deleted from it."""

    async def read(self, key: RequestKey, model_digest: bytes, timeout_s: float) -> Opened:
        """The response, if it has a valid one; `Refused` says why not (`redis_away`: it did not answer)."""


class NetworkLookups:
    """All open lookups. Responses that are found go to `store`, and to `clients` with their lookup's end."""

    def __init__(
        self,
        network: NetworkId,
        trust: Trust,
        clients: Clients,
        store: Stored | None,
        scope: Scope,
        metrics: Metrics,
        submit: Callable[[NetworkEvent], None],
        tasks: LookupTasks,
        shared: SharedStore | None,
    ) -> None:
        self._network = network
        self._trust = trust
        self._clients = clients
        self._store = store
        self._scope = scope
        self._metrics = metrics
        self._submit = submit
        self._tasks = tasks
        self._shared = shared
        self._loop = asyncio.get_running_loop()
        self._lookups: dict[int, _Lookup] = {}
        self._reading: set[int] = set()
        self._opened: dict[tuple[int, PeerId | None], Opened] = {}  # None: of the shared store
        self.last: dict[str, object] = {}

    def find(
        self,
        lookup: int,
        request_key: RequestKey,
        model_digest: bytes,
        deadline_ms: int,
        hints: Hints | None,
    ) -> None:
        """Begin a lookup; without a shared store, `hints` are asked first."""
        self._lookups[lookup] = _Lookup(request_key, model_digest, self._loop.time())
        name = request_hash(self._network, request_key)
        if self._shared is not None and not self._shared.is_away:
            self._submit(ResponseWanted(lookup, name, deadline_ms, shared=True))
        elif hints is None:
            self._submit(ResponseWanted(lookup, name, deadline_ms))
        else:
            self._tasks.start(lookup, self._find_with_hints(hints, lookup, name, deadline_ms))

    def release(self, lookup: int) -> None:
        """The client waits no longer; a search may go on for the next request's sake."""
        if lookup in self._lookups:
            self._submit(ResponseReleased(lookup))

    def used(self, keys: Iterable[bytes]) -> None:
        """Tell the core of hits, by their requests' hashes."""
        self._submit(ResponsesUsed(tuple(request_hash(self._network, RequestKey(key)) for key in keys)))

    def purge(self, keys: Iterable[bytes]) -> None:
        """Lookups of these come to nothing at once: what is being fetched for them would be stored again."""
        purged = set(keys)
        for number in [number for number, lookup in self._lookups.items() if lookup.key in purged]:
            del self._lookups[number]  # the core ends its own by the deadline
            self._clients.answer(number, None, "not_found")

    # --- effects --------------------------------------------------------------------------------

    def hint(self, effect: HintResponse) -> None:
        """Tell the client whether waiting is worth while."""
        if effect.lookup in self._lookups:
            self._clients.hint(effect.lookup, effect.hinted)

    def read_shared(self, effect: ReadShared, hints: Hints | None) -> None:
        """Read the shared store, unless it is read for SHARED_READS_MAX others."""
        assert self._shared is not None
        if not self._shared.is_purged(effect.request_hash) and len(self._reading) < SHARED_READS_MAX:
            self._reading.add(effect.lookup)
            self._tasks.start(effect.lookup, self._read_shared(self._shared, effect, hints))
        elif hints is None:
            self._submit(SharedRead(effect.lookup, "not_read"))
        else:
            self._tasks.start(effect.lookup, self._miss_shared(effect, hints, "not_read"))

    def fetch(self, effect: FetchResponse, host: Providers) -> None:
        """Ask a provider."""
        self._tasks.start(effect.lookup, self._fetch(effect, host))

    def search(self, effect: SearchDht, host: Providers) -> None:
        """Ask the DHT for providers."""
        self._tasks.start(effect.lookup, self._search(effect, host))

    def answer(self, effect: AnswerResponse) -> None:
        """End a lookup, and what runs for it."""
        lookup = self._lookups.pop(effect.lookup, None)
        self._reading.discard(effect.lookup)
        self._tasks.end(effect.lookup)
        opened = self._opened.pop((effect.lookup, effect.peer), None) if effect.reason == "hit" else None
        for at in [at for at in self._opened if at[0] == effect.lookup]:
            del self._opened[at]
        if lookup is None:
            return
        if opened is not None and self._store is not None:
            keep(self._store, lookup.key, opened, self._scope)
        if effect.source != "redis":  # that one counts its own
            self._note(lookup, effect)
        found = found_response(opened, effect.source, self._trust, clock.now()) if opened is not None else None
        self._clients.answer(effect.lookup, found, effect.reason)

    # --- leaves ---------------------------------------------------------------------------------

    async def _find_with_hints(self, hints: Hints, lookup: int, name: bytes, deadline_ms: int) -> None:
        told = await hints.providers(name)
        self._submit(ResponseWanted(lookup, name, deadline_ms, told))

    async def _read_shared(self, shared: SharedStore, effect: ReadShared, hints: Hints | None) -> None:
        lookup = self._lookups.get(effect.lookup)
        if lookup is None:
            return
        try:
            opened = await shared.read(lookup.key, lookup.model_digest, effect.timeout_ms / 1000)
        except Refused as refused:
            await self._miss_shared(effect, hints, refused.reason)
        else:
            self._opened[effect.lookup, None] = opened
            self._submit(SharedRead(effect.lookup, "hit"))

    async def _miss_shared(self, effect: ReadShared, hints: Hints | None, reason: str) -> None:
        self._reading.discard(effect.lookup)
        told = await hints.providers(effect.request_hash) if hints is not None else ()
        self._submit(SharedRead(effect.lookup, reason, told))

    async def _fetch(self, effect: FetchResponse, host: Providers) -> None:
        lookup = self._lookups.get(effect.lookup)
        if lookup is None:
            return
        deadline = self._loop.time() + effect.timeout_ms / 1000
        try:
            if effect.peer not in host.connected:
                if not effect.address:
                    raise PeerFailed(Reason.UNREACHABLE)
                await host.connect(effect.peer, effect.address, effect.timeout_ms / 1000)
            answer = await ask_peer(host, effect.peer, Query(effect.request_hash), deadline - self._loop.time())
            if not isinstance(answer, Hit):
                raise PeerFailed(_reason_of(answer))
            opened = await self._open(effect.lookup, lookup, answer)
        except PeerFailed as failed:
            self._refused(effect, failed.reason)
        except Refused as refused:
            self._refused(effect, Reason.of(refused))
        except ProtocolViolation:
            self._refused(effect, Reason.PROTOCOL)
        else:
            self._metrics.bytes_total.labels("fetched").inc(len(answer.sealed))
            self._opened[effect.lookup, effect.peer] = opened
            size, expires_at_ms = len(opened.body), opened.expires_at_ms
            self._submit(ResponseFetched(effect.lookup, effect.peer, size, expires_at_ms, answer.popularity))

    async def _open(self, number: int, lookup: _Lookup, hit: Hit) -> Opened:
        """What a hit holds. Of a signer that isn't trusted it goes to be audited, now and then."""
        asked_for = hit, lookup.key, self._network, lookup.model_digest, self._trust, clock.now()
        try:
            return await open_fetched(*asked_for)
        except Refused as refused:
            if refused.reason == "untrusted_signer":
                tried = await open_fetched(*asked_for, on_trial=True)
                self._clients.let_try(number, tried.body, tried.raw_proof)
            raise

    def _refused(self, effect: FetchResponse, reason: Reason) -> None:
        if reason is not Reason.MISS:
            self._metrics.failures_total.labels("l1", reason).inc()
        self._submit(ResponseRefused(effect.lookup, effect.peer, reason))

    async def _search(self, effect: SearchDht, host: Providers) -> None:
        key = f"/cache/{effect.request_hash.hex()}"
        try:
            peers, cost_ms = await host.find_providers(key, PROVIDERS_MAX, effect.timeout_ms / 1000)
        except PeerFailed:
            peers, cost_ms = (), 0.0
        if cost_ms:
            self._metrics.search_cpu_seconds.observe(cost_ms / 1000)
        self._submit(ProvidersFound(effect.lookup, peers, cost_ms))

    def _note(self, lookup: _Lookup, effect: AnswerResponse) -> None:
        took_s = self._loop.time() - lookup.began_s
        result = "hit" if effect.peer else "miss"
        self._metrics.lookups_total.labels("l1", result, effect.reason).inc()
        self._metrics.lookup_seconds.labels("l1").observe(took_s)
        self.last = {
            "result": result,
            "reason": effect.reason,
            "source": effect.source,
            "peer": effect.peer,
            "took_ms": round(took_s * 1000, 1),
        }


def _reason_of(answer: PeerAnswer) -> Reason:
    """Why an answer to a query is no hit."""
    match answer:
        case Miss("busy"):
            return Reason.BUSY
        case Miss():
            return Reason.MISS
        case Refusal(reason):
            return Reason(reason)
        case _:
            return Reason.PROTOCOL
