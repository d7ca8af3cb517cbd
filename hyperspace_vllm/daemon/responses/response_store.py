"""The one writer of the response database: TTL, byte quota, eviction of what is asked for least, CacheProofs.

It takes what this node's engines computed, and signs it, and what was fetched from peers, with the proof that came with
it. Whoever speaks for this node in the network hears which entries may leave it, after they were committed.

A thread of its own takes messages from a bounded queue, everything that has queued up in one transaction. Nothing is
synced to disk before an answer counts as stored: after a kill -9 the WAL holds all commits, after a power cut at worst
the last ones are gone, and a lost entry is only a miss. A database that is damaged is moved aside, and a fresh one
takes its place; so it does where the file was deleted, and where it was replaced the other one is used. Readers and
this writer notice by the files' identities.
"""

import contextlib
import errno
import logging
import os
import sqlite3
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import log2
from pathlib import Path
from typing import Protocol

from nacl.signing import SigningKey

from ...contained import report_error
from ...core.local.messages import Question, Scope, StoreResponse
from ...core.records.ids import NetworkId, RequestKey
from ...core.records.limits import CLOCK_SKEW_MS, RESPONSE_TTL_MS, STORE_QUEUE_BYTES_MAX, MiB
from ...core.response.cache_proof import make_proof, request_hash
from ...core.response.similar.match_error import KINDS_MAX, WINDOW
from ...response_db import MIGRATIONS, SCHEMA, SCHEMA_VERSION, Embedded, file_at, packed
from ..clock import wall_ms
from ..disk_complaint import DiskComplaint
from .store_changes import PROOF_SIGNER, Listener, ServableEntry, StartupScan, StoreChanges

logger = logging.getLogger(__name__)

_ENTRY_OVERHEAD_BYTES = 1024  # proof, key, index entries and the tail of a page
_QUESTION_OVERHEAD_BYTES = 256  # its keys and the index entry
_TOUCHES_MAX = 65_536
_HALF_LIFE_MS = 3_600_000  # of popularity, where entries are weighed against each other
_EXPIRE_EVERY_MS = 60_000
# What lies there at the start is told at 1,000 entries a second: a registry's 20,000 in 20 s, at some 2 % of the loop.
_SCAN_ENTRIES = 250
_SCAN_EVERY_S = 0.25

_SIGNED_BY = f"substr(proof, {PROOF_SIGNER.start + 1}, 32) = ?"

_INSERT = """
INSERT INTO entries (request_key, proof, computed_at_ms, expires_at_ms, size, last_used_ms, hits, scope, worth_ms)
VALUES (?, ?, ?, ?, ?, ?, 0, ?, ?)
"""

_SHORTEN = "UPDATE entries SET expires_at_ms = computed_at_ms + ?1 WHERE expires_at_ms > computed_at_ms + ?1"

_TOUCH = """
UPDATE entries SET hits = hits + ?1, last_used_ms = ?2, worth_ms = worth(hits + ?1, ?2) WHERE request_key = ?3
"""

_INSERT_QUESTION = """
INSERT INTO questions (id, partition, canonical_key, question, embedder, vectors) VALUES (?, ?, ?, ?, ?, ?)
"""

_WITHOUT_QUESTION = """
SELECT id FROM entries WHERE request_key = ? AND NOT EXISTS (SELECT 1 FROM questions WHERE questions.id = entries.id)
"""
_RAISE_FLOOR = "UPDATE questions SET floor = ?2 WHERE id = (SELECT id FROM entries WHERE request_key = ?1)"


class Signer(Protocol):
    """What the store needs of the node's identity."""

    @property
    def signing_key(self) -> SigningKey:
        """The node's Ed25519 key."""


@dataclass(frozen=True, slots=True)
class _Computed:
    """A response of this node's engines; `embedded` is of its question."""

    message: StoreResponse
    embedded: Embedded | None


@dataclass(frozen=True, slots=True)
class _Fetched:
    """A response from a peer, opened and verified."""

    request_key: RequestKey
    scope: Scope
    proof: bytes
    computed_at_ms: int
    expires_at_ms: int
    body: bytes


@dataclass(frozen=True, slots=True)
class _Purge:
    """Entries that the operator wants gone."""

    request_keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class _Asked:
    """The question of an entry that was stored without."""

    request_key: RequestKey
    question: Question
    embedded: Embedded | None


