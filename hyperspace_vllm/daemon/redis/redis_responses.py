"""A fleet's responses in its Redis: asked between the client's lookup and the network's, with or without a network.

    hyperspace:<network, 16 hex digits>:response:<request hash, 64 hex digits>   a Hit (peer_wire.py), until it expires

    find ──▶ Redis has it, and it is valid ──▶ the answer, stored here too
      └────▶ a miss, or Redis is away ────▶ NetworkDriver.find, with the time that is left

Responses that this node's engines computed, and that may leave it, are written once they are committed, sealed and with
their CacheProof, as they would be served to a member. Redis is trusted no more than a peer: the same function judges
its answers.

Context: peers first hint, then answer. Choice: one bounded command, whose answer is the hint as well. Rejected: a hint
as soon as the key exists, because then a client that fills Redis with useless data makes every request wait for its
deadline.
"""

import asyncio
from collections.abc import Iterable, Mapping
from typing import Protocol

from ...contained import report_error
from ...core.local.message_fields import Scope
from ...core.peers.trust import Trust
from ...core.records.errors import ProtocolViolation, Refused
from ...core.records.ids import NetworkId, RequestKey
from ...core.records.limits import STREAM_FRAME_BYTES_MAX
from ...core.records.peer_wire import Hit, Miss, decode_answer, encode
from ...core.response.cache_proof import request_hash
from ...core.response.sealed_hit import Opened
from .. import clock
from ..metrics import Metrics
from ..responses.answer_places import OWN_NODE
from ..responses.fetched_response import Stored, found_response, keep, open_fetched
from ..responses.response_lookups import Clients
from ..responses.response_server import ResponseServer
from ..responses.store_changes import ServableEntry
from .redis_link import AWAY, READ_S, WRITE_S, RedisLink

READS_MAX = 8  # at once, of at most 8 MiB each; further lookups skip Redis
QUEUE_MAX = 20_000  # ids, some 4 MiB; a body is read from the database when its turn comes
SAME_MS = 1_000  # tolerance between two expiries of one entry: clocks are set and commands travel
BUSY_S = 0.1  # until this node's database is read again


class Network(Protocol):
    """Continues a lookup that finds nothing in Redis (NetworkDriver)."""

    def find(
        self, lookup: int, request_key: RequestKey, model_digest: bytes, deadline_ms: int, beside_redis: bool
    ) -> None:
        """Look for a response at other nodes; `beside_redis`: without peers the client should keep asking."""

    def release(self, lookup: int) -> None:
        """The client no longer waits for the lookup."""

    def used(self, keys: Iterable[bytes]) -> None:
        """Count hits of this host's clients."""

    def purge(self, keys: Iterable[bytes]) -> None:
        """Delete these entries."""

    def heard(self, stored: tuple[ServableEntry, ...], gone: tuple[bytes, ...]) -> None:
        """Take what this node can serve now, and what it no longer can; from any thread."""


