"""Reads of the database: on the event loop, unless the disk might hang.

A read from the page cache takes about 60 µs, less than passing it to a thread. But a disk that hangs must not delay the
server's other requests. So a thread with a deadline reads if no read was fast within the last second; after a fast one
the event loop reads itself, so that it waits at most once for a disk that hangs within that second. A large body is
always unpacked and hashed in the thread.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ..core.local.response_cache_messages import TouchResponses
from ..core.records.ids import RequestKey
from ..core.records.limits import INLINE_BODY_BYTES, RECENT_BYTES_MAX, RECENT_MS, KiB
from ..response_db import ResponseReader, StoredResponse, intact, unpacked_size
from .options import NodeLink

T = TypeVar("T")

_WAITING_MAX = 256
_TOUCHED_MAX = 4 * KiB  # keys in one message
_TOUCH_EVERY_S = 1.0
_QUICK_S = 0.02
_TRUSTED_S = 1.0


class DatabaseLookup:
    """A reader of the database, with a thread, a bounded queue and a deadline; every failure is a miss."""

    def __init__(self, path: Path, ttl_ms: int, deadline_s: float) -> None:
        self._reader = ResponseReader(path, ttl_ms)
        self._deadline_s = deadline_s
        self._thread = ThreadPoolExecutor(1, "hyperspace-lookup")
        self._waiting = 0
        self._trusted_until_s = 0.0
        self._overdue: asyncio.Future[Any] | None = None

    async def get(self, key: RequestKey, now_ms: int) -> StoredResponse | None:
        """The entry of `key`, if it can be read within the deadline."""
        row = await self._read(partial(self._reader.row, key, now_ms))
        if row is None:
            return None
        if unpacked_size(row) <= INLINE_BODY_BYTES:
            return intact(row)
        return await self._in_thread(partial(intact, row)) if self._waiting < _WAITING_MAX else None

    async def find_canonical(self, canonical_key: bytes, now_ms: int) -> RequestKey | None:
        """The key of the newest entry whose question has this canonical key, as `get`."""
        return await self._read(partial(self._reader.find_canonical, canonical_key, now_ms))

    async def _read(self, read: Callable[[], T | None]) -> T | None:
        if self._overdue is not None and not self._overdue.done():
            return None
        started_s = time.monotonic()
        if self._waiting == 0 and started_s < self._trusted_until_s:
            found = read()
        elif self._waiting < _WAITING_MAX:
            found = await self._in_thread(read)
        else:
            return None
        finished_s = time.monotonic()
        self._trusted_until_s = finished_s + _TRUSTED_S if finished_s - started_s < _QUICK_S else 0.0
        return found

    async def _in_thread(self, read: Callable[[], T | None]) -> T | None:
        self._waiting += 1
        answer = asyncio.get_running_loop().run_in_executor(self._thread, read)
        answer.add_done_callback(self._answered)
        try:
            async with asyncio.timeout(self._deadline_s):
                return await asyncio.shield(answer)
        except TimeoutError:
            self._overdue = answer
            return None

    def _answered(self, _: object) -> None:
        self._waiting -= 1


class Recent:
    """Answers that the node is about to store, whose database may not show them yet: a repeat at once is a hit too."""

    def __init__(self) -> None:
        self._entries: dict[RequestKey, tuple[int, StoredResponse]] = {}  # with when it came, the oldest first
        self._bytes = 0

    def add(self, key: RequestKey, entry: StoredResponse, now_ms: int) -> None:
        """Keep an entry for RECENT_MS, or until others need its room."""
        self.forget(key)
        self._entries[key] = (now_ms, entry)
        self._bytes += len(entry.body)
        while self._bytes > RECENT_BYTES_MAX:
            self.forget(next(iter(self._entries)))

    def newer(self, key: RequestKey, than: StoredResponse | None, now_ms: int) -> StoredResponse | None:
        """The entry of `key`, if it is newer than the database's; else the database's."""
        # `abs`: after the clock was set back, an earlier entry would otherwise stay until that time comes again.
        while self._entries and abs(now_ms - (oldest := next(iter(self._entries.items())))[1][0]) >= RECENT_MS:
            self.forget(oldest[0])
        _, entry = self._entries.get(key, (0, None))
        if entry is None or entry.expires_at_ms <= now_ms or (than and than.computed_at_ms >= entry.computed_at_ms):
            return than
        return entry

    def forget(self, key: RequestKey) -> None:
        """Drop the entry."""
        if (removed := self._entries.pop(key, None)) is not None:
            self._bytes -= len(removed[1].body)


class Touches:
    """Gathers hits, and tells the node about them at most once a second."""

    def __init__(self, client: NodeLink) -> None:
        self._client = client
        self._keys: list[bytes] = []
        self._next_s = 0.0

    def add(self, key: RequestKey) -> None:
        """Note a hit of `key`."""
        if len(self._keys) < _TOUCHED_MAX:
            self._keys.append(key)
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._next_s:
            self._next_s = now_s + _TOUCH_EVERY_S
            self._client.send(TouchResponses(tuple(self._keys)))
            self._keys = []
