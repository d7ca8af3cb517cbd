"""Requests that are too large for the event loop, and a thread that is busy with others."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from hyperspace_vllm.api.large_bodies import LargeBodies
from hyperspace_vllm.core.records.limits import INLINE_BODY_BYTES, USUAL_BODY_BYTES
from tests.support.until import until_async

LARGE = INLINE_BODY_BYTES + 1
LARGEST = USUAL_BODY_BYTES + 1
PATIENT_S = 60.0
LONG_CHAT = {"model": "base", "messages": [{"role": "user", "content": "word " * (USUAL_BODY_BYTES // 4)}]}
BYPASSED = "hyperspace; fwd=bypass; detail=busy"
AS_JSON = {"content-type": "application/json"}


@asynccontextmanager
async def taken(bodies: LargeBodies, size: int) -> AsyncIterator[None]:
    """The thread of `bodies` at work, and `size` bytes in its line, those included."""
    done = threading.Event()
    task = asyncio.create_task(bodies.work(size, partial(done.wait, 2 * PATIENT_S)))
    await until_async(lambda: bodies.waiting == size)
    try:
        yield
    finally:
        done.set()
    await asyncio.wait((task,))


async def emptied(bodies: LargeBodies) -> None:
    await until_async(lambda: bodies.waiting == 0)
