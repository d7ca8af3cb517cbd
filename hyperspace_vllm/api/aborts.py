"""Whether the engine aborted an answer that vLLM marks as complete: the Responses API does not report it.

The code that computes an answer watches; vLLM's code, which runs in the same task, reports the abort.
"""

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class Abort:
    """Whether the engine aborted the answer that is computed in this context."""

    happened: bool = False


_watched: ContextVar[Abort | None] = ContextVar("hyperspace_abort", default=None)


def watch() -> Abort:
    """Watch the tasks that are started from here."""
    abort = Abort()
    _watched.set(abort)
    return abort


def note() -> None:
    """The engine has aborted the current answer; without a watch nothing happens."""
    if (abort := _watched.get()) is not None:
        abort.happened = True
