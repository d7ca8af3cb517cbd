"""Audits: this server's engine scores answers of other nodes after they were served (core/response/audit.py).

It scores one in AUDIT_EVERY, and all answers of suspected signers or on trial; one at a time, for at most AUDIT_SHARE
of the time. Answers that arrive meanwhile are not scored.
"""

import random
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import msgspec

from ..core.local.response_cache_messages import ResponseAudited
from ..core.records.ids import RequestKey
from ..core.records.limits import AUDIT_TOKENS_MAX
from ..core.response.audit import (
    Comparison,
    Said,
    compare,
    confirming_request,
    confirms,
    continuing_request,
    plain_answer,
    prompt_of,
    rest_of,
    score,
    scoring_request,
)
from ..core.response.request_fields import Endpoint
from .cache_port import CachePort
from .checks import OneAtATime, answer_to
from .large_bodies import Busy

AUDIT_EVERY = 16
AUDIT_SHARE = 0.05  # of the time: accusing a signer, so that all of its answers are audited, costs no more
CONTINUATIONS_MAX = 3
_TOKENIZE, _DETOKENIZE, _COMPLETIONS = "/tokenize", "/detokenize", "/v1/completions"


class Audits(OneAtATime):
    """The audits of one server; they belong to one event loop."""

    def __init__(self) -> None:
        super().__init__()
        self._rng = random.Random()
        self._splits_evenly: bool | None = None  # not known yet
        self._rests_until_s = 0.0

    def draw(self, suspect: bool) -> bool:
        """Whether an answer's turn has come."""
        has_time = self.idle and time.monotonic() >= self._rests_until_s
        return has_time and (suspect or self._rng.randrange(AUDIT_EVERY) == 0)

    async def audit(self, port: CachePort, key: RequestKey, body: bytes, proof: bytes) -> None:
        """Have the engine score an answer, and send the result to the node."""
        began_s = time.monotonic()
        try:
            with suppress(Busy):
                await self._audit(port, key, body, proof)
        finally:
            now_s = time.monotonic()
            self._rests_until_s = now_s + (now_s - began_s) * (1 / AUDIT_SHARE - 1)

    async def _audit(self, port: CachePort, key: RequestKey, body: bytes, proof: bytes) -> None:
        said = await port.read_found(len(body), partial(_said, port.facts.endpoint, body))
        prompt = await port.read(partial(prompt_of, port.facts.endpoint, port.facts.body))
        if said is None or prompt is None or not await self._can_split(port):
            return
        before = await _tokens(port, prompt)
        after = await _text_tokens(port, said.text) if said.text else []
        if not before or bool(after) != bool(said.text) or len(before) + len(after) > AUDIT_TOKENS_MAX:
            return
        request = scoring_request(port.facts.body.get("model"), before, after)
        raw = await answer_to(port, _at(port, _COMPLETIONS), msgspec.json.encode(request))
        if raw is None:
            return
        scored = score(msgspec.json.decode(raw), len(before), said, port.facts.body)
        far = scored.far
        if scored.far_at:
            match await _own_words(port, before, after, said.text, scored.far_at):
                case "agrees":
                    far = int(not scored.ends_well)
                case "unclear":
                    far = 1
        if far and not await _confirmed(port, before):
            return
        if far:
            port.forget(key)
        port.tell_node(ResponseAudited(key, proof, scored.tokens, far, port.source))

    async def _can_split(self, port: CachePort) -> bool:
        """Whether a text that continues another has the same tokens when it is tokenised alone.

        Some SentencePiece tokenizers put a space before every text, so that honest answers would begin wrongly.
        """
        if self._splits_evenly is None:
            whole, *halves = [await _text_tokens(port, text) for text in ("a b", "a", " b")]
            if not whole or not all(halves):
                return False  # the server does not answer, or not now
            self._splits_evenly = whole == halves[0] + halves[1]
        return self._splits_evenly


async def _confirmed(port: CachePort, prompt: Sequence[int]) -> bool:
    """Whether the route that answers the client's request has the same prompt ids as were scored."""
    request = await port.read(partial(confirming_request, port.facts.endpoint, port.facts.body))
    raw = await answer_to(port, port.facts.scope, await port.read(partial(msgspec.json.encode, request)))
    return raw is not None and confirms(msgspec.json.decode(raw), prompt)


async def _own_words(
    port: CachePort, before: Sequence[int], after: Sequence[int], text: str, far_at: Sequence[int]
) -> Comparison:
    """Whether the engine's own text differs from the answer's after any of its far tokens."""
    said: Comparison = "agrees"
    for at in far_at[:CONTINUATIONS_MAX]:
        beginning = await _text_of(port, after[:at]) if at else ""
        rest = None if beginning is None else rest_of(text, beginning)
        request = continuing_request(port.facts.body.get("model"), [*before, *after[:at]])
        raw = await answer_to(port, _at(port, _COMPLETIONS), msgspec.json.encode(request))
        found = "unclear" if raw is None or rest is None else compare(msgspec.json.decode(raw), rest)
        if found == "departs":
            return "departs"
        if found == "agrees":
            return said
        said = "unclear" if found == "unclear" else said
    return said if len(far_at) <= CONTINUATIONS_MAX else "unclear"


async def _text_of(port: CachePort, tokens: Sequence[int]) -> str | None:
    request = {"model": port.facts.body.get("model"), "tokens": list(tokens)}
    raw = await answer_to(port, _at(port, _DETOKENIZE), msgspec.json.encode(request))
    return None if raw is None else str(msgspec.json.decode(raw)["prompt"])


async def _text_tokens(port: CachePort, text: str) -> list[int]:
    request = {"model": port.facts.body.get("model"), "prompt": text, "add_special_tokens": False}
    return await _tokens(port, request)


async def _tokens(port: CachePort, request: dict[str, object]) -> list[int]:
    """The token ids of a prompt; none if the server does not return them."""
    body = await port.read(partial(msgspec.json.encode, request))
    raw = await answer_to(port, _at(port, _TOKENIZE), body)
    return [] if raw is None else await port.read_found(len(raw), partial(_tokens_in, raw))


def _tokens_in(raw: bytes) -> list[int]:
    tokens: list[int] = msgspec.json.decode(raw)["tokens"]
    return tokens


def _said(endpoint: Endpoint, body: bytes) -> Said | None:
    return plain_answer(endpoint, msgspec.json.decode(body))


def _at(port: CachePort, path: str) -> dict[str, object]:
    """The scope of the client's request, for another path."""
    path = port.facts.scope.get("root_path", "") + path
    return {**port.facts.scope, "path": path, "raw_path": path.encode(), "query_string": b""}
