"""RequestKey: which requests may share one answer.

Context: a wrong hit is the one thing a response cache must never do, and the request format grows with every release
of vLLM. Choice: a deny-list that fails closed. Only fields known not to reach the output are left out of the key;
everything else is in it, including unknown fields, and a request that its own bytes do not determine (remote images,
client-made transfer parameters) is not cached at all. Two spellings share a key only where vLLM is known to treat them
alike: a field absent, null or set to its default; `1` and `1.0` in a numeric field; the order of keys in the request
and in a message. At deeper levels order and spelling count, because they reach the prompt (a chat template prints a
tool's JSON schema as it came). Rejected: hashing the rendered prompt, which costs a tokenisation per hit. Cost: some
requests that would have the same answer have different keys.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from json.encoder import c_make_encoder, encode_basestring_ascii  # type: ignore[attr-defined]

from ..records.ids import RequestKey, sha256
from .request_fields import FIELDS, POOLING, Endpoint, Fields
from .request_media import why_not_by_bytes

# 1: answers had the first client's ids; 2: streams and JSON shared answers that vLLM's parsers read differently.
_TAG = b"hyperspace/request/3"
# Request fields for which vLLM parses calls, or adds to an answer, by other code in a stream than in JSON.
_READ_APART = ("tools", "tool_choice", "functions", "function_call", "include", "enable_response_messages")


@dataclass(frozen=True, slots=True)
class Uncacheable:
    """The request must be computed; `reason` is one of a small set, used as a metric label."""

    reason: str


class _DuplicateKey(ValueError):
    pass


def _string(text: str) -> str:
    return encode_basestring_ascii(text)


# json.dumps, in C but for its strings: at each of them another thread may have the GIL, which the whole text of a large
# request would hold for longer than it takes to read it.
_as_json = c_make_encoder(None, None, _string, None, ":", ",", False, False, False)


def parse_request(raw: bytes) -> dict[str, object] | Uncacheable:
    """The JSON object in a request body, unless it is not an object, or two parsers may read it differently."""
    try:
        body = json.loads(raw, object_pairs_hook=_without_duplicates)
    except _DuplicateKey:
        return Uncacheable("duplicate_key")
    except (ValueError, RecursionError):
        return Uncacheable("not_json")
    return body if isinstance(body, dict) else Uncacheable("not_json")


def request_key(
    endpoint: Endpoint,
    body: Mapping[str, object],
    model_digest: bytes,
    lora: bytes | None,
    tenant: str,
    parses: bool = False,
) -> RequestKey | Uncacheable:
    """The 32-byte key of a request, or the reason why it has none.

    `model_digest` is the 32-byte digest of everything the server adds to the request (weights, template, sampling
    defaults), `lora` that of the adapter's files. The model's name in `body` is in the key as well. `parses`: the
    server parses tool calls or reasoning from the model's output.
    """
    known = FIELDS[endpoint]
    for refusal in (_forbidden(known, body), _neutral_of_wrong_type(known, body), _stream_conflict(body)):
        if refusal is not None:
            return refusal
    try:
        if (why := why_not_by_bytes(endpoint, body)) is not None:
            return Uncacheable(why)
        fields = canonical_fields(endpoint, body)
        if streams_apart(endpoint, body, parses):
            fields = dict(sorted({**fields, "stream": bool(body.get("stream"))}.items()))
        text = "".join(_as_json([endpoint, fields], 0))
    except ValueError:  # NaN, Infinity, 1e999
        return Uncacheable("not_finite")
    except RecursionError:  # all of these take a few levels more than reading did
        return Uncacheable("not_json")
    assert len(model_digest) == 32
    assert lora is None or len(lora) == 32
    return RequestKey(sha256(_TAG, model_digest, lora or bytes(32), sha256(tenant.encode()), text.encode("ascii")))


def streams_apart(endpoint: Endpoint, body: Mapping[str, object], parses: bool) -> bool:
    """Whether a stream may differ from the JSON answer to the same request.

    vLLM's parsers read a growing text by other code than a complete one, and the two differ for malformed calls, white
    space and order.
    """
    if body.get("echo"):  # in a stream the prompt's tokens come with it
        return True
    if endpoint == "completions" or endpoint in POOLING:
        return False
    return parses or any(body.get(name) for name in _READ_APART)


def is_sampled(endpoint: Endpoint, body: Mapping[str, object]) -> bool:
    """Whether the next answer to `body` may differ: no temperature of 0 and no seed.

    Without a temperature it is the server's default, which is unknown here. Pooling models do not sample.
    """
    if endpoint in POOLING:
        return False
    temperature = body.get("temperature")
    greedy = isinstance(temperature, int | float) and temperature == 0
    return not greedy and ("seed" not in FIELDS[endpoint].keyed or body.get("seed") is None)


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


def _forbidden(known: Fields, body: Mapping[str, object]) -> Uncacheable | None:
    for field in known.forbidden:
        value = body.get(field)
        if field == "kv_transfer_params" and isinstance(value, dict) and not value.keys() - {"hyperspace"}:
            continue  # Hyperspace's own field, which the middleware replaces
        # Of a Response in the background null is neither true nor false to vLLM, which fails by it.
        if field == "background" and field in body:
            if value is not False:
                return Uncacheable(field)
        elif value is not None:
            return Uncacheable(field)
    return None


def _neutral_of_wrong_type(known: Fields, body: Mapping[str, object]) -> Uncacheable | None:
    for field, types in known.neutral.items():
        if field not in body or object in types:
            continue
        value = body[field]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            return Uncacheable("field_type")
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            return Uncacheable("field_type")
        if isinstance(value, str) and not value.isascii() and has_surrogates(value):
            return Uncacheable("field_type")  # vLLM can't write it out, and fails
    return None


def has_surrogates(text: str) -> bool:
    """Whether a text has lone surrogates: JSON may have them, and UTF-8 cannot encode them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _stream_conflict(body: Mapping[str, object]) -> Uncacheable | None:
    """A field that vLLM refuses in a stream, or that a replayed stream could not honour."""
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


