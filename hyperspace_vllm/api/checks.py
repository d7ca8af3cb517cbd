"""Semantic matches that are computed as well, to compare the answers (core/response/similar/match_error.py)."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import partial

import msgspec
from starlette.types import Scope

from ..core.local.similar_messages import ANSWER_CHARS_MAX, Question, SimilarChecked
from ..core.records.ids import RequestKey
from ..core.response.admission import Admitted, admit
from ..core.response.request_key import Uncacheable
from ..core.response.similar.guards import Mode
from .cache_port import CachePort
from .large_bodies import Busy
from .subrequest import ask

CHECK_S = 120.0  # for the engine to answer; it may be busy with clients' requests


class OneAtATime:
    """Background work that no request waits for; work that arrives while some is under way is dropped."""

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return self._task is None or self._task.done()

    def start(self, work: Coroutine[None, None, None]) -> None:
        """Do `work`, or drop it."""
        if self.idle:
            self._task = asyncio.create_task(work, name="hyperspace-check")
        else:
            work.close()


@dataclass(frozen=True, slots=True)
class ToCompare:
    """A match of `question`, whose answer is stored under `key`; `similarity` is that of the questions.

    `said` is the beginning of that answer's text, None if it is not text.
    """

    key: RequestKey
    question: Question
    similarity: float
    mode: Mode
    said: str | None


async def compute_too(port: CachePort, match: ToCompare) -> None:
    """Have the engine answer a request that got a match, store that answer too, and have the two compared.

    Only if the match is text.
    """
    if match.said is None:
        return
    facts, naming = port.facts, port.naming
    body = {name: value for name, value in facts.body.items() if name not in ("stream", "stream_options")}
    named = naming.names()
    if isinstance(named, Uncacheable):
        return

    def read() -> tuple[RequestKey | Uncacheable, Question | None, bytes]:
        return naming.key(named, body), naming.question(named, body), port.for_engine(body)

    try:
        key, question, raw = await port.read(read)
    except Busy:
        return
    answer = await answer_to(port, facts.scope, raw)
    if answer is None or isinstance(key, Uncacheable):
        return
    admitted = await port.read_computed(len(answer), partial(admit, facts.endpoint, body, answer))
    if isinstance(admitted, Admitted) and naming.names() == named:  # else the weights have changed meanwhile
        port.hand_over(key, admitted.body, question)
        await report(port, match, admitted.body)


async def report(port: CachePort, match: ToCompare, computed: bytes) -> None:
    """Let the node compare the answers, if both are text."""
    text = await text_of(port, computed)
    if match.said is not None and text is not None:
        port.tell_node(SimilarChecked(match.key, match.question, match.similarity, match.mode, match.said, text))


async def answer_to(port: CachePort, scope: Scope, raw: bytes) -> bytes | None:
    """The server's answer to a request of the cache, on behalf of a client; None if there is none."""
    too_late = asyncio.Event()
    timer = asyncio.get_running_loop().call_later(CHECK_S, too_late.set)
    try:
        answer = await ask(port.engine, scope, raw, too_late)
    finally:
        timer.cancel()
    return None if too_late.is_set() else answer


async def text_of(port: CachePort, answer: bytes) -> str | None:
    """The beginning of the text of a chat's first choice, as far as answers are compared."""
    return await port.read_computed(len(answer), partial(_said, answer))


def _said(answer: bytes) -> str | None:
    try:
        match msgspec.json.decode(answer):
            case {"choices": [{"message": {"content": str(text)}}]} if text:
                return text[:ANSWER_CHARS_MAX]
    except msgspec.DecodeError:
        return None
    return None
