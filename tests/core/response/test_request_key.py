"""Which requests share an answer, and which never do."""

import hashlib
import json
from typing import Any, get_args

import pytest

from hyperspace_vllm.core.response import scope as scopes
from hyperspace_vllm.core.response.request_fields import ENDPOINTS, FIELDS, Endpoint
from hyperspace_vllm.core.response.request_key import Uncacheable, choice_count, is_sampled, parse_request, request_key
from tests.support.paths import VECTORS

CASES = json.loads((VECTORS / "request_keys.json").read_text())
MODEL = bytes(range(32))
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Why is the sky blue?"}]}
TEXT = {"model": "m", "prompt": "Once upon a time"}
MESSAGES = CHAT | {"max_tokens": 5}
RESPONSES = {"model": "m", "input": "Why is the sky blue?"}
EMBEDDINGS = {"model": "m", "input": "Why is the sky blue?"}
RERANK = {"model": "m", "query": "sky", "documents": ["blue", "green"]}
SCORE = {"model": "m", "queries": "sky", "documents": ["blue", "green"]}
SAMPLES: dict[Endpoint, dict[str, Any]] = {
    "chat": CHAT,
    "completions": TEXT,
    "responses": RESPONSES,
    "messages": MESSAGES,
    "embeddings": EMBEDDINGS,
    "rerank": RERANK,
    "score": SCORE,
}


def key(endpoint: Endpoint, body: object, lora: bytes | None = None, tenant: str = "") -> bytes | Uncacheable:
    parsed = parse_request(body if isinstance(body, bytes) else json.dumps(body).encode())
    return parsed if isinstance(parsed, Uncacheable) else request_key(endpoint, parsed, MODEL, lora, tenant)


def image(url: object, **more: object) -> dict[str, object]:
    part = {"type": "image_url", "image_url": url, **more}
    return {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "What?"}, part]}]}


def marked(part: object) -> dict[str, object]:
    return {"model": "m", "messages": [{"role": "user", "content": [part]}]}


def item(kind: str, **more: object) -> dict[str, object]:
    return {**RESPONSES, "input": [{"type": kind, **more}]}


def block(kind: str, **more: object) -> dict[str, object]:
    return {**MESSAGES, "messages": [{"role": "user", "content": [{"type": kind, **more}]}]}


SAME = [
    ("chat", CHAT, CHAT | {"stream": True}),
    ("chat", CHAT, CHAT | {"stream": True, "stream_options": {"include_usage": True}}),
    ("chat", CHAT, CHAT | {"user": "ann", "metadata": {"a": 1}, "request_id": "r", "priority": 3}),
    ("chat", CHAT, CHAT | {"service_tier": "auto", "prompt_cache_key": "k", "safety_identifier": "s", "store": True}),
    ("chat", CHAT, CHAT | {"session_id": "s", "stream_interval": 4, "prompt_cache_retention": "24h"}),
    ("chat", CHAT, CHAT | {"temperature": None, "seed": None, "tools": None, "stop": None}),
    ("chat", CHAT, CHAT | {"n": 1, "stop": [], "logprobs": False, "top_logprobs": 0, "parallel_tool_calls": True}),
    ("chat", CHAT | {"max_tokens": 5}, CHAT | {"max_completion_tokens": 5}),
    ("chat", CHAT | {"max_tokens": 9, "max_completion_tokens": 5}, CHAT | {"max_completion_tokens": 5}),
    ("chat", CHAT | {"temperature": 1}, CHAT | {"temperature": 1.0}),
    ("chat", CHAT | {"temperature": 0}, CHAT | {"temperature": -0.0}),
    ("chat", CHAT, {"messages": [{"content": "Why is the sky blue?", "role": "user"}], "model": "m"}),
    ("chat", CHAT, CHAT | {"kv_transfer_params": {"hyperspace": {"scope": "public"}}}),
    ("chat", CHAT, CHAT | {"kv_transfer_params": None, "background": False}),
    ("completions", TEXT, TEXT | {"max_tokens": 16}),
    ("completions", TEXT, TEXT | {"max_tokens": None, "echo": False}),
    ("chat", marked({"type": "text", "text": "a"}), marked({"type": "text", "text": "a", "cache_control": {}})),
    ("responses", RESPONSES, RESPONSES | {"store": False, "user": "ann", "metadata": {"a": "b"}, "stream": True}),
    ("responses", RESPONSES, RESPONSES | {"truncation": "disabled", "tools": [], "top_logprobs": 0}),
    ("messages", MESSAGES, MESSAGES | {"metadata": {"user_id": "ann"}, "stream": True, "service_tier": "auto"}),
    ("messages", MESSAGES | {"system": "a"}, MESSAGES | {"system": "a", "mm_payload": "tensors"}),
    (
        "messages",
        MESSAGES | {"system": [{"type": "text", "text": "a"}], "tools": [{"name": "f", "input_schema": {}}]},
        MESSAGES
        | {
            "system": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}],
            "tools": [{"name": "f", "input_schema": {}, "cache_control": {"type": "ephemeral"}}],
        },
    ),
    ("rerank", RERANK, RERANK | {"user": "ann", "top_n": 0, "request_id": "r"}),
    ("score", SCORE, SCORE | {"priority": 1}),
    ("embeddings", EMBEDDINGS, EMBEDDINGS | {"encoding_format": "base64", "embed_dtype": "float32"}),
    ("completions", TEXT, b' {"prompt" : "Once\\u0020upon a time", "model":"m"}\n'),
]


