"""Every endpoint of a real server, by its official client: replayed answers equal computed ones, streamed or not.

Each request is computed once, as a stream or not, and asked again in both ways. This server has parsers, which read a
stream by other code than a whole answer, so all but completions are computed once in each way.
"""

import base64
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import openai
import pytest

from bench.servers import MODELS, Server
from hyperspace_vllm.core.records.ids import sha256
from hyperspace_vllm.core.response.answer_ids import without_ids
from hyperspace_vllm.core.response.cache_proof import decode_proof
from hyperspace_vllm.core.response.request_fields import ENDPOINTS, Endpoint
from tests.support.answers import MARK, canaries, events, ids_in
from tests.support.engines.official_clients import (
    STATUS,
    TOOL,
    Ask,
    chat,
    completion,
    message,
    openai_client,
    response,
    unstreamed,
)
from tests.support.frozen_engine import frozen_engine
from tests.support.until import until

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.feature("every endpoint: what is replayed is what was computed"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = (
        "--enable-auto-tool-choice",
        "--tool-call-parser",
        "hermes",
        "--reasoning-parser",
        "qwen3",
        "--enable-request-id-headers",
    )
    semantic = {"HYPERSPACE_SEMANTIC": "balanced"}
    directory = tmp_path_factory.mktemp("generate")
    with Server("generate", MODELS["tiny"], directory, arguments=flags, environment=semantic) as server:
        yield server.ready()


@pytest.fixture(scope="module")
def pooling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ("--runner", "pooling", "--convert", "embed")
    with Server("pooling", MODELS["tiny"], tmp_path_factory.mktemp("pooling"), arguments=flags) as server:
        yield server.ready()


QUESTION = [{"role": "user", "content": "Why is the sky blue?"}]
REQUESTS: list[tuple[str, Ask, dict[str, Any]]] = [
    ("chat", chat, {"messages": QUESTION}),
    ("chat with logprobs", chat, {"messages": QUESTION, "logprobs": True, "top_logprobs": 2}),
    ("chat with two choices", chat, {"messages": QUESTION, "n": 2, "temperature": 1, "seed": 5}),
    ("chat with tools", chat, {"messages": QUESTION, "tools": [TOOL]}),
    ("chat without reasoning", unstreamed, {"messages": QUESTION, "extra_body": {"include_reasoning": False}}),
    ("completion", completion, {"prompt": "Once upon a time"}),
    ("completion of two prompts", completion, {"prompt": ["Once", "Twice"]}),
    ("response", response, {"input": "Why is the sky blue?", "store": False}),
    ("response by default", response, {"input": "Why is the sky blue?"}),
    ("response to messages", response, {"input": QUESTION, "instructions": "Be brief.", "store": False}),
    (
        "response with tools",
        response,
        {"input": QUESTION, "tools": [{"type": "function", **TOOL["function"], "strict": False}], "store": False},  # type: ignore[dict-item]
    ),
    ("message", message, {"messages": QUESTION}),
    ("message with a system prompt", message, {"messages": QUESTION, "system": "Be brief.", "stop_sequences": ["x"]}),
    (
        "message with tools",
        message,
        {"messages": QUESTION, "tools": [{"name": "add", "input_schema": TOOL["function"]["parameters"]}]},  # type: ignore[index]
    ),
]


@pytest.mark.parametrize("stored_by", ["stream", "json"])
@pytest.mark.parametrize(("name", "ask", "fields"), REQUESTS, ids=[name for name, _, _ in REQUESTS])
def test_what_is_replayed_is_what_was_computed(
    server: Server, name: str, ask: Ask, fields: dict[str, Any], stored_by: str
) -> None:
    own = {"extra_body": {**fields.get("extra_body", {}), "cache_salt": f"{name} {stored_by} {time.time_ns()}"}}
    ids: set[str] = set()

    def asked_again(stream: bool, status: str) -> dict[str, Any]:
        answer = ask(server, stream, **{**fields, **own})
        assert status in STATUS[-1], STATUS[-1]
        assert not ids & set(ids_in(answer))
        ids.update(ids_in(answer))
        return without_ids(answer)

    ways = (stored_by == "stream", stored_by != "stream")
    first = asked_again(ways[0], COMPUTED)
    for stream in ways:
        computed = first if stream == ways[0] or ask in (completion, unstreamed) else asked_again(stream, COMPUTED)
        for _ in range(2):
            assert asked_again(stream, "; hit; ") == computed


def test_a_response_repeats_what_this_request_said_of_itself(server: Server) -> None:
    asked = {"input": f"Why? {time.time_ns()}"}
    for stream in (False, True):
        first = response(server, stream, **asked, metadata={"who": "ann"}, user="ann")
        other = response(server, stream, **asked, metadata={"who": "ben"})
        assert "; hit; " in STATUS[-1]
        assert (other["metadata"], other.get("user")) == ({"who": "ben"}, None)
        assert without_ids(other)["output"] == without_ids({**first})["output"]


TEXT_REQUESTS: list[tuple[Endpoint, dict[str, Any]]] = [
    ("chat", {"messages": QUESTION, "max_tokens": 4}),
    ("completions", {"prompt": "Once", "max_tokens": 4}),
    ("responses", {"input": "Why?", "max_output_tokens": 4}),
    ("messages", {"messages": QUESTION, "max_tokens": 4}),
]
POOLING_REQUESTS: list[tuple[Endpoint, dict[str, Any]]] = [
    ("embeddings", {"input": "sky"}),
    ("rerank", {"query": "sky", "documents": ["blue"]}),
    ("score", {"queries": "sky", "documents": ["blue"]}),
]


@pytest.mark.parametrize("stored_by", [{"stream": True}, {}], ids=["stream", "json"])
@pytest.mark.parametrize(("endpoint", "body"), TEXT_REQUESTS, ids=[endpoint for endpoint, _ in TEXT_REQUESTS])
def test_a_hit_tells_nothing_of_the_client_that_asked_first(
    server: Server, endpoint: Endpoint, body: dict[str, Any], stored_by: dict[str, Any]
) -> None:
    both: tuple[object, ...] = ({}, {"stream": True})
    check_nothing_is_told(server, endpoint, body, stored_by, both if endpoint == "completions" else (stored_by,))


def check_nothing_is_told(
    server: Server, endpoint: Endpoint, body: dict[str, Any], stored_by: dict[str, Any], asked_as: tuple[object, ...]
) -> None:
    path = next(path for path, name in ENDPOINTS.items() if name == endpoint)
    body = {"model": "demo", **body, "cache_salt": str(time.time_ns())}

    def ask(more: Any, headers: dict[str, str]) -> httpx.Response:
        answer = httpx.post(server.url + path, json=body | more, headers=headers, timeout=120)
        assert answer.status_code == 200, answer.text
        return answer

    first = ask(canaries(endpoint) | stored_by, {"X-Request-Id": MARK})
    assert first.headers["cache-status"] == "hyperspace; fwd=uri-miss; stored"
    assert MARK in first.text
    ids = set(found_ids(first))
    for more in asked_as:
        hit = ask(more, {})
        assert "; hit; " in hit.headers["cache-status"]
        assert MARK not in hit.text
        assert not ids & set(found_ids(hit))
        ids |= set(found_ids(hit))
        named = ask(more, {"X-Request-Id": "trace-7"})
        assert endpoint == "responses" or any(each.endswith("-trace-7") for each in found_ids(named))


def found_ids(answer: httpx.Response) -> list[str]:
    is_json = answer.headers["content-type"].startswith("application/json")
    return list(ids_in(answer.json() if is_json else events(answer.content)))


# --- headers --------------------------------------------------------------------------------------

HIT = r"hyperspace; hit; ttl=86\d{3}; detail="
COMPUTED = r"hyperspace; fwd=uri-miss; stored"
# The first request (None: none), the second one and its headers; the status and the Cache-Status of its answer.
HEADERS: list[tuple[str, str | None, str, dict[str, str], int, str]] = [
    ("a miss", None, "How do I cook {}?", {}, 200, COMPUTED),
    ("a hit", "How do I cook {}?", "How do I cook {}?", {}, 200, HIT + "exact"),
    ("another spelling", "What is {}?", "Please explain {}", {}, 200, HIT + "canonical"),
    (
        "another wording",
        "When did the {} war end?",
        "In what year did the {} war end?",
        {},
        200,
        HIT + r"semantic; similarity=(0\.9|1\.0)\d+",
    ),
    (
        "a stricter caller",
        "When did the {} war end?",
        "In what year did the {} war end?",
        {"X-Hyperspace-Semantic": "strict"},
        200,
        COMPUTED,
    ),
    ("exact hits only", "What is {}?", "Please explain {}", {"X-Hyperspace-Semantic": "off"}, 200, COMPUTED),
    ("no-store", "Why {}?", "Why {}?", {"Cache-Control": "no-store"}, 200, "hyperspace; fwd=request; detail=no-store"),
    ("no-cache", "Why {}?", "Why {}?", {"Cache-Control": "no-cache"}, 200, "hyperspace; fwd=request; stored"),
    ("max-age", "Why {}?", "Why {}?", {"Cache-Control": "max-age=60"}, 200, HIT + "exact"),
    ("too old", "Why {}?", "Why {}?", {"Cache-Control": "max-age=0"}, 200, "hyperspace; fwd=stale; stored"),
    ("too short", "Why {}?", "Why {}?", {"Cache-Control": "min-fresh=90000"}, 200, "hyperspace; fwd=stale; stored"),
    ("only if cached", "Why {}?", "Why {}?", {"Cache-Control": "only-if-cached"}, 200, HIT + "exact"),
    ("not cached", None, "Why {}?", {"Cache-Control": "only-if-cached"}, 504, "hyperspace; detail=uri-miss"),
    ("private", None, "Why {}?", {"Cache-Control": "private"}, 200, COMPUTED),
    ("private again", "Why {}?", "Why {}?", {"Cache-Control": "private"}, 200, HIT + "exact"),
]


def asked(server: Server, question: str, headers: dict[str, str], **fields: object) -> httpx.Response:
    messages = [{"role": "user", "content": question}]
    body = {"model": "demo", "max_tokens": 4, "temperature": 0, "messages": messages, **fields}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=120)


