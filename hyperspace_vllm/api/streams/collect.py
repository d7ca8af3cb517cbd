"""From the frames of a stream to the JSON body that vLLM would have sent to the same request without `stream`.

Fails closed: an unknown field, or a field with two values, makes the stream not storable. The order and the nulls of
the body are those of vLLM 0.32's response models.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, cast

import msgspec

from ...core.records.limits import RESPONSE_BYTES_MAX
from ...core.response.admission import NotStored
from ...core.response.request_fields import Endpoint

FrameKind = Literal["other", "finish", "usage"]
Json = dict[str, Any]

_PROMPT_FIELDS = ("prompt_token_ids", "prompt_text")
_CHUNK_FIELDS = frozenset(
    ("id", "object", "created", "model", "choices", "usage", "system_fingerprint", "metrics", *_PROMPT_FIELDS)
)
_CHOICE_FIELDS = frozenset(
    ("index", "delta", "text", "logprobs", "finish_reason", "stop_reason", "token_ids", "prompt_token_ids")
)
_DELTA_FIELDS = frozenset(("role", "content", "reasoning", "tool_calls"))
_CALL_FIELDS = frozenset(("id", "type", "index", "function"))
_ENVELOPE_BYTES = 160  # of a frame, around what it adds to the body
_OBJECTS = {"chat": "chat.completion.chunk", "completions": "text_completion"}


class _Unstorable(Exception):
    pass


@dataclass
class _Call:
    id: str | None = None
    name: str | None = None
    arguments: list[str] = field(default_factory=list)


@dataclass
class _Choice:
    role: str | None = None
    text: list[str] | None = None
    reasoning: list[str] | None = None
    calls: dict[int, _Call] = field(default_factory=dict)
    logprobs: dict[str, list[Any]] | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    finish_reason: str | None = None
    stop_reason: object = None


class CompletionCollector:
    """Takes frames of completions and chats in the order in which they are sent; per request."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._choices: dict[int, _Choice] = {}
        self._head: Json = {}
        self._usage: Json | None = None
        self._bytes = 0
        self._failure: str | None = None
        self._done = False

    def feed(self, frame: bytes) -> FrameKind:
        """Take in one `data: …` frame (comments pass) and say which kind it is."""
        if not frame.startswith(b"data:"):
            if frame.strip() and not frame.startswith(b":"):
                self._failure = "garbled"
            return "other"
        payload = frame[5:].strip()
        if payload == b"[DONE]":
            self._done = True
            return "other"
        try:
            chunk = msgspec.json.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self._failure = "garbled"
            return "other"
        kind = _kind(chunk)
        if self._failure is None:
            try:
                self._take(chunk, len(payload))
            except _Unstorable as reason:
                self._failure = str(reason)
                self._choices.clear()
        return kind

    @property
    def size(self) -> int:
        """Bytes of the frames without their envelopes."""
        return self._bytes

    def result(self) -> bytes | NotStored:
        """The JSON body, if the stream ended with [DONE] and all of it was understood."""
        if self._failure is not None:
            return NotStored(self._failure)
        if not self._done or not self._choices:
            return NotStored("unfinished")
        if self._usage is None:
            return NotStored("no_usage")
        if sorted(self._choices) != list(range(len(self._choices))):
            return NotStored("inconsistent")
        try:
            build = _chat_body if self._endpoint == "chat" else _completion_body
            return msgspec.json.encode(build(self._head, self._choices, _full_usage(self._usage)))
        except _Unstorable as reason:
            return NotStored(str(reason))

    def _take(self, chunk: Any, size: int) -> None:
        if not isinstance(chunk, dict) or "error" in chunk:
            raise _Unstorable("error")
        _only(chunk, _CHUNK_FIELDS)
        if chunk.get("object") != _OBJECTS.get(self._endpoint) or self._done:
            raise _Unstorable("unknown_field")
        self._bytes += max(size - _ENVELOPE_BYTES, 0)
        if self._bytes > RESPONSE_BYTES_MAX:
            raise _Unstorable("too_large")
        for name in ("id", "created", "model"):
            if self._head.setdefault(name, chunk.get(name)) != chunk.get(name):
                raise _Unstorable("inconsistent")
        for name in ("system_fingerprint", *_PROMPT_FIELDS):
            if chunk.get(name) is not None:
                self._head[name] = chunk[name]
        if chunk.get("usage") is not None:
            self._usage = _typed(chunk["usage"], dict)
        for choice in _typed(chunk.get("choices"), list):
            _only(_typed(choice, dict), _CHOICE_FIELDS)
            self._merge(self._choices.setdefault(_typed(choice.get("index"), int), _Choice()), choice)

    def _merge(self, into: _Choice, choice: Json) -> None:
        if self._endpoint == "chat":
            _merge_delta(into, _typed(choice.get("delta"), dict))
        else:
            into.text = into.text or []
            into.text.append(_typed(choice.get("text"), str))
        if choice.get("token_ids") is not None:
            into.token_ids = into.token_ids or []
            into.token_ids.extend(_typed(choice["token_ids"], list))
        if choice.get("prompt_token_ids") is not None:
            into.prompt_token_ids = _typed(choice["prompt_token_ids"], list)
        if choice.get("logprobs") is not None:
            into.logprobs = into.logprobs or {}
            for name, entries in _typed(choice["logprobs"], dict).items():
                if entries is not None:
                    into.logprobs.setdefault(name, []).extend(_typed(entries, list))
        if choice.get("finish_reason") is not None:
            into.finish_reason = _typed(choice["finish_reason"], str)
            into.stop_reason = choice.get("stop_reason")


