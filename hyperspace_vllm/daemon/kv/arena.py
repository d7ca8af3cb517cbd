"""The shared memory in which KV rows travel between engine processes and the node.

    file = header: u64 generation of every page (little-endian) | pages of 64 KiB

A slab is a run of whole pages; its slot is the number of its first page. Freeing a slab advances the generation of its
slot *before* the pages can be handed out again, so a reader that compares generations after its copy learns whether the
bytes were still those it asked for. (On x86 and on arm64 the aligned u64 is one store; a lock and a message to another
process lie between it and the first byte of a new owner, and order them.) Generations start at a random number, so that
a slab of an earlier node never looks current in this node's arena.

A node keeps its file locked (`flock`) while it is mapped, so the kernel unlocks it however the node dies. At its start
a node removes the files in shared memory that it can lock: a killed node's directory may never be used again. Process
ids would not do: containers that share /dev/shm have their own.

A file, not `multiprocessing.shared_memory`: on Python 3.11 its first client's resource tracker unlinks it.
"""

import errno
import fcntl
import logging
import math
import mmap
import os
import re
import secrets
import threading
import time
from bisect import bisect_left
from contextlib import suppress
from itertools import islice
from pathlib import Path

from ...core.local.slab import PAGE_BYTES, Slab, pages_bytes
from ...core.records.limits import MiB
from ...regular_files import open_regular

logger = logging.getLogger(__name__)

# Less than this in /dev/shm (Docker gives 64 MiB) holds too few rows to be useful: a file is better.
SHARED_MEMORY_BYTES_MIN = 256 * MiB
_GENERATION_BYTES = 8
_NAME = re.compile(r"hyperspace-[0-9a-f]{32}\.arena")
_ABANDONED_AFTER_S = 60.0  # a node may be paused between creating its file and locking it
_LOOKS_MAX = 256  # files per start
_SWEEP_S = 2.0  # freeing 32 GiB takes longer: the rest continues during the start


class ArenaFull(OSError):
    """Neither shared memory nor the data directory has room for an arena."""


