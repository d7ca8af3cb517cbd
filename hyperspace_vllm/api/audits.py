"""Answers of other nodes, scored by this server's engine (core/response/audit.py), after they were served.

One in AUDIT_EVERY, and all of whoever is suspected; one at a time, and what comes meanwhile is not scored.
"""

import random
from typing import TYPE_CHECKING

import msgspec

from ..core.records.ids import RequestKey
from ..core.records.limits import AUDIT_TOKENS_MAX
from ..core.records.local import ResponseAudited
from ..core.response.audit import plain_answer, prompt_of, score, scoring_request
from ..response_db import StoredResponse
from .checks import OneAtATime, answer_to

if TYPE_CHECKING:
    from .exchange import Exchange

AUDIT_EVERY = 16
_TOKENIZE, _COMPLETIONS = "/tokenize", "/v1/completions"


class Audits(OneAtATime):
    """Of one server; they belong to one event loop."""

    def __init__(self) -> None:
        super().__init__()
        self._rng = random.Random()
        self._splits_evenly: bool | None = None  # not known yet

    def draw(self, suspect: bool) -> bool:
        """Whether an answer's turn has come."""
        return self.idle and (suspect or self._rng.randrange(AUDIT_EVERY) == 0)

    async def audit(self, exchange: "Exchange", key: RequestKey, entry: StoredResponse) -> None:
        """Have the engine score an answer, and the node hear of it."""
        said = plain_answer(exchange.endpoint, msgspec.json.decode(entry.body))
        prompt = prompt_of(exchange.endpoint, exchange.body)
        if said is None or prompt is None or not await self._can_split(exchange):
            return
        before = await _tokens(exchange, prompt)
        after = await _text_tokens(exchange, said.text) if said.text else []
        if not before or bool(after) != bool(said.text) or len(before) + len(after) > AUDIT_TOKENS_MAX:
            return
        request = scoring_request(exchange.body.get("model"), before, after)
        raw = await answer_to(exchange, _at(exchange, _COMPLETIONS), msgspec.json.encode(request))
        if raw is None:
            return
        scored = score(msgspec.json.decode(raw), len(before), said, exchange.body)
        if scored.far:
            exchange.cache.recent.forget(key)
        exchange.options.client.send(ResponseAudited(key, entry.proof, scored.tokens, scored.far))

    async def _can_split(self, exchange: "Exchange") -> bool:
        """Whether a text that continues another has the same tokens alone.

        Some SentencePiece tokenizers put a space before every text, and would have honest answers begin wrongly.
        """
        if self._splits_evenly is None:
            whole, *halves = [await _text_tokens(exchange, text) for text in ("a b", "a", " b")]
            if not whole or not all(halves):
                return False  # the server doesn't tell, or not now
            self._splits_evenly = whole == halves[0] + halves[1]
        return self._splits_evenly


async def _text_tokens(exchange: "Exchange", text: str) -> list[int]:
    request = {"model": exchange.body.get("model"), "prompt": text, "add_special_tokens": False}
    return await _tokens(exchange, request)


async def _tokens(exchange: "Exchange", request: dict[str, object]) -> list[int]:
    """The token ids of a prompt; none if the server doesn't tell."""
    raw = await answer_to(exchange, _at(exchange, _TOKENIZE), msgspec.json.encode(request))
    return [] if raw is None else msgspec.json.decode(raw)["tokens"]


def _at(exchange: "Exchange", path: str) -> dict[str, object]:
    """The scope of the client's request, for another path."""
    path = exchange.scope.get("root_path", "") + path
    return {**exchange.scope, "path": path, "raw_path": path.encode(), "query_string": b""}
