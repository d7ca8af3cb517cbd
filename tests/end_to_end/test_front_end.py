"""The response cache inside vLLM's real front end answers as vLLM alone would have, refusals included."""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from hyperspace_vllm.core.response.request_fields import ENDPOINTS, FIELDS, POOLING, Endpoint
from tests.support.comparable import comparable
from tests.support.front_end import FrontEnds, front_ends, with_tokens
from tests.support.paths import TINY

Json = dict[str, Any]

pytestmark = [pytest.mark.io, pytest.mark.filterwarnings("ignore")]

PATHS = {endpoint: path for path, endpoint in ENDPOINTS.items()}
HERMES = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3")
LLAMA = ("--enable-auto-tool-choice", "--tool-call-parser", "llama3_json", "--reasoning-parser", "deepseek_r1")
PYTHONIC = ("--enable-auto-tool-choice", "--tool-call-parser", "pythonic", "--reasoning-parser", "granite")
EMBED = ("--runner", "pooling", "--convert", "embed")
FLAGS: dict[str, tuple[str, ...]] = {
    "no parser": (),
    "hermes and qwen3": HERMES,
    "llama3_json and deepseek_r1": LLAMA,
    "pythonic and granite": PYTHONIC,
    "pooling": EMBED,
}

CALL = '{"name": "add", "arguments": {"a": 1, "b": [2.0, "\\u00e9"]}}'
TEXTS = [
    "", "Blue.", "\n\nhi \n", "né 😀 ok", "a < b and <tool", "one STOP two",
    f"<tool_call>\n{CALL}\n</tool_call>", f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call> done",
    '<tool_call>\n{"name": "now"}\n</tool_call>', f"Sure. <tool_call>{CALL}", '<tool_call>{"name": "add", "arg',
    "<think>hm</think>blue", "<think>hm", f"<think>\nhm\n</think>\n\n<tool_call>\n{CALL}\n</tool_call>",
    CALL, f"<|python_tag|>{CALL}; {CALL}", '{"name": "add", "parameters": {"a": 1}} and more',
    '[{"name": "add", "parameters": {"a": 1}}]', '[{"name":"add","parameters":{"a":1}},{"name":"now","parameters":{}}]',
    '{"a": 1}', "[add(a=1, b='x'), now()]", "[add(a=1", "Here is my thought process: hm Here is my response: blue",
]  # fmt: skip
TOOLS = [
    {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    {"name": "now", "parameters": {"type": "object", "properties": {}}},
]
CHAT_TOOLS = [{"type": "function", "function": tool} for tool in TOOLS]
NAMED = {"type": "function", "function": {"name": "add"}}
TWICE: Json = {"n": 2, "temperature": 1, "seed": 1}
CHOICES: dict[Endpoint, list[Json]] = {
    "chat": [
        {},
        TWICE,
        {"logprobs": True, "top_logprobs": 2},
        {"return_token_ids": True},
        {"tools": CHAT_TOOLS},
        *({"tools": CHAT_TOOLS, "tool_choice": choice} for choice in ("auto", "none", "required", NAMED)),
    ],
    "messages": [{}, {"tools": [{"name": tool["name"], "input_schema": tool["parameters"]} for tool in TOOLS]}],
    "responses": [
        {},
        {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
        {"tools": [{"type": "function", **tool} for tool in TOOLS]},
    ],
    "completions": [{}, TWICE, {"logprobs": 2}, {"echo": True}],
}
LIMITS: dict[Endpoint, Json] = {
    "chat": {"max_tokens": 400},
    "completions": {"max_tokens": 400},
    "messages": {"max_tokens": 400},
    "responses": {"max_output_tokens": 400},
}


def asked(endpoint: Endpoint, text: str, **more: object) -> Json:
    """A request that the scripted core answers with `text`."""
    said = f"SAY[[{text}]]"
    prompts: dict[Endpoint, Json] = {
        "completions": {"prompt": said},
        "responses": {"input": said},
        "embeddings": {"input": text or "x"},
        "rerank": {"query": "sky", "documents": [text or "x", "green"]},
        "score": {"queries": "sky", "documents": [text or "x"]},
    }
    prompt = prompts.get(endpoint, {"messages": [{"role": "user", "content": said}]})
    greedy = {} if endpoint in POOLING else {"temperature": 0}
    return {"model": "demo", **prompt, **greedy, **LIMITS.get(endpoint, {}), **more}


@pytest.fixture(scope="module")
def with_flags(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], FrontEnds]]:
    """Front ends by the name of their flags, each started once."""
    with ExitStack() as stack:
        running: dict[str, FrontEnds] = {}

        def start(name: str) -> FrontEnds:
            if name not in running:
                tasks = ("embed",) if name == "pooling" else ("generate",)
                directory, model = tmp_path_factory.mktemp("front-end"), TINY
                if "deepseek_r1" in name:
                    model = with_tokens(tmp_path_factory.mktemp("model"), "<think>", "</think>", "<|python_tag|>")
                running[name] = stack.enter_context(front_ends(directory, *FLAGS[name], model=model, tasks=tasks))
            return running[name]

        yield start


