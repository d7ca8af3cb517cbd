"""From a stored JSON body to the frames that vLLM 0.32 would have streamed, and the edits on frames that pass.

The frames have the same fields in the same order; only the boundaries between them differ, because the engine's are not
stored. `collect.Collector` is the inverse (a property test).
"""

from collections.abc import Iterator
from typing import Any

import msgspec

from ...core.response.request_fields import Endpoint

Json = dict[str, Any]

_TEXT_CHARS_PER_FRAME = 4096  # at most 16 KiB: HTTP clients limit the length of a line, aiohttp to 128 KiB
_TOKENS_PER_FRAME = 64
DONE = b"data: [DONE]\n\n"


def completion_frames(endpoint: Endpoint, body: Json, include_usage: bool) -> Iterator[bytes]:
    """The stream of a stored completion or chat, from the first frame to [DONE]."""
    chunk_object = "chat.completion.chunk" if endpoint == "chat" else "text_completion"
    head = {"id": body["id"], "object": chunk_object, "created": body["created"], "model": body["model"]}
    for choice in body["choices"] if endpoint == "chat" else ():
        yield _frame({**head, "choices": [_role(choice)], **_prompt(body)})
    final = {} if include_usage else _fingerprint(body)
    for choice in body["choices"]:
        for part in _chat_parts(choice) if endpoint == "chat" else _completion_parts(choice):
            finished = part["finish_reason"] is not None
            yield _frame({**head, "choices": [part], **(final if finished else {})})
    if include_usage:
        yield _frame({**head, "choices": [], "usage": _without_nulls(body["usage"]), **_fingerprint(body)})
    yield DONE


def with_fingerprint(frame: bytes, fingerprint: str) -> bytes:
    """A finish frame with the system fingerprint that vLLM puts there when no usage frame follows."""
    return _frame({**msgspec.json.decode(frame[5:]), "system_fingerprint": fingerprint})


def fingerprint_of(frame: bytes) -> str | None:
    """The system fingerprint in a usage frame."""
    value = msgspec.json.decode(frame[5:]).get("system_fingerprint")
    return value if isinstance(value, str) else None


def _frame(chunk: Json) -> bytes:
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


def _role(choice: Json) -> Json:
    delta = {"role": choice["message"]["role"], "content": ""}
    return {"index": choice["index"], "delta": delta, "logprobs": None, "finish_reason": None}


def _prompt(body: Json) -> Json:
    return {name: body.get(name) for name in ("prompt_token_ids", "prompt_text")}


def _fingerprint(body: Json) -> Json:
    value = body.get("system_fingerprint")
    return {} if value is None else {"system_fingerprint": value}


def _chat_parts(choice: Json) -> Iterator[Json]:
    message, logprobs, ids = choice["message"], choice.get("logprobs"), choice.get("token_ids")
    entries = None if logprobs is None else logprobs.get("content") or []
    tokens = max(len(entries or ()), len(ids or ()))
    deltas = _deltas(message, tokens)
    count = len(deltas)
    for at, delta in enumerate(deltas):
        yield {
            "index": choice["index"],
            "delta": delta,
            "logprobs": None if entries is None else {"content": _slice(entries, at, count)},
            "finish_reason": None,
            "token_ids": None if ids is None else _slice(ids, at, count),
        }
    yield {
        "index": choice["index"],
        "delta": {} if message.get("content") is None else {"content": ""},
        "logprobs": None if entries is None else {"content": []},
        "finish_reason": choice["finish_reason"],
        "stop_reason": choice.get("stop_reason"),
        "token_ids": None if ids is None else [],
    }


def _deltas(message: Json, tokens: int) -> list[Json]:
    """Reasoning, then text, then tool calls, in enough pieces for `tokens` log-probabilities."""
    texts = [(name, message[name]) for name in ("reasoning", "content") if message.get(name)]
    chars = sum(len(text) for _, text in texts)
    pieces = max(-(-tokens // _TOKENS_PER_FRAME), 1)
    step = max(min(-(-chars // pieces), _TEXT_CHARS_PER_FRAME), 1)
    deltas = [{name: text[at : at + step]} for name, text in texts for at in range(0, len(text), step)]
    if message.get("reasoning") == "":
        deltas.append({"reasoning": ""})
    for index, call in enumerate(message.get("tool_calls") or ()):
        function = {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
        deltas.append({"tool_calls": [{"id": call["id"], "type": "function", "index": index, "function": function}]})
    return deltas + [{}] * (pieces - len(deltas) if tokens else 0)


def _completion_parts(choice: Json) -> Iterator[Json]:
    text, logprobs, ids = choice["text"], choice.get("logprobs"), choice.get("token_ids")
    tokens = max(len(logprobs["tokens"]) if logprobs else 0, len(ids or ()))
    count = max(-(-len(text) // _TEXT_CHARS_PER_FRAME), -(-tokens // _TOKENS_PER_FRAME))
    for at in range(count + 1):  # the last one is empty, and ends the choice
        last = at == count
        yield {
            "index": choice["index"],
            "text": "" if last else _slice(text, at, count),
            "logprobs": None
            if logprobs is None
            else {name: [] if last else _slice(values, at, count) for name, values in logprobs.items()},
            "finish_reason": choice["finish_reason"] if last else None,
            "stop_reason": choice.get("stop_reason") if last else None,
            "prompt_token_ids": choice.get("prompt_token_ids") if at == 0 else None,
            "token_ids": None if ids is None else [] if last else _slice(ids, at, count),
        }


def _slice(values: Any, at: int, count: int) -> Any:
    """Part `at` of `count` parts of about the same length."""
    return values[len(values) * at // count : len(values) * (at + 1) // count]


def _without_nulls(usage: Json) -> Json:
    return {k: _without_nulls(v) if isinstance(v, dict) else v for k, v in usage.items() if v is not None}
