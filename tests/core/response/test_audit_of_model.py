"""Answers scored by a real model: its own words pass, others do not."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from bench.servers import Server
from hyperspace_vllm.api import audits
from hyperspace_vllm.api.request_context import RequestContext
from hyperspace_vllm.api.request_facts import facts_of
from hyperspace_vllm.core.local.response_cache_messages import PurgeResponses, ResponseAudited
from tests.support.audits import CHAT, TEXT, Suspect
from tests.support.cached_server import Bench, benches
from tests.support.until import until_async


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


@pytest.mark.slow
@pytest.mark.vllm
async def test_an_honest_answer_whose_text_is_not_its_tokens_passes(server: Server, bench: Bench) -> None:
    """The stop string cuts " Mississippi", one token, in two."""
    body = {**TEXT, "prompt": "The longest river of the United States is the", "stop": ["ssippi"], "max_tokens": 16}
    answer = computed(server, "/v1/completions", body)
    assert answer["choices"][0]["text"] == " Missi"
    assert (await audited(bench, "/v1/completions", body, answer)).far == 0


async def audited(bench: Bench, path: str, body: dict[str, Any], answer: dict[str, Any]) -> ResponseAudited:
    """What comes of auditing another node's answer."""
    suspect = bench.node.others = Suspect()
    suspect.says = answer
    count = len(bench.node.audited)
    reply = await bench.ask({**body, "seed": len(bench.node.asked)}, path)
    assert "detail=peer" in reply.headers["cache-status"]
    await until_async(lambda: len(bench.node.audited) > count)
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
    await until_async(lambda: bench.cache.audits.idle)
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
    await until_async(lambda: bench.cache.audits.idle)
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

    async def nothing() -> Message:
        raise AssertionError

    async def nowhere(message: Message) -> None:
        raise AssertionError

    async with benches(tmp_path) as make:
        bench = await make()
        bench.cache.app = tokenize
        for fails, splits in (("a", False), (" b", False), ("a b", False), ("", True), ("a", True)):
            failing[:] = [fails]
            facts = facts_of(bench.cache.options, "chat", b"", CHAT, {"path": "/v1", "headers": []})
            context = RequestContext(bench.cache, facts, nothing, nowhere)
            assert await bench.cache.audits._can_split(context) is splits
