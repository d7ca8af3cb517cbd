"""The one writer of the response database: TTL, byte quota, eviction of the least requested, CacheProofs.

It stores responses of this node's engines, which it signs, and responses from peers, with their own proofs. After a
commit its listener gets the entries that may leave the node.

A separate thread takes tasks from a bounded queue, all queued ones in one transaction. An answer counts as stored
before it is synced to disk: after a kill -9 the WAL has all commits; after a power cut the last ones may be lost, and a
lost entry is only a miss.
"""

import contextlib
import errno
import sqlite3
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ...contained import report_error
from ...core.local.message_fields import Scope
from ...core.local.response_cache_messages import StoreResponse
from ...core.local.similar_messages import Question
from ...core.records.ids import NetworkId, RequestKey
from ...core.records.limits import RESPONSE_TTL_MS, STORE_QUEUE_BYTES_MAX
from ...core.response.cache_proof import request_hash
from ...response_db import Embedded
from ..clock import wall_ms
from ..disk_complaint import DiskComplaint
from .database_file import DatabaseFile
from .store_changes import Listener, StartupScan
from .store_tasks import Asked, Checked, Computed, Drop, Fetched, Purge, StoreTask, task_bytes
from .store_transaction import Signer, StoreTransaction, totals, worth

_TOUCHES_MAX = 65_536
_EXPIRE_EVERY_MS = 60_000
# What lies there at the start is told at 1,000 entries a second: a registry's 20,000 in 20 s, at some 2 % of the loop.
_SCAN_ENTRIES = 250
_SCAN_EVERY_S = 0.25