@pytest.mark.parametrize(("endpoint", "one", "other"), SAME)
def test_spellings_of_one_request_share_its_key(endpoint: Endpoint, one: object, other: object) -> None:
    assert isinstance(key(endpoint, one), bytes)
    assert key(endpoint, one) == key(endpoint, other)


ORDER_A = {"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": 2}}}
ORDER_B = {"type": "function", "function": {"name": "f", "parameters": {"a": 2, "b": 1}}}
DIFFERENT = [
    (CHAT, CHAT | {"model": "other"}),
    (CHAT, CHAT | {"temperature": 0}),
    (CHAT, CHAT | {"temperature": 1}),  # the server's default may be another
    (CHAT | {"seed": 1}, CHAT | {"seed": 2}),
    (CHAT | {"n": 1}, CHAT | {"n": None}),
    (CHAT | {"n": True}, CHAT | {"n": 1}),
    (CHAT, CHAT | {"cache_salt": "s"}),
    (CHAT, CHAT | {"a_field_of_tomorrow": None}),
    (CHAT | {"a_field_of_tomorrow": 1}, CHAT | {"a_field_of_tomorrow": 1.0}),
    (CHAT | {"tools": [ORDER_A]}, CHAT | {"tools": [ORDER_B]}),  # a chat template prints them as they came
    (CHAT | {"tools": [ORDER_A]}, CHAT | {"tools": [ORDER_A], "tool_choice": "auto"}),
    (CHAT | {"tools": [ORDER_A]}, CHAT | {"tools": [ORDER_A], "tool_choice": None}),
    (CHAT | {"chat_template_kwargs": {"x": 1}}, CHAT | {"chat_template_kwargs": {"x": 1.0}}),
    (CHAT | {"stop": "a"}, CHAT | {"stop": ["a"]}),
    (CHAT, CHAT | {"include_reasoning": False}),
    (CHAT, CHAT | {"mm_processor_kwargs": {"fps": 2}}),
    (image({"url": "data:image/png;base64,AAAA"}), image({"url": "data:image/png;base64,AAAB"})),
    (image({"url": "data:image/png;base64,AAAA"}), image({"url": "data:image/png;base64,AAAA", "detail": "low"})),
    ({"messages": [{"role": "user", "content": "a"}]}, {"messages": [{"role": "system", "content": "a"}]}),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_what_reaches_the_output_separates_keys(one: object, other: object) -> None:
    assert isinstance(key("chat", one), bytes)
    assert isinstance(key("chat", other), bytes)
    assert key("chat", one) != key("chat", other)


UNCACHEABLE = [
    (b"", "not_json"),
    (b"[1]", "not_json"),
    (b'{"prompt": "\xff"}', "not_json"),
    (b"[" * 100_000, "not_json"),
    (b'{"model": "a", "model": "b", "messages": []}', "duplicate_key"),
    (b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "duplicate_key"),
    (b'{"messages": [], "temperature": NaN}', "not_finite"),
    (b'{"messages": [], "temperature": 1e999}', "not_finite"),
    (CHAT | {"kv_transfer_params": {"do_remote_prefill": True}}, "kv_transfer_params"),
    (CHAT | {"kv_transfer_params": {}, "ec_transfer_params": {}}, "ec_transfer_params"),
    (CHAT | {"kv_transfer_params": 0}, "kv_transfer_params"),
    (CHAT | {"ec_transfer_params": False}, "ec_transfer_params"),
    (CHAT | {"background": True}, "background"),
    (CHAT | {"background": 0}, "background"),
    (CHAT | {"background": None}, "background"),
    (CHAT | {"previous_response_id": "r"}, "previous_response_id"),
    (CHAT | {"stream": "yes"}, "field_type"),
    (CHAT | {"user": 5}, "field_type"),
    (CHAT | {"priority": True}, "field_type"),
    (CHAT | {"priority": 1 << 63}, "field_type"),
    (CHAT | {"messages": "hello"}, "field_type"),
    (CHAT | {"messages": ["hello"]}, "field_type"),
    (CHAT | {"stream_options": {"include_usage": True}}, "stream_options"),
    (CHAT | {"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options"),
    (CHAT | {"stream": True, "stream_options": {"continuous_usage_stats": True}}, "continuous_usage"),
    (CHAT | {"stream": True, "prompt_logprobs": 1}, "stream_conflict"),
    (CHAT | {"stream": True, "use_beam_search": True}, "stream_conflict"),
    (image({"url": "https://example.com/cat.png"}), "media"),
    (image({"url": "file:///cat.png"}), "media"),
    (image(None, uuid="cat"), "media"),
    (image({"url": "data:image/png;base64,AAAA"}, uuid="cat"), "media"),
    (image({"url": "data:image/png;base64,AAAA", "more": "https://example.com"}), "media"),
    (CHAT | {"messages": [{"role": "user", "content": [{"type": "tool_reference", "name": "t"}]}]}, "media"),
    (CHAT | {"messages": [{"role": "user", "content": [{"image_url": {"url": "data:,"}}]}]}, "media"),
    (CHAT | {"messages": [{"role": "user", "content": [{"type": "text", "text": "t", "uuid": "u"}]}]}, "media"),
]


@pytest.mark.parametrize(("body", "reason"), UNCACHEABLE)
def test_what_its_bytes_do_not_name_is_not_cached(body: object, reason: str) -> None:
    assert key("chat", body) == Uncacheable(reason)


def test_marks_that_reach_the_prompt_are_in_the_key() -> None:
    def told(**mark: object) -> dict[str, object]:
        result = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "5", **mark}]}
        return {**MESSAGES, "messages": [{"role": "assistant", "content": [result]}]}

    assert key("messages", told()) != key("messages", told(cache_control={}))


