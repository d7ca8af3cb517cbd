"""The data directory as one node's own: claimed, and locked for as long as it runs."""

import fcntl
import os
from pathlib import Path

from ...config import CHOOSE_DATA_DIR
from ..start_error import needed


def claim_directory(data_dir: Path) -> None:
    """Make the directory, or make it private; `StartError` if it can't be had."""
    with needed(f"data_dir = {str(data_dir)!r}", CHOOSE_DATA_DIR):
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = data_dir.stat().st_uid
        if owner != os.geteuid():
            raise PermissionError(f"it belongs to user {owner}, this is user {os.geteuid()}")
        data_dir.chmod(0o700)


def lock_directory(data_dir: Path) -> int | None:
    """The lock's descriptor, None if another process holds it; `StartError`."""
    path = data_dir / "node.lock"
    with needed(path, "the data directory (HYPERSPACE_DATA_DIR) must be on a file system that has locks"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            os.close(descriptor)
            raise
        return descriptor
