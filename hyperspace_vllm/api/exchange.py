"""One request to the response cache and its answer: which way it goes (middleware.py names them), and going it."""

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from ..contained import contained, report_error
from ..core.local.messages import (
    PurgeResponses,
    Question,
    RememberQuestion,
    ResponseFound,
    ResponseToTry,
    StoreResponse,
)
from ..core.records.ids import RequestKey, sha256
from ..core.response.admission import Admitted, NotStored, admit, storage_scope, streams_completely
from ..core.response.answer_ids import ID_CHARS_MAX, named_by
from ..core.response.audit import plain_answer, prompt_of
from ..core.response.request_fields import POOLING, Endpoint
from ..core.response.request_key import Uncacheable, is_sampled, request_key
from ..core.response.scope import DEFAULT_SCOPE, api_key_of, engine_salt, sign_scope, tenant_of
from ..core.response.similar.guards import eligible
from ..core.response.similar.match_error import CHECK_EVERY
from ..core.response.similar.semantic_key import question_of, tightened
from ..response_db import StoredResponse
from . import aborts, checks
from .coalesce import Flight, Laggard, LeaderFailed, Message, Receive, Scope, Send
from .embed_inputs import answer_inputs
from .http_headers import LOAD_REPORT, PROOF, first_header, forward_status, header, parse_cache_control, without_proof
from .large_bodies import Busy
from .network_race import HITS, NetworkRace, Outcome
from .node_lookup import Pending
from .own_ids import OwnIds
from .relay import Relay, leaving_on_disconnect
from .request_body import changes_of, replayed, with_changes, with_content_length
from .stored_answer import StoredAnswer, Wanted, entry_of, json_headers, origin_header, render
from .streams.frames import collector

if TYPE_CHECKING:
    from .middleware import ResponseCacheMiddleware

_COMMIT_LOOKS, _COMMIT_LOOK_S = 20, 0.005  # the node commits within milliseconds, or is busy
# How the engine serves a request: a request that sets one shares no computation with others.
_SERVED_BY = ("priority", "stream_interval")
_SERVED_BY_HEADERS = (b"x-vllm-priority", b"x-data-parallel-rank")
_FOLLOWED_MAX = 2  # computations of others that may fail a request before it is computed alone
_OWN_TEMPLATES = ("chat_template", "chat_template_kwargs")  # where a client may have a template of its own
Names = tuple[bytes, bytes | None, str]
T = TypeVar("T")


