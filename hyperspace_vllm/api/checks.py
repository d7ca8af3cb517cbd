"""Requests of our own, in the background: what was served is held against the engine now and then.

The answer of a semantic match is computed as well (core/response/wrongness.py). At most one such request is under way
in a server, nobody waits for it, and what comes meanwhile is not checked.
"""

import asyncio
import json
import logging
import random
from collections.abc import Coroutine
from typing import TYPE_CHECKING

import msgspec

from ..core.records.ids import RequestKey
from ..core.records.local import ANSWER_CHARS_MAX, SimilarChecked
from ..core.response.admission import Admitted, admit
from ..core.response.audit import answer_text
from ..core.response.request_key import Uncacheable
from .request_body import rewritten
from .subrequest import ask

if TYPE_CHECKING:
    from .exchange import Exchange

logger = logging.getLogger(__name__)

CHECK_S = 120.0  # for the engine to answer; it may be busy with those who wait


class Checks:
    """Of one server; they belong to one event loop."""

    def __init__(self) -> None:
        self.rng = random.Random()
        self._task: asyncio.Task[None] | None = None

    def start(self, work: Coroutine[None, None, None]) -> None:
        """Do `work` in the background, or not at all."""
        if self._task is not None and not self._task.done():
            work.close()
            return
        self._task = asyncio.create_task(_quietly(work), name="hyperspace-check")


async def _quietly(work: Coroutine[None, None, None]) -> None:
    try:
        await work
    except Exception:
        logger.exception("a stored answer could not be checked: please report it")


async def compute_too(exchange: "Exchange", match: RequestKey, similarity: float, stored: bytes) -> None:
    """Have the engine answer a request that a match was served to: the two are compared, and the new one is stored."""
    key = exchange.key()
    body = {name: value for name, value in exchange.body.items() if name not in ("stream", "stream_options")}
    raw = rewritten(json.dumps(body).encode(), body, exchange.signed_scope(), add_usage=False)
    answer = await _answer(exchange, raw)
    if answer is None or isinstance(key, Uncacheable):
        return
    admitted = admit(exchange.endpoint, body, answer)
    if isinstance(admitted, Admitted) and exchange.key() == key:  # else the weights have changed meanwhile
        exchange.hand_over(key, admitted.body, exchange.question())
        report(exchange, match, similarity, stored, admitted.body)


def report(exchange: "Exchange", match: RequestKey, similarity: float, stored: bytes, computed: bytes) -> None:
    """Let the node compare two answers, if they are text."""
    texts = [answer_text(exchange.endpoint, msgspec.json.decode(body)) for body in (stored, computed)]
    if texts[0] is not None and texts[1] is not None:
        cut = (text[:ANSWER_CHARS_MAX] for text in (texts[0], texts[1]))
        exchange.options.client.send(SimilarChecked(match, similarity, *cut))


async def _answer(exchange: "Exchange", raw: bytes) -> bytes | None:
    """The engine's answer to a request of ours, in the name of the exchange's client; None if it comes to nothing."""
    too_late = asyncio.Event()
    timer = asyncio.get_running_loop().call_later(CHECK_S, too_late.set)
    try:
        answer = await ask(exchange.app, exchange.scope, raw, too_late)
    finally:
        timer.cancel()
    return None if too_late.is_set() else answer