def questions_known(server: Server) -> int:
    similar = server.node_status()["similar"]
    assert isinstance(similar, dict)
    return int(similar["questions"]) if similar["state"] == "on" else -1


@pytest.mark.parametrize(
    ("before", "question", "headers", "code", "status"), [row[1:] for row in HEADERS], ids=[row[0] for row in HEADERS]
)
def test_headers_say_what_became_of_a_request(
    server: Server, before: str | None, question: str, headers: dict[str, str], code: int, status: str
) -> None:
    until(lambda: questions_known(server) >= 0, timeout_s=60)
    salt = {"cache_salt": str(time.time_ns())}
    if before is not None:
        known = questions_known(server)
        assert asked(server, before.format("boxer"), {}, **salt).headers["cache-status"] == COMPUTED
        until(lambda: questions_known(server) > known, timeout_s=60)
        if "max-age=0" in headers.values():  # ages are whole seconds
            until(lambda: asked(server, before.format("boxer"), {}, **salt).headers["age"] != "0")
    answer = asked(server, question.format("boxer"), headers, **salt)
    assert answer.status_code == code
    assert re.fullmatch(status, answer.headers["cache-status"]), answer.headers["cache-status"]
    is_hit = "; hit;" in answer.headers["cache-status"]
    assert ("age" in answer.headers) is is_hit
    assert answer.headers.get("cache-control") == ("private" if is_hit else None)
    assert "x-hyperspace-proof" not in answer.headers


