"""Which answers are stored: those that finished cleanly, without the fields that belong to one request alone."""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from ..records.limits import RESPONSE_BYTES_MAX
from .answer_ids import without_ids
from .request_fields import Endpoint
from .request_key import choice_count
from .scope import RequestScope, Scope

# Statements about one run, or copies of fields of its request, which are not for another request.
_PER_REQUEST: dict[str, object] = dict.fromkeys(("kv_transfer_params", "ec_transfer_params", "metrics"))
_REPEATED: dict[str, object] = dict.fromkeys(("metadata", "user"))
_FINISHED = ("stop", "length", "tool_calls", "function_call", "content_filter", "repetition")
_STOP_REASONS = ("end_turn", "max_tokens", "stop_sequence", "tool_use")


@dataclass(frozen=True, slots=True)
class Admitted:
    """`body` is the JSON response as it will be stored, hashed and replayed."""

    body: bytes


@dataclass(frozen=True, slots=True)
class NotStored:
    """The answer is not stored; `reason` is one of a small set, used as a metric label."""

    reason: str


def admit(endpoint: Endpoint, request: Mapping[str, object], raw: bytes) -> Admitted | NotStored:
    """Judge the complete JSON body of a 200 response. It must have the usage, and every choice must be finished.

    A body that was stored before is admitted unchanged.
    """
    if len(raw) > RESPONSE_BYTES_MAX:
        return NotStored("too_large")
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return NotStored("not_json")
    if not isinstance(body, dict) or not body.keys() >= _NEEDED[endpoint].keys():
        return NotStored("error")
    for name, value in _NEEDED[endpoint].items():
        if value is not None and body[name] != value:
            return NotStored("error")
    if not isinstance(body.get("usage"), dict):
        return NotStored("no_usage")
    if not _is_finished(endpoint, request, body):
        return NotStored("unfinished")
    if endpoint == "responses" and not _says_anything(body["output"]):
        return NotStored("empty")  # in JSON it has an item without content, in a stream none
    told = _PER_REQUEST | _REPEATED if endpoint == "responses" else _PER_REQUEST
    return Admitted(msgspec.json.encode(without_ids(body | {name: told[name] for name in told if name in body})))


# The fields of an answer, with their value where it is constant.
_NEEDED: dict[Endpoint, dict[str, str | None]] = {
    "chat": {"created": None, "model": None, "choices": None, "object": "chat.completion"},
    "completions": {"created": None, "model": None, "choices": None, "object": "text_completion"},
    "responses": {"created_at": None, "model": None, "output": None, "object": "response"},
    "messages": {"model": None, "content": None, "type": "message", "role": "assistant"},
    "embeddings": {"created": None, "model": None, "data": None, "object": "list"},
    "rerank": {"model": None, "results": None},
    "score": {"created": None, "model": None, "data": None, "object": "list"},
}


def _is_finished(endpoint: Endpoint, request: Mapping[str, object], body: Mapping[str, object]) -> bool:
    match endpoint:
        case "chat" | "completions":
            choices = body["choices"]
            return (
                isinstance(choices, list)
                and len(choices) == choice_count(endpoint, request)
                and all(isinstance(c, dict) and c.get("finish_reason") in _FINISHED for c in choices)
            )
        case "responses":
            return body.get("status") in ("completed", "incomplete") and isinstance(body["output"], list)
        case "messages":
            return body.get("stop_reason") in _STOP_REASONS and isinstance(body["content"], list)
        case "embeddings" | "rerank" | "score":
            results = body["results" if endpoint == "rerank" else "data"]
            return isinstance(results, list) and all(isinstance(result, dict) for result in results) and bool(results)


def _says_anything(output: list[object]) -> bool:
    """Whether any item of a Response is other than an empty message."""
    return any(not isinstance(item, dict) or item.get("type") != "message" or item.get("content") for item in output)


def streams_completely(request: Mapping[str, object]) -> bool:
    """Whether a stream has all fields of a JSON answer: it lacks prompt logprobs, which an echo asks for too."""
    return request.get("prompt_logprobs") is None and not request.get("echo")


def storage_scope(tenant: str, cache_salt: object, marked_private: bool) -> RequestScope:
    """How far an answer may travel: a salt, a tenant or the client's header keeps it on its node."""
    scope: Scope = "private" if tenant or cache_salt is not None or marked_private else "network"
    return RequestScope(scope, tenant)
