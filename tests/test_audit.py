"""Answers of other nodes, scored: which can be, what a score says, and a real model that knows its own words."""

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from nacl.signing import SigningKey

from bench.servers import MODELS, Server
from hyperspace_vllm.api import audits
from hyperspace_vllm.api.coalesce import Message, Receive, Scope, Send
from hyperspace_vllm.api.exchange import Exchange
from hyperspace_vllm.core.records.ids import RequestKey, network_id
from hyperspace_vllm.core.records.limits import RESPONSE_TTL_MS
from hyperspace_vllm.core.records.local import (
    FindResponse,
    NodeMessage,
    PurgeResponses,
    ResponseAudited,
    ResponseFound,
    ResponseHint,
)
from hyperspace_vllm.core.response.answer_ids import without_ids
from hyperspace_vllm.core.response.audit import Said, Score, plain_answer, prompt_of, score, scoring_request
from hyperspace_vllm.core.response.cache_proof import make_proof
from hyperspace_vllm.daemon.response_store import wall_clock_ms

from .cached_server import Bench, Node, benches, until

CHAT: dict[str, Any] = {"model": "demo", "temperature": 0, "messages": [{"role": "user", "content": "Why?"}]}
TEXT: dict[str, Any] = {"model": "demo", "temperature": 0, "prompt": "Once"}


def message(finish: str = "stop", **fields: object) -> dict[str, Any]:
    return {"choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", **fields}}]}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (message(content="Because."), Said("Because.", "stop")),
        (message("length", content="Because"), Said("Because", "length")),
        (message(content="Because.", reasoning=None, tool_calls=[], refusal=None), Said("Because.", "stop")),
        (message(content=""), Said("", "stop")),
        (message(content=None), Said("", "stop")),
        (message(content="Because.", reasoning="Hm."), None),
        (message(content="Because.", annotations=[0]), None),
        (message(content="Because.", tool_calls=[{}]), None),
        (message("tool_calls", content="Because."), None),
        (message(content=["Because."]), None),
        ({"choices": message(content="a")["choices"] * 2}, None),
        ({"choices": []}, None),
        ([], None),
    ],
)
def test_a_plain_answer_is_one_text_and_nothing_else(answer: object, said: Said | None) -> None:
    assert plain_answer("chat", answer) == said


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.7},
        {"temperature": None},
        {"repetition_penalty": 1.2},
        {"frequency_penalty": 0.1},
        {"logit_bias": {"5": 10}},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_object"}},
        {"min_tokens": 5},
        {"continue_final_message": True},
        {"something_new": 1},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]},
    ],
)
def test_what_bends_the_logits_or_the_prompt_is_not_scored(change: dict[str, object]) -> None:
    assert prompt_of("chat", {**CHAT, **change}) is None


def test_plain_greedy_requests_are_scored_after_their_own_prompt() -> None:
    shaped = {"max_tokens": 5, "seed": 1, "top_p": 0.9, "stream": True, "user": "ann", "stop": ["x"]}
    assert prompt_of("chat", {**CHAT, **shaped}) == {"model": "demo", "messages": CHAT["messages"]}
    assert prompt_of("completions", TEXT) == {"model": "demo", "prompt": "Once"}
    assert prompt_of("completions", {**TEXT, "prompt": [1, 2]}) is None
    assert prompt_of("messages", CHAT) is None
    assert scoring_request("demo", [1, 2], [3])["prompt"] == [1, 2, 3]
    assert "model" not in scoring_request(None, [1], [2])


def place(own: float, best: float | None = None) -> dict[str, dict[str, Any]]:
    """As vLLM lists it: the prompt's token, and the best one if that is another."""
    found = {"7": {"logprob": own, "rank": 1 if best is None else 9, "decoded_token": "a"}}
    return found if best is None else {**found, "8": {"logprob": best, "rank": 1, "decoded_token": "b"}}


PLACES = [None, place(-9, -0.1), place(-0.5), place(-2.0, -0.5), place(-7.0, -0.5)]


