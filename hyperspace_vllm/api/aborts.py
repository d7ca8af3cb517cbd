"""Whether the engine gave up on an answer that vLLM calls complete all the same: Responses don't say.

Whoever computes an answer watches; vLLM's code, which runs in the same task, says so where it learns of it.
"""

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class Abort:
    """Of the answer that is computed in this context."""

    happened: bool = False


_watched: ContextVar[Abort | None] = ContextVar("hyperspace_abort", default=None)


def watch() -> Abort:
    """What will tell of the tasks that are started from here."""
    abort = Abort()
    _watched.set(abort)
    return abort


def note() -> None:
    """The engine has given up on the answer that is being made; where nobody watches, nothing happens."""
    if (abort := _watched.get()) is not None:
        abort.happened = True
