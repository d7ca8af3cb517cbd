"""A fleet's responses in its Redis: read before peers are asked, with or without a network.

    hyperspace:<network, 16 hex digits>:response:<request hash, 64 hex digits>   a Hit (peer_wire.py), until it expires

Responses that this node's engines computed, and that may leave it, are written once they are committed, sealed and with
their CacheProof, as they would be served to a member. Redis is trusted no more than a peer: the same function judges
its answers. The machine of a lookup (core/response/lookup.py) says when it is read.
"""

import asyncio
from collections.abc import Iterable, Mapping

from ...contained import report_error
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
from ..responses.fetched_response import open_fetched
from ..responses.response_server import ResponseServer
from ..responses.store_changes import ServableEntry
from .redis_link import AWAY, WRITE_S, RedisLink

QUEUE_MAX = 20_000  # ids, some 4 MiB; a body is read from the database when its turn comes
SAME_MS = 1_000  # tolerance between two expiries of one entry: clocks are set and commands travel
BUSY_S = 0.1  # until this node's database is read again


class RedisResponses:
    """Create it in a running event loop. `responses` are this node's own, as it serves them."""

    def __init__(
        self, url: str, network_id: NetworkId, responses: ResponseServer, trust: Trust, metrics: Metrics
    ) -> None:
        self._link = RedisLink(url)
        self._id = network_id
        self._responses = responses
        self._trust = trust
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
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
        self._writer.cancel()
        await asyncio.wait([self._writer], timeout=WRITE_S)
        await self._link.close()

    # --- reading --------------------------------------------------------------------------------

    @property
    def is_away(self) -> bool:
        """Whether Redis failed a moment ago, and is not asked now."""
        return self._link.away_s > 0

    def is_purged(self, request_hash: bytes) -> bool:
        """Whether a response is about to be deleted."""
        return request_hash in self._purged

    async def read(self, key: RequestKey, model_digest: bytes, timeout_s: float) -> Opened:
        """The response in Redis, if it is valid; `Refused` says why not (`redis_away`: it did not answer)."""
        began_s = self._loop.time()
        try:
            opened = await self._read(key, model_digest, timeout_s)
        except Refused as refused:
            self._count_lookup("miss", refused.reason, began_s)
            raise
        self._count_lookup("hit", "hit", began_s)
        return opened

    async def _read(self, key: RequestKey, model_digest: bytes, timeout_s: float) -> Opened:
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

    def heard(self, stored: tuple[ServableEntry, ...]) -> None:
        """Take what this node can serve now; from any thread. Entries that it evicts stay in Redis."""
        computed = {told.request_hash: told.expires_at_ms for told in stored if told.computed}
        self._loop.call_soon_threadsafe(self._enqueue, computed)

    def purge(self, keys: Iterable[bytes]) -> None:
        """Delete these entries from Redis too."""
        names = [request_hash(self._id, RequestKey(key)) for key in keys]
        self._purged.update(names)
        self._enqueue(dict.fromkeys(names))

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
