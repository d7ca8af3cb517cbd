"""Answers a request for embeddings from what is stored of its inputs, and has the engine compute the rest.

Nothing of it is shared with other nodes: an embedding takes less time than asking them.
"""

import asyncio
import base64
import json
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from ..core.records.ids import RequestKey
from ..core.response.request_key import Uncacheable, request_key
from ..response_db import StoredResponse
from .coalesce import ABANDONED_GRACE_S
from .embeddings import Embedding, decode, inputs_of, is_finite, merged, request_of
from .http_headers import forward_status, hit_headers
from .request_body import rewritten
from .stored_answer import json_headers
from .subrequest import ask

if TYPE_CHECKING:
    from .exchange import Exchange, Names


async def answer_inputs(exchange: "Exchange", names: "Names") -> None:
    """Answer an exchange whose request has a key, by `names`."""
    requests = await exchange.read(partial(_requests, exchange.body, names))
    if isinstance(requests, Uncacheable):
        return await exchange.bypass("bypass", requests.reason)
    if await exchange.is_refused():
        return await exchange.bypass("bypass", "refused")
    keys = [key for key, _ in requests]
    missing = dict(requests)
    now_ms = exchange.options.clock()
    entries = {} if exchange.wishes.no_cache else await _entries(exchange, list(missing), now_ms)
    found = {key: embedding for key, entry in entries.items() if (embedding := _usable(exchange, entry, now_ms))}
    for key in found:
        exchange.cache.touches.add(key)
        del missing[key]
    if not found and not exchange.options.client.connected and not exchange.wishes.only_if_cached:
        return await exchange.bypass("uri-miss", "no_node")
    if missing and exchange.wishes.only_if_cached:
        return await exchange.not_cached("partial" if found else "uri-miss")
    computed = await _compute(exchange, await exchange.read(partial(_bodies, missing, exchange.salt)))
    if len(computed) < len(missing):
        _store(exchange, computed, names)
        # vLLM says by itself what is wrong with the request.
        return await exchange.bypass("request" if exchange.wishes.no_cache else "uri-miss", "failed")
    if missing:
        why = "request" if exchange.wishes.no_cache else "partial" if found else "uri-miss"
        exchange.cache.metrics.lookups.labels("miss", why).inc()
        detail = f'"{len(found)} of {len(found) + len(missing)} stored"' if found else ""
        status = forward_status(why, stored=_store(exchange, computed, names), detail=detail)
        headers = [(b"cache-status", status)]
    else:
        exchange.cache.metrics.lookups.labels("hit", "local").inc()
        headers = _hit_headers([entry for entry in entries.values() if entry], now_ms)
    encoding = exchange.body.get("encoding_format", "float")
    embeddings = [(found | computed)[key] for key in keys]
    merge = partial(merged, embeddings, encoding, exchange.ids().answer)
    body = await exchange.cache.bodies.always(sum(len(each.vector) for each in embeddings), merge)
    await exchange.send({"type": "http.response.start", "status": 200, "headers": headers + json_headers(body)})
    return await exchange.send({"type": "http.response.body", "body": body})


def _requests(body: dict[str, Any], names: "Names") -> list[tuple[RequestKey, dict[str, Any]]] | Uncacheable:
    """The request for each of the inputs, with its key."""
    inputs = inputs_of(body)
    if isinstance(inputs, Uncacheable):
        return inputs
    requests = []
    for given in inputs:
        request = request_of(body, given)
        key = request_key("embeddings", request, *names)
        assert not isinstance(key, Uncacheable)  # the whole request has one
        requests.append((key, request))
    return requests


def _bodies(missing: dict[RequestKey, dict[str, Any]], salt: object) -> dict[RequestKey, bytes]:
    return {
        key: rewritten(json.dumps(request).encode(), request, None, salt, add_usage=False)
        for key, request in missing.items()
    }


async def _entries(
    exchange: "Exchange", keys: list[RequestKey], now_ms: int
) -> dict[RequestKey, StoredResponse | None]:
    """Those that can be had within one read's deadline."""
    entries: dict[RequestKey, StoredResponse | None] = {}
    with suppress(TimeoutError):
        async with asyncio.timeout(exchange.options.read_deadline_s):
            for key in keys:
                entries[key] = await exchange.entry(key, now_ms)
    return entries


def _store(exchange: "Exchange", computed: dict[RequestKey, Embedding], names: object) -> bool:
    """Hand over what was computed; whether any of it was sent."""
    same = exchange.names() == names  # else the weights have changed meanwhile
    results = [exchange.hand_over(key, each.encode()) if same else "model_changed" for key, each in computed.items()]
    for result in results:
        exchange.cache.metrics.stored.labels(result).inc()
    return "sent" in results


def _usable(exchange: "Exchange", entry: StoredResponse | None, now_ms: int) -> Embedding | None:
    if entry is None:
        return None
    age_s, ttl_s = (now_ms - entry.computed_at_ms) // 1000, (entry.expires_at_ms - now_ms) // 1000
    return decode(entry.body) if exchange.wishes.allows(max(age_s, 0), max(ttl_s, 0)) else None


async def _compute(exchange: "Exchange", missing: dict[RequestKey, bytes]) -> dict[RequestKey, Embedding]:
    """The embeddings of what is missing; those that were there first if one is refused, which ends the others."""
    if not missing:
        return {}
    gone = asyncio.Event()

    async def watch() -> None:
        while (await exchange.receive())["type"] != "http.disconnect":
            pass
        gone.set()

    async def compute(key: RequestKey, body: bytes) -> tuple[RequestKey, Embedding | None]:
        raw = await ask(exchange.app, exchange.scope, body, gone)
        embedding = None if raw is None else decode(raw)
        return key, embedding if embedding is not None and is_finite(embedding) else None

    watcher = asyncio.create_task(watch(), name="hyperspace-disconnect")
    tasks = [asyncio.create_task(compute(*each), name="hyperspace-embedding") for each in missing.items()]
    computed: dict[RequestKey, Embedding] = {}
    try:
        for each in asyncio.as_completed(tasks):
            key, embedding = await each
            if embedding is None:
                break
            computed[key] = embedding
    finally:
        watcher.cancel()
        gone.set()
        for task in tasks:
            task.add_done_callback(_heard)
            asyncio.get_running_loop().call_later(ABANDONED_GRACE_S, task.cancel)
    return computed


def _heard(task: asyncio.Task[object]) -> None:
    """An error of a computation that no request waits for is not logged."""
    if not task.cancelled():
        task.exception()


def _hit_headers(entries: list[StoredResponse], now_ms: int) -> list[tuple[bytes, bytes]]:
    """Of the oldest of them, with the proof if there is one alone."""
    age_s = max(max(now_ms - entry.computed_at_ms, 0) for entry in entries) // 1000
    ttl_s = min(max(entry.expires_at_ms - now_ms, 0) for entry in entries) // 1000
    proof = base64.b64encode(entries[0].proof) if len(entries) == 1 else b""
    return hit_headers(age_s, ttl_s, proof, "exact")
