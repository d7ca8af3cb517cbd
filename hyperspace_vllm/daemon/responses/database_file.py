"""The file of the response database, for its one writer: opened only if it is sound and has this schema.

A damaged database is moved aside, and a new one takes its place. If the file was deleted a new one is created; if it
was replaced, the new file is used. Readers and the writer detect this by the files' identities.
"""

import contextlib
import errno
import logging
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

from ...core.records.limits import MiB
from ...response_db import MIGRATIONS, SCHEMA, SCHEMA_VERSION, file_at

logger = logging.getLogger(__name__)

_SHORTEN = "UPDATE entries SET expires_at_ms = computed_at_ms + ?1 WHERE expires_at_ms > computed_at_ms + ?1"


class _Damaged(sqlite3.DatabaseError):
    """The file opens, but is not a sound database of this schema."""


class DatabaseFile:
    """Belongs to one thread. Entries that would outlive `ttl_ms` are shortened when it is opened.

    `worth(hits, last used)` is a function of its SQL.
    """

    def __init__(self, path: Path, ttl_ms: int, worth: Callable[[int, int], int]) -> None:
        self._path = path
        self._ttl_ms = ttl_ms
        self._worth = worth
        self._file: tuple[int, int] | None = None  # that the connection has open, and those beside it
        self._beside: dict[Path, tuple[int, int] | None] = {}
        self._damaged = False
        self.moved_aside = 0

    @property
    def is_in_place(self) -> bool:
        """Whether the file that was opened last is still at the path."""
        return file_at(self._path) == self._file

    def open(self) -> sqlite3.Connection:
        """A connection to the file at the path, or to a new database in place of a damaged one."""
        try:
            if not self._damaged:
                return self._open_sound()
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
        self._move_aside()
        return self._open_sound()

    def close_if_damaged(self, database: sqlite3.Connection, error: Exception) -> bool:
        """Whether the error means damage: then the connection is closed, and the file is not opened again."""
        if not _is_damage(error):
            return False
        database.close()
        self._damaged = True
        return True

    def let_go(self, database: sqlite3.Connection) -> None:
        """Close a file that is no longer at the path, and delete its WAL, which the next one would read."""
        with contextlib.suppress(sqlite3.Error):
            database.close()
        for path, mine in self._beside.items():
            if file_at(path) == mine:
                path.unlink(missing_ok=True)
        logger.warning("%s was deleted or replaced: what is there now is used, a fresh one if nothing is", self._path)

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
            database.create_function("worth", 2, self._worth, deterministic=True)
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
        """Keep the last damaged database for the operator to look at; its WAL is of no use without it."""
        with contextlib.suppress(FileNotFoundError):
            os.replace(self._path, self._path.with_suffix(".damaged"))
        for suffix in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self._path}{suffix}")
        self._damaged = False
        self.moved_aside += 1
        logger.warning("%s was damaged: moved aside, a fresh one takes its place", self._path)


def _is_damage(error: Exception) -> bool:
    damage = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
    return isinstance(error, _Damaged) or getattr(error, "sqlite_errorcode", None) in damage