def test_a_hit_has_a_request_id_of_its_own_and_its_proof_for_who_asks(server: Server) -> None:
    question = f"Why {time.time_ns()}?"
    first = asked(server, question, {})
    hit = asked(server, question, {"X-Hyperspace-Proof": "1"})
    assert "; hit;" in hit.headers["cache-status"]
    assert hit.json()["created"] == first.json()["created"]
    assert len({first.json()["id"], hit.json()["id"]}) == 2
    assert len({first.headers["x-request-id"], hit.headers["x-request-id"]}) == 2
    stored = b"{" + hit.content.partition(b",")[2]
    assert decode_proof(base64.b64decode(hit.headers["x-hyperspace-proof"])).response_hash == sha256(stored)


def test_what_may_not_be_cached_passes_by_and_says_why(server: Server) -> None:
    with httpx.Client(timeout=120) as client:
        body = {
            "model": "demo",
            "input": "Why?",
            "store": False,
            "previous_response_id": "resp_1",
            "max_output_tokens": 4,
        }
        answer = client.post(f"{server.url}/v1/responses", json=body)
    assert answer.headers["cache-status"].startswith("hyperspace; fwd=bypass; detail=")


def test_equal_requests_at_one_time_are_computed_once(server: Server) -> None:
    question = {"role": "user", "content": f"Why {time.time_ns()}?"}
    body = {"model": "demo", "max_tokens": 400, "messages": [question], "stream": True, "ignore_eos": True}
    finished = server.metric("vllm:request_success_total")
    with httpx.Client(timeout=120) as client, ExitStack() as opened:

        def stream() -> httpx.Response:
            return opened.enter_context(client.stream("POST", f"{server.url}/v1/chat/completions", json=body))

        first = stream()
        frames = first.iter_text()
        begun = next(frames)
        with frozen_engine(server):  # no answer can end before the last request has arrived
            others = [stream() for _ in range(7)]
        answers = {begun + "".join(frames), *(other.read().decode() for other in others)}
    assert len(answers) == 8
    assert len({re.sub(r"chatcmpl-[0-9a-f]{16}", "", answer) for answer in answers}) == 1
    statuses = [each.headers["cache-status"] for each in (first, *others)]
    assert statuses == [COMPUTED, *["hyperspace; fwd=uri-miss; collapsed"] * 7]
    until(lambda: server.metric("vllm:request_success_total") > finished)
    assert server.metric("vllm:request_success_total") == finished + 1