def _kind(chunk: Any) -> FrameKind:
    if not isinstance(chunk, dict) or not isinstance(chunk.get("choices"), list):
        return "other"
    if not chunk["choices"]:
        return "usage" if chunk.get("usage") is not None else "other"
    choices = cast(list[Any], chunk["choices"])
    return "finish" if any(isinstance(c, dict) and c.get("finish_reason") for c in choices) else "other"


def _merge_delta(into: _Choice, delta: Json) -> None:
    _only(delta, _DELTA_FIELDS)
    if delta.get("role") is not None:
        into.role = _typed(delta["role"], str)
        if delta.get("content") == "":
            return  # the empty text that announces the role: a message of tool calls alone has none
    if delta.get("content") is not None:
        into.text = into.text or []
        into.text.append(_typed(delta["content"], str))
    if delta.get("reasoning") is not None:
        into.reasoning = into.reasoning or []
        into.reasoning.append(_typed(delta["reasoning"], str))
    for part in _typed(delta.get("tool_calls") or [], list):
        _only(_typed(part, dict), _CALL_FIELDS)
        call = into.calls.setdefault(_typed(part.get("index"), int), _Call())
        function = _typed(part.get("function") or {}, dict)
        _only(function, frozenset({"name", "arguments"}))
        for name, value in (("id", part.get("id")), ("name", function.get("name"))):
            if value and getattr(call, name) not in (None, value):
                raise _Unstorable("inconsistent")
            if value:
                setattr(call, name, _typed(value, str))
        if function.get("arguments") is not None:
            call.arguments.append(_typed(function["arguments"], str))


def _chat_body(head: Json, choices: dict[int, _Choice], usage: Json) -> Json:
    return {
        "id": head["id"],
        "object": "chat.completion",
        "created": head["created"],
        "model": head["model"],
        "choices": [
            {
                "index": index,
                "message": _message(choice),
                "logprobs": _chat_logprobs(choice.logprobs),
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
                "token_ids": choice.token_ids,
                "routed_experts": None,
            }
            for index, choice in sorted(choices.items())
        ],
        "service_tier": None,
        "system_fingerprint": head.get("system_fingerprint"),
        "usage": usage,
        "prompt_logprobs": None,
        "prompt_token_ids": head.get("prompt_token_ids"),
        "prompt_text": head.get("prompt_text"),
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }


def _message(choice: _Choice) -> Json:
    if choice.role is None:
        raise _Unstorable("inconsistent")
    if choice.text is None and choice.reasoning is None and not choice.calls:
        raise _Unstorable("empty")  # in JSON it may be null or an empty text
    message: Json = {
        "role": choice.role,
        "content": None if choice.text is None else "".join(choice.text),
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
    }
    if choice.calls:
        message["tool_calls"] = [_tool_call(choice.calls, index) for index in range(len(choice.calls))]
    return {**message, "reasoning": None if choice.reasoning is None else "".join(choice.reasoning)}


def _tool_call(calls: dict[int, _Call], index: int) -> Json:
    call = calls.get(index)
    if call is None or call.id is None or call.name is None:
        raise _Unstorable("inconsistent")
    function = {"name": call.name, "arguments": "".join(call.arguments)}
    return {"id": call.id, "type": "function", "function": function}


def _chat_logprobs(logprobs: dict[str, list[Any]] | None) -> Json | None:
    if logprobs is None:
        return None
    _only(logprobs, frozenset({"content"}))
    defaults: Json = {"token": None, "logprob": -9999.0, "bytes": None, "top_logprobs": []}
    return {"content": [{**defaults, **_typed(entry, dict)} for entry in logprobs.get("content", [])]}


def _completion_body(head: Json, choices: dict[int, _Choice], usage: Json) -> Json:
    return {
        "id": head["id"],
        "object": "text_completion",
        "created": head["created"],
        "model": head["model"],
        "choices": [
            {
                "index": index,
                "text": "".join(choice.text or []),
                "logprobs": choice.logprobs,
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
                "token_ids": choice.token_ids,
                "prompt_logprobs": None,
                "prompt_token_ids": choice.prompt_token_ids,
                "routed_experts": None,
            }
            for index, choice in sorted(choices.items())
        ],
        "service_tier": None,
        "system_fingerprint": head.get("system_fingerprint"),
        "usage": usage,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }


def _full_usage(usage: Json) -> Json:
    return {
        "prompt_tokens": 0,
        "total_tokens": 0,
        "completion_tokens": 0,
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
        **usage,
    }


def _only(value: Json, known: frozenset[str]) -> None:
    for name in value.keys() - known:
        if value[name] is not None:
            raise _Unstorable("unknown_field")


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise _Unstorable("unknown_field")
    return value
