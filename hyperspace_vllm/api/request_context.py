"""One request and the cache of its server: the context that every state uses."""

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar

from prometheus_client import Histogram
from starlette.types import ASGIApp, Receive, Scope, Send

from ..core.local.response_cache_messages import StoreResponse
from ..core.local.similar_messages import Question
from ..core.records.ids import RequestKey
from ..core.response.request_fields import POOLING
from ..core.response.scope import DEFAULT_SCOPE, sign_scope
from ..response_db import StoredResponse
from .audits import Audits
from .checks import OneAtATime
from .client_end import Client
from .client_source import source_of
from .coalesce import FlightTable
from .database_lookup import DatabaseLookup, Recent, Touches
from .l1_metrics import L1Metrics
from .large_bodies import LargeBodies
from .naming import Naming
from .node_lookup import NodeLookup
from .options import ApiMessage, ResponseCacheOptions
from .ready_answer import Ready
from .request_body import changes_of, rewritten, with_changes
from .request_facts import RequestFacts
from .stored_answer import Sending, StoredAnswer, Wanted, render

T = TypeVar("T")


class Cache(Protocol):
    """The state that all requests of one server share."""

    app: ASGIApp
    options: ResponseCacheOptions
    lookup: DatabaseLookup | None  # None: the cache is off
    bodies: LargeBodies
    flights: FlightTable
    recent: Recent
    sending: Sending
    touches: Touches
    node: NodeLookup
    checks: OneAtATime
    audits: Audits
    metrics: L1Metrics

    def passing(self, send: Send, why: str, reason: str) -> Send:
        """`send` for a request that bypasses the cache; reported and counted unless the cache is off."""


