"""The file into which a new object is encoded."""

import contextlib
import mmap
import os
from pathlib import Path

from ...core.records.limits import TOTAL_CHUNKS


class ObjectWriter:
    """A new object's file, mapped: initially zero, its space reserved."""

    def __init__(self, path: Path, rows: int, chunk_bytes: int) -> None:
        self.path = path
        self.size = size = rows * TOTAL_CHUNKS * chunk_bytes
        self._row_bytes = TOTAL_CHUNKS * chunk_bytes
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, size)  # a full disk must fail here: under mmap it would be SIGBUS
            self._map = mmap.mmap(fd, size)
        except BaseException:
            path.unlink()
            raise
        finally:
            os.close(fd)
        self._view = memoryview(self._map)

    def row(self, row: int) -> memoryview:
        """Where the 64 chunks of a row go."""
        return self._view[row * self._row_bytes : (row + 1) * self._row_bytes]

    def close(self) -> None:
        """Unmap; the file stays."""
        self._view.release()
        with contextlib.suppress(BufferError):  # a failed encoder's traceback still holds slices: unmapped with it
            self._map.close()
