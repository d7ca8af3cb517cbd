"""Waiting for what happens elsewhere: polled until a deadline, and never slept for.

Both forms return the condition's first true value. At the deadline the test fails with what it waited for and the last
value.
"""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import NoReturn, TypeVar, overload

T = TypeVar("T")

WAIT_S = 60.0  # a machine may be busy


def until(condition: Callable[[], T | None], timeout_s: float = WAIT_S, what: str = "") -> T:
    """Poll until `condition()` is true; `what` says it in words where the source of the condition does not."""
    ends_at_s, pauses_s = time.monotonic() + timeout_s, _pauses_s()
    while not (value := condition()):
        if time.monotonic() >= ends_at_s:
            _fail(condition, timeout_s, what, value)
        time.sleep(next(pauses_s))
    return value


@overload
async def until_async(condition: Callable[[], Awaitable[T | None]], timeout_s: float = WAIT_S, what: str = "") -> T: ...
@overload
async def until_async(condition: Callable[[], T | None], timeout_s: float = WAIT_S, what: str = "") -> T: ...
async def until_async(condition: Callable[[], object], timeout_s: float = WAIT_S, what: str = "") -> object:
    """Poll until `condition()`, or what it awaits, is true, while the event loop goes on."""
    ends_at_s, pauses_s = time.monotonic() + timeout_s, _pauses_s()
    while True:
        value = condition()
        if inspect.isawaitable(value):
            try:
                value = await asyncio.wait_for(value, ends_at_s - time.monotonic())
            except TimeoutError:
                _fail(condition, timeout_s, what, "still awaited")
        if value:
            return value
        if time.monotonic() >= ends_at_s:
            _fail(condition, timeout_s, what, value)
        await asyncio.sleep(next(pauses_s))


def _pauses_s() -> Iterator[float]:
    """Short at first, for what happens at once; then long enough to leave the others the processor."""
    pause_s = 0.002
    while True:
        yield pause_s
        pause_s = min(1.5 * pause_s, 0.05)


def _fail(condition: Callable[[], object], timeout_s: float, what: str, value: object) -> NoReturn:
    try:
        source = " ".join(inspect.getsource(condition).split())
    except (OSError, TypeError):
        source = repr(condition)
    raise TimeoutError(f"{what or source}: not within {timeout_s:g} s; the last value was {value!r}")
