"""The response database: its schema, and the read path that API servers use in place.

One process writes (daemon/responses/response_store.py); any number of others read the same file under SQLite's WAL: a
hit needs no message to the node. A reader never reports an error: a missing, locked, damaged or replaced database is a
miss. Every body is checked against the digest in its CacheProof, because SQLite itself has no checksums.

Bodies have a separate table, so that touching an entry does not rewrite its body, and are compressed where that makes
them shorter. An entry's request hash, by which peers ask for it, is the one at the start of its CacheProof: SQLite
derives the column, so the two cannot differ.

"""

import contextlib
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from .core.local.message_fields import Scope
from .core.records.errors import ProtocolViolation
from .core.records.ids import RequestKey, sha256
from .core.records.limits import CLOCK_SKEW_MS, RESPONSE_BYTES_MAX, RESPONSE_TTL_MS
from .core.response.cache_proof import decode_proof

SCHEMA_VERSION = 4

_ZSTD_LEVEL = 3
_PACKED_BYTES_MIN = 256  # shorter bodies hardly shrink

_REQUEST_HASH = "request_hash BLOB AS (substr(proof, 1, 32)) VIRTUAL"
_REQUEST_HASH_INDEX = "CREATE INDEX entries_by_request_hash ON entries (request_hash);"

Row = tuple[Any, ...]

_WORTH = "worth_ms INTEGER"  # which entry is evicted first: see response_store
_WORTH_INDEX = "CREATE INDEX entries_by_worth ON entries (worth_ms);"

# Vectors as in `Embedded`; both NULL where there are none. `floor`: the similarity that another question needs to get
# this answer, set once the answer was wrong for one (core/response/similar/match_error.py).
_QUESTIONS = """
CREATE TABLE questions (
    id INTEGER PRIMARY KEY,
    partition BLOB NOT NULL,
    canonical_key BLOB NOT NULL,
    question TEXT NOT NULL,
    embedder TEXT,
    vectors BLOB,
    floor REAL NOT NULL DEFAULT 0
);
CREATE INDEX questions_by_canonical_key ON questions (canonical_key);
CREATE TRIGGER entry_removed AFTER DELETE ON entries
BEGIN
    UPDATE totals SET entries = entries - 1, bytes = bytes - old.size;
    DELETE FROM bodies WHERE id = old.id;
    DELETE FROM questions WHERE id = old.id;
END;
"""

# The last answers of semantic matches that were compared with the engine's.
_CHECKS = "CREATE TABLE checks (id INTEGER PRIMARY KEY, kind BLOB NOT NULL, wrong INTEGER NOT NULL);"

SCHEMA = f"""
CREATE TABLE entries (
    id INTEGER PRIMARY KEY,
    request_key BLOB NOT NULL UNIQUE,
    proof BLOB NOT NULL,
    computed_at_ms INTEGER NOT NULL,
    expires_at_ms INTEGER NOT NULL,
    size INTEGER NOT NULL,
    last_used_ms INTEGER NOT NULL,
    hits INTEGER NOT NULL,
    scope TEXT NOT NULL,
    {_REQUEST_HASH},
    {_WORTH} NOT NULL
);
{_REQUEST_HASH_INDEX}
{_WORTH_INDEX}
CREATE INDEX entries_by_expiry ON entries (expires_at_ms);
CREATE TABLE bodies (id INTEGER PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE totals (entries INTEGER NOT NULL, bytes INTEGER NOT NULL);
INSERT INTO totals VALUES (0, 0);
CREATE TRIGGER entry_added AFTER INSERT ON entries
BEGIN UPDATE totals SET entries = entries + 1, bytes = bytes + new.size; END;
{_QUESTIONS}
{_CHECKS}
PRAGMA user_version = {SCHEMA_VERSION};
"""

_TO_4 = f"""
DROP TRIGGER entry_removed;
{_QUESTIONS}
DROP INDEX entries_by_use;
ALTER TABLE entries ADD COLUMN {_WORTH};
UPDATE entries SET worth_ms = last_used_ms;
{_WORTH_INDEX}
{_CHECKS}
PRAGMA user_version = 4;
"""
# By the version that they start from.
MIGRATIONS = {
    1: f"ALTER TABLE entries ADD COLUMN {_REQUEST_HASH}; {_REQUEST_HASH_INDEX} {_TO_4}",
    2: _TO_4,
    3: f"ALTER TABLE questions ADD COLUMN floor REAL NOT NULL DEFAULT 0; {_CHECKS} PRAGMA user_version = 4;",
}

