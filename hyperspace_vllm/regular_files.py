"""Reads files that may not be regular: those of models, adapters and data directories."""

import errno
import os
import stat
import time
from contextlib import suppress
from io import FileIO
from pathlib import Path

_LEFT_BEHIND_S = 3600.0


def open_regular(path: str | Path, flags: int = 0) -> FileIO:
    """A file opened for reading; `OSError` if it isn't regular: a pipe would block, and a device never end."""
    file = FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags))
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_regular(path: str | Path, bytes_max: int) -> bytes:
    """The file's first bytes; `OSError` as `open_regular`."""
    with open_regular(path) as file:
        return file.read(bytes_max)


def remove_drafts(directory: Path, pattern: str) -> None:
    """Remove the leftovers of killed processes: files of these names that were not written for an hour."""
    for path in directory.glob(pattern):
        with suppress(OSError):
            if time.time() - path.lstat().st_mtime > _LEFT_BEHIND_S:
                path.unlink()