class RedisResponses:
    """Lookups end at `clients`; what is found is stored. Create it in a running event loop."""

    def __init__(
        self,
        url: str,
        network_id: NetworkId,
        scope: Scope,
        responses: ResponseServer,
        trust: Trust,
        metrics: Metrics,
        network: Network,
        clients: Clients,
        store: Stored,
    ) -> None:
        self._link = RedisLink(url)
        self._id = network_id
        self._scope: Scope = scope
        self._responses = responses
        self._trust = trust
        self._metrics = metrics
        self._network = network
        self._clients = clients
        self._store = store
        self._loop = asyncio.get_running_loop()
        self._reading: dict[int, tuple[RequestKey, asyncio.Task[None]]] = {}
        self._queue: dict[bytes, int | None] = {}  # request hash -> expires at; None: nothing to write
        self._purged: set[bytes] = set()  # of those in `_queue`: to be deleted first, and not read until then
        self._wake = asyncio.Event()
        self._counts = dict.fromkeys(("written", "dropped", "hits"), 0)
        self._writer = asyncio.create_task(self._write(), name="redis-responses")

    def status(self) -> dict[str, object]:
        """What `hyperspace status` shows."""
        return {"state": "away" if self._link.failing else "on", "queued": len(self._queue), **self._counts}

    async def close(self) -> None:
        """Close the connections; queued entries are reported again when the node restarts."""
        tasks = [self._writer, *(task for _, task in self._reading.values())]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=WRITE_S)
        await self._link.close()

    # --- lookups (response_lookups.ResponseFinder) ----------------------------------------------

    def find(self, lookup: int, request_key: RequestKey, model_digest: bytes, deadline_ms: int) -> None:
        """Look for a response in Redis, for READ_S at most, and then in the network."""
        purged = request_hash(self._id, request_key) in self._purged
        if purged or self._link.away_s > 0 or len(self._reading) >= READS_MAX:
            self._ask_network(lookup, request_key, model_digest, deadline_ms)
            return
        work = self._find(lookup, request_key, model_digest, deadline_ms)
        task = asyncio.create_task(work, name="redis-response")
        self._reading[lookup] = request_key, task
        task.add_done_callback(lambda _: self._reading.pop(lookup))

    def release(self, lookup: int) -> None:
        """The client no longer waits for the lookup."""
        if (reading := self._reading.get(lookup)) is not None:
            reading[1].cancel()
        self._network.release(lookup)

    async def _find(self, lookup: int, key: RequestKey, model_digest: bytes, deadline_ms: int) -> None:
        began_s = self._loop.time()
        try:
            opened = await self._read(key, model_digest, min(READ_S, deadline_ms / 1000))
        except Refused as refused:
            self._count_lookup("miss", refused.reason, began_s)
            left_ms = deadline_ms - round((self._loop.time() - began_s) * 1000)
            self._ask_network(lookup, key, model_digest, max(left_ms, 1))
            return
        self._count_lookup("hit", "hit", began_s)
        keep(self._store, key, opened, self._scope)
        self._clients.answer(lookup, found_response(opened, "redis", self._trust, clock.now()), "hit")

    def _ask_network(self, lookup: int, key: RequestKey, model_digest: bytes, deadline_ms: int) -> None:
        self._network.find(lookup, key, model_digest, deadline_ms, beside_redis=self._link.away_s <= 0)

    async def _read(self, key: RequestKey, model_digest: bytes, timeout_s: float) -> Opened:
        """The response in Redis, if it is valid; `Refused` says why not."""
        try:
            # One byte more than the maximum: a larger value shows, and isn't read whole.
            name = self._key(request_hash(self._id, key))
            value = await self._ask(timeout_s, "GETRANGE", name, 0, STREAM_FRAME_BYTES_MAX)
        except AWAY as error:
            raise Refused("redis_away") from error
        if not isinstance(value, bytes):
            raise Refused("redis_error")
        if not value:
            raise Refused("not_found")
        if len(value) > STREAM_FRAME_BYTES_MAX:
            raise Refused("too_large", str(len(value)))
        try:
            hit = decode_answer(value)
            if not isinstance(hit, Hit):
                raise ProtocolViolation(f"{type(hit).__name__}: expected a Hit")
            return await open_fetched(hit, key, self._id, model_digest, self._trust, clock.now())
        except ProtocolViolation as violation:
            raise Refused("protocol") from violation

    def _count_lookup(self, result: str, reason: str, began_s: float) -> None:
        self._counts["hits"] += result == "hit"
        self._metrics.lookups_total.labels("redis", result, reason).inc()
        self._metrics.lookup_seconds.labels("redis").observe(self._loop.time() - began_s)
        if reason not in ("hit", "not_found", "redis_error"):  # `_ask` counts the last one
            self._metrics.failures_total.labels("l1", reason).inc()

    # --- writing --------------------------------------------------------------------------------

    def heard(self, stored: tuple[ServableEntry, ...], gone: tuple[bytes, ...]) -> None:
        """Take what this node can serve now, and what it no longer can (store_changes.Listener); from any thread.

        Entries evicted here stay in Redis.
        """
        self._network.heard(stored, gone)
        computed = {told.request_hash: told.expires_at_ms for told in stored if told.computed}
        self._loop.call_soon_threadsafe(self._enqueue, computed)

    def used(self, keys: Iterable[bytes]) -> None:
        """Count hits of this host's clients, which Redis counts nowhere."""
        self._network.used(keys)

    def purge(self, keys: Iterable[bytes]) -> None:
        """Delete these entries from Redis too: open lookups of them end, as they would store them again."""
        purged = {RequestKey(key) for key in keys}
        names = [request_hash(self._id, key) for key in purged]
        self._purged.update(names)
        self._enqueue(dict.fromkeys(names))
        for lookup, (key, task) in self._reading.items():
            if key in purged and task.cancel():
                self._clients.answer(lookup, None, "not_found")
        self._network.purge(purged)

    def _enqueue(self, changes: Mapping[bytes, int | None]) -> None:
        for name, expires_at_ms in changes.items():
            self._queue.pop(name, None)
            self._queue[name] = expires_at_ms
            if len(self._queue) > QUEUE_MAX:
                oldest = next(iter(self._queue))
                del self._queue[oldest]
                self._purged.discard(oldest)
                self._counts["dropped"] += 1
        self._wake.set()

    async def _write(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                try:
                    await self._write_oldest()
                except AWAY:
                    await asyncio.sleep(self._link.away_s)
                except Exception:  # a bug of ours: it costs one entry, not the writer
                    report_error("the writer of shared responses")
                    await asyncio.sleep(BUSY_S)

    async def _write_oldest(self) -> None:
        name = next(iter(self._queue))
        key = self._key(name)
        if name in self._purged:
            await self._ask(WRITE_S, "DEL", key)
            self._purged.discard(name)
            if self._queue.get(name, 0) is None:  # else it was computed again since
                del self._queue[name]
            return
        held_ms = await self._ask(WRITE_S, "PTTL", key)
        # Only now, because without Redis it stays queued. An entry that fails from here on is lost: it might fail for
        # ever.
        expires_at_ms = self._queue.get(name)
        if expires_at_ms is None:
            return  # purged in the meantime, and its turn comes; or dropped
        del self._queue[name]
        left_ms = expires_at_ms - clock.wall_ms()
        # A starting node reports all its entries, of which most are in Redis already.
        if left_ms <= 0 or not isinstance(held_ms, int) or left_ms <= held_ms + SAME_MS:
            return
        hit = await self._responses.answer(name, 0, OWN_NODE)
        if hit == Miss("busy"):
            self._queue.setdefault(name, expires_at_ms)
            await asyncio.sleep(BUSY_S)
        elif isinstance(hit, Hit):  # else it has gone in the meantime
            value = encode(hit)
            if await self._ask(WRITE_S, "SET", key, value, "PX", left_ms) is True:
                self._counts["written"] += 1
                self._metrics.bytes_total.labels("shared").inc(len(value))

    # --- leaves ---------------------------------------------------------------------------------

    def _key(self, request_hash: bytes) -> str:
        return f"hyperspace:{self._id.hex()[:16]}:response:{request_hash.hex()}"

    async def _ask(self, timeout_s: float, *command: str | bytes | int) -> object:
        """Redis's answer, its own errors included (a value of another type, out of memory); raises one of `AWAY`."""
        pipeline = self._link.redis.pipeline(transaction=False)
        pipeline.execute_command(*command)
        (said,) = await self._link.within(timeout_s, pipeline.execute(raise_on_error=False))
        if isinstance(said, Exception):
            self._metrics.failures_total.labels("l1", "redis_error").inc()
        return said