PICTURE = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}
ELSEWHERE: list[tuple[Endpoint, object, str]] = [
    ("responses", RESPONSES | {"previous_response_id": "r"}, "previous_response_id"),
    ("responses", RESPONSES | {"background": True}, "background"),
    ("responses", RESPONSES | {"prompt": {"id": "p"}}, "prompt"),
    ("responses", RESPONSES | {"tools": [{"type": "code_interpreter"}]}, "server_tools"),
    ("responses", RESPONSES | {"tools": [{"type": "function", "name": "f"}, {"type": "mcp"}]}, "server_tools"),
    ("responses", RESPONSES | {"tools": "all"}, "field_type"),
    ("responses", RESPONSES | {"metadata": "x"}, "field_type"),
    ("responses", RESPONSES | {"metadata": {"a": 1}}, "field_type"),
    (
        "responses",
        item("message", content=[{"type": "input_text", "text": "a", "uuid": "u", "image_url": "x"}]),
        "media",
    ),
    ("responses", RESPONSES | {"input": 5}, "field_type"),
    ("responses", item("item_reference", id="i"), "media"),
    ("responses", item("message", content=[{**PICTURE, "image_url": "https://example.com/a.png"}]), "media"),
    ("responses", item("message", content=[{**PICTURE, "file_id": "f"}]), "media"),
    ("responses", item("message", content=[{"type": "input_file", "file_id": "f"}]), "media"),
    ("responses", item("function_call_output", output=[{"type": "input_file", "file_id": "f"}]), "media"),
    ("messages", block("image", source={"type": "url", "url": "https://example.com/a.png"}), "media"),
    ("messages", block("tool_result", content=[{"type": "image", "source": {"type": "url", "url": "x"}}]), "media"),
    ("messages", block("document", source={"type": "base64", "data": "x"}), "media"),
    ("messages", MESSAGES | {"system": [{"type": "image", "source": {"type": "url"}}]}, "media"),
    ("messages", MESSAGES | {"metadata": 5}, "field_type"),
    ("rerank", RERANK | {"documents": [{"content": [{"type": "image_url"}]}]}, "media"),
    ("score", SCORE | {"documents": {"content": []}}, "media"),
    ("embeddings", EMBEDDINGS | {"input": [{"role": "user", "content": "a"}]}, "field_type"),
    ("embeddings", {"model": "m", "messages": [{"role": "user", "content": "a"}]}, "messages"),
]


