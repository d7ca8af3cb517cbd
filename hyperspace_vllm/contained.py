"""Keeps errors of Hyperspace out of vLLM.

Context: vLLM calls connectors, plugins, middleware and statistics without catching errors: an exception ends the
engine, or the request. Choice: every entry from vLLM is contained: its exception is logged with a traceback, once per
entry, and vLLM gets an answer that costs a miss. Cost: an error of Hyperspace is a line in the log, not a crash.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

logger = logging.getLogger("vllm.hyperspace")

Entry = TypeVar("Entry", bound=Callable[..., Any])

_reported: set[str] = set()  # one name per entry, so it is bounded


def report_error(where: str) -> None:
    """Log the exception being handled, with its traceback, if it is the first one there."""
    if where not in _reported:
        _reported.add(where)
        logger.exception("hyperspace: an error in %s, please report it (further ones there are not logged)", where)


def _nothing(*_: Any, **__: Any) -> None:
    return None


def contained(answer: Callable[..., Any] = _nothing) -> Callable[[Entry], Entry]:
    """Decorate an entry, not a coroutine: where it raises, `answer` is called with the same arguments instead."""

    def decorate(entry: Entry) -> Entry:
        @functools.wraps(entry)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return entry(*args, **kwargs)
            except Exception:
                report_error(entry.__qualname__)
                return answer(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate
