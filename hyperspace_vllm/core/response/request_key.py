"""RequestKey: which requests may share one answer.

Context: a wrong hit is the one thing a response cache must never do, and the request format grows with every release
of vLLM. Choice: a deny-list that fails closed. Only fields known not to reach the output are left out of the key;
everything else is in it, fields we have never heard of included, and what can't be named by the request's own bytes
(remote images, client-made transfer parameters) is not cached at all. Two spellings share a key only where vLLM is
known to treat them alike: a field absent, null or set to its default; `1` and `1.0` in a numeric field; the order of
keys in the request and in a message. Deeper down order and spelling stay, for they reach the prompt (a chat template
prints a tool's JSON schema as it came). Rejected: hashing the rendered prompt, which costs a tokenisation a hit.
Cost: some requests that would have had the same answer miss each other.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..records.ids import RequestKey, sha256

Endpoint = Literal["completions", "chat"]

_TAG = b"hyperspace/request/1"
_NULL = type(None)

# Fields that don't reach the output, with the types under which vLLM accepts them: anything else is its to refuse.
NEUTRAL: dict[str, tuple[type, ...]] = {
    "stream": (bool, _NULL),
    "stream_options": (dict, _NULL),
    "stream_interval": (int, _NULL),
    "user": (str, _NULL),
    "request_id": (str,),
    "session_id": (str, _NULL),
    "priority": (int,),
    # OpenAI's, unknown to vLLM 0.32, which ignores them whatever they hold
    "metadata": (object,),
    "service_tier": (object,),
    "store": (object,),
    "prompt_cache_key": (object,),
    "prompt_cache_retention": (object,),
    "safety_identifier": (object,),
}

# Fields that make an answer depend on more than the request.
FORBIDDEN = frozenset({"kv_transfer_params", "ec_transfer_params", "background", "previous_response_id"})

_SAMPLING: dict[str, object] = {
    "frequency_penalty": None,
    "presence_penalty": None,
    "repetition_penalty": None,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "min_p": None,
    "seed": None,
    "n": 1,
    "stop": [],
    "stop_token_ids": [],
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": [],
    "min_tokens": 0,
    "ignore_eos": False,
    "include_stop_str_in_output": False,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "truncate_prompt_tokens": None,
    "truncation_side": None,
    "use_beam_search": False,
    "length_penalty": 1,
    "watermarking": None,
    "prompt_logprobs": None,
    "logprob_token_ids": None,
    "response_format": None,
    "structured_outputs": None,
    "repetition_detection": None,
    "thinking_token_budget": None,
    "return_tokens_as_token_ids": None,
    "return_token_ids": None,
    "return_token_offsets": False,
    "routed_experts_prompt_start": 0,
    "mm_payload": "tensors",
    "return_mm_kwargs": None,
    "cache_salt": None,
    "vllm_xargs": None,
    "echo": False,
    "model": None,
}

# Every other field that vLLM 0.32 knows, with its default (a test compares them with vLLM's own models).
KEYED: dict[Endpoint, dict[str, object]] = {
    "completions": _SAMPLING
    | {
        "prompt": None,
        "prompt_embeds": None,
        "suffix": None,
        "max_tokens": 16,
        "logprobs": None,
        "add_special_tokens": True,
    },
    "chat": _SAMPLING
    | {
        "messages": None,
        "max_tokens": None,
        "max_completion_tokens": None,
        "logprobs": False,
        "top_logprobs": 0,
        "tools": None,
        "parallel_tool_calls": True,
        "reasoning_effort": None,
        "include_reasoning": True,
        "add_generation_prompt": True,
        "continue_final_message": False,
        "add_special_tokens": False,
        "documents": None,
        "chat_template": None,
        "chat_template_kwargs": None,
        "media_io_kwargs": None,
        "mm_processor_kwargs": None,
        "return_prompt_text": None,
    },
}

# Keyed as given: absent means "auto" with tools and "none" without, and null is neither.
VERBATIM = frozenset({"tool_choice"})

# Fields with a default for which vLLM takes null too, and means the default by it.
NULL_IS_DEFAULT: dict[Endpoint, frozenset[str]] = {
    "completions": frozenset({"stop", "stop_token_ids", "echo", "max_tokens", "return_token_offsets"}),
    "chat": frozenset({"stop", "stop_token_ids", "logprobs", "top_logprobs", "return_token_offsets"}),
}

_TEXT_PARTS = frozenset({"text", "input_text", "output_text", "refusal", "thinking"})
_URL_PARTS = frozenset({"image_url", "audio_url", "video_url"})


@dataclass(frozen=True, slots=True)
class Uncacheable:
    """The request must be computed; `reason` is one of a small set, used as a metric label."""

    reason: str


class _DuplicateKey(ValueError):
    pass


def parse_request(raw: bytes) -> dict[str, object] | Uncacheable:
    """The JSON object in a request body, unless it is none, or one that two parsers may read differently."""
    try:
        body = json.loads(raw, object_pairs_hook=_without_duplicates)
    except _DuplicateKey:
        return Uncacheable("duplicate_key")
    except (ValueError, RecursionError):
        return Uncacheable("not_json")
    return body if isinstance(body, dict) else Uncacheable("not_json")


def request_key(
    endpoint: Endpoint, body: Mapping[str, object], model_digest: bytes, lora: bytes | None, tenant: str
) -> RequestKey | Uncacheable:
    """The 32-byte key of a request, or why it has none.

    `model_digest` is the 32-byte digest of everything the server adds to the request (weights, template, sampling
    defaults), `lora` that of the adapter's files. The model's name in `body` is in the key as well.
    """
    for refusal in (_forbidden(body), _neutral_of_wrong_type(body), _stream_conflict(body), _media(body)):
        if refusal is not None:
            return refusal
    fields = canonical_fields(endpoint, body)
    if isinstance(fields, Uncacheable):
        return fields
    try:
        text = json.dumps([endpoint, fields], separators=(",", ":"), allow_nan=False)
    except ValueError:  # NaN, Infinity, 1e999
        return Uncacheable("not_finite")
    except RecursionError:  # writing takes a few levels more than reading did
        return Uncacheable("not_json")
    assert len(model_digest) == 32
    assert lora is None or len(lora) == 32
    return RequestKey(sha256(_TAG, model_digest, lora or bytes(32), sha256(tenant.encode()), text.encode("ascii")))


def is_sampled(body: Mapping[str, object]) -> bool:
    """Whether the next answer to `body` may be another: no temperature of 0 and no seed.

    Without a temperature it is the server's default, of which nothing is known here.
    """
    temperature = body.get("temperature")
    greedy = isinstance(temperature, int | float) and temperature == 0
    return not greedy and body.get("seed") is None


def choice_count(endpoint: Endpoint, body: Mapping[str, object]) -> int:
    """How many choices a finished answer to `body` has."""
    n = body.get("n")
    count = n if isinstance(n, int) else 1
    prompt = body.get("prompt")
    if endpoint == "completions" and isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        count *= len(prompt)
    return count


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _DuplicateKey
    return members


def _forbidden(body: Mapping[str, object]) -> Uncacheable | None:
    for field in FORBIDDEN:
        value = body.get(field)
        if field == "kv_transfer_params" and isinstance(value, dict) and not value.keys() - {"hyperspace"}:
            continue  # our own, which the middleware replaces
        if value not in (None, False):
            return Uncacheable(field)
    return None


def _neutral_of_wrong_type(body: Mapping[str, object]) -> Uncacheable | None:
    for field, types in NEUTRAL.items():
        if field not in body or object in types:
            continue
        value = body[field]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            return Uncacheable("field_type")
    return None


def _stream_conflict(body: Mapping[str, object]) -> Uncacheable | None:
    """What vLLM refuses to stream, or what a replayed stream could not tell truthfully."""
    options = body.get("stream_options")
    if not body.get("stream"):
        return Uncacheable("stream_options") if options else None
    if body.get("prompt_logprobs") or body.get("use_beam_search"):
        return Uncacheable("stream_conflict")
    if isinstance(options, dict):
        if any(not isinstance(value, bool | None) for value in options.values()):
            return Uncacheable("stream_options")
        if options.get("continuous_usage_stats"):
            return Uncacheable("continuous_usage")
    return None


def _media(body: Mapping[str, object]) -> Uncacheable | None:
    messages = body.get("messages")
    if messages is None:
        return None
    if not isinstance(messages, list):
        return Uncacheable("field_type")
    for message in messages:
        if not isinstance(message, dict):
            return Uncacheable("field_type")
        content = message.get("content")
        if content is None or isinstance(content, str):
            continue
        if not isinstance(content, list):
            return Uncacheable("field_type")
        for part in content:
            if not isinstance(part, str) and not (isinstance(part, dict) and _named_by_its_bytes(part)):
                return Uncacheable("media")
    return None


def _named_by_its_bytes(part: Mapping[str, object]) -> bool:
    """Whether a content part holds everything that vLLM will read of it (a uuid names what it read before)."""
    kind = part.get("type")
    if not isinstance(kind, str):
        return False
    if kind in _TEXT_PARTS:
        return not part.keys() & {"uuid", *_URL_PARTS}
    if kind == "input_audio":
        return "uuid" not in part
    if kind not in _URL_PARTS or part.keys() - {"type", "detail", kind}:
        return False
    source = part.get(str(kind))
    url = source.get("url") if isinstance(source, dict) and not source.keys() - {"url", "detail"} else source
    return isinstance(url, str) and url.startswith("data:")


def canonical_fields(endpoint: Endpoint, body: Mapping[str, object]) -> dict[str, object] | Uncacheable:
    """The fields of a request that reach its answer, without those at their defaults."""
    known = KEYED[endpoint]
    body = _one_token_limit(body) if endpoint == "chat" else body
    fields: dict[str, object] = {}
    for field in sorted(body):
        value = body[field]
        if field in NEUTRAL or field in FORBIDDEN:
            continue
        if field not in known:
            fields[field] = value
            continue
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        default = known[field]
        if type(value) is type(default) and value == default:
            continue
        if value is None and field in NULL_IS_DEFAULT[endpoint]:
            continue
        fields[field] = [_message(each) for each in value] if field == "messages" else value  # type: ignore[attr-defined]
    return fields


def _one_token_limit(body: Mapping[str, object]) -> Mapping[str, object]:
    """vLLM reads max_completion_tokens, or max_tokens where that is absent or null."""
    limits = body.get("max_tokens"), body.get("max_completion_tokens")
    if any(type(limit) not in (int, _NULL) for limit in limits):
        return body
    return {**body, "max_tokens": None, "max_completion_tokens": limits[0] if limits[1] is None else limits[1]}


def _message(message: Mapping[str, object]) -> dict[str, object]:
    """A message with its own keys sorted: vLLM picks them by name. What they hold stays as it came."""
    canonical = {key: message[key] for key in sorted(message)}
    content = canonical.get("content")
    if isinstance(content, list):
        canonical["content"] = [
            {key: part[key] for key in sorted(part)} if isinstance(part, dict) and len(part) == 2 else part
            for part in content
        ]
    return canonical
