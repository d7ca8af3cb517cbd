"""Requests of our own, in the background: what was served is held against the engine now and then.

The answer of a semantic match is computed as well (core/response/wrongness.py), the answer of another node is scored
(core/response/audit.py). At most one of them is under way in a server, nobody waits for it, and what comes meanwhile is
not checked.
"""

import asyncio
import json
import logging
import random
from collections.abc import Coroutine
from typing import TYPE_CHECKING

import msgspec

from ..core.records.ids import RequestKey
from ..core.records.local import ANSWER_CHARS_MAX, ResponseAudited, SimilarChecked
from ..core.response.admission import Admitted, admit
from ..core.response.audit import answer_text, prompt_of, score, scoring_request
from ..core.response.request_key import Uncacheable
from ..response_db import StoredResponse
from .request_body import rewritten
from .subrequest import ask

if TYPE_CHECKING:
    from .exchange import Exchange

logger = logging.getLogger(__name__)

AUDIT_EVERY = 16  # answers of other nodes, but for those of whoever is suspected: all of them
CHECK_S = 120.0  # for the engine to answer; it may be busy with those who wait
_TOKENIZE, _COMPLETIONS = "/tokenize", "/v1/completions"


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


async def audit(exchange: "Exchange", key: RequestKey, entry: StoredResponse) -> None:
    """Have the engine score what another node answered, and the node hear of it."""
    text = answer_text(exchange.endpoint, msgspec.json.decode(entry.body))
    prompt = prompt_of(exchange.endpoint, exchange.body)
    if text is None or prompt is None:
        return
    model = prompt.get("model")
    before = await _tokens(exchange, prompt)
    after = await _tokens(exchange, {"model": model, "prompt": text, "add_special_tokens": False})
    if not before or not after:
        return
    raw = await _answer(exchange, msgspec.json.encode(scoring_request(model, before, after)), _COMPLETIONS)
    if raw is None:
        return
    scored = score(msgspec.json.decode(raw), len(before))
    if scored.far:
        exchange.cache.recent.forget(key)
    exchange.options.client.send(ResponseAudited(key, entry.proof, scored.tokens, scored.far))


async def _tokens(exchange: "Exchange", request: dict[str, object]) -> list[int]:
    """The token ids of a prompt; none if the server doesn't tell."""
    raw = await _answer(exchange, msgspec.json.encode(request), _TOKENIZE)
    return [] if raw is None else msgspec.json.decode(raw)["tokens"]


async def _answer(exchange: "Exchange", raw: bytes, path: str = "") -> bytes | None:
    """The server's answer to a request of ours, in the name of the exchange's client; None if it comes to nothing.

    It goes to `path`, or to where the client's went.
    """
    scope = exchange.scope
    if path:
        path = scope.get("root_path", "") + path
        scope = {**scope, "path": path, "raw_path": path.encode(), "query_string": b""}
    too_late = asyncio.Event()
    timer = asyncio.get_running_loop().call_later(CHECK_S, too_late.set)
    try:
        answer = await ask(exchange.app, scope, raw, too_late)
    finally:
        timer.cancel()
    return None if too_late.is_set() else answer