# ?1 selects the entry, ?2 is the time, ?3 the longest life. An entry computed while the clock was ahead is not served:
# it would look fresh until that time comes.
_EXPIRES = "min(expires_at_ms, computed_at_ms + ?3)"
_ALIVE = f"{_EXPIRES} > ?2 AND computed_at_ms <= ?2 + {CLOCK_SKEW_MS}"

_SELECT = f"""
SELECT body, proof, computed_at_ms, {_EXPIRES} FROM entries JOIN bodies USING (id) WHERE request_key = ?1 AND {_ALIVE}
"""

_SELECT_CANONICAL = f"""
SELECT CAST(request_key AS BLOB) FROM entries JOIN questions USING (id)
WHERE canonical_key = ?1 AND floor <= 1 AND {_ALIVE} ORDER BY computed_at_ms DESC LIMIT 1
"""

_SELECT_ALIVE = f"SELECT 1 FROM entries WHERE request_key = ?1 AND {_ALIVE}"

# Newest first: an index with too little room omits the oldest.
_SELECT_QUESTIONS = f"""
SELECT CAST(request_key AS BLOB), partition, question, vectors, floor FROM questions JOIN entries USING (id)
WHERE embedder = ?1 AND {_ALIVE} ORDER BY id DESC LIMIT ?4
"""

_SHAREABLE = f"""
SELECT CAST(request_key AS BLOB), scope, body, proof, computed_at_ms, {_EXPIRES} FROM entries JOIN bodies USING (id)
WHERE request_hash = ?1 AND {_ALIVE} AND scope IN
"""
_SELECT_SHAREABLE = f"{_SHAREABLE} ('network', 'public')"
_SELECT_PUBLIC = f"{_SHAREABLE} ('public')"


def database_path(data_dir: Path) -> Path:
    """The path of a data directory's response database."""
    return data_dir / "responses.sqlite"


def file_at(path: Path) -> tuple[int, int] | None:
    """Identifies the file at a path: it differs once the file was replaced, None if there is none."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def packed(body: bytes) -> bytes:
    """A body in its stored form: compressed by zstd, if that makes it shorter."""
    is_alike = body.startswith(zstandard.FRAME_HEADER)  # it would be taken for compressed
    if len(body) < _PACKED_BYTES_MIN and not is_alike:
        return body
    compressed = zstandard.compress(body, _ZSTD_LEVEL)
    return compressed if len(compressed) < len(body) or is_alike else body


def unpacked(stored: bytes) -> bytes | None:
    """The body again; None for bytes that `packed` can't have made."""
    if not stored.startswith(zstandard.FRAME_HEADER):
        return stored
    try:
        if not 0 <= zstandard.frame_content_size(stored) <= RESPONSE_BYTES_MAX:
            return None
        return zstandard.decompress(stored)
    except zstandard.ZstdError:
        return None


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """One entry, its body intact; `proof` is an encoded CacheProof."""

    body: bytes
    proof: bytes
    computed_at_ms: int
    expires_at_ms: int


@dataclass(frozen=True, slots=True)
class Embedded:
    """Vectors of a question and of its canonical form by the embedder of that name: int8 [2, dimensions], each times
    its own scale.
    """

    embedder: str
    vectors: bytes


@dataclass(frozen=True, slots=True)
class StoredQuestion:
    """A question with the key of its answer; `vectors` as in `Embedded`, `floor` as in the database."""

    key: RequestKey
    partition: bytes
    text: str
    vectors: bytes
    floor: float


@dataclass(frozen=True, slots=True)
class Shareable:
    """An entry that may leave this node, with the RequestKey that may not."""

    key: RequestKey
    scope: Scope
    response: StoredResponse