def canonical_fields(endpoint: Endpoint, body: Mapping[str, object]) -> dict[str, object]:
    """The fields of a request that reach its answer, without those at their defaults."""
    known = FIELDS[endpoint]
    body = _one_token_limit(body) if endpoint == "chat" else body
    fields: dict[str, object] = {}
    for field in sorted(body):
        value = body[field]
        if field in known.neutral or field in known.forbidden:
            continue
        if field not in known.keyed:
            fields[field] = value
            continue
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        default = known.keyed[field]
        if type(value) is type(default) and value == default:
            continue
        if value is None and field in known.null_is_default:
            continue
        fields[field] = _canonical_value(endpoint, field, value)
    return fields


def _canonical_value(endpoint: Endpoint, field: str, value: object) -> object:
    if endpoint == "messages" and field in ("system", "tools"):
        value = _without_marks(value)
    if endpoint == "messages" and field == "messages" and isinstance(value, list):
        # For tool results of other roles vLLM prints the input as it came, marks included.
        value = [
            _without_marks(each) if isinstance(each, dict) and each.get("role") == "user" else each for each in value
        ]
    return [_message(each) for each in value] if field == "messages" and isinstance(value, list) else value


def _without_marks(value: object) -> object:
    """Without `cache_control`, with which Anthropic's clients mark what to cache: vLLM does not read it."""
    if isinstance(value, list):
        return [_without_marks(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {
        name: _without_marks(each) if name == "content" else each
        for name, each in value.items()
        if name != "cache_control"
    }


def _one_token_limit(body: Mapping[str, object]) -> Mapping[str, object]:
    """vLLM reads max_completion_tokens, or max_tokens where that is absent or null."""
    limits = body.get("max_tokens"), body.get("max_completion_tokens")
    if any(type(limit) not in (int, type(None)) for limit in limits):
        return body
    return {**body, "max_tokens": None, "max_completion_tokens": limits[0] if limits[1] is None else limits[1]}


def _message(message: Mapping[str, object]) -> dict[str, object]:
    """A message with its own keys sorted: vLLM reads them by name. Their values stay as they came."""
    canonical = {key: message[key] for key in sorted(message)}
    content = canonical.get("content")
    if isinstance(content, list):
        canonical["content"] = [_part(part) for part in content]
    return canonical


def _part(part: object) -> object:
    if not isinstance(part, dict):
        return part
    if part.get("type") == "text":
        part = {key: value for key, value in part.items() if key != "cache_control"}
    return {key: part[key] for key in sorted(part)} if len(part) == 2 else part
