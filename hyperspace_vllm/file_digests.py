"""SHA-256 of a model's files, read once per machine: every byte of a file is its identity, never a sample.

A digest is kept in `<data_dir>/digests` with the state (size, times, inode) that the file had when it was read, and
counts while the file is in that state. Processes that need the same files at the same time wait for the one that reads
them. Reading takes about a minute per 100 GB, at low priority.
"""

import fcntl
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .core.records.errors import Refused
from .core.records.limits import MiB
from .regular_files import open_regular, read_regular, remove_drafts

READ_BYTES = 8 * MiB
RECORD_BYTES_MAX = 64 * MiB
RECORDS_MAX = 256  # sets of files that are remembered: models and adapters of one machine
PROGRESS_S = 1.0
_NICE = 10  # where engines spin on every core it still gets a tenth of one


@dataclass(frozen=True, slots=True)
class FileState:
    """A file as `stat` shows it: changed bytes mean another state (ctime advances with every write)."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, path: str) -> "FileState":
        """The file's state now; `OSError` if it is unavailable."""
        return cls._from(path, os.stat(path))

    @classmethod
    def _from(cls, path: str, status: os.stat_result) -> "FileState":
        return cls(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)

    def hash(self, advance: Callable[[int], None]) -> str:
        """SHA-256 (hex) of the file; `Refused` if it isn't in this state, before and after. `advance` counts bytes."""
        digest, buffer = hashlib.sha256(), memoryview(bytearray(READ_BYTES))
        with open_regular(self.path) as file:
            before = self._from(self.path, os.fstat(file.fileno()))
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                advance(count)
            if not self == before == self._from(self.path, os.fstat(file.fileno())):
                raise Refused("changed", f"{self.path} was changed after it was loaded")
        return digest.hexdigest()


class FileDigests:
    """The digests that a machine's processes share in one data directory."""

    def __init__(self, data_dir: Path) -> None:
        self._directory = data_dir / "digests"

    def digest(self, title: str, states: Iterable[FileState]) -> dict[str, str]:
        """SHA-256 (hex) by path; blocks while files are read. `title` names the set in progress reports.

        `Refused` when a file is no longer in its state, or can't be read.
        """
        wanted = tuple(sorted(states, key=lambda state: state.path))
        name = hashlib.sha256("\0".join(state.path for state in wanted).encode("utf-8", "surrogateescape")).hexdigest()
        record = self._directory / f"{name[:32]}.json"
        try:
            known = _read(record)
            if any(state not in known for state in wanted):
                with self._reading(record, title, sum(state.size for state in wanted)) as advance:
                    known = _read(record)  # another process may have read them in the meantime
                    known = {s: known[s] if s in known else s.hash(advance) for s in wanted}
                    with suppress(OSError):  # a read-only disk costs the next process another read
                        self._write(record, known)
        except OSError as error:
            raise Refused("unreadable", f"{error.filename or title}: {error.strerror}") from error
        return {state.path: known[state] for state in wanted}

    @contextmanager
    def _reading(self, record: Path, title: str, size: int) -> Iterator[Callable[[int], None]]:
        """Hold the set's lock; `in_progress` shows what is passed to the yielded function."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        done, told_at = 0, float("-inf")
        if threading.current_thread() is not threading.main_thread():  # the main thread keeps it, for children too
            with suppress(OSError):
                nice = max(_NICE, os.getpriority(os.PRIO_PROCESS, 0))  # root could raise the priority
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)  # of this thread alone
        with record.with_suffix(".part").open("w") as part:
            fcntl.flock(part, fcntl.LOCK_EX)

            def advance(count: int) -> None:
                nonlocal done, told_at
                done += count
                if time.monotonic() - told_at >= PROGRESS_S:
                    told_at = time.monotonic()
                    progress = json.dumps({"title": title, "done_bytes": done, "total_bytes": size})
                    os.pwrite(part.fileno(), progress.ljust(512).encode(), 0)

            yield advance
            with suppress(OSError):
                Path(part.name).unlink()

    def _write(self, record: Path, known: dict[FileState, str]) -> None:
        rows = [[*_fields(state), digest] for state, digest in known.items()]
        draft = record.with_suffix(f".{os.getpid()}-{threading.get_native_id()}")
        draft.write_text(json.dumps(rows))
        draft.replace(record)
        remove_drafts(self._directory, "*.part")
        remove_drafts(self._directory, "*.*-*")
        records = sorted(self._directory.glob("*.json"), key=lambda path: path.stat().st_mtime)
        for old in records[:-RECORDS_MAX]:
            old.unlink(missing_ok=True)


def in_progress(data_dir: Path) -> list[dict[str, object]]:
    """The sets of files being read now: `title`, `done_bytes` and `total_bytes` of each."""
    found: list[dict[str, object]] = []
    for part in (data_dir / "digests").glob("*.part"):
        with suppress(OSError, ValueError), open_regular(part) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(dict(json.load(file)))
    return found


def _fields(state: FileState) -> tuple[str | int, ...]:
    return state.path, state.size, state.mtime_ns, state.ctime_ns, state.inode, state.device


def _read(record: Path) -> dict[FileState, str]:
    """The stored digests; none if the record is damaged."""
    try:
        return {FileState(*state): str(digest) for *state, digest in json.loads(read_regular(record, RECORD_BYTES_MAX))}
    except (OSError, ValueError, TypeError):
        return {}