@pytest.mark.parametrize(("endpoint", "body", "reason"), ELSEWHERE)
def test_other_endpoints_cache_nothing_that_lies_elsewhere(endpoint: Endpoint, body: object, reason: str) -> None:
    assert key(endpoint, body) == Uncacheable(reason)


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("responses", item("message", role="user", content=[PICTURE, {"type": "input_text", "text": "What?"}])),
        ("responses", item("function_call_output", call_id="c", output="5")),
        ("responses", RESPONSES | {"tools": [{"type": "function", "name": "f"}]}),
        ("messages", block("image", source={"type": "base64", "media_type": "image/png", "data": "AAAA"})),
        ("messages", block("tool_result", tool_use_id="t", content=[{"type": "text", "text": "5"}])),
        ("embeddings", EMBEDDINGS | {"input": [[1, 2], [3]]}),
        ("score", {"model": "m", "text_1": "a", "text_2": ["b"]}),
    ],
)
def test_what_they_carry_themselves_they_cache(endpoint: Endpoint, body: object) -> None:
    assert isinstance(key(endpoint, body), bytes)


@pytest.mark.parametrize("endpoint", ENDPOINTS.values())
def test_models_that_pool_do_not_sample(endpoint: Endpoint) -> None:
    body = SAMPLES[endpoint]
    assert is_sampled(endpoint, body) == (endpoint not in ("embeddings", "rerank", "score"))
    assert not is_sampled(endpoint, body | {"temperature": 0})


def test_endpoint_adapter_tenant_and_model_separate_keys() -> None:
    body = TEXT | {"messages": CHAT["messages"]}
    keys = {
        key("chat", body),
        key("completions", body),
        key("chat", body, lora=bytes(31) + b"\x01"),
        key("chat", body, tenant="a"),
        key("chat", body, tenant="b"),
        request_key("chat", body, bytes(32), None, ""),
    }
    assert len(keys) == 6


def test_completions_know_no_max_completion_tokens() -> None:
    assert key("completions", TEXT | {"max_tokens": 5}) != key("completions", TEXT | {"max_completion_tokens": 5})


@pytest.mark.parametrize(
    ("endpoint", "body", "count"),
    [
        ("chat", CHAT, 1),
        ("chat", CHAT | {"n": 3}, 3),
        ("completions", TEXT, 1),
        ("completions", TEXT | {"prompt": [1, 2, 3]}, 1),
        ("completions", TEXT | {"prompt": ["a", "b"], "n": 2}, 4),
        ("completions", TEXT | {"prompt": [[1], [2], [3]]}, 3),
    ],
)
def test_choices_are_counted_as_vllm_makes_them(endpoint: Endpoint, body: dict[str, object], count: int) -> None:
    assert choice_count(endpoint, body) == count


@pytest.mark.parametrize("vector", CASES, ids=[v["name"] for v in CASES])
def test_keys_match_the_published_vectors(vector: dict[str, str]) -> None:
    lora = bytes.fromhex(vector["lora"]) if vector["lora"] else None
    parsed = parse_request(vector["body"].encode())
    assert not isinstance(parsed, Uncacheable)
    named = bytes.fromhex(vector["model_digest"]), lora, vector["tenant"]
    made = request_key(vector["endpoint"], parsed, *named, parses="parses" in vector)  # type: ignore[arg-type]
    assert isinstance(made, bytes)
    assert made.hex() == vector["key"]
    # The slow twin: the documented bytes, written out.
    tenant = hashlib.sha256(vector["tenant"].encode()).digest()
    head = b"hyperspace/request/3" + bytes.fromhex(vector["model_digest"]) + (lora or bytes(32)) + tenant
    assert hashlib.sha256(head + vector["canonical"].encode()).hexdigest() == vector["key"]


