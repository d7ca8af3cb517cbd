"""Why a node can't start, in words that say what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import zmq


class StartError(Exception):
    """The node can't start; the message names the setting or file that is in the way, and what to do."""


@contextmanager
def needed(what: str | Path, advice: str) -> Iterator[None]:
    """A `StartError` that names `what` in place of the error that a system call or a wrong value ends in."""
    try:
        yield
    except (OSError, ValueError, zmq.ZMQError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise StartError(f"{what}: {reason}; {advice}") from error
