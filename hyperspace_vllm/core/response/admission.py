"""What may be stored: an answer that finished cleanly, without what belongs to one request alone."""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from ..records.limits import RESPONSE_BYTES_MAX
from .request_key import Endpoint, choice_count
from .scope import RequestScope, Scope

# Server-side statements about one run, which another request must not be told.
_PER_REQUEST = ("kv_transfer_params", "ec_transfer_params", "metrics")
_NEEDED = frozenset({"id", "created", "model", "choices"})
_FINISHED = ("stop", "length", "tool_calls", "function_call", "content_filter", "repetition")


@dataclass(frozen=True, slots=True)
class Admitted:
    """`body` is the JSON response as it will be stored, hashed and replayed."""

    body: bytes


@dataclass(frozen=True, slots=True)
class NotStored:
    """Why not; `reason` is one of a small set, used as a metric label."""

    reason: str


def admit(endpoint: Endpoint, request: Mapping[str, object], raw: bytes) -> Admitted | NotStored:
    """Judge the complete JSON body of a 200 response. Needed to be there: usage, and every choice, finished."""
    if len(raw) > RESPONSE_BYTES_MAX:
        return NotStored("too_large")
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return NotStored("not_json")
    expected = "chat.completion" if endpoint == "chat" else "text_completion"
    if not isinstance(body, dict) or body.get("object") != expected or not body.keys() >= _NEEDED:
        return NotStored("error")
    if not isinstance(body.get("usage"), dict):
        return NotStored("no_usage")
    choices = body.get("choices")
    if not isinstance(choices, list) or len(choices) != choice_count(endpoint, request):
        return NotStored("unfinished")
    if any(not isinstance(c, dict) or c.get("finish_reason") not in _FINISHED for c in choices):
        return NotStored("unfinished")
    if all(body.get(field) is None for field in _PER_REQUEST):
        return Admitted(raw)
    return Admitted(msgspec.json.encode({k: None if k in _PER_REQUEST else v for k, v in body.items()}))


def streams_completely(request: Mapping[str, object]) -> bool:
    """Whether a stream carries all that a JSON answer would: prompt logprobs, which an echo asks for too, it lacks."""
    return request.get("prompt_logprobs") is None and not request.get("echo")


def storage_scope(tenant: str, cache_salt: object, marked_private: bool) -> RequestScope:
    """How far an answer may travel: a salt, a tenant or the client's word keeps it on its node."""
    scope: Scope = "private" if tenant or cache_salt is not None or marked_private else "network"
    return RequestScope(scope, tenant)