class ResponseReader:
    """Reads the database in place. Belongs to one thread at a time; opens and reopens the file itself.

    An entry computed `ttl_ms` ago or earlier has expired for it.
    """

    def __init__(self, path: Path, ttl_ms: int = RESPONSE_TTL_MS) -> None:
        self._path, self._ttl_ms = path, ttl_ms
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None

    def get(self, key: RequestKey, now_ms: int) -> StoredResponse | None:
        """The entry of `key` that has not expired, or None."""
        row = self.row(key, now_ms)
        return intact(row) if row else None

    def row(self, key: RequestKey, now_ms: int) -> Row | None:
        """The same entry in its stored form, for `intact`."""
        return self._row(_SELECT, key, now_ms)

    def find_canonical(self, canonical_key: bytes, now_ms: int) -> RequestKey | None:
        """The newest entry whose question has this canonical key."""
        row = self._row(_SELECT_CANONICAL, canonical_key, now_ms)
        return RequestKey(row[0]) if row and len(row[0]) == 32 else None

    def holds(self, key: RequestKey, now_ms: int) -> bool:
        """Whether there is an entry of `key` that has not expired."""
        return self._row(_SELECT_ALIVE, key, now_ms) is not None

    def questions(self, embedder: str, limit: int, now_ms: int) -> list[StoredQuestion]:
        """The newest questions that have vectors of this embedder, oldest first."""
        try:
            connection = self._current()
            which = (embedder, now_ms, self._ttl_ms, limit)
            rows = connection.execute(_SELECT_QUESTIONS, which).fetchall() if connection else []
        except (sqlite3.Error, OSError):
            self.close()
            return []
        return [StoredQuestion(RequestKey(row[0]), *row[1:]) for row in reversed(rows)]

    def checks(self) -> list[tuple[bytes, bool]]:
        """The last checked matches, oldest first: their kind, and whether they were wrong."""
        try:
            connection = self._current()
            rows = connection.execute("SELECT kind, wrong FROM checks ORDER BY id").fetchall() if connection else []
        except (sqlite3.Error, OSError):
            self.close()
            return []
        return [(kind, bool(wrong)) for kind, wrong in rows]

    def find_by_hash(self, request_hash: bytes, now_ms: int, to_member: bool = True) -> Shareable | None:
        """The entry that peers know by `request_hash`, unless it has expired or its scope excludes the peer.

        The body of an excluded entry is not read: repeated requests for it would keep the disk busy.
        """
        row = self._row(_SELECT_SHAREABLE if to_member else _SELECT_PUBLIC, request_hash, now_ms)
        response = intact(row[2:]) if row else None
        return Shareable(RequestKey(row[0]), row[1], response) if row and response and len(row[0]) == 32 else None

    def close(self) -> None:
        """Close the file; `get` opens it again."""
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
        self._connection = self._file = None

    def _row(self, query: str, key: bytes, now_ms: int) -> Row | None:
        try:
            connection = self._current()
            return connection.execute(query, (key, now_ms, self._ttl_ms)).fetchone() if connection else None
        except (sqlite3.Error, OSError):
            self.close()
            return None

    def _current(self) -> sqlite3.Connection | None:
        """A connection to the file that is at the path now, which may have been replaced."""
        file = file_at(self._path)
        if file != self._file:
            self.close()
        if file is not None and self._connection is None:
            # It doesn't wait for locks: readers meet one only while the writer recovers or replaces the file.
            self._connection = sqlite3.connect(
                f"{self._path.absolute().as_uri()}?mode=ro",
                uri=True,
                timeout=0,
                isolation_level=None,
                check_same_thread=False,
            )
            self._file = file
        return self._connection


def unpacked_size(row: Row) -> int:
    """Bytes of the body that `intact` makes of a row; 0 for a damaged one."""
    stored = row[0]
    try:
        return zstandard.frame_content_size(stored) if stored.startswith(zstandard.FRAME_HEADER) else len(stored)
    except (zstandard.ZstdError, TypeError, AttributeError):
        return 0


def intact(row: Row) -> StoredResponse | None:
    """The entry in a row, None for a damaged one; takes time in proportion to the size of its body."""
    stored, *rest = row
    try:
        body = unpacked(stored)
        entry = StoredResponse(body or b"", *rest)
        proof = decode_proof(entry.proof)
    except (ProtocolViolation, TypeError, AttributeError):  # the others: a damaged page may hold another type
        return None
    return entry if body is not None and proof.response_hash == sha256(body) else None