def vllms_models(endpoint: Endpoint) -> list[Any]:
    """The pydantic models of vLLM by which a request may be read."""
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.pooling.embed.protocol import EmbeddingCompletionRequest
    from vllm.entrypoints.pooling.scoring.protocol import RerankRequest, ScoreRequest

    models: dict[Endpoint, list[Any]] = {
        "chat": [ChatCompletionRequest],
        "completions": [CompletionRequest],
        "responses": [ResponsesRequest],
        "messages": [AnthropicMessagesRequest],
        "embeddings": [EmbeddingCompletionRequest],
        "rerank": [RerankRequest],
        "score": list(get_args(ScoreRequest)),
    }
    return models[endpoint]


@pytest.mark.parametrize("endpoint", ENDPOINTS.values())
def test_every_request_of_vllm_has_the_salt_that_keeps_tenants_apart(endpoint: Endpoint) -> None:
    assert all("cache_salt" in model.model_fields for model in vllms_models(endpoint))


@pytest.mark.feature("every request field is judged")
@pytest.mark.parametrize("endpoint", ENDPOINTS.values())
def test_every_field_of_vllm_is_classified(endpoint: Endpoint) -> None:
    from vllm import SamplingParams

    fields = FIELDS[endpoint]
    known = fields.keyed.keys() | fields.neutral.keys() | fields.forbidden | fields.verbatim
    theirs = {name: field for model in vllms_models(endpoint) for name, field in model.model_fields.items()}
    assert theirs.keys() - known == set(), "fields of vLLM's that we have not judged"
    for name in fields.keyed.keys() & theirs.keys():  # newer and older releases have others, too
        default, field = fields.keyed[name], theirs[name]
        value = None if field.is_required() else field.get_default(call_default_factory=True)
        if value != default:  # vLLM 0.29 and 0.30 read a null as their default
            assert default is None, f"vLLM's default of {name} has changed"
            null, absent = SamplingParams.from_optional(**{name: None}), SamplingParams.from_optional(**{name: value})
            assert null == absent
    (model, *_) = vllms_models(endpoint)
    for name in fields.null_is_default & theirs.keys():
        read = getattr(model.model_validate(SAMPLES[endpoint] | {name: None}), name)
        assert isinstance(read, type(None) | type(fields.keyed[name]))
    for name, types in fields.neutral.items():
        if name in theirs and not {type(None), object} & set(types):
            with pytest.raises(ValueError, match=name):
                model.model_validate(SAMPLES[endpoint] | {name: None})


@pytest.mark.feature("every request field is judged")
@pytest.mark.parametrize("endpoint", ENDPOINTS.values())
def test_vllm_accepts_neutral_fields_in_the_types_that_we_do(endpoint: Endpoint) -> None:
    (model, *_) = vllms_models(endpoint)
    examples: dict[type, object] = {bool: False, str: "float", int: 0, dict: {}, type(None): None, object: "x"}
    for name, types in FIELDS[endpoint].neutral.items():
        for kind in types:
            body = SAMPLES[endpoint] | {name: examples[kind]}
            if name == "stream_options" and kind is dict:
                body["stream"] = True
            if name == "stream_interval":
                body[name] = 1
            if name == "endianness":
                body[name] = "native"
            model.model_validate(body)


def test_a_tenant_is_an_api_key_under_the_fleets_secret() -> None:
    keys = ("one", "two")
    first = scopes.tenant_of(b"secret", keys, "Bearer one")
    assert first == scopes.tenant_of(b"secret", keys, "bearer one")
    assert first not in ("", scopes.tenant_of(b"secret", keys, "Bearer two"))
    assert first != scopes.tenant_of(b"other", keys, "Bearer one")
    assert scopes.tenant_of(b"secret", ("one", "one"), "Bearer one") == ""
    for authorization in (None, "Bearer three", "one", "Basic one"):
        assert scopes.tenant_of(b"secret", keys, authorization) is None


def test_a_scope_that_the_middleware_did_not_sign_is_none() -> None:
    signed = scopes.sign_scope(b"s", "private", "t", "salt")
    assert scopes.verify_scope(b"s", signed, "salt") == scopes.RequestScope("private", "t")
    forgeries: list[object] = [
        None,
        "private",
        {},
        signed | {"scope": "network"},
        signed | {"scope": "everywhere"},
        signed | {"tenant": "u"},
        signed | {"tenant": 5},
        signed | {"mac": "é"},
        signed | {"mac": None},
    ]
    for forged in forgeries:
        assert scopes.verify_scope(b"s", forged, "salt") is None
    assert scopes.verify_scope(b"s", signed, None) is None
    assert scopes.verify_scope(b"t", signed, "salt") is None
