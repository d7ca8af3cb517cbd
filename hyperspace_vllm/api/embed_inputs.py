"""Answers a request for embeddings from the stored inputs, and has the engine compute the others.

Embeddings are not shared with other nodes: computing one takes less time than asking them.
"""

import asyncio
import base64
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..core.records.ids import RequestKey
from ..core.response.request_key import Uncacheable, request_key
from ..response_db import StoredResponse
from .cache_port import InputsPort
from .coalesce import ABANDONED_GRACE_S
from .embeddings import Embedding, decode, inputs_of, is_finite, merged, request_of
from .http_headers import RawHeaders, forward_status, hit_headers
from .naming import Names
from .stored_answer import json_headers
from .subrequest import ask


@dataclass(frozen=True, slots=True)
class PassedBy:
    """vLLM answers the whole request, for this reason."""

    why: str
    reason: str


@dataclass(frozen=True, slots=True)
class NoneStored:
    """The request asked for stored inputs only, and some are missing."""

    why: str


@dataclass(frozen=True, slots=True)
class Made:
    """A 200."""

    headers: RawHeaders
    body: bytes


class Inputs:
    """A request for embeddings that has a key, by `names`."""

    def __init__(self, port: InputsPort, names: Names) -> None:
        self._port = port
        self._names = names

    async def answer(self) -> PassedBy | NoneStored | Made:
        """The answer to all inputs, or the other way that the request takes."""
        port, wishes = self._port, self._port.facts.wishes
        requests = await port.read(partial(_requests, port.facts.body, self._names))
        if isinstance(requests, Uncacheable):
            return PassedBy("bypass", requests.reason)
        if await port.is_refused():
            return PassedBy("bypass", "refused")
        keys = [key for key, _ in requests]
        missing = dict(requests)
        now_ms = port.now_ms()
        entries = {} if wishes.no_cache else await self._entries(list(missing), now_ms)
        found = {key: embedding for key, entry in entries.items() if (embedding := self._usable(entry, now_ms))}
        for key in found:
            port.touch(key)
            del missing[key]
        if not found and not port.has_node and not wishes.only_if_cached:
            return PassedBy("uri-miss", "no_node")
        if missing and wishes.only_if_cached:
            return NoneStored("partial" if found else "uri-miss")
        computed = await self._compute(await port.read(partial(self._bodies, missing)))
        if len(computed) < len(missing):
            self._store(computed)
            # vLLM reports the error in the request.
            return PassedBy("request" if wishes.no_cache else "uri-miss", "failed")
        if missing:
            why = "request" if wishes.no_cache else "partial" if found else "uri-miss"
            port.count_lookup("miss", why)
            detail = f'"{len(found)} of {len(found) + len(missing)} stored"' if found else ""
            headers = [(b"cache-status", forward_status(why, stored=self._store(computed), detail=detail))]
        else:
            port.count_lookup("hit", "local")
            headers = _hit_headers([entry for entry in entries.values() if entry], now_ms)
        encoding = port.facts.body.get("encoding_format", "float")
        embeddings = [(found | computed)[key] for key in keys]
        merge = partial(merged, embeddings, encoding, port.facts.own_ids().answer)
        body = await port.write(sum(len(each.vector) for each in embeddings), merge)
        return Made(headers + json_headers(body), body)

    def _bodies(self, missing: dict[RequestKey, dict[str, Any]]) -> dict[RequestKey, bytes]:
        return {key: self._port.for_engine(request) for key, request in missing.items()}

    async def _entries(self, keys: list[RequestKey], now_ms: int) -> dict[RequestKey, StoredResponse | None]:
        """The entries that can be read within one read's deadline."""
        entries: dict[RequestKey, StoredResponse | None] = {}
        with suppress(TimeoutError):
            async with asyncio.timeout(self._port.read_deadline_s):
                for key in keys:
                    entries[key] = await self._port.entry(key, now_ms)
        return entries

    def _store(self, computed: dict[RequestKey, Embedding]) -> bool:
        """Send the computed embeddings to the node; whether any was sent."""
        port = self._port
        same = port.naming.names() == self._names  # else the weights have changed meanwhile
        results = [port.hand_over(key, each.encode()) if same else "model_changed" for key, each in computed.items()]
        for result in results:
            port.count_stored(result)
        return "sent" in results

    def _usable(self, entry: StoredResponse | None, now_ms: int) -> Embedding | None:
        if entry is None:
            return None
        age_s, ttl_s = (now_ms - entry.computed_at_ms) // 1000, (entry.expires_at_ms - now_ms) // 1000
        return decode(entry.body) if self._port.facts.wishes.allows(max(age_s, 0), max(ttl_s, 0)) else None

    async def _compute(self, missing: dict[RequestKey, bytes]) -> dict[RequestKey, Embedding]:
        """The embeddings of the missing inputs; a refused one ends the others, and the computed ones are kept."""
        if not missing:
            return {}
        gone = asyncio.Event()

        async def watch() -> None:
            await self._port.client.until_gone()
            gone.set()

        async def compute(key: RequestKey, body: bytes) -> tuple[RequestKey, Embedding | None]:
            raw = await ask(self._port.engine, self._port.facts.scope, body, gone)
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
                task.add_done_callback(_retrieve_exception)
                asyncio.get_running_loop().call_later(ABANDONED_GRACE_S, task.cancel)
        return computed


def _requests(body: dict[str, Any], names: Names) -> list[tuple[RequestKey, dict[str, Any]]] | Uncacheable:
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


def _retrieve_exception(task: asyncio.Task[object]) -> None:
    """An error of a computation that no request waits for is not logged."""
    if not task.cancelled():
        task.exception()


def _hit_headers(entries: list[StoredResponse], now_ms: int) -> RawHeaders:
    """Of the oldest of them, with the proof if there is one alone."""
    age_s = max(max(now_ms - entry.computed_at_ms, 0) for entry in entries) // 1000
    ttl_s = min(max(entry.expires_at_ms - now_ms, 0) for entry in entries) // 1000
    proof = base64.b64encode(entries[0].proof) if len(entries) == 1 else b""
    return hit_headers(age_s, ttl_s, proof, "exact")