class ResponseStore:
    """Takes responses from any thread, never blocking it; `store` and `touch` are dropped when the queue is full.

    What was taken before `start` is written then.
    """

    def __init__(
        self,
        path: Path,
        quota_bytes: int,
        ttl_ms: int,
        identity: Signer,
        network: NetworkId,
        clock: Callable[[], int] = wall_ms,
    ) -> None:
        self._file = DatabaseFile(path, min(ttl_ms, RESPONSE_TTL_MS), worth)
        self._quota_bytes = quota_bytes
        self._ttl_ms = min(ttl_ms, RESPONSE_TTL_MS)
        self._identity = identity
        self._network = network
        self._clock = clock
        self._scan = self._new_scan()
        self._next_scan_s = 0.0
        self._changed = threading.Condition()
        self._queue: deque[StoreTask] = deque()
        self._queue_bytes = 0
        self._touched: Counter[bytes] = Counter()
        self._closing = False
        self._busy = True
        self._complaint = DiskComplaint(path)
        self._swept_ms = 1 << 62  # by the clock; later than now where that was set back, and at first
        self._totals = {"entries": 0, "bytes": 0}
        self._counts = dict.fromkeys(
            ("stored", "fetched", "dropped", "evicted", "expired", "purged", "hits", "failed"), 0
        )
        self._thread: threading.Thread | None = None

    def start(self, listener: Listener | None = None) -> None:
        """Begin to write.

        `listener` is called in the writer's thread with what this node can serve: first all existing entries.
        """
        self._thread = threading.Thread(target=self._run, args=(listener,), name="hyperspace-responses", daemon=True)
        self._thread.start()

    def store(self, message: StoreResponse, embedded: Embedded | None = None) -> bool:
        """Queue a response; False if it was dropped because the writer is behind or it exceeds the quota.

        With the vectors of its question, if it has one, other questions find it.
        """
        return self._enqueue(Computed(message, embedded))

    def store_fetched(
        self,
        key: RequestKey,
        body: bytes,
        raw_proof: bytes,
        computed_at_ms: int,
        expires_at_ms: int,
        scope: Scope,
    ) -> bool:
        """Queue a peer's response that `open_hit` accepted, to be served under the same proof; False as `store`.

        An entry that was computed at the same time or later stays.
        """
        assert raw_proof[:32] == request_hash(self._network, key)
        expires_at_ms = min(expires_at_ms, computed_at_ms + self._ttl_ms)
        return self._enqueue(Fetched(key, scope, raw_proof, computed_at_ms, expires_at_ms, body))

    def purge(self, keys: Iterable[bytes]) -> bool:
        """Queue the deletion of these entries, behind all earlier tasks; False as `store`."""
        return self._enqueue(Purge(tuple(keys)))

    def store_question(self, key: RequestKey, question: Question, embedded: Embedded | None) -> bool:
        """Queue the question of an entry that is here, or before it in the queue; False as `store`."""
        return self._enqueue(Asked(key, question, embedded))

    def note_check(self, key: RequestKey, kind: bytes, floor: float | None) -> bool:
        """Queue the result of checking a match of this entry; False as `store`.

        If it was wrong, the entry answers only questions with a similarity of `floor` or more; None: it was right.
        """
        return self._enqueue(Checked(key, kind, floor))

    def drop(self, raw_proof: bytes, all_of_signer: bool) -> bool:
        """Queue the deletion of the entry with this proof, but not of one that has replaced it; False as `store`.

        `all_of_signer`: of everything that its signer signed.
        """
        return self._enqueue(Drop(raw_proof, all_of_signer))

    def _enqueue(self, message: StoreTask) -> bool:
        size = task_bytes(message)
        with self._changed:
            if self._closing or size > self._quota_bytes or self._queue_bytes + size > STORE_QUEUE_BYTES_MAX:
                self._counts["dropped"] += 1
                return False
            self._queue.append(message)
            self._queue_bytes += size
            self._changed.notify_all()
        return True

    def touch(self, keys: Iterable[bytes]) -> None:
        """Note that these RequestKeys were hit."""
        with self._changed:
            for key in keys:
                if len(self._touched) < _TOUCHES_MAX or key in self._touched:
                    self._touched[key] += 1
            self._changed.notify_all()

    def stats(self) -> dict[str, int]:
        """Entries, their bytes, the quota, and what happened since the start."""
        with self._changed:
            return {
                **self._totals,
                "quota_bytes": self._quota_bytes,
                "queued_bytes": self._queue_bytes,
                **self._counts,
                "moved_aside": self._file.moved_aside,
            }

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything queued so far is committed (or failed); False after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not (self._queue or self._touched or self._busy) or not self._is_running(),
                timeout_s,
            )

    def close(self) -> None:
        """Commit what is queued and end the thread, within 5 s."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(5)

    def _is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _run(self, listener: Listener | None) -> None:
        database: sqlite3.Connection | None = None
        while True:
            with self._changed:
                if database is not None:
                    self._busy = False
                    self._changed.notify_all()
                    self._changed.wait_for(
                        lambda: self._queue or self._touched or self._closing, self._pause_s(listener)
                    )
                if self._closing and not self._queue and not self._touched:
                    break
                self._busy = True
                batch, self._queue = list(self._queue), deque()
                touched, self._touched = self._touched, Counter()
            database = self._commit(database, batch, touched, listener)
            with self._changed:
                self._queue_bytes -= sum(map(task_bytes, batch))
        if database is not None:
            with contextlib.suppress(sqlite3.Error):
                database.close()

    def _pause_s(self, listener: Listener | None) -> float:
        return _EXPIRE_EVERY_MS / 1000 if listener is None or self._scan.done else _SCAN_EVERY_S

    def _commit(
        self,
        database: sqlite3.Connection | None,
        batch: list[StoreTask],
        touched: Counter[bytes],
        listener: Listener | None,
    ) -> sqlite3.Connection | None:
        """One transaction; what could not be written is counted and forgotten."""
        try:
            if database is not None and not self._file.is_in_place:
                self._start_over(database)
                database = None
            database = database or self._file.open()
            if listener is not None:
                self._scan_on(database, listener)
            with database:
                database.execute("BEGIN IMMEDIATE")
                written = StoreTransaction(database, self._identity, self._network, self._ttl_ms, self._clock())
                self._write(written, batch, touched)
                sizes = totals(database)
            if not self._file.is_in_place:
                raise FileNotFoundError(errno.ENOENT, "deleted or replaced while it was written")
        except (sqlite3.Error, OSError) as error:
            self._count({"failed": len(batch) or 1})
            self._complaint.failed(error)
            if database is not None and self._file.close_if_damaged(database, error):
                database = None
            if database is None:  # e.g. a read-only or full disk: wait before the next attempt
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, 1.0)
            return database
        except Exception:  # a bug of ours: it costs this batch, not the writer
            self._count({"failed": len(batch) or 1})
            report_error("the response database's writer")
            return database
        self._complaint.works()
        with self._changed:
            self._totals = sizes
        self._count({"hits": touched.total(), **written.counts})
        if listener is not None:
            written.changes.tell(listener)
        return database

    def _start_over(self, database: sqlite3.Connection) -> None:
        """The file was deleted or replaced."""
        self._file.let_go(database)
        self._scan, self._swept_ms = self._new_scan(), 1 << 62
        with self._changed:
            self._totals = {"entries": 0, "bytes": 0}

    def _new_scan(self) -> StartupScan:
        return StartupScan(self._network, self._identity.signing_key.verify_key.encode())

    def _scan_on(self, database: sqlite3.Connection, listener: Listener) -> None:
        if self._scan.done or time.monotonic() < self._next_scan_s:
            return
        self._next_scan_s = time.monotonic() + _SCAN_EVERY_S
        self._scan.next(database, _SCAN_ENTRIES, self._clock()).tell(listener)

    def _write(self, written: StoreTransaction, batch: list[StoreTask], touched: Counter[bytes]) -> None:
        for task in batch:
            written.perform(task)
        written.touch(touched)
        since_ms = written.now_ms - self._swept_ms
        if not 0 <= since_ms < _EXPIRE_EVERY_MS:
            self._swept_ms = written.now_ms
            written.expire(clock_was_set_back=since_ms < 0)
        written.evict(self._quota_bytes)

    def _count(self, increments: Mapping[str, int]) -> None:
        with self._changed:
            for name, increment in increments.items():
                self._counts[name] += increment