@dataclass(frozen=True, slots=True)
class _Checked:
    """A match of an entry was compared with the engine's answer; `floor` as of `floor_after`, None if it was right."""

    request_key: RequestKey
    kind: bytes
    floor: float | None


@dataclass(frozen=True, slots=True)
class _Drop:
    """Entries that an audit found false; `where`, a condition of this module, selects them by `value`."""

    where: str
    value: bytes


_Task = _Computed | _Fetched | _Purge | _Asked | _Checked | _Drop


class _Damaged(sqlite3.DatabaseError):
    """The file opens, but is not a sound database of our schema."""


class ResponseStore:
    """Takes responses from any thread, never blocking it; `store` and `touch` are dropped when the queue is full."""

    def __init__(
        self,
        path: Path,
        quota_bytes: int,
        ttl_ms: int,
        identity: Signer,
        network: NetworkId,
        clock: Callable[[], int] = wall_ms,
        listener: Listener | None = None,
    ) -> None:
        """`listener` hears, from the writer's thread, what this node can serve: first all that lies there already."""
        self._path = path
        self._quota_bytes = quota_bytes
        self._ttl_ms = min(ttl_ms, RESPONSE_TTL_MS)
        self._identity = identity
        self._network = network
        self._clock = clock
        self._listener = listener
        self._file: tuple[int, int] | None = None  # that the connection has open, and those beside it
        self._beside: dict[Path, tuple[int, int] | None] = {}
        self._scan = self._new_scan()
        self._next_scan_s = 0.0
        self._changed = threading.Condition()
        self._queue: deque[_Task] = deque()
        self._queue_bytes = 0
        self._touched: Counter[bytes] = Counter()
        self._closing = False
        self._busy = True
        self._damaged = False
        self._complaint = DiskComplaint(path)
        self._swept_ms = 1 << 62  # by the clock; later than now where that was set back, and at first
        self._totals = {"entries": 0, "bytes": 0}
        self._counts = dict.fromkeys(
            ("stored", "fetched", "dropped", "evicted", "expired", "purged", "hits", "failed", "moved_aside"), 0
        )
        self._thread = threading.Thread(target=self._run, name="hyperspace-responses", daemon=True)
        self._thread.start()

    def store(self, message: StoreResponse, embedded: Embedded | None = None) -> bool:
        """Queue a response; False if it was dropped because the writer is behind or it exceeds the quota.

        With the vectors of its question, if it has one, other questions find it.
        """
        return self._enqueue(_Computed(message, embedded))

    def store_fetched(
        self,
        key: RequestKey,
        body: bytes,
        raw_proof: bytes,
        computed_at_ms: int,
        expires_at_ms: int,
        scope: Scope,
    ) -> bool:
        """Queue what a peer served and `open_hit` believed, to be served on under the same proof; False as `store`.

        An entry that was computed at the same time or later stays.
        """
        assert raw_proof[:32] == request_hash(self._network, key)
        expires_at_ms = min(expires_at_ms, computed_at_ms + self._ttl_ms)
        return self._enqueue(_Fetched(key, scope, raw_proof, computed_at_ms, expires_at_ms, body))

    def purge(self, keys: Iterable[bytes]) -> bool:
        """Queue the deletion of these entries, behind whatever is to be stored before; False as `store`."""
        return self._enqueue(_Purge(tuple(keys)))

    def store_question(self, key: RequestKey, question: Question, embedded: Embedded | None) -> bool:
        """Queue the question of an entry that is here, or before it in the queue; False as `store`."""
        return self._enqueue(_Asked(key, question, embedded))

    def note_check(self, key: RequestKey, kind: bytes, floor: float | None) -> bool:
        """Queue what came of checking a match of this entry; False as `store`.

        Where it was wrong, it answers other questions from similarity `floor` on only; None: it was right.
        """
        return self._enqueue(_Checked(key, kind, floor))

    def drop(self, raw_proof: bytes, all_of_signer: bool) -> bool:
        """Queue the deletion of what holds this very proof, not of what has replaced it since; False as `store`.

        `all_of_signer`: of everything that its signer signed.
        """
        if all_of_signer:
            return self._enqueue(_Drop(_SIGNED_BY, raw_proof[PROOF_SIGNER]))
        return self._enqueue(_Drop("proof = ?", raw_proof))

    def _enqueue(self, message: _Task) -> bool:
        size = _size(message)
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
            }

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything queued so far is committed (or failed); False after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not (self._queue or self._touched or self._busy) or not self._thread.is_alive(),
                timeout_s,
            )

    def close(self) -> None:
        """Commit what is queued and end the thread, within 5 s."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(5)

    def _run(self) -> None:
        database: sqlite3.Connection | None = None
        while True:
            with self._changed:
                if database is not None:
                    self._busy = False
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._queue or self._touched or self._closing, self._pause_s())
                if self._closing and not self._queue and not self._touched:
                    break
                self._busy = True
                batch, self._queue = list(self._queue), deque()
                touched, self._touched = self._touched, Counter()
            database = self._commit(database, batch, touched)
            with self._changed:
                self._queue_bytes -= sum(map(_size, batch))
        if database is not None:
            with contextlib.suppress(sqlite3.Error):
                database.close()

    def _pause_s(self) -> float:
        return _EXPIRE_EVERY_MS / 1000 if self._listener is None or self._scan.done else _SCAN_EVERY_S

    def _commit(
        self, database: sqlite3.Connection | None, batch: list[_Task], touched: Counter[bytes]
    ) -> sqlite3.Connection | None:
        """One transaction; what could not be written is counted and forgotten."""
        changes = StoreChanges()
        try:
            if database is not None and file_at(self._path) != self._file:
                self._let_go(database)
                database = None
            database = database or self._open()
            self._scan_on(database)
            with database:
                database.execute("BEGIN IMMEDIATE")
                counts = self._write(database, batch, touched, changes)
                totals = _totals(database)
            if file_at(self._path) != self._file:
                raise FileNotFoundError(errno.ENOENT, "deleted or replaced while it was written")
        except (sqlite3.Error, OSError) as error:
            self._count(failed=len(batch) or 1)
            self._complaint.failed(error)
            if database is not None and _is_damage(error):
                database.close()
                database, self._damaged = None, True
            if database is None:  # e.g. a read-only or full disk: wait before the next attempt
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, 1.0)
            return database
        except Exception:  # a bug of ours: it costs this batch, not the writer
            self._count(failed=len(batch) or 1)
            report_error("the response database's writer")
            return database
        self._complaint.works()
        with self._changed:
            self._totals = totals
        self._count(hits=touched.total(), **counts)
        if self._listener is not None:
            changes.tell(self._listener)
        return database

    def _let_go(self, database: sqlite3.Connection) -> None:
        """Close what lies no longer at the path, and delete what is left of it: the next one would read its WAL."""
        with contextlib.suppress(sqlite3.Error):
            database.close()
        for path, mine in self._beside.items():
            if file_at(path) == mine:
                path.unlink(missing_ok=True)
        self._scan, self._swept_ms = self._new_scan(), 1 << 62
        with self._changed:
            self._totals = {"entries": 0, "bytes": 0}
        logger.warning("%s was deleted or replaced: what is there now is used, a fresh one if nothing is", self._path)

    def _new_scan(self) -> StartupScan:
        return StartupScan(self._network, self._identity.signing_key.verify_key.encode())

    def _scan_on(self, database: sqlite3.Connection) -> None:
        if self._listener is None or self._scan.done or time.monotonic() < self._next_scan_s:
            return
        self._next_scan_s = time.monotonic() + _SCAN_EVERY_S
        self._scan.next(database, _SCAN_ENTRIES, self._clock()).tell(self._listener)

    def _open(self) -> sqlite3.Connection:
        try:
            if not self._damaged:
                return self._open_sound()
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
        self._move_aside()
        return self._open_sound()

    def _open_sound(self) -> sqlite3.Connection:
        """A connection to a database of our schema that passed its integrity check."""
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self._path, os.O_CREAT | os.O_EXCL, 0o600))
        if not os.access(self._path, os.W_OK):
            raise PermissionError(errno.EACCES, "it can't be written")
        # SQLite gives them the mode that the file had when they were made, by a reader too, and they would keep it.
        for suffix in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.chmod(f"{self._path}{suffix}", 0o600)
        database = sqlite3.connect(self._path, timeout=5, isolation_level=None, check_same_thread=False)
        try:
            database.create_function("worth", 2, _worth, deterministic=True)
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            database.execute(f"PRAGMA journal_size_limit = {16 * MiB}")
            (version,) = database.execute("PRAGMA user_version").fetchone()
            (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
            (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if verdict != "ok" or (tables and version != SCHEMA_VERSION and version not in MIGRATIONS):
                raise _Damaged(verdict)
            if not tables:
                database.executescript(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT;")
            elif version in MIGRATIONS:
                database.executescript(f"BEGIN IMMEDIATE; {MIGRATIONS[version]} COMMIT;")
            database.execute(_SHORTEN, (self._ttl_ms,))
            self._file = file_at(self._path)
            self._beside = {path: file_at(path) for path in (Path(f"{self._path}-wal"), Path(f"{self._path}-shm"))}
        except sqlite3.Error:
            database.close()
            raise
        return database

    def _move_aside(self) -> None:
        """Keep the last damaged database for whoever wants to look at it; its WAL is of no use without it."""
        with contextlib.suppress(FileNotFoundError):
            os.replace(self._path, self._path.with_suffix(".damaged"))
        for suffix in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self._path}{suffix}")
        self._damaged = False
        self._count(moved_aside=1)
        logger.warning("%s was damaged: moved aside, a fresh one takes its place", self._path)

    def _write(
        self,
        database: sqlite3.Connection,
        batch: list[_Task],
        touched: Counter[bytes],
        changes: StoreChanges,
    ) -> dict[str, int]:
        now_ms = self._clock()
        fetched = purged = 0
        for message in batch:
            if isinstance(message, _Fetched):
                fetched += self._insert_fetched(database, message, now_ms, changes)
            elif isinstance(message, _Purge):
                purged += sum(_delete(database, "request_key = ?", key, changes) for key in message.request_keys)
            elif isinstance(message, _Asked):
                _attach(database, message)
            elif isinstance(message, _Checked):
                _note_check(database, message)
            elif isinstance(message, _Drop):
                purged += _delete(database, message.where, message.value, changes)
            else:
                self._insert_computed(database, message, now_ms, changes)
        database.executemany(_TOUCH, [(hits, now_ms, key) for key, hits in touched.items()])
        expired = self._expire(database, now_ms, changes)
        stored = sum(isinstance(message, _Computed) for message in batch)
        evicted = self._evict(database, changes)
        return {"stored": stored, "fetched": fetched, "expired": expired, "evicted": evicted, "purged": purged}

    def _expire(self, database: sqlite3.Connection, now_ms: int, changes: StoreChanges) -> int:
        """Once a minute: delete what has expired, and what was computed while the clock was ahead of now."""
        since_ms = now_ms - self._swept_ms
        if 0 <= since_ms < _EXPIRE_EVERY_MS:
            return 0
        self._swept_ms = now_ms
        expired = _delete(database, "expires_at_ms <= ?", now_ms, changes)
        if since_ms < 0:
            expired += _delete(database, "computed_at_ms > ?", now_ms + CLOCK_SKEW_MS, changes)
        return expired

    def _insert_computed(
        self, database: sqlite3.Connection, task: _Computed, now_ms: int, changes: StoreChanges
    ) -> None:
        message = task.message
        key = RequestKey(message.request_key)
        proof = make_proof(
            self._identity.signing_key,
            self._network,
            key,
            message.body,
            message.model_digest,
            message.engine_version,
            now_ms,
        )
        expires_at_ms = now_ms + min(self._ttl_ms, message.ttl_ms)
        _delete(database, "request_key = ?", key, changes)
        body = packed(message.body)
        size = _size(task) - len(message.body) + len(body)
        number = _insert(
            database, (key, proof.encode(), now_ms, expires_at_ms, size, now_ms, message.scope, now_ms), body
        )
        if message.question is not None:
            _insert_question(database, number, message.question, task.embedded)
        if message.scope != "private" and expires_at_ms > now_ms:
            changes.stored(ServableEntry(proof.request_hash, expires_at_ms, True))

    def _insert_fetched(
        self, database: sqlite3.Connection, message: _Fetched, now_ms: int, changes: StoreChanges
    ) -> bool:
        """Whether it was stored: not if it has expired, or what is here is no older."""
        query = "SELECT 1 FROM entries WHERE request_key = ? AND computed_at_ms BETWEEN ? AND ? AND expires_at_ms > ?"
        when = (message.computed_at_ms, now_ms + CLOCK_SKEW_MS, now_ms)
        newer_here = database.execute(query, (message.request_key, *when)).fetchone()
        if newer_here or message.expires_at_ms <= now_ms:
            return False
        _delete(database, "request_key = ?", message.request_key, changes)
        body = packed(message.body)
        values = (
            message.request_key,
            message.proof,
            message.computed_at_ms,
            message.expires_at_ms,
            _size(message) - len(message.body) + len(body),
            now_ms,
            message.scope,
            now_ms,
        )
        _insert(database, values, body)
        if message.scope != "private":
            changes.stored(ServableEntry(message.proof[:32], message.expires_at_ms, False))
        return True

    def _evict(self, database: sqlite3.Connection, changes: StoreChanges) -> int:
        """Delete the entries of the least worth until the rest fit the quota."""
        excess = _totals(database)["bytes"] - self._quota_bytes
        doomed: list[int] = []
        for entry, size in database.execute("SELECT id, size FROM entries ORDER BY worth_ms, id"):
            if excess <= 0:
                break
            doomed.append(entry)
            excess -= size
        return sum(_delete(database, "id = ?", entry, changes) for entry in doomed)

    def _count(self, **increments: int) -> None:
        with self._changed:
            for name, increment in increments.items():
                self._counts[name] += increment


def _worth(hits: int, now_ms: int) -> int:
    """When an entry without a hit would have to be used to be worth as much: each doubling of hits is a half-life."""
    return now_ms + round(_HALF_LIFE_MS * log2(1 + hits))


def _size(task: _Task) -> int:
    """Bytes in the queue and, once its body is packed, in the database."""
    if isinstance(task, _Purge):
        return 32 * len(task.request_keys)
    if isinstance(task, _Drop):
        return len(task.value)
    if isinstance(task, _Fetched):
        return len(task.body) + _ENTRY_OVERHEAD_BYTES
    if isinstance(task, _Checked):
        return _QUESTION_OVERHEAD_BYTES
    if isinstance(task, _Asked):
        vectors = len(task.embedded.vectors) if task.embedded else 0
        return len(task.question.text) + vectors + _QUESTION_OVERHEAD_BYTES
    size = len(task.message.body) + _ENTRY_OVERHEAD_BYTES
    if (question := task.message.question) is not None:
        size += len(question.text) + _QUESTION_OVERHEAD_BYTES
    return size + (len(task.embedded.vectors) if task.embedded else 0)


def _insert(database: sqlite3.Connection, values: tuple[object, ...], body: bytes) -> int:
    """The new entry's id."""
    cursor = database.execute(_INSERT, values)
    database.execute("INSERT INTO bodies (id, body) VALUES (?, ?)", (cursor.lastrowid, body))
    assert cursor.lastrowid is not None
    return cursor.lastrowid