def post(front: FrontEnds, endpoint: Endpoint, body: Json | bytes, **headers: str) -> tuple[Any, Any, str]:
    """vLLM's answer, its answer with the cache inside, and the Cache-Status of the latter."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    said: list[Any] = []
    status = ""
    for client in (front.plain, front.cached):
        try:
            answer = client.post(PATHS[endpoint], content=raw, headers=named)
        except httpx.RemoteProtocolError:  # a stream in which vLLM itself failed
            said.append((0, "broken off"))
            continue
        said.append(comparable(answer))
        status = answer.headers.get("cache-status", "")
    return said[0], said[1], status


# --- vLLM's refusals --------------------------------------------------------------------------------

REFUSED: list[tuple[str, Endpoint, Json, Json, dict[str, str]]] = [
    ("no parser", "chat", {}, {"stream_interval": 0}, {}),
    ("no parser", "chat", {}, {"stream_interval": 0, "stream": True}, {}),
    ("no parser", "completions", {}, {"stream_interval": -1}, {}),
    ("no parser", "responses", {}, {"background": None}, {}),
    ("no parser", "chat", {}, {}, {"content_type": "application/json ;charset=utf-8"}),
    ("no parser", "chat", {}, {}, {"x_data_parallel_rank": "77"}),
    ("no parser", "messages", {}, {}, {"x_data_parallel_rank": "-1"}),
    ("no parser", "chat", {}, {}, {"x_vllm_priority": "9" * 30}),
    ("hermes and qwen3", "chat", {"thinking_token_budget": 64}, {"thinking_token_budget": 64.0}, {}),
    ("pooling", "embeddings", {}, {"dimensions": 64.5}, {}),
]


@pytest.mark.parametrize(("flags", "endpoint", "stored", "refused", "headers"), REFUSED)
def test_what_vllm_refuses_is_refused_though_its_answer_is_stored(
    with_flags: Callable[[str], FrontEnds],
    flags: str,
    endpoint: Endpoint,
    stored: Json,
    refused: Json,
    headers: dict[str, str],
) -> None:
    front = with_flags(flags)
    body = asked(endpoint, "Blue.", **stored)
    post(front, endpoint, body)
    assert "; hit; " in post(front, endpoint, body)[2]
    plain, cached, status = post(front, endpoint, body | refused, **headers)
    assert plain[0] >= 400
    assert cached == plain, status


def test_headers_that_vllm_takes_keep_their_hits(with_flags: Callable[[str], FrontEnds]) -> None:
    front, body = with_flags("no parser"), asked("chat", "Blue.")
    post(front, "chat", body)
    for headers in ({"x_data_parallel_rank": "0"}, {"x_data_parallel_rank": "x"}, {"x_vllm_priority": "5"}):
        plain, cached, status = post(front, "chat", body | {"priority": 5}, **headers)
        assert "; hit; " in status, headers
        assert cached == plain


def test_who_asks_for_a_report_of_load_gets_it(with_flags: Callable[[str], FrontEnds]) -> None:
    front, body = with_flags("no parser"), asked("chat", "Blue.")
    for wanted in ("TEXT", "json", "x"):
        post(front, "chat", body)
        plain, cached, status = post(front, "chat", body, endpoint_load_metrics_format=wanted)
        assert ("endpoint-load-metrics" in plain[1]) == (wanted != "x")
        assert cached == plain
        assert status == "hyperspace; fwd=bypass; detail=load_report"


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_vectors_that_are_not_of_numbers_are_vllms_own_each_time(
    with_flags: Callable[[str], FrontEnds], encoding: str
) -> None:
    front = with_flags("pooling")
    for given in ("NAN", ["sky", "NAN"], "NAN"):
        body = asked("embeddings", "", input=given, encoding_format=encoding)
        plain, cached, status = post(front, "embeddings", body)
        assert cached == plain
        assert "hit" not in status
    assert "; hit; " not in post(front, "embeddings", asked("embeddings", "", input="NAN", encoding_format="base64"))[2]


# --- streams and JSON -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "texts"),
    [("no parser", TEXTS[:5]), ("hermes and qwen3", TEXTS[:1] + TEXTS[5:14])],
    ids=["plain", "parsed"],
)
@pytest.mark.parametrize("endpoint", ["chat", "completions", "messages", "responses"])
def test_a_stream_never_becomes_another_json_answer_nor_the_other_way_round(
    with_flags: Callable[[str], FrontEnds], flags: str, texts: list[str], endpoint: Endpoint
) -> None:
    front = with_flags(flags)
    for choice in CHOICES[endpoint]:
        for number, text in enumerate(texts):
            ways: list[Json] = [{"stream": True}, {}] if number % 2 else [{}, {"stream": True}]
            for way in (*ways, *ways):
                plain, cached, status = post(front, endpoint, asked(endpoint, text, **choice, **way))
                assert cached == plain, (text, choice, way, status)


@pytest.mark.parametrize("endpoint", ["chat", "completions", "messages", "responses"])
def test_plain_text_is_shared_by_streams_and_json(with_flags: Callable[[str], FrontEnds], endpoint: Endpoint) -> None:
    front = with_flags("no parser")
    for first, second in (({"stream": True}, {}), ({}, {"stream": True})):
        body = asked(endpoint, "Blue.", cache_salt=f"shared {bool(first)}")
        post(front, endpoint, body | first)
        assert "; hit; " in post(front, endpoint, body | second)[2]


def test_a_replayed_response_begins_without_what_is_known_at_its_end(with_flags: Callable[[str], FrontEnds]) -> None:
    front = with_flags("no parser")
    body = asked("responses", "Blue.", stream=True, enable_response_messages=True)
    post(front, "responses", body)
    plain, cached, status = post(front, "responses", body)
    assert "; hit; " in status
    assert plain[2][0][0]["response"]["output_messages"] is None
    assert cached == plain


# --- random requests --------------------------------------------------------------------------------

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 0.0, 1.0, 64.0, 0.5, 2, 2**63, 10**30, "", "x", "1", "auto", "\ud800", [], ["a"], [1],
    {}, {"a": 1}, {"a": "b"}, {"type": "text"}, {"include_usage": True}, {"include_usage": None},
]  # fmt: skip
HEADERS = [
    *[("x-data-parallel-rank", value) for value in ("0", "1", "-1", "x", "")],
    *[("x-vllm-priority", value) for value in ("5", "x", "9" * 30)],
    *[
        ("content-type", value)
        for value in ("APPLICATION/JSON", "application/json;charset=x", "application/json ;a=b", "")
    ],
    *[("endpoint-load-metrics-format", value) for value in ("TEXT", "json", "x", "")],
    ("x-session-id", "s"),
    ("x-request-id", "r"),
]
# Fields that the scripted core can't answer, or takes long to answer.
UNSCRIPTED = frozenset({"prompt_logprobs", "logprob_token_ids", "use_beam_search", "n"})
REQUESTS = [200, pytest.param(400, marks=pytest.mark.slow)]


def changed(rng: random.Random, endpoint: Endpoint, body: Json) -> Json:
    """The same request in another form, or another request."""
    fields = FIELDS[endpoint]
    neutral = sorted(fields.neutral)
    names = sorted({*fields.neutral, *fields.keyed, *fields.forbidden, *fields.verbatim} - UNSCRIPTED)
    body = dict(body)
    if endpoint not in POOLING and rng.random() < 0.5:
        body["stream"] = not body.get("stream")
        body.pop("stream_options", None)
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        body[rng.choice(rng.choice((neutral, names)))] = rng.choice(VALUES)
    return body


@pytest.mark.parametrize("requests", REQUESTS)
@pytest.mark.parametrize("flags", FLAGS)
def test_any_requests_get_vllms_own_answers(with_flags: Callable[[str], FrontEnds], flags: str, requests: int) -> None:
    front, rng = with_flags(flags), random.Random(flags)
    endpoints: list[Endpoint] = [each for each in FIELDS if (each in POOLING) == (flags == "pooling")]
    texts = rng.sample(TEXTS, 8)
    before: list[tuple[Endpoint, Json]] = []
    seen: Counter[object] = Counter()
    for _ in range(requests):
        if before and rng.random() < 0.7:
            endpoint, body = rng.choice(before)
            body = changed(rng, endpoint, body)
        else:
            endpoint = rng.choice(endpoints)
            body = asked(endpoint, rng.choice(texts), **rng.choice(CHOICES.get(endpoint, [{}])))
            before.append((endpoint, body))
        headers = dict(rng.sample(HEADERS, rng.choice((0, 0, 0, 1))))
        plain, cached, status = post(front, endpoint, body, **headers)
        assert cached == plain, (endpoint, body, headers, status)
        seen[plain[0]] += 1
        seen["hit", endpoint, bool(body.get("stream"))] += "; hit; " in status
    assert seen[400] > requests / 20
    modes = [(each, stream) for each in endpoints for stream in ((False,) if each in POOLING else (False, True))]
    assert all(seen["hit", *mode] for mode in modes), seen
