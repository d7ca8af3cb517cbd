"""The registry in a fleet's Redis: the alternative to documents passed on between peers, for fleets that have a Redis.

    hyperspace:<network, 16 hex digits>:<id, 64 hex digits>   sorted set: peer id → expires at (ms)
    hyperspace:<network, 16 hex digits>:node:<peer id>        marker: this node's entries are in here

Losing Redis is a miss, never an outage: a read that takes longer than READ_S, or comes while Redis is away, finds no
peers; writes wait in a bounded queue. A Redis that came back without its data has no marker: then a node publishes
everything again. An entry in Redis is a hint, like every registry entry: only well-formed peer ids with a plausible
expiry are used.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from itertools import islice

from ...core.records.errors import ProtocolViolation
from ...core.records.ids import NetworkId, PeerId, public_key_of
from ...core.records.limits import CLOCK_SKEW_MS, PROVIDERS_MAX, REGISTRY_ENTRIES_MAX, REGISTRY_TTL_MS
from .redis_link import AWAY, READ_S, WRITE_S, RedisLink

CHECK_S = 5.0  # between two checks for the marker
BATCH_MAX = 256  # ids written in one round trip
QUEUE_MAX = 2 * REGISTRY_ENTRIES_MAX  # all entries, and as many that are gone: for a long absence of Redis
PEERS_MAX = 64  # of one id; those that expire last stay


class RedisRegistry:
    """This node's entries in Redis, and all nodes' providers from there. Create it in a running event loop."""

    def __init__(self, url: str, network: NetworkId, own_peer: PeerId, clock: Callable[[], int]) -> None:
        self._link = RedisLink(url)
        self._prefix = f"hyperspace:{network.hex()[:16]}:"
        self._own_peer = own_peer
        self._clock = clock
        self._own: dict[bytes, int] = {}  # oldest first
        self._queue: dict[bytes, int | None] = {}  # id -> expires at; None: gone
        self._wake = asyncio.Event()
        self._writer = asyncio.create_task(self._write(), name="redis-registry")

    def note_stored(self, id: bytes, expires_at_ms: int) -> None:
        """Record that this node can serve `id` until then. At the bound the oldest entry is removed."""
        if self._own.pop(id, None) is None and len(self._own) >= REGISTRY_ENTRIES_MAX:
            self.note_gone([next(iter(self._own))])
        self._own[id] = expires_at_ms
        self._enqueue(id, expires_at_ms)

    def note_gone(self, ids: Iterable[bytes]) -> None:
        """Record that this node can no longer serve them."""
        for id in ids:
            if self._own.pop(id, None) is not None:
                self._enqueue(id, None)

    async def providers(self, id: bytes) -> tuple[PeerId, ...]:
        """Up to PROVIDERS_MAX peers that can serve `id`, latest expiry first; none if Redis doesn't answer in time."""
        if self._link.away_s > 0:
            return ()
        now_ms = self._clock()
        try:
            found = await self._link.within(
                READ_S,
                self._link.redis.zrevrangebyscore(
                    self._key(id), now_ms + REGISTRY_TTL_MS + CLOCK_SKEW_MS, f"({now_ms}", start=0, num=PEERS_MAX
                ),
            )
        except AWAY:
            return ()
        members = found if isinstance(found, list) else []
        peers = [peer for peer in map(_peer, members) if peer is not None and peer != self._own_peer]
        return tuple(peers[:PROVIDERS_MAX])

    async def close(self) -> None:
        """Close the connections; queued writes are lost, and expire in Redis."""
        self._writer.cancel()
        await asyncio.wait([self._writer], timeout=WRITE_S)
        await self._link.close()

    # --- writing --------------------------------------------------------------------------------

    def _enqueue(self, id: bytes, expires_at_ms: int | None) -> None:
        self._queue.pop(id, None)
        self._queue[id] = expires_at_ms
        if len(self._queue) > QUEUE_MAX:
            self._queue = dict(self._own)  # entries that are gone stay in Redis as stale hints until they expire
        self._wake.set()

    async def _write(self) -> None:
        while True:
            try:
                await self._check_marker()
                while self._queue:
                    await self._write_batch()
            except AWAY:
                await asyncio.sleep(self._link.away_s)
                continue
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CHECK_S):
                    await self._wake.wait()

    async def _check_marker(self) -> None:
        marker = f"{self._prefix}node:{self._own_peer}"
        if await self._link.within(WRITE_S, self._link.redis.set(marker, b"", nx=True, px=REGISTRY_TTL_MS)):
            self._queue = {**self._queue, **self._own}

    async def _write_batch(self) -> None:
        batch = dict(islice(self._queue.items(), BATCH_MAX))
        now_ms = self._clock()
        pipeline = self._link.redis.pipeline(transaction=False)
        for id, expires_at_ms in batch.items():
            key = self._key(id)
            if expires_at_ms is None:
                pipeline.zrem(key, self._own_peer)
            elif expires_at_ms > now_ms:
                pipeline.zadd(key, {self._own_peer: expires_at_ms})
                pipeline.zremrangebyscore(key, "-inf", now_ms)
                pipeline.zremrangebyrank(key, 0, -PEERS_MAX - 1)
                pipeline.pexpire(key, REGISTRY_TTL_MS)
            else:
                self._own.pop(id, None)
        await self._link.within(WRITE_S, pipeline.execute())
        for id, expires_at_ms in batch.items():
            if self._queue.get(id, 0) == expires_at_ms:  # else it has changed in the meantime
                del self._queue[id]

    def _key(self, id: bytes) -> str:
        return f"{self._prefix}{id.hex()}"


def _peer(member: object) -> PeerId | None:
    if not isinstance(member, bytes) or len(member) > 64:
        return None
    try:
        text = member.decode("ascii")
        public_key_of(text)
    except (ProtocolViolation, UnicodeDecodeError):
        return None
    return PeerId(text)
