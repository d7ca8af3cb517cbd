"""/v1/embeddings one input at a time: stored embeddings are combined with computed ones.

Context: clients embed overlapping batches, and usage is reported only for a whole answer. Choice: every missing input
is a separate request to the engine, which batches concurrent ones; its answer is stored as base64 float32, with its own
usage, and rendered as each client wants it. Rejected: one request for all missing inputs, whose usage cannot be
divided. Cost: some front-end work per missing input, hence INPUTS_MAX; larger batches bypass the cache, and so do
batches whose other fields, repeated for each input, exceed REQUEST_BYTES_MAX.
"""

import base64
import json
import math
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ..core.records.limits import REQUEST_BYTES_MAX
from ..core.response.request_key import Uncacheable

INPUTS_MAX = 64

Input = str | list[int]


@dataclass(frozen=True, slots=True)
class Embedding:
    """The answer to one input; `vector` is the base64 of float32, little-endian."""

    created: int
    model: str
    vector: str
    usage: dict[str, Any]

    def encode(self) -> bytes:
        """The stored form: vLLM's answer to this one input, in base64, without an id."""
        data = [{"index": 0, "object": "embedding", "embedding": self.vector}]
        return msgspec.json.encode(_answer(self.created, self.model, data, self.usage))


def inputs_of(body: Mapping[str, Any]) -> list[Input] | Uncacheable:
    """The inputs of a request, or the reason why it bypasses the cache."""
    shape = body.get("encoding_format", "float"), body.get("embed_dtype", "float32"), body.get("endianness", "native")
    if shape[0] not in ("float", "base64") or shape[1] != "float32" or shape[2] not in ("native", sys.byteorder):
        return Uncacheable("encoding")
    given = body.get("input")
    inputs = [given] if isinstance(given, str) or _is_tokens(given) else given
    if not isinstance(inputs, list) or not all(isinstance(each, str) or _is_tokens(each) for each in inputs):
        return Uncacheable("field_type")
    if len({type(each) for each in inputs}) > 1:
        return Uncacheable("field_type")
    if not 0 < len(inputs) <= INPUTS_MAX:
        return Uncacheable("batch")
    repeated = len(json.dumps(request_of(body, "")))  # in each of the requests
    return inputs if len(inputs) * repeated <= REQUEST_BYTES_MAX or len(inputs) == 1 else Uncacheable("batch")


def request_of(body: Mapping[str, Any], given: Input) -> dict[str, Any]:
    """The request for one of the inputs, without the id of all of them."""
    others = {name: value for name, value in body.items() if name != "request_id"}
    return {**others, "input": given, "encoding_format": "base64"}


def decode(raw: bytes) -> Embedding | None:
    """An answer to one input, as vLLM sends it in base64; None for anything else."""
    try:
        body = msgspec.json.decode(raw)
        (entry,) = body["data"]
        vector = entry["embedding"]
        if not isinstance(vector, str) or len(base64.b64decode(vector, validate=True)) % 4 or not vector:
            return None
        embedding = Embedding(body["created"], body["model"], vector, body["usage"])
        tokens = embedding.usage["prompt_tokens"], embedding.usage["total_tokens"]
    except (ValueError, LookupError, TypeError, RecursionError):  # ValueError: what JSON, UTF-8 and base64 raise
        return None
    sound = isinstance(embedding.created, int) and isinstance(embedding.model, str)
    return embedding if sound and all(isinstance(count, int) for count in tokens) else None


def is_finite(embedding: Embedding) -> bool:
    """Whether a vector has no NaN and no infinity: JSON has none, so vLLM's answer to `float` is an error."""
    return math.isfinite(sum(_floats(embedding.vector)))


def merged(embeddings: Sequence[Embedding], encoding_format: object, answer_id: str) -> bytes:
    """vLLM's answer to all inputs at once, with the date of the newest."""
    data = [
        {
            "index": index,
            "object": "embedding",
            "embedding": each.vector if encoding_format == "base64" else _floats(each.vector),
        }
        for index, each in enumerate(embeddings)
    ]
    last = max(embeddings, key=lambda each: each.created)
    usage = {**embeddings[0].usage}
    for name in ("prompt_tokens", "total_tokens"):
        usage[name] = sum(each.usage[name] for each in embeddings)
    return msgspec.json.encode({"id": answer_id, **_answer(last.created, last.model, data, usage)})


def _answer(created: int, model: str, data: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
    return {"object": "list", "created": created, "model": model, "data": data, "usage": usage}


def _floats(vector: str) -> list[float]:
    raw = base64.b64decode(vector)
    return list(struct.unpack(f"<{len(raw) // 4}f", raw))


def _is_tokens(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)