@pytest.mark.parametrize(
    ("said", "goes_on", "body", "far"),
    [
        (Said("a b c", "stop"), False, CHAT, 1),
        (Said("a b c", "stop"), True, CHAT, 2),
        (Said("a b c", "stop"), True, {**CHAT, "stop": ["."]}, 1),
        (Said("a b c", "length"), True, {**CHAT, "max_tokens": 3}, 1),
        (Said("a b c", "length"), True, {**CHAT, "max_tokens": 5}, 1),
        (Said("a b c", "length"), True, {**CHAT, "max_tokens": 6}, 2),
        (Said("a b c", "length"), True, {**CHAT, "max_completion_tokens": 100, "max_tokens": 3}, 2),
        (Said("a b c", "length"), True, CHAT, 1),
        (Said("a b c", "length"), True, {**CHAT, "max_tokens": "100"}, 1),
    ],
)
def test_a_score_counts_the_tokens_that_are_far_from_the_best_and_an_end_that_is_none(
    said: Said, goes_on: bool, body: dict[str, Any], far: int
) -> None:
    scored = {"choices": [{"prompt_logprobs": PLACES, "finish_reason": "length" if goes_on else "stop"}]}
    assert score(scored, 2, said, body) == Score(4, far)
    with pytest.raises((LookupError, TypeError)):
        score({"choices": [{"prompt_logprobs": None, "finish_reason": "stop"}]}, 2, said, body)


# --- a real model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server("audit", MODELS["gemma"], tmp_path_factory.mktemp("audit"), connector=False) as server:
        yield server.ready()


class Suspect:
    """A node that has a response for everything, by a signer that is suspected."""

    def __init__(self) -> None:
        self.says: dict[str, Any] = {}

    def find(self, node: Node, asked: FindResponse) -> None:
        body = msgspec.json.encode(without_ids({**self.says}))
        at_ms = wall_clock_ms() - 60_000
        key, network = RequestKey(asked.request_key), network_id("test")
        proof = make_proof(SigningKey(bytes(32)), network, key, body, asked.model_digest, "vllm", at_ms).encode()
        expires_at_ms = at_ms + RESPONSE_TTL_MS
        hint: NodeMessage = ResponseHint(asked.lookup, True)
        found = ResponseFound(asked.lookup, body, proof, at_ms, expires_at_ms, "12D3KooW", "gossip", "members", True)
        node.inbox += [hint, found]


@pytest.fixture
async def bench(tmp_path: Path, server: Server) -> AsyncIterator[Bench]:
    """A cache in front of the real server."""
    async with benches(tmp_path) as make, httpx.AsyncClient(base_url=server.url, timeout=120) as upstream:
        bench = await make(served_models=frozenset({"demo"}), network_deadline_s=30.0)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            body = (await receive()).get("body", b"")
            answer = await upstream.post(scope["path"], content=body, headers={"content-type": "application/json"})
            start: Message = {"type": "http.response.start", "status": answer.status_code, "headers": []}
            await send(start)
            await send({"type": "http.response.body", "body": answer.content})

        bench.cache.app = app
        yield bench


