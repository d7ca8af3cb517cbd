"""Tells, across processes and containers, whether a worker that lost its lease may still write into its slabs.

A worker holds `<data_dir>/sessions/<session key in hex>` locked (`flock`) from before its Hello until it is certain to
write nothing of that session any more. The kernel drops the lock of a process that dies, so one check is right for
live, frozen and dead workers; process ids would not do (containers have their own).
"""

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Literal

from .regular_files import open_regular, remove_drafts


class SessionLock:
    """The lock that a worker holds; `OSError` when the file can't be created."""

    def __init__(self, data_dir: Path, session: bytes) -> None:
        path = _path(data_dir, session)
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)  # a worker may start before its node
        path.parent.mkdir(mode=0o700, exist_ok=True)
        draft = path.with_suffix(".new")  # a node that starts now must not find the file before it is locked
        self._file = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            draft.rename(path)
        except OSError:
            os.close(self._file)
            raise

    def release(self) -> None:
        """The session's slabs are no longer written."""
        os.close(self._file)  # the file stays, unlocked, for the node to find


def look(data_dir: Path, session: bytes) -> Literal["held", "over", "unknown"]:
    """Whether a worker may still write into the session's slabs; the file of a session that is over is removed.

    Unknown: there is no such file, because the worker could not create one.
    """
    path = _path(data_dir, session)
    try:
        with open_regular(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(OSError):  # the session is over, whether or not its file can be removed
                path.unlink()
    except FileNotFoundError:
        return "unknown"
    except OSError:
        return "held"
    return "over"


def remove_leftovers(data_dir: Path) -> None:
    """Remove the files of ended sessions that earlier nodes left."""
    remove_drafts(data_dir / "sessions", "*.new")
    for path in (data_dir / "sessions").glob("*"):
        with contextlib.suppress(ValueError):
            look(data_dir, bytes.fromhex(path.name))


def _path(data_dir: Path, session: bytes) -> Path:
    return data_dir / "sessions" / session.hex()
