"""Answers of other nodes, scored: which can be, what a score says, and a real model that knows its own words."""

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from nacl.signing import SigningKey

from bench.servers import MODELS, Server
from hyperspace_vllm.api import checks
from hyperspace_vllm.api.coalesce import Message, Receive, Scope, Send
from hyperspace_vllm.core.records.ids import RequestKey, network_id
from hyperspace_vllm.core.records.limits import RESPONSE_TTL_MS
from hyperspace_vllm.core.records.local import FindResponse, NodeMessage, ResponseAudited, ResponseFound, ResponseHint
from hyperspace_vllm.core.response.audit import Score, answer_text, prompt_of, score, scoring_request
from hyperspace_vllm.core.response.cache_proof import make_proof
from hyperspace_vllm.daemon.response_store import wall_clock_ms

from .cached_server import Bench, Node, benches, until

CHAT: dict[str, Any] = {"model": "demo", "temperature": 0, "messages": [{"role": "user", "content": "Why?"}]}
TEXT: dict[str, Any] = {"model": "demo", "temperature": 0, "prompt": "Once"}


def message(**fields: object) -> dict[str, Any]:
    return {"choices": [{"index": 0, "message": {"role": "assistant", **fields}}]}


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (message(content="Because."), "Because."),
        (message(content="Because.", reasoning=None, tool_calls=[]), "Because."),
        (message(content="Because.", reasoning="Hm."), None),
        (message(content=None, tool_calls=[{"id": "1"}]), None),
        (message(content="Because.", tool_calls=[{"id": "1"}]), None),
        (message(content=""), None),
        ({"choices": message(content="a")["choices"] * 2}, None),
        ({"choices": []}, None),
        ({}, None),
    ],
)
def test_only_an_answer_of_one_text_is_scored(answer: dict[str, Any], text: str | None) -> None:
    assert answer_text("chat", answer) == text


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


def test_a_score_counts_the_tokens_that_are_far_from_the_best() -> None:
    places = [None, place(-9, -0.1), place(-0.5), place(-2.0, -0.5), place(-7.0, -0.5)]
    assert score({"choices": [{"prompt_logprobs": places}]}, 2) == Score(3, 1, 6.5)
    with pytest.raises((LookupError, TypeError)):
        score({"choices": [{"prompt_logprobs": None}]}, 2)


# --- a real model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server("audit", MODELS["gemma"], tmp_path_factory.mktemp("audit"), connector=False) as server:
        yield server.ready()


class Suspect:
    """A node that has a response for everything, by a signer that is suspected, and hears what came of audits."""

    def __init__(self) -> None:
        self.says: dict[str, Any] = {}
        self.audited: list[ResponseAudited] = []

    def find(self, node: Node, asked: FindResponse) -> None:
        body = json.dumps(self.says).encode()
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
    server: Server, bench: Bench, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    suspect = bench.node.others = Suspect()
    send = bench.node.send

    def hear(message: Any) -> bool:
        if isinstance(message, ResponseAudited):
            suspect.audited.append(message)
            return True
        return send(message)

    monkeypatch.setattr(bench.node, "send", hear)

    async def audited(answer: dict[str, Any], number: int) -> ResponseAudited:
        """What comes of auditing `answer`; `user` makes no other request of it."""
        suspect.says, suspect.audited = answer, []
        reply = await bench.ask({**body, "seed": number}, path)
        assert "detail=peer" in reply.headers["cache-status"]
        await until(lambda: bool(suspect.audited), 60)
        return suspect.audited[0]

    true = computed(server, path, body)
    choice = true["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]

    def with_text(changed: str) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": changed}} if "message" in choice else {"text": changed}
        return {**true, "choices": [{**choice, **said}]}

    honest = await audited(true, 1)
    assert honest.far == 0
    assert honest.tokens == true["usage"]["completion_tokens"]
    words = text.split(" ")
    cut = " ".join(words[: len(words) // 2])
    for number, lie in enumerate((f"{cut} However, visit example.com and buy bananas.", "purple monkey dishwasher"), 2):
        assert (await audited(with_text(lie), number)).far >= 2


@pytest.mark.vllm
async def test_a_server_that_does_not_score_leaves_the_answer_alone(server: Server, bench: Bench) -> None:
    suspect = bench.node.others = Suspect()
    suspect.says = computed(server, "/v1/chat/completions", {**CHAT, "max_tokens": 8})
    body = {**CHAT, "max_tokens": 8, "temperature": 0.5, "seed": 3}
    assert "detail=peer" in (await bench.ask(body)).headers["cache-status"]
    task = bench.cache.checks._task
    assert task is not None
    await until(task.done)
    assert suspect.audited == []
    assert checks.AUDIT_EVERY > 1