class Exchange:
    """One request and its answer."""

    def __init__(
        self,
        cache: "ResponseCacheMiddleware",
        endpoint: Endpoint,
        raw: bytes,
        body: dict[str, Any],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        self.started_s = time.perf_counter()
        self.cache, self.options = cache, cache.options
        self.endpoint, self.raw, self.body = endpoint, raw, body
        self.scope, self.receive = scope, receive
        self._send = send
        self._wants_proof = header(scope["headers"], PROOF) is not None
        self._abort = aborts.Abort()
        self._weights_changes = self.options.weights_changes()
        self._doubted: checks.ToCompare | None = None  # one that is computed instead of served
        self._refused: bool | None = None  # not asked yet
        self.named_as: Names | Uncacheable = Uncacheable("off")
        self.question: Question | None = None  # until it is wanted
        self._kept = False  # an entry stays, whatever is computed
        self._committed = False  # the application has the request, or the client some of an answer
        self.wishes = parse_cache_control(header(scope["headers"], b"cache-control"))
        authorization = first_header(scope["headers"], b"authorization")
        self.tenant = tenant_of(self.options.fleet_secret, self.options.api_keys, authorization)
        self.salt = engine_salt(api_key_of(self.options.api_keys, authorization), body.get("cache_salt"))
        self.reach = storage_scope(
            self.tenant or "",
            body.get("cache_salt"),
            self.wishes.private or self.wishes.no_store or endpoint == "embeddings",
        )
        self.mode = tightened(self.options.semantic, header(scope["headers"], b"x-hyperspace-semantic"))
        self.named = named_by(endpoint, body, first_header(scope["headers"], b"x-request-id"))
        self.streams = endpoint not in POOLING and bool(body.get("stream"))
        # Others' streams end with usage whether asked to or not.
        self.chooses_usage = self.streams and endpoint in ("completions", "chat")
        options = body.get("stream_options")
        self.wants_usage = self.chooses_usage and isinstance(options, dict) and bool(options.get("include_usage"))
        repeats = ("metadata", "user") if endpoint == "responses" else ()
        self.repeated = {name: body[name] for name in repeats if body.get(name) is not None}

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application behind the cache."""
        self._committed = True
        await self.cache.app(scope, receive, send)

    async def send(self, message: Message) -> None:
        """To the client, without a proof that it did not ask for."""
        self._committed = True
        if message["type"] == "http.response.start" and not self._wants_proof:
            message = {**message, "headers": without_proof(message.get("headers", ()))}
        await self._send(message)

    async def run(self) -> None:
        """Answer the request, come what may: an error of ours is a bypass."""
        try:
            await self._choose()
        except Busy:
            if self._committed:
                raise
            await self._answer_unread()
        except Exception:
            if self._committed:
                raise
            report_error("the response cache: a request passes by it")
            await self.bypass("bypass", "error")

    async def _choose(self) -> None:
        self.named_as = named = self.names()
        key = named if isinstance(named, Uncacheable) else await self.read(partial(self.key, named))
        if isinstance(named, Uncacheable) or isinstance(key, Uncacheable) or self.wishes.no_store:
            reason = key.reason if isinstance(key, Uncacheable) else "no-store"
            if self.wishes.only_if_cached and self.cache.lookup is not None:
                return await self.not_cached(reason)
            return await self.bypass("request" if self.wishes.no_store else "bypass", reason)
        if self.endpoint == "embeddings":
            return await answer_inputs(self, named)
        why = "request" if self.wishes.no_cache else "uri-miss"
        now_ms = self.options.clock()
        if self.wishes.no_cache and self._first_sample_stays:
            self._kept = await self.entry(key, now_ms) is not None
        elif not self.wishes.no_cache:
            entry = await self.entry(key, now_ms)
            if entry is not None:
                self._kept = self._first_sample_stays
                if await self._answer_from(key, entry, now_ms):
                    return None
                if await self.is_refused():
                    return await self.bypass("bypass", "refused")
                why = "stale"
        if self.mode is not None:
            self.question = await self.read(partial(self.question_to, named))
        if why == "uri-miss" and await self._answer_from_similar():
            return None
        if self.wishes.only_if_cached:
            return await self._find_or_refuse(key, why)
        return await self._compute(key, why)

    async def read(self, work: Callable[[], T]) -> T:
        """What `work` makes of the request, off the event loop if that is large; raises `Busy`."""
        return await self.cache.bodies.work(len(self.raw), work)

    async def is_refused(self) -> bool:
        """Whether the server itself refuses the request, and should say so: asked once there is another answer."""
        if self._refused is None:
            accepts = partial(self.options.accepts, self.endpoint, self.raw, self.scope["headers"])
            self._refused = not await self.read(accepts)
        return self._refused

    async def _answer_unread(self) -> None:
        """There was no time to read the request."""
        if self.wishes.only_if_cached:
            return await self.not_cached("busy")
        return await self.bypass("bypass", "busy")

    @property
    def _first_sample_stays(self) -> bool:
        """Whether an answer is one of many, of which no client may choose the one that all get."""
        return is_sampled(self.endpoint, self.body)

    def key(self, named: Names, body: dict[str, Any] | None = None) -> RequestKey | Uncacheable:
        """What an answer would be stored under, or why it can't be; to `body` if given, else to the request."""
        body = self.body if body is None else body
        if any("strftime" in str(body.get(name)) for name in _OWN_TEMPLATES):
            return Uncacheable("dated")
        return request_key(self.endpoint, body, *named, parses=self.options.parses)

    def question_to(self, named: Names, body: dict[str, Any] | None = None) -> Question | None:
        """The question of a request that has a key, if others may ask the same in other words. `body` as of `key`."""
        body = self.body if body is None else body
        return question_of(self.endpoint, body, *named, self.options.acronyms, parses=self.options.parses)

    def names(self) -> Names | Uncacheable:
        """Digest of model and date, LoRA digest and tenant, or why the request can't have a key."""
        digest = self.options.model_digest()
        model = self.body.get("model") or None
        if self.cache.lookup is None:
            return Uncacheable("off")
        if self.tenant is None:
            return Uncacheable("unknown_tenant")
        if len(self.named or "") > ID_CHARS_MAX:
            return Uncacheable("request_id")
        if first_header(self.scope["headers"], LOAD_REPORT):
            return Uncacheable("load_report")  # the engine's load of this moment, beside the answer
        if digest is None or (self.chooses_usage and self.options.force_include_usage):
            return Uncacheable("no_model_digest" if digest is None else "continuous_usage")
        lora = self.options.loras.get(model) if isinstance(model, str) else None
        served = isinstance(model, str) and model in self.options.served_models
        if model is not None and lora is None and not served:
            return Uncacheable("unknown_model")
        if self.endpoint == "responses" and not self.options.sees_aborts:
            return Uncacheable("blind")
        if self.endpoint == "responses" and self.options.keeps_responses and self.body.get("store") is not False:
            return Uncacheable("retrievable")
        if not self.options.cache_sampled and is_sampled(self.endpoint, self.body):
            return Uncacheable("sampled")
        dates = "" if self.endpoint == "completions" else self.options.dates()
        if dates is None:
            return Uncacheable("dated")
        return sha256(digest, dates.encode()) if dates else digest, lora, self.tenant

    # --- answers that vLLM has no part in -------------------------------------------------------

    async def _answer_from_similar(self) -> bool:
        """Replay the answer to another wording of the question; False, with nothing sent, when there is none."""
        lookup, question = self.cache.lookup, self.question
        if lookup is None or question is None or self.mode is None:
            return False
        if eligible(question.text) is not None:
            return False
        if self.options.max_error >= 1:  # else the node decides which matches may be served
            same = await lookup.find_canonical(question.canonical_key, self.options.clock())
            checked = random.randrange(CHECK_EVERY) == 0
            if same is not None and await self._answer_from_match(same, 1.0, "canonical", checked):
                return True
        digest = self.options.model_digest() or b""
        similar = await self.cache.node.find_similar(question, self.mode, digest, self.options.max_error)
        if isinstance(similar, str):
            self.cache.metrics.similar.labels(similar).inc()
            return False
        key = RequestKey(similar.request_key)
        if similar.verdict == "compute":
            self.cache.metrics.similar.labels("doubted").inc()
            if (entry := await self.entry(key, self.options.clock())) is not None:
                self._doubted = checks.ToCompare(key, similar.similarity, self.mode, entry.body)
            return False
        self.cache.metrics.similar.labels("found").inc()
        detail = f"semantic; similarity={similar.similarity:.3f}"
        return await self._answer_from_match(key, similar.similarity, detail, similar.verdict == "check")

    async def entry(self, key: RequestKey, now_ms: int) -> StoredResponse | None:
        """The entry of `key` in the database, or on its way there."""
        assert self.cache.lookup is not None
        return self.cache.recent.newer(key, await self.cache.lookup.get(key, now_ms), now_ms)

    async def _answer_from_match(self, key: RequestKey, similarity: float, detail: str, checked: bool) -> bool:
        """Replay the answer to a question like this one; `checked`: and compute one as well."""
        now_ms = self.options.clock()
        entry = await self.entry(key, now_ms)
        if entry is None or not await self._answer_from(key, entry, now_ms, detail):
            return False
        if checked and self.mode is not None and not self.wishes.only_if_cached:
            match = checks.ToCompare(key, similarity, self.mode, entry.body)
            self.cache.checks.start(checks.compute_too(self, match))
        return True

    async def _answer_from(self, key: RequestKey, entry: StoredResponse, now_ms: int, detail: str = "exact") -> bool:
        """Replay an entry; False, with nothing sent, when it won't do."""
        answer = await self._render(entry, self.wants_usage, now_ms, detail)
        if answer is None:
            return False
        self.cache.metrics.lookups.labels("hit", "local" if detail == "exact" else detail.partition(";")[0]).inc()
        self.cache.touches.add(key)
        for message in answer.messages(self.cache.sending):
            await self.send(message)
        self.cache.metrics.hit_seconds.observe(time.perf_counter() - self.started_s)
        return True

    async def _render(self, entry: StoredResponse, usage: bool, now_ms: int, detail: str) -> StoredAnswer | None:
        """The answer from an entry, if the server would answer, it is as fresh as wanted, and there is room for it."""
        age_s = max(now_ms - entry.computed_at_ms, 0) // 1000
        ttl_s = max(entry.expires_at_ms - now_ms, 0) // 1000
        if entry.expires_at_ms <= now_ms or not self.wishes.allows(age_s, ttl_s) or await self.is_refused():
            return None
        wanted = Wanted(self.endpoint, self.streams, usage, self.repeated, self.ids())
        size = len(entry.body) + (len(self.raw) if self.repeated else 0)
        answer = await self.cache.bodies.work(size, partial(render, entry, wanted, age_s, ttl_s, detail))
        if answer is None:
            return None
        answer = replace(answer, request_bytes=len(self.raw))
        if not self.cache.sending.has_room(answer):
            return None
        took_ms = (time.perf_counter() - self.started_s) * 1000
        answer.headers.append((b"server-timing", f"hyperspace;dur={took_ms:.3f}".encode()))
        return answer

    def ids(self) -> OwnIds:
        """Ids for an answer that was not computed for this request."""
        return OwnIds(self.endpoint, self.named)

    async def not_cached(self, why: str) -> None:
        """Answer `only-if-cached` as RFC 9111 §5.2.1.7 says, in the shape of vLLM's errors."""
        self.cache.metrics.lookups.labels("miss", "only-if-cached").inc()
        error = {
            "message": "The request asked for a cached response only, and there is none.",
            "type": "GatewayTimeoutError",
            "param": None,
            "code": 504,
        }
        body = json.dumps({"error": error}).encode()
        status = f"hyperspace; detail={why}".encode()
        headers = [*json_headers(body), (b"cache-status", status)]
        await self.send({"type": "http.response.start", "status": 504, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    # --- answers of other nodes -----------------------------------------------------------------

    def _ask(self, key: RequestKey) -> Pending | None:
        """Ask other nodes, unless the request must not leave this one, or wants to be computed."""
        digest, deadline_s = self.options.model_digest(), self.options.network_deadline_s
        if self.reach.scope == "private" or self.wishes.no_cache or digest is None or deadline_s <= 0:
            return None
        return self.cache.node.start(key, digest, deadline_s, partial(self._try, key))

    async def _answer_found(self, key: RequestKey, usage: bool, found: ResponseFound) -> StoredAnswer | None:
        """The answer from what another node had, if it is sound and fresh enough; an error of ours is none."""
        try:
            now_ms = self.options.clock()
            entry = await self.cache.bodies.work(len(found.body) + len(self.raw), partial(self._judged, found, now_ms))
            if entry is None:
                self.options.client.send(PurgeResponses((key,)))  # the node, which can't tell, has stored it
                return None
            answer = await self._render(entry, usage, now_ms, "peer")
        except Busy:
            return None
        except Exception:
            report_error("the response cache: another node's answer")
            return None
        if answer is not None:
            answer.headers.append(origin_header(found))
            self.cache.recent.add(key, entry, now_ms)
            self._have_audited(key, entry.body, entry.proof, found.suspect)
            if self.question is not None:
                self.options.client.send(RememberQuestion(key, self.question))
        return answer

    def _judged(self, found: ResponseFound, now_ms: int) -> StoredResponse | None:
        entry = entry_of(found, self.endpoint, self.body, now_ms, self.options.ttl_ms)
        return None if entry is None or self._cannot_be_audited(entry) else entry

    @contained()
    def _try(self, key: RequestKey, message: ResponseToTry) -> None:
        """Audit what a stranger says is the answer."""
        self._have_audited(key, message.body, message.proof, True)

    def _have_audited(self, key: RequestKey, body: bytes, proof: bytes, surely: bool) -> None:
        audits = self.cache.audits
        if self.options.audits and not self.wishes.only_if_cached and audits.draw(surely):
            audits.start(audits.audit(self, key, body, proof))

    def _cannot_be_audited(self, entry: StoredResponse) -> bool:
        """Whether this server's model would never answer so: then it can't be audited, and need not be."""
        if not self.options.audits or prompt_of(self.endpoint, self.body) is None:
            return False
        return plain_answer(self.endpoint, json.loads(entry.body)) is None

    def _count(self, outcome: Outcome) -> None:
        self.cache.metrics.network.labels(outcome).inc()
        if outcome in HITS:
            self.cache.metrics.lookups.labels("hit", "network").inc()

    async def _find_or_refuse(self, key: RequestKey, why: str) -> None:
        """Wait for other nodes, and don't compute."""
        if (lookup := self._ask(key)) is None:
            return await self.not_cached(why)

        async def refuse(*_: object) -> None:
            await self.not_cached(why)

        request = replayed([{"type": "http.request", "body": self.raw, "more_body": False}], self.receive)
        find = partial(self._answer_found, key, self.wants_usage)
        race = NetworkRace(refuse, lookup, find, self._count, self.cache.sending, waits=True)
        await race(self.scope, request, self.send)
        if race.outcome in HITS:
            self.cache.metrics.network_hit_seconds.observe(time.perf_counter() - self.started_s)
        return None

    # --- answers from vLLM ----------------------------------------------------------------------

    async def bypass(self, why: str, reason: str) -> None:
        """Have vLLM answer, told of the scope and nothing else."""
        try:
            body = await self._engine_body(add_usage=False)
        except Exception:
            report_error("the response cache: a scope is not signed")
            body = self.raw
        request = replayed([{"type": "http.request", "body": body, "more_body": False}], self.receive)
        send = self.cache.passing(self.send, why, reason)
        await self.app(with_content_length(self.scope, len(body)), request, send)

    async def _engine_body(self, add_usage: bool) -> bytes:
        """The body for the application, which gets it signed and salted even if there is no time for a large one."""
        changes = changes_of(self.body, self.signed_scope(), self.salt, add_usage)
        if not changes:
            return self.raw
        write = partial(with_changes, self.raw, self.body, changes)
        return await self.cache.bodies.always(len(self.raw), write)

    def signed_scope(self) -> dict[str, str] | None:
        """The scope for the connector, unless it is the default. An unknown tenant gets none, hence nothing shared."""
        if self.endpoint in POOLING:
            return None  # nothing of theirs passes through a connector
        if self.tenant is None or self.reach == DEFAULT_SCOPE or not isinstance(self.salt, str | None):
            return None
        return sign_scope(self.options.process_secret, self.reach.scope, self.reach.tenant, self.salt)

    async def _compute(self, key: RequestKey, why: str) -> None:
        complete = not self.streams or (self.options.store_streams and streams_completely(self.body))
        storing = complete and self.options.client.connected and not self._kept
        # Usage is asked for on the client's behalf, and taken out again: without it the answer could only be streamed.
        asks_usage = self.wants_usage or (self.chooses_usage and storing)
        # What answers one may be a stored response of a certain age, so it answers those who want it no fresher.
        freshness = (self.wishes.max_age_s, self.wishes.min_fresh_s)
        served_by = self._served_by()
        repeated = await self.read(partial(json.dumps, self.repeated)) if self.repeated else ""
        same = (key, self.streams, asks_usage, freshness, repeated, served_by)
        shared = None if self.wishes.no_cache else same
        # Before a flight is looked for: nothing is waited for until the next one is open.
        body = await self._engine_body(asks_usage and not self.wants_usage)
        failed = 0
        while failed < _FOLLOWED_MAX and self.cache.flights.find(shared) is not None:
            if await self.is_refused():
                return await self.bypass("bypass", "refused")
            flight = self.cache.flights.find(shared)  # it may have ended meanwhile
            if flight is not None and await self._follow(flight, why):
                return None
            failed += 1
            now_ms = self.options.clock()
            if (entry := await self.entry(key, now_ms)) and await self._answer_from(key, entry, now_ms):
                return None  # of those whom it has failed before
        if failed:  # other nodes have been asked
            self.cache.metrics.lookups.labels("miss", "leader-failed").inc()
            return await self._lead(key, why, shared, body, storing, asks_usage, None)
        lookup = self._ask(key)
        leased = storing and shared is not None and not any(served_by) and self.options.client.api_servers > 1
        if lookup is None and not leased:
            self.cache.metrics.lookups.labels("miss", why).inc()
        return await self._lead(key, why, shared, body, storing, asks_usage, lookup, leased)

    def _served_by(self) -> tuple[object, ...]:
        headers = self.scope["headers"]
        fields = (self.body.get(name) or None for name in _SERVED_BY)  # a priority of 0 is the default
        return (*fields, *(first_header(headers, name) for name in _SERVED_BY_HEADERS))

    async def _follow(self, flight: Flight, why: str) -> bool:
        """Read somebody else's computation; False, with nothing sent, when it came to nothing."""
        strips_usage = self.chooses_usage and not self.wants_usage
        follower = Relay(flight.join(), self.send, forward_status(why, collapsed=True), strips_usage)
        try:
            async with leaving_on_disconnect(self.receive, follower.reader):
                await follower.follow(self.options.follow_deadline_s, self.options.stalled_stream_s, self.ids())
        except LeaderFailed:
            if not follower.started:
                flight.close()  # the first follower that it fails leads the others
                return False
            if flight.error is not None:
                raise flight.error from None  # as for the leader: the server ends the connection
        except Laggard:
            pass  # the server ends the connection of a response that is not complete
        self.cache.metrics.lookups.labels(*(("hit", "network") if flight.from_cache else ("collapsed", why))).inc()
        return True

    async def _lead(
        self,
        key: RequestKey,
        why: str,
        shared: object,
        body: bytes,
        storing: bool,
        asks_usage: bool,
        lookup: Pending | None,
        leased: bool = False,
    ) -> None:
        # Whatever may raise comes before the flight is open: one that never starts would hold up who joins it.
        taking = collector(self.endpoint) if storing else None
        adds_usage = asks_usage and not self.wants_usage
        flight = self.cache.flights.open(shared, taking)
        if storing:
            flight.on_end = partial(self._ended, key, flight, leased)
        leader = Relay(flight.join(), self.send, forward_status(why, stored=storing), adds_usage)
        race = None if lookup is None else self._race(key, why, flight, lookup, asks_usage)
        app = partial(self._leased, key, why, flight, race) if leased else race or self.app
        self._abort = aborts.watch()
        flight.start(app, with_content_length(self.scope, len(body)), body)
        try:
            async with leaving_on_disconnect(self.receive, leader.reader):
                await leader.lead(forward_status(why))
        except LeaderFailed:
            if flight.error is not None:
                raise flight.error from None
        except Laggard:
            pass
        if race is not None and race.outcome in HITS:
            self.cache.metrics.network_hit_seconds.observe(time.perf_counter() - self.started_s)

    def _race(self, key: RequestKey, why: str, flight: Flight, lookup: Pending, usage: bool) -> NetworkRace:
        def decided(outcome: Outcome) -> None:
            self._count(outcome)
            if outcome in HITS:
                flight.from_cache = True  # the node stores it by itself
            else:
                self.cache.metrics.lookups.labels("miss", why).inc()

        return NetworkRace(self.app, lookup, partial(self._answer_found, key, usage), decided, self.cache.sending)

    async def _leased(
        self,
        key: RequestKey,
        why: str,
        flight: Flight,
        race: NetworkRace | None,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """The application, unless another API server of the node computes the same: then that one's answer.

        Who streams doesn't wait: the other's frames can't be had, and its end is later than one's own first frame.
        """
        if self.streams:
            self.cache.node.lead(key)
        elif not await self.cache.node.lead_or_wait(key, self.options.follow_deadline_s):
            if (answer := await self._answer_of_another(key)) is not None:
                flight.from_cache = True
                self.cache.metrics.lookups.labels("collapsed", why).inc()
                for message in answer.messages(self.cache.sending):
                    await send(message)
                return
            self.cache.node.lead(key)
        if race is None:
            self.cache.metrics.lookups.labels("miss", why).inc()
        await (race or self.app)(scope, receive, send)

    async def _answer_of_another(self, key: RequestKey) -> StoredAnswer | None:
        """What another API server has just handed to the node, once the database has it."""
        for _ in range(_COMMIT_LOOKS):
            now_ms = self.options.clock()
            if (entry := await self.entry(key, now_ms)) is not None:
                try:
                    answer = await self._render(entry, self.wants_usage, now_ms, "exact")
                except Busy:
                    return None
                return answer and answer.with_status(forward_status("uri-miss", collapsed=True))
            await asyncio.sleep(_COMMIT_LOOK_S)
        return None

    async def _ended(self, key: RequestKey, flight: Flight, leased: bool) -> None:
        try:
            if not flight.from_cache:
                self.cache.metrics.stored.labels(await self._judge(key, flight)).inc()
        except Exception:
            report_error("the response cache: an answer is not stored")
        finally:
            if leased:
                self.cache.node.done(key)

    async def _judge(self, key: RequestKey, flight: Flight) -> str:
        taken = flight.collector
        if not flight.complete or taken is None or self._abort.happened:
            return "unfinished"
        if flight.status != 200:
            return "error"

        def judged() -> Admitted | NotStored:
            raw = taken.result() if flight.streams else bytes(flight.body)
            return raw if isinstance(raw, NotStored) else admit(self.endpoint, self.body, raw)

        answer = await self.cache.bodies.in_turn(taken.size if flight.streams else len(flight.body), judged)
        if isinstance(answer, NotStored):
            return answer.reason
        if self.names() != self.named_as or self.options.weights_changes() != self._weights_changes:
            return "model_changed"
        now_ms = self.options.clock()
        if self._first_sample_stays and self.cache.recent.newer(key, None, now_ms) is not None:
            result = "kept"  # another computation was quicker
        else:
            result = self.hand_over(key, answer.body, self.question)
        if self._doubted is not None:
            await checks.report(self, self._doubted, answer.body)
        return result

    def hand_over(self, key: RequestKey, body: bytes, question: Question | None = None) -> str:
        """Give an answer to the node, and keep it until the database has it; "sent" or "dropped"."""
        message = StoreResponse(
            key,
            self.reach.scope,
            self.options.model_digest() or b"",
            self.options.engine_version[:256],
            self.options.ttl_ms,
            body,
            question,
        )
        now_ms = self.options.clock()
        if not self.options.client.send(message):
            return "dropped"
        self.cache.recent.add(key, StoredResponse(body, b"", now_ms, now_ms + self.options.ttl_ms), now_ms)
        return "sent"