def _delete(database: sqlite3.Connection, where: str, value: int | bytes, changes: StoreChanges) -> int:
    """Delete the entries that `where`, a condition of this module, selects; how many."""
    shareable = "SELECT CAST(request_hash AS BLOB) FROM entries WHERE scope <> 'private' AND"
    for (hash_,) in database.execute(f"{shareable} {where}", (value,)):
        changes.gone(hash_)
    return database.execute(f"DELETE FROM entries WHERE {where}", (value,)).rowcount


def _insert_question(database: sqlite3.Connection, entry: int, question: Question, embedded: Embedded | None) -> None:
    named = embedded or Embedded("", b"")
    asked = (entry, question.partition, question.canonical_key, question.text)
    database.execute(_INSERT_QUESTION, (*asked, named.embedder or None, named.vectors or None))


def _attach(database: sqlite3.Connection, task: _Asked) -> None:
    """Give an entry that has none its question."""
    row = database.execute(_WITHOUT_QUESTION, (task.request_key,)).fetchone()
    if row is not None:
        _insert_question(database, row[0], task.question, task.embedded)
        database.execute("UPDATE entries SET size = size + ? WHERE id = ?", (_size(task), row[0]))
        database.execute("UPDATE totals SET bytes = bytes + ?", (_size(task),))


def _note_check(database: sqlite3.Connection, check: _Checked) -> None:
    wrong = check.floor is not None
    if check.kind:
        number = database.execute("INSERT INTO checks (kind, wrong) VALUES (?, ?)", (check.kind, wrong)).lastrowid
        database.execute("DELETE FROM checks WHERE id <= ? - ?", (number, KINDS_MAX * WINDOW))
    if wrong:
        database.execute(_RAISE_FLOOR, (check.request_key, check.floor))


def _totals(database: sqlite3.Connection) -> dict[str, int]:
    entries, size = database.execute("SELECT entries, bytes FROM totals").fetchone()
    return {"entries": entries, "bytes": size}


def _is_damage(error: Exception) -> bool:
    damage = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
    return isinstance(error, _Damaged) or getattr(error, "sqlite_errorcode", None) in damage
