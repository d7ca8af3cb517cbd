"""Why a node can't start, in words that say what to do."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import zmq


class StartError(Exception):
    """The node can't start; the message names the setting or file that is at fault, and what to do."""


@contextmanager
def needed(what: str | Path, advice: str) -> Iterator[None]:
    """Raise a `StartError` that names `what` instead of the error of a system call or a wrong value.

    For a full disk the advice is to make room; for other errors it is `advice`.
    """
    try:
        yield
    except (OSError, ValueError, zmq.ZMQError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if is_full and not advice.startswith("make room"):
            advice = "make room on that disk, or choose another HYPERSPACE_DATA_DIR"
        raise StartError(f"{what}: {reason}; {advice}") from error
