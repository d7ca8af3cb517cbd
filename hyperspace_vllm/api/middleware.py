"""The response cache as pure ASGI middleware, innermost in vLLM's stack: inside its authentication.

A request takes one of these ways, which `Cache-Status` reports:

    bypass     its bytes do not determine its answer, or it may not be stored: vLLM answers, with a signed scope at most
    hit        the node's database has the answer: replayed as JSON, or as the frames of a stream
    similar    the database has the answer to another wording of its question (if the server enables that): likewise
    collapsed  the same request is being computed for another client: both read one computation's log
    network    other nodes are asked first, or while vLLM computes (network_race.py): a hit if they answer in time
    miss       computed, passed on frame by frame, and sent to the node if it finishes cleanly

All state of a request is in its `RequestContext`; exchange.py chooses its way, and states/ has the ways. The middleware
itself keeps the table of computations that may be joined, the database reader, and the answers and hits that are on
their way to the node, all bounded.
"""

import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..contained import contained, report_error
from ..core.response.request_fields import ENDPOINTS, SALTED, SCOPED, Endpoint
from ..core.response.request_key import Uncacheable, parse_request
from ..core.response.scope import api_key_of, engine_salt, sign_scope, tenant_of
from .audits import Audits
from .checks import OneAtATime
from .coalesce import FlightTable
from .database_lookup import DatabaseLookup, Recent, Touches
from .exchange import Exchange
from .http_headers import Directives, first_header, forward_status, header, parse_cache_control
from .l1_metrics import l1_metrics
from .large_bodies import Busy, LargeBodies
from .node_lookup import NodeLookup
from .options import ResponseCacheOptions
from .ready_answer import Ready
from .request_body import read_body, read_rest, replayed, rewritten, with_content_length
from .request_context import RequestContext
from .request_facts import facts_of
from .states.refusals import Bypass, NotCached
from .stored_answer import Sending

Answer = Callable[[], Awaitable[Ready | None]]

_PRIVATE_SALT = "private"  # no secret: it only keeps KV here


