"""Which requests share an answer, and which never do."""

import hashlib
import json
from pathlib import Path

import pytest

from hyperspace_vllm.core.response import scope as scopes
from hyperspace_vllm.core.response.request_key import (
    FORBIDDEN,
    KEYED,
    NEUTRAL,
    NULL_IS_DEFAULT,
    VERBATIM,
    Endpoint,
    Uncacheable,
    choice_count,
    parse_request,
    request_key,
)

VECTORS = json.loads((Path(__file__).parent / "vectors" / "request_keys.json").read_text())
MODEL = bytes(range(32))
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Why is the sky blue?"}]}
TEXT = {"model": "m", "prompt": "Once upon a time"}


def key(endpoint: Endpoint, body: object, lora: bytes | None = None, tenant: str = "") -> bytes | Uncacheable:
    parsed = parse_request(body if isinstance(body, bytes) else json.dumps(body).encode())
    return parsed if isinstance(parsed, Uncacheable) else request_key(endpoint, parsed, MODEL, lora, tenant)


def image(url: object, **more: object) -> dict[str, object]:
    part = {"type": "image_url", "image_url": url, **more}
    return {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "What?"}, part]}]}


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
    (CHAT | {"background": True}, "background"),
    (CHAT | {"previous_response_id": "r"}, "previous_response_id"),
    (CHAT | {"stream": "yes"}, "field_type"),
    (CHAT | {"user": 5}, "field_type"),
    (CHAT | {"priority": True}, "field_type"),
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


@pytest.mark.parametrize("vector", VECTORS, ids=[v["name"] for v in VECTORS])
def test_keys_match_the_published_vectors(vector: dict[str, str]) -> None:
    lora = bytes.fromhex(vector["lora"]) if vector["lora"] else None
    parsed = parse_request(vector["body"].encode())
    assert not isinstance(parsed, Uncacheable)
    made = request_key(vector["endpoint"], parsed, bytes.fromhex(vector["model_digest"]), lora, vector["tenant"])  # type: ignore[arg-type]
    assert isinstance(made, bytes)
    assert made.hex() == vector["key"]
    # The slow twin: the documented bytes, written out.
    tenant = hashlib.sha256(vector["tenant"].encode()).digest()
    head = b"hyperspace/request/1" + bytes.fromhex(vector["model_digest"]) + (lora or bytes(32)) + tenant
    assert hashlib.sha256(head + vector["canonical"].encode()).hexdigest() == vector["key"]


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_every_field_of_vllm_is_classified(endpoint: Endpoint) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    model = ChatCompletionRequest if endpoint == "chat" else CompletionRequest
    known = KEYED[endpoint].keys() | NEUTRAL.keys() | FORBIDDEN | VERBATIM
    assert model.model_fields.keys() - known == set(), "fields of vLLM's that we have not judged"
    assert KEYED[endpoint].keys() - model.model_fields.keys() == set(), "fields that vLLM no longer has"
    for name, default in KEYED[endpoint].items():
        field = model.model_fields[name]
        theirs = None if field.is_required() else field.get_default(call_default_factory=True)
        assert theirs == default, f"vLLM's default of {name} has changed"
    base = CHAT if endpoint == "chat" else TEXT
    for name in NULL_IS_DEFAULT[endpoint]:
        assert isinstance(
            getattr(model.model_validate(base | {name: None}), name), type(None) | type(KEYED[endpoint][name])
        )
    for name, types in NEUTRAL.items():
        if name in model.model_fields and type(None) not in types:
            with pytest.raises(ValueError, match=name):
                model.model_validate(base | {name: None})


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
