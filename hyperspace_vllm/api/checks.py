"""Semantic matches that are computed as well, to compare the answers (core/response/similar/match_error.py)."""

import asyncio
import json
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from ..core.local.messages import ANSWER_CHARS_MAX, Question, SimilarChecked
from ..core.records.ids import RequestKey
from ..core.response.admission import Admitted, admit
from ..core.response.request_key import Uncacheable
from ..core.response.similar.guards import Mode
from .coalesce import Scope
from .large_bodies import Busy
from .request_body import rewritten
from .subrequest import ask

if TYPE_CHECKING:
    from .exchange import Exchange

CHECK_S = 120.0  # for the engine to answer; it may be busy with those who wait


class OneAtATime:
    """Work in the background that nobody waits for; what comes while it is under way is not done."""

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return self._task is None or self._task.done()

    def start(self, work: Coroutine[None, None, None]) -> None:
        """Do `work`, or not at all."""
        if self.idle:
            self._task = asyncio.create_task(work, name="hyperspace-check")
        else:
            work.close()


@dataclass(frozen=True, slots=True)
class ToCompare:
    """A semantic match, whose answer is `stored` under `key`; `similarity` is that of the questions."""

    key: RequestKey
    similarity: float
    mode: Mode
    stored: bytes


async def compute_too(exchange: "Exchange", match: ToCompare) -> None:
    """Have the engine answer a request that a match was served to, store that too, and let the two be compared.

    Not if the match isn't text.
    """
    if await _text(exchange, match.stored) is None:
        return
    body = {name: value for name, value in exchange.body.items() if name not in ("stream", "stream_options")}
    named = exchange.names()
    if isinstance(named, Uncacheable):
        return

    def read() -> tuple[RequestKey | Uncacheable, Question | None, bytes]:
        raw = rewritten(json.dumps(body).encode(), body, exchange.signed_scope(), exchange.salt, add_usage=False)
        return exchange.key(named, body), exchange.question_to(named, body), raw

    try:
        key, question, raw = await exchange.read(read)
    except Busy:
        return
    answer = await answer_to(exchange, exchange.scope, raw)
    if answer is None or isinstance(key, Uncacheable):
        return
    admitted = await exchange.cache.bodies.in_turn(len(answer), partial(admit, exchange.endpoint, body, answer))
    if isinstance(admitted, Admitted) and exchange.names() == named:  # else the weights have changed meanwhile
        exchange.hand_over(key, admitted.body, question)
        await report(exchange, match, admitted.body)


async def report(exchange: "Exchange", match: ToCompare, computed: bytes) -> None:
    """Let the node compare the answers, if both are text."""
    stored, text = await _text(exchange, match.stored), await _text(exchange, computed)
    question = exchange.question
    if question is not None and stored is not None and text is not None:
        said = stored[:ANSWER_CHARS_MAX], text[:ANSWER_CHARS_MAX]
        exchange.options.client.send(SimilarChecked(match.key, question, match.similarity, match.mode, *said))


async def answer_to(exchange: "Exchange", scope: Scope, raw: bytes) -> bytes | None:
    """The server's answer to a request of ours, in the name of the exchange's client; None if it comes to nothing."""
    too_late = asyncio.Event()
    timer = asyncio.get_running_loop().call_later(CHECK_S, too_late.set)
    try:
        answer = await ask(exchange.app, scope, raw, too_late)
    finally:
        timer.cancel()
    return None if too_late.is_set() else answer


async def _text(exchange: "Exchange", answer: bytes) -> str | None:
    return await exchange.cache.bodies.in_turn(len(answer), partial(_said, answer))


def _said(answer: bytes) -> str | None:
    """What a chat's first choice says to its reader."""
    try:
        match msgspec.json.decode(answer):
            case {"choices": [{"message": {"content": str(text)}}]} if text:
                return text
    except msgspec.DecodeError:
        return None
    return None