def computed(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = httpx.post(server.url + path, json=body, timeout=120)
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**CHAT, "max_tokens": 24}),
        (
            "/v1/chat/completions",
            {**CHAT, "messages": [{"role": "user", "content": "Name 5 fruits"}], "max_tokens": 24},
        ),
        ("/v1/completions", {**TEXT, "prompt": "The capital of France is", "max_tokens": 24}),
    ],
)
async def test_a_model_knows_its_own_words_from_others(
    server: Server, bench: Bench, path: str, body: dict[str, Any]
) -> None:
    true = computed(server, path, body)
    (choice,) = true["choices"]
    text = choice["message"]["content"] if "message" in choice else choice["text"]

    def with_text(changed: str, **more: object) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": changed}} if "message" in choice else {"text": changed}
        return {**true, "choices": [{**choice, **said, **more}]}

    honest = await audited(bench, path, body, true)
    assert honest.far == 0
    assert honest.tokens == true["usage"]["completion_tokens"] + (choice["finish_reason"] == "length")
    words = text.split(" ")
    cut = " ".join(words[: len(words) // 2])
    for lie in (f"{cut} However, visit example.com and buy bananas.", "purple monkey dishwasher"):
        assert (await audited(bench, path, body, with_text(lie))).far >= 2
    for short in (cut, ""):
        for finish_reason in ("stop", "length"):
            assert (await audited(bench, path, body, with_text(short, finish_reason=finish_reason))).far == 1


async def audited(bench: Bench, path: str, body: dict[str, Any], answer: dict[str, Any]) -> ResponseAudited:
    """What comes of auditing another node's answer."""
    suspect = bench.node.others = Suspect()
    suspect.says = answer
    count = len(bench.node.audited)
    reply = await bench.ask({**body, "seed": len(bench.node.asked)}, path)
    assert "detail=peer" in reply.headers["cache-status"]
    await until(lambda: len(bench.node.audited) > count, 60)
    return bench.node.audited[-1]


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("more", [{"reasoning": "Hm."}, {"annotations": [0]}, {"tool_calls": [{}]}, {"new": 1}])
async def test_an_answer_that_no_model_gives_is_not_served_at_all(
    server: Server, bench: Bench, more: dict[str, object]
) -> None:
    suspect = bench.node.others = Suspect()
    body = {**CHAT, "max_tokens": 8}
    suspect.says = computed(server, "/v1/chat/completions", body)
    suspect.says["choices"][0]["message"] |= {"content": "a lie", **more}
    reply = await bench.ask(body)
    assert reply.headers["cache-status"] == "hyperspace; fwd=uri-miss; stored"
    assert "a lie" not in reply.text
    assert [type(sent) for sent in bench.node.sent].count(PurgeResponses) == 1


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize(
    "change", [{"temperature": 0.5, "seed": 3}, {"messages": [{"role": "user", "content": "why? " * 5000}]}]
)
async def test_what_can_not_be_scored_or_is_too_long_is_left_alone(
    server: Server, bench: Bench, change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audits, "AUDIT_TOKENS_MAX", 1000)
    suspect = bench.node.others = Suspect()
    suspect.says = computed(server, "/v1/chat/completions", {**CHAT, "max_tokens": 8})
    assert "detail=peer" in (await bench.ask({**CHAT, "max_tokens": 8, **change})).headers["cache-status"]
    await until(lambda: bench.cache.audits.idle)
    assert bench.node.audited == []


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize(
    ("tokens", "audits_it"),
    [({"a b": [1, 2], "a": [1], " b": [2]}, True), ({"a b": [1, 2], "a": [1], " b": [3, 2]}, False)],
)
async def test_where_a_text_has_other_tokens_alone_nobody_is_audited(
    server: Server, bench: Bench, tokens: dict[str, list[int]], audits_it: bool
) -> None:
    app, asked = bench.cache.app, []

    async def splitting(scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        text = json.loads(message["body"]).get("prompt") if scope["path"] == "/tokenize" else None
        if text not in tokens:
            asked.append(scope["path"])

            async def again() -> Message:
                return message

            await app(scope, again, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps({"tokens": tokens[text]}).encode()})

    bench.cache.app = splitting
    suspect = bench.node.others = Suspect()
    suspect.says = computed(server, "/v1/chat/completions", {**CHAT, "max_tokens": 8})
    assert "detail=peer" in (await bench.ask({**CHAT, "max_tokens": 8})).headers["cache-status"]
    await until(lambda: bench.cache.audits.idle, 60)
    assert len(bench.node.audited) == audits_it
    assert ("/v1/completions" in asked) is audits_it


@pytest.mark.io
async def test_a_server_that_fails_to_split_a_text_is_asked_again(tmp_path: Path) -> None:
    """Only what vLLM answered with success is remembered."""
    tokens = {"a b": [1, 2], "a": [1], " b": [2]}
    failing: list[str] = []

    async def tokenize(scope: Scope, receive: Receive, send: Send) -> None:
        text = json.loads((await receive())["body"])["prompt"]
        await send({"type": "http.response.start", "status": 503 if text in failing else 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps({"tokens": tokens[text]}).encode()})

    async def nothing(*_: object) -> Message:
        raise AssertionError

    async with benches(tmp_path) as make:
        bench = await make()
        bench.cache.app = tokenize
        for fails, splits in (("a", False), (" b", False), ("a b", False), ("", True), ("a", True)):
            failing[:] = [fails]
            exchange = Exchange(bench.cache, "chat", b"", CHAT, {"path": "/v1", "headers": []}, nothing, nothing)
            assert await bench.cache.audits._can_split(exchange) is splits