# --- models that pool -----------------------------------------------------------------------------


@pytest.mark.slow
def test_embeddings_are_those_that_were_computed(pooling: Server) -> None:
    client = openai_client(pooling).embeddings
    salt = {"cache_salt": str(time.time_ns())}
    texts = ["sky", "a longer text about the sea", "sky"]
    unstored = {"Cache-Control": "no-store"}
    alone = client.create(model="demo", input=texts, encoding_format="float", extra_headers=unstored)
    assert STATUS[-1].startswith("hyperspace; fwd=request")
    client.create(model="demo", input="sky", extra_body=salt)
    both = client.create(model="demo", input=texts, encoding_format="float", extra_body=salt)
    assert STATUS[-1] == 'hyperspace; fwd=partial; stored; detail="1 of 2 stored"'
    assert both.usage == alone.usage
    for mine, theirs in zip(both.data, alone.data, strict=True):
        assert mine.index == theirs.index
        assert mine.embedding == pytest.approx(theirs.embedding, abs=1e-3)
    for encoding in ("float", "base64", openai.NOT_GIVEN):  # the client's default is base64, which it decodes
        again = client.create(model="demo", input=texts, encoding_format=encoding, extra_body=salt)  # type: ignore[arg-type]
        assert "; hit; " in STATUS[-1]
        assert again.usage == both.usage
        if encoding != "base64":
            assert [e.embedding for e in again.data] == [e.embedding for e in both.data]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/rerank", {"query": "sky", "documents": ["blue", "a red house", "the sea"], "top_n": 2}),
        ("/v1/score", {"queries": "sky", "documents": ["blue", "a red house"]}),
        ("/v1/score", {"text_1": ["sky"], "text_2": ["blue"]}),
    ],
)
def test_scores_are_replayed(pooling: Server, path: str, body: dict[str, Any]) -> None:
    asked = {"model": "demo", "cache_salt": str(time.time_ns()), **body}
    first = httpx.post(pooling.url + path, json=asked, timeout=60)
    assert first.status_code == 200, first.text
    assert first.headers["cache-status"] == "hyperspace; fwd=uri-miss; stored"
    again = httpx.post(pooling.url + path, json={**asked, "user": "ann"}, timeout=60)
    assert "; hit; " in again.headers["cache-status"]
    assert without_ids(again.json()) == without_ids(first.json())


@pytest.mark.slow
@pytest.mark.parametrize(("endpoint", "body"), POOLING_REQUESTS, ids=[endpoint for endpoint, _ in POOLING_REQUESTS])
def test_scores_tell_nothing_of_the_client_that_asked_first(
    pooling: Server, endpoint: Endpoint, body: dict[str, Any]
) -> None:
    check_nothing_is_told(pooling, endpoint, body, {}, ({},))