class RequestContext:
    """A request, its client and the cache."""

    def __init__(self, cache: Cache, facts: RequestFacts, receive: Receive, send: Send) -> None:
        self.started_s = time.perf_counter()
        self.cache, self.options, self.facts = cache, cache.options, facts
        self.client = Client(receive, send, facts.wants_proof)
        self.naming = Naming(facts, cache.options)
        self._weights_changes = self.options.weights_changes()
        self._refused: bool | None = None  # not asked yet

    @property
    def source(self) -> bytes:
        """The request's source, as audits count sources."""
        return source_of(self.facts.scope, self.options.names_proxies)

    @property
    def has_node(self) -> bool:
        """Whether a node is there to store anything."""
        return self.options.client.connected

    @property
    def read_deadline_s(self) -> float:
        """For the database."""
        return self.options.read_deadline_s

    def now_ms(self) -> int:
        """Milliseconds since 1970, by the server's clock."""
        return self.options.clock()

    @property
    def weights_changed(self) -> bool:
        """Whether the engine's weights have begun to change since the request came."""
        return self.options.weights_changes() != self._weights_changes

    async def engine(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application behind the cache."""
        self.client.committed = True
        await self.cache.app(scope, receive, send)

    def ready(self, answer: StoredAnswer, seconds: Histogram | None = None) -> Ready:
        """An answer for the client; `seconds` gets the time that the request took."""
        return Ready(answer, self.client, self.cache.sending, seconds, self.started_s)

    def has_room(self, answer: StoredAnswer) -> bool:
        """Whether there is room for an answer while its client reads it."""
        return self.cache.sending.has_room(answer)

    async def read(self, work: Callable[[], T]) -> T:
        """The result of `work` on the request, off the event loop if that is large; raises `Busy`."""
        return await self.cache.bodies.work(len(self.facts.raw), work)

    async def read_found(self, size: int, work: Callable[[], T]) -> T:
        """The same for other data of `size` bytes."""
        return await self.cache.bodies.work(size, work)

    async def read_computed(self, size: int, work: Callable[[], T]) -> T:
        """The same for the engine's answer: it waits for its turn however long the queue is."""
        return await self.cache.bodies.in_turn(size, work)

    async def write(self, size: int, work: Callable[[], T]) -> T:
        """The result of `work` on `size` bytes; on the event loop if the threads are too busy."""
        return await self.cache.bodies.always(size, work)

    async def is_refused(self) -> bool:
        """Whether the server itself refuses the request, and should answer: checked once there is another answer."""
        if self._refused is None:
            facts = self.facts
            accepts = partial(self.options.accepts, facts.endpoint, facts.raw, facts.scope["headers"])
            self._refused = not await self.read(accepts)
        return self._refused

    async def engine_body(self, add_usage: bool) -> bytes:
        """The body for the application: signed and salted even if the threads are too busy for a large one."""
        facts = self.facts
        changes = changes_of(facts.body, self._signed_scope(), facts.salt, add_usage)
        if not changes:
            return facts.raw
        return await self.write(len(facts.raw), partial(with_changes, facts.raw, facts.body, changes))

    def for_engine(self, body: dict[str, Any]) -> bytes:
        """A request of the cache on behalf of the client: signed and salted like the client's own."""
        return rewritten(json.dumps(body).encode(), body, self._signed_scope(), self.facts.salt, add_usage=False)

    def _signed_scope(self) -> dict[str, str] | None:
        """The scope for the connector, unless it is the default. An unknown tenant gets none, so nothing is shared."""
        facts = self.facts
        if facts.endpoint in POOLING:
            return None  # nothing of theirs passes through a connector
        if facts.tenant is None or facts.reach == DEFAULT_SCOPE or not isinstance(facts.salt, str | None):
            return None
        return sign_scope(self.options.process_secret, facts.reach.scope, facts.reach.tenant, facts.salt)

    async def entry(self, key: RequestKey, now_ms: int) -> StoredResponse | None:
        """The entry of `key` in the database, or on its way there."""
        assert self.cache.lookup is not None
        return self.cache.recent.newer(key, await self.cache.lookup.get(key, now_ms), now_ms)

    async def rendered(self, entry: StoredResponse, usage: bool, now_ms: int, detail: str) -> StoredAnswer | None:
        """The answer from an entry, if the server accepts the request, it is fresh enough, and there is room for it."""
        facts = self.facts
        age_s = max(now_ms - entry.computed_at_ms, 0) // 1000
        ttl_s = max(entry.expires_at_ms - now_ms, 0) // 1000
        if entry.expires_at_ms <= now_ms or not facts.wishes.allows(age_s, ttl_s) or await self.is_refused():
            return None
        wanted = Wanted(facts.endpoint, facts.streams, usage, facts.repeated, facts.own_ids())
        size = len(entry.body) + (len(facts.raw) if facts.repeated else 0)
        answer = await self.read_found(size, partial(render, entry, wanted, age_s, ttl_s, detail))
        if answer is None or not self.has_room(answer):
            return None
        took_ms = (time.perf_counter() - self.started_s) * 1000
        answer.headers.append((b"server-timing", f"hyperspace;dur={took_ms:.3f}".encode()))
        return answer

    def hand_over(self, key: RequestKey, body: bytes, question: Question | None = None) -> str:
        """Give an answer to the node, and keep it until the database has it; "sent" or "dropped"."""
        message = StoreResponse(
            key,
            self.facts.reach.scope,
            self.options.model_digest() or b"",
            self.options.engine_version[:256],
            self.options.ttl_ms,
            body,
            question,
        )
        now_ms = self.now_ms()
        if not self.tell_node(message):
            return "dropped"
        self.cache.recent.add(key, StoredResponse(body, b"", now_ms, now_ms + self.options.ttl_ms), now_ms)
        return "sent"

    def forget(self, key: RequestKey) -> None:
        """Stop serving an answer that is kept until the database has it."""
        self.cache.recent.forget(key)

    def tell_node(self, message: ApiMessage) -> bool:
        """Queue a message for the node; False when it was dropped."""
        return self.options.client.send(message)

    def touch(self, key: RequestKey) -> None:
        """Note that the entry of `key` was served."""
        self.cache.touches.add(key)

    def count_lookup(self, result: str, reason: str) -> None:
        """Count the request, once."""
        self.cache.metrics.lookups.labels(result, reason).inc()

    def count_stored(self, result: str) -> None:
        """Count the result of storing a computed answer."""
        self.cache.metrics.stored.labels(result).inc()

    def seconds(self) -> float:
        """Seconds since the request's body arrived."""
        return time.perf_counter() - self.started_s