class ResponseCacheMiddleware:
    """Answers repeated POSTs to `ENDPOINTS`; passes everything else on unchanged."""

    def __init__(self, app: ASGIApp, options: ResponseCacheOptions) -> None:
        self.app = app
        self.options = options
        ttl_ms, deadline_s = options.ttl_ms, options.read_deadline_s
        self.lookup = DatabaseLookup(options.db_path, ttl_ms, deadline_s) if options.db_path else None
        self.bodies = LargeBodies(options.body_deadline_s)
        self.flights = FlightTable(self.bodies)
        self.recent = Recent()
        self.sending = Sending()
        self.touches = Touches(options.client)
        self.node = NodeLookup(options.client)
        self.checks = OneAtATime()
        self.audits = Audits()
        self.metrics = l1_metrics()
        self._has_tenants = len(set(options.api_keys)) > 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request (ASGI 3). If Hyperspace fails before the way is chosen, the application answers."""
        endpoint = _endpoint(scope)
        if endpoint is None and not self._changes(scope):
            await self.app(scope, receive, send)
            return
        ready = await self._answer(endpoint, scope, receive, send)
        if ready is not None:  # here nothing of the request is held any more
            await ready.send()

    async def _answer(self, endpoint: Endpoint | None, scope: Scope, receive: Receive, send: Send) -> Ready | None:
        heard: list[Message] = []

        async def hear() -> Message:
            heard.append(await receive())
            return heard[-1]

        try:
            way = partial(self._way, endpoint) if endpoint is not None else self._salted
            answer = await way(scope, receive, hear, send)
        except Exception:
            report_error("the response cache")
            answer = partial(self.app, scope, replayed(heard, receive), send)
        return await answer()

    async def _way(self, endpoint: Endpoint, scope: Scope, receive: Receive, hear: Receive, send: Send) -> Answer:
        """How a request will be answered. `hear` is `receive`, remembered."""
        raw, too_large = await read_body(hear), False
        if isinstance(raw, list) and (self._has_tenants or _stays_here(scope)) and _is_json(scope):
            raw, too_large = await read_rest(raw, hear), True
        if isinstance(raw, list):
            return partial(self._untouched, scope, replayed(raw, receive), send, "too_large")
        if not _is_json(scope):
            return await self._not_json(scope, raw, receive, send)
        try:
            body, lenient = await self.bodies.work(len(raw), partial(_parsed, raw, too_large))
        except Busy:
            if _wishes(scope).only_if_cached and self.lookup is not None:
                return partial(NotCached(self._context(endpoint, raw, {}, scope, receive, send)).answer, "busy")
            # The salt that separates tenants and the private scope are added anyway, at the cost of vLLM's own read.
            must = self._has_tenants or _stays_here(scope)
            body, lenient = Uncacheable("busy"), _as_vllm_reads(raw) if must else None
        if not isinstance(body, Uncacheable):
            return Exchange(self._context(endpoint, raw, body, scope, receive, send)).answer
        if lenient is None:
            request = replayed([{"type": "http.request", "body": raw, "more_body": False}], receive)
            return partial(self._untouched, scope, request, send, body.reason)
        # It has no key, but the connector still needs the scope of its KV.
        context = self._context(endpoint, raw, lenient, scope, receive, send)
        return partial(Bypass(context).answer, "bypass", body.reason)

    def _context(
        self, endpoint: Endpoint, raw: bytes, body: dict[str, Any], scope: Scope, receive: Receive, send: Send
    ) -> RequestContext:
        return RequestContext(self, facts_of(self.options, endpoint, raw, body, scope), receive, send)

    def _changes(self, scope: Scope) -> bool:
        """Whether a request to an endpoint without a response cache gets a salt or a scope."""
        path = _path(scope)
        return (path in SALTED and self._has_tenants) or (path in SALTED | SCOPED and _stays_here(scope))

    async def _salted(self, scope: Scope, receive: Receive, hear: Receive, send: Send) -> Answer:
        """A request to an endpoint without a response cache: a salt separates it in vLLM's own prefix cache.

        KV that stays here has a private scope, or a salt, which the connector takes for one, where no scope reaches it.
        """
        raw = await read_body(hear)
        if isinstance(raw, list):
            raw = await read_rest(raw, hear)
        if isinstance(raw, list):
            return partial(self.app, scope, replayed(raw, receive), send)
        path, stays, options = _path(scope), _stays_here(scope), self.options
        authorization = first_header(scope["headers"], b"authorization")
        key = api_key_of(options.api_keys, authorization) if path in SALTED else ""
        tenant = tenant_of(options.fleet_secret, options.api_keys, authorization)
        sign = None
        if stays and path in SCOPED and tenant is not None:
            sign = partial(sign_scope, options.process_secret, "private", tenant)
        salt = _PRIVATE_SALT if stays and path not in SCOPED else None
        raw = await self.bodies.always(len(raw), partial(_with_salt, raw, key, salt, sign))
        request = replayed([{"type": "http.request", "body": raw, "more_body": False}], receive)
        return partial(self.app, with_content_length(scope, len(raw)), request, send)

    async def _not_json(self, scope: Scope, raw: bytes, receive: Receive, send: Send) -> Answer:
        """A request whose Content-Type vLLM refuses, after FastAPI has read the body: remove any scope in it."""
        if _may_hold_scope(raw):
            with suppress(Busy):  # it would not verify
                raw = await self.bodies.work(len(raw), partial(_with_salt, raw, ""))
        request = replayed([{"type": "http.request", "body": raw, "more_body": False}], receive)
        return partial(self._untouched, with_content_length(scope, len(raw)), request, send, "not_json")

    async def _untouched(self, scope: Scope, receive: Receive, send: Send, reason: str) -> None:
        await self.app(scope, receive, self.passing(send, "bypass", reason))

    def passing(self, send: Send, why: str, reason: str) -> Send:
        """`send` for a request that bypasses the cache; reported and counted unless the cache is off."""
        if self.lookup is None:
            return send
        self.metrics.lookups.labels("bypass", reason).inc()
        return _adding_status(send, forward_status(why, detail=reason))


@contained(lambda app, options: app)
def response_cache(app: ASGIApp, options: ResponseCacheOptions) -> ASGIApp:
    """The middleware around `app`, or `app` alone if the middleware cannot be built."""
    return ResponseCacheMiddleware(app, options)


def _endpoint(scope: Scope) -> Endpoint | None:
    return ENDPOINTS.get(_path(scope))


def _path(scope: Scope) -> str:
    """Of a POST."""
    is_post = scope["type"] == "http" and scope["method"] == "POST"
    return scope["path"].removeprefix(scope.get("root_path", "")) if is_post else ""


def _is_json(scope: Scope) -> bool:
    """Whether the Content-Type is JSON, as vLLM reads it: it refuses any other on all of its endpoints."""
    content_type = first_header(scope["headers"], b"content-type") or ""
    return content_type.lower().split(";")[0] == "application/json"


def _may_hold_scope(raw: bytes) -> bool:
    """Whether a body names kv_transfer_params if it is JSON: plainly, in escapes, or in UTF-16 or UTF-32."""
    return b"kv_transfer_params" in raw or b"\\u" in raw or b"\0" in raw[:4]


def _stays_here(scope: Scope) -> bool:
    wishes = _wishes(scope)
    return wishes.private or wishes.no_store


def _wishes(scope: Scope) -> Directives:
    return parse_cache_control(header(scope["headers"], b"cache-control"))


def _parsed(raw: bytes, too_large: bool) -> tuple[dict[str, Any] | Uncacheable, dict[str, Any] | None]:
    """A request's body; for one without a key also what vLLM reads in it."""
    body = Uncacheable("too_large") if too_large else parse_request(raw)
    return body, _as_vllm_reads(raw) if isinstance(body, Uncacheable) else None


def _with_salt(
    raw: bytes,
    api_key: str | None,
    otherwise: str | None = None,
    sign: Callable[[str | None], dict[str, str]] | None = None,
) -> bytes:
    """A body with the salt of that key's tenant, else with `otherwise`, and without a client's own scope.

    `sign` makes the scope that belongs to a salt.
    """
    if (body := _as_vllm_reads(raw)) is None:
        return raw
    salt = engine_salt(api_key, body.get("cache_salt"))
    salt = otherwise if salt is None else salt
    signed = sign(salt) if sign is not None and isinstance(salt, str | None) else None
    return rewritten(raw, body, signed, salt, add_usage=False)


def _as_vllm_reads(raw: bytes) -> dict[str, Any] | None:
    """A body without a key, in which the last of two equal JSON keys counts."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


def _adding_status(send: Send, status: bytes) -> Send:
    async def send_with_status(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), (b"cache-status", status)]}
        await send(message)

    return send_with_status