class Arena:
    """Allocates slabs in one mapped file. Not thread-safe: everything happens on the node's loop."""

    def __init__(self, path: Path, size: int) -> None:
        """Map a new file of `size` bytes at `path`; `OSError` if the space isn't available."""
        self.path = path
        pages = size // PAGE_BYTES
        header_pages = -(-pages * _GENERATION_BYTES // PAGE_BYTES)
        assert pages > header_pages, "an arena needs at least two pages"
        self.size = pages * PAGE_BYTES
        self.quarantined_bytes = 0
        self._data_start = header_pages * PAGE_BYTES
        self._pages = pages - header_pages
        self._mapping = _map_new_file(path, self.size)
        self._bytes = memoryview(self._mapping)
        self._generations = self._bytes[: self._pages * _GENERATION_BYTES].cast("Q")
        first_generation = secrets.randbits(48)
        for slot in range(self._pages):
            self._generations[slot] = first_generation
        self._free: list[tuple[int, int]] = [(0, self._pages)]  # (first page, pages), ascending, never adjacent
        self._live: dict[int, Slab] = {}

    @classmethod
    def create(cls, data_dir: Path, size: int, shared_memory: Path = Path("/dev/shm")) -> "Arena":
        """An arena in shared memory, or in the data directory if there is too little; at most half of what is free.

        Files of killed nodes are removed first; <data_dir>/arena.path records the file, so that the next node of the
        directory needn't wait until it counts as abandoned. The caller holds the directory's lock.
        """
        note = data_dir / "arena.path"
        (data_dir / "arena").unlink(missing_ok=True)
        sweep = threading.Thread(target=_sweep, args=(note, shared_memory), name="hyperspace-sweep", daemon=True)
        sweep.start()
        sweep.join(_SWEEP_S)
        places = [
            (shared_memory / f"hyperspace-{secrets.token_hex(16)}.arena", min(size, SHARED_MEMORY_BYTES_MIN)),
            (data_dir / "arena", 4 * PAGE_BYTES),
        ]
        for path, least in places:
            granted = min(size, _free_bytes(path.parent) // 2)
            if granted < least:
                continue
            note.write_text(str(path))  # before the file exists: a node killed in between leaves nothing behind
            try:
                return cls(path, granted)
            except OSError:
                continue  # another process took the space since the check
        raise ArenaFull(f"no room for {size} bytes in {shared_memory} nor in {data_dir}")

    @property
    def free_bytes(self) -> int:
        """Bytes in no slab and not quarantined."""
        return sum(pages for _, pages in self._free) * PAGE_BYTES

    @property
    def capacity_bytes(self) -> int:
        """Bytes that all slabs together may take."""
        return self._pages * PAGE_BYTES

    def allocate(self, length: int) -> Slab | None:
        """A slab of `length` bytes from the first gap that holds it; None if there is no such gap."""
        wanted = _pages_of(length)
        for index, (first, pages) in enumerate(self._free):
            if pages < wanted:
                continue
            if pages == wanted:
                del self._free[index]
            else:
                self._free[index] = (first + wanted, pages - wanted)
            slab = Slab(first, self._data_start + first * PAGE_BYTES, length, self._generations[first])
            self._live[first] = slab
            return slab
        return None

    def free(self, slab: Slab) -> None:
        """Give the slab's pages back; a process that still reads it will see another generation."""
        self._end(slab)
        self._add_free(slab.slot, _pages_of(slab.length))

    def quarantine(self, slab: Slab) -> None:
        """End the slab without freeing its pages: a process that lost its lease may still write there."""
        self._end(slab)
        self.quarantined_bytes += pages_bytes(slab.length)

    def release(self, slab: Slab) -> None:
        """Give a quarantined slab's pages back: no process writes there any more."""
        self.quarantined_bytes -= pages_bytes(slab.length)
        self._add_free(slab.slot, _pages_of(slab.length))

    def view(self, slab: Slab) -> memoryview:
        """The slab's bytes, writable."""
        assert self._live.get(slab.slot) == slab, "the slab is not live"
        return self._bytes[slab.offset : slab.offset + slab.length]

    def close(self) -> None:
        """Remove the file; processes that mapped it keep their pages until they unmap it."""
        with suppress(OSError):  # the data directory may be read-only; the next node removes the file
            self.path.unlink()

    def _add_free(self, first: int, pages: int) -> None:
        index = bisect_left(self._free, (first, 0))
        if index < len(self._free) and self._free[index][0] == first + pages:
            pages += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == first:
            first, before = self._free[index - 1]
            self._free[index - 1] = (first, before + pages)
        else:
            self._free.insert(index, (first, pages))

    def _end(self, slab: Slab) -> None:
        live = self._live.pop(slab.slot, None)
        assert live == slab, f"{slab} is not live"
        self._generations[slab.slot] = slab.generation + 1


def _pages_of(length: int) -> int:
    assert length > 0
    return pages_bytes(length) // PAGE_BYTES


def _free_bytes(directory: Path) -> int:
    try:
        status = os.statvfs(directory)
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize


def _map_new_file(path: Path, size: int) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        # The mapping holds the lock too, so both last equally long; executed child processes inherit neither.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink == 0:
            raise FileNotFoundError(errno.ENOENT, "removed before it was locked", str(path))
        # Reserve the pages now: a missing page would be a SIGBUS at its first access, not an error.
        os.posix_fallocate(descriptor, 0, size)
        return mmap.mmap(descriptor, size)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _sweep(note: Path, shared_memory: Path) -> None:
    """Remove what the directory's last node left, and older files of this user's other nodes."""
    freed, abandoned_s = [], time.time() - _ABANDONED_AFTER_S
    with suppress(OSError, ValueError):  # no note, or an unreadable one
        freed.append(_remove_unlocked(shared_memory / Path(note.read_text()).name, math.inf))
    with suppress(OSError), os.scandir(shared_memory) as entries:
        arenas = (shared_memory / entry.name for entry in entries if _NAME.fullmatch(entry.name))
        freed += [_remove_unlocked(path, abandoned_s) for path in islice(arenas, _LOOKS_MAX)]
    if number := sum(map(bool, freed)):
        logger.warning("arenas of killed nodes removed from %s: %d, %d MiB", shared_memory, number, sum(freed) // MiB)


def _remove_unlocked(path: Path, made_before_s: float) -> int:
    """Remove this user's arena if it is old enough and no node holds its lock; the bytes freed, 0 if it stays."""
    with suppress(OSError), open_regular(path, os.O_NOFOLLOW) as file:
        status = os.fstat(file.fileno())
        if not _NAME.fullmatch(path.name) or status.st_uid != os.geteuid() or status.st_mtime > made_before_s:
            return 0
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its node is alive
        if os.path.samestat(status, path.lstat()):
            path.unlink()
            return status.st_blocks * 512
    return 0
