"""A tenant never gets, nor learns of, what another has asked: not by its keys, its answers or its timing."""

import importlib
import json
import pkgutil
import random
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bench.servers import MODELS, Server
from hyperspace_vllm.api import node_lookup, request_body
from hyperspace_vllm.api.states import from_store
from hyperspace_vllm.core.response.request_fields import ENDPOINTS, SALTED, Endpoint
from hyperspace_vllm.core.response.request_key import request_key
from hyperspace_vllm.core.response.scope import engine_salt, tenant_of
from hyperspace_vllm.core.response.similar import match_error
from hyperspace_vllm.core.response.similar.canonical import ACRONYMS
from hyperspace_vllm.core.response.similar.semantic_key import question_of
from tests.support.cached_server import Bench, MakeBench, benches

KEYS = tuple(f"sk-{number}" for number in range(20))
TENANTS = ("", *(str(tenant_of(b"fleet", KEYS, f"Bearer {key}")) for key in KEYS))
SALTS = (None, *(f"salt {number}" for number in range(20)))
QUESTIONS = ("What is ML?", "Explain machine learning", "Why is the sky blue?", "How do I cook rice?")

Names = tuple[object, ...]


def body_of(endpoint: Endpoint, rng: random.Random) -> dict[str, Any]:
    question = rng.choice(QUESTIONS)
    shapes: dict[Endpoint, dict[str, Any]] = {
        "chat": {"messages": [{"role": "user", "content": question}]},
        "messages": {"messages": [{"role": "user", "content": question}], "max_tokens": 5},
        "completions": {"prompt": question},
        "responses": {"input": question},
        "embeddings": {"input": question},
        "rerank": {"query": question, "documents": list(QUESTIONS)},
        "score": {"queries": question, "documents": list(QUESTIONS)},
    }
    extra = rng.choice(({}, {"user": "ann"}, {"temperature": 0}, {"vendor_field": rng.randrange(3)}))
    return {"model": "base", **shapes[endpoint], **extra}


def names_of(endpoint: Endpoint, body: dict[str, Any], tenant: str, salt: str | None) -> set[Names]:
    """Every name by which an answer to a request may be found."""
    asked = body if salt is None else body | {"cache_salt": salt}
    key = request_key(endpoint, asked, bytes(32), None, tenant)
    assert isinstance(key, bytes)
    question = question_of(endpoint, asked, bytes(32), None, tenant, ACRONYMS)
    if question is None:
        return {("exact", key)}
    return {("exact", key), ("canonical", question.canonical_key), ("near", question.partition)}


def test_ten_thousand_pairs_across_tenants_and_salts_have_no_name_in_common() -> None:
    rng = random.Random(1)
    compared = 0
    while compared < 10_000:
        endpoint = rng.choice(list(ENDPOINTS.values()))
        body = body_of(endpoint, rng)
        mine, theirs = [(rng.choice(TENANTS), rng.choice(SALTS)) for _ in range(2)]
        ours = names_of(endpoint, body, *mine), names_of(endpoint, body, *theirs)
        assert (ours[0] == ours[1]) is (mine == theirs)
        if mine != theirs:
            assert not ours[0] & ours[1], (endpoint, body, mine, theirs)
            compared += 1


@pytest.fixture
async def make_bench(tmp_path: Path) -> AsyncIterator[MakeBench]:
    async with benches(tmp_path) as make:
        yield make


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow an embedding the time that it may take on a busy machine."""
    monkeypatch.setattr(node_lookup, "SIMILAR_S", 30.0)


def chat(question: str) -> dict[str, Any]:
    return {"model": "base", "messages": [{"role": "user", "content": question}]}


@pytest.mark.io
async def test_what_a_tenant_stored_answers_that_tenant_alone(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    for sampling in (from_store, match_error):  # a match that is also computed has its own answer from then on
        monkeypatch.setattr(sampling, "CHECK_EVERY", 1 << 40)
    bench = await make_bench(semantic="balanced", api_keys=KEYS)
    rng = random.Random(2)
    first: dict[tuple[str, str], str] = {}  # (tenant's key, canonical question) -> the text that it got
    for _ in range(150):
        key, question = rng.choice(KEYS[:4]), rng.choice(QUESTIONS)
        answer = await bench.ask(chat(question), authorization=f"Bearer {key}")
        text = answer.json()["choices"][0]["message"]["content"]
        meant = "What is ML?" if question == "Explain machine learning" else question
        assert ("; hit; " in answer.headers["cache-status"]) is ((key, meant) in first)
        assert first.setdefault((key, meant), text) == text
        assert [other for other, said in first.items() if said == text] == [(key, meant)]
        await bench.stored(len(first))
    assert set(bench.node.scopes) == {"private"}
    assert bench.node.asked == []


@pytest.mark.io
@pytest.mark.parametrize("semantic", ["off", "balanced"])
async def test_its_time_does_not_tell_whether_another_tenant_asked(make_bench: MakeBench, semantic: str) -> None:
    bench = await make_bench(semantic=semantic, api_keys=KEYS)

    def ask(number: int) -> dict[str, Any]:
        return chat(f"What is the meaning of the number {number}?")

    numbers = list(range(400))
    theirs = set(numbers[::2])
    for number in sorted(theirs):
        await bench.ask(ask(number), authorization=f"Bearer {KEYS[0]}")
    await bench.stored(len(theirs))
    random.Random(3).shuffle(numbers)
    times = {}
    for number in numbers:
        began = time.perf_counter()
        answer = await bench.ask(ask(number), authorization=f"Bearer {KEYS[1]}")
        times[number] = time.perf_counter() - began
        assert answer.headers["cache-status"] == "hyperspace; fwd=uri-miss; stored"
    # How often a question of the other tenant took longer than a new one: 0.5, give or take 0.03; 0 or 1 would be a
    # leak.
    longer = sum(times[a] > times[b] for a in numbers if a in theirs for b in numbers if b not in theirs)
    assert 0.3 < longer / (len(theirs) * (len(numbers) - len(theirs))) < 0.7


# --- vLLM's own prefix cache ------------------------------------------------------------------------

CHAT_MESSAGES = [{"role": "user", "content": "Why?"}]
ENGINES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Why?"},
    "/v1/chat/completions": {"messages": CHAT_MESSAGES},
    "/v1/responses": {"input": "Why?"},
    "/v1/messages": {"messages": CHAT_MESSAGES, "max_tokens": 5},
    "/v1/embeddings": {"input": ["Why?", "How?"]},
    "/v1/rerank": {"query": "Why?", "documents": ["a"]},
    "/v1/score": {"queries": "Why?", "documents": ["a"]},
    "/v1/chat/completions/batch": {"messages": [CHAT_MESSAGES]},
    "/v1/systemone": {"state": "Why?", "questions": {"a": {"type": "yes_no"}}},
    "/v1/decisions": {"prompt": "Why?"},
    "/generative_scoring": {"query": "Why?", "items": ["a"], "label_token_ids": [1, 2]},
    "/inference/v1/generate": {"token_ids": [1], "sampling_params": {}},
    "/invocations": {"prompt": "Why?"},
    "/pooling": {"input": "Why?"},
    "/classify": {"input": "Why?"},
    "/score": {"queries": "Why?", "documents": ["a"]},
    "/rerank": {"query": "Why?", "documents": ["a"]},
    "/v2/rerank": {"query": "Why?", "documents": ["a"]},
}


def vllms_routes() -> dict[str, list[Any]]:
    """vLLM's models for the body of a POST to each of its paths."""
    import vllm.entrypoints

    def models(annotation: Any) -> list[Any]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return [annotation]
        return [model for part in get_args(annotation) for model in models(part)]

    found = {}
    for module in pkgutil.walk_packages(vllm.entrypoints.__path__, "vllm.entrypoints."):
        if module.name.endswith("api_router"):
            router = getattr(importlib.import_module(module.name), "router", None)
            for route in router.routes if router is not None else ():
                body = getattr(route, "body_field", None)
                if body is not None and "POST" in route.methods:
                    found[route.path] = models(body.field_info.annotation)
    return found


def test_every_path_of_vllm_that_takes_a_salt_is_given_one() -> None:
    salted = {
        path
        for path, models in vllms_routes().items()
        if any("cache_salt" in model.model_fields for model in models) and not path.endswith("/render")
    }  # a rendered request runs in no engine
    assert {"/v1/messages", "/pooling", "/inference/v1/generate"} <= salted
    assert salted <= set(ENDPOINTS) | SALTED
    assert set(ENGINES) == set(ENDPOINTS) | SALTED
    assert set(ENDPOINTS) <= salted


class Engine:
    """Records what reaches vLLM's routes."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def answer(self, request: Request) -> Response:
        self.bodies.append(await request.body())
        return JSONResponse({"error": "busy"}, 503)

    def salts(self) -> list[object]:
        salts = [json.loads(body).get("cache_salt") for body in self.bodies]
        self.bodies.clear()
        return salts


@pytest.fixture
def engine() -> Engine:
    return Engine()


async def salted_bench(make: MakeBench, engine: Engine, **options: Any) -> Bench:
    others = [path for path in ENGINES if path not in ("/v1/completions", "/v1/chat/completions")]
    bench = await make(more_routes=dict.fromkeys(others, engine.answer), **{"api_keys": KEYS[:2], **options})
    bench.upstream.bodies = engine.bodies = []
    return bench


@pytest.mark.io
@pytest.mark.parametrize("path", ENGINES)
async def test_the_engine_gets_a_salt_that_only_the_tenants_key_makes(
    make_bench: MakeBench, engine: Engine, path: str
) -> None:
    bench = await salted_bench(make_bench, engine)
    routes = vllms_routes()

    async def salts_for(key: str, **more: object) -> set[object]:
        bench.upstream.bodies = engine.bodies = []
        named = {"authorization": f"Bearer {key}", "cache_control": "no-cache"}
        await bench.ask({"model": "base", **ENGINES[path], **more}, path, **named)
        for model in routes.get(path, ()):
            if len(routes[path]) == 1:  # as vLLM reads it
                assert model.model_validate_json(engine.bodies[0]).cache_salt
        return set(engine.salts())

    mine, again, theirs = await salts_for(KEYS[0]), await salts_for(KEYS[0]), await salts_for(KEYS[1])
    with_own, with_other = await salts_for(KEYS[0], cache_salt="s"), await salts_for(KEYS[0], cache_salt="t")
    theirs_with_own = await salts_for(KEYS[1], cache_salt="s")
    assert mine == again
    different = [*mine, *theirs, *with_own, *with_other, *theirs_with_own]
    assert len(set(different)) == len(different) == 5
    for salt in different:
        assert re.fullmatch("[0-9a-f]{64}", str(salt))
        assert str(salt) not in (*KEYS, *TENANTS, "s", "t")


@pytest.mark.io
@pytest.mark.parametrize("path", ENGINES)
@pytest.mark.parametrize("keys", [(), KEYS[:1]], ids=["no key", "one key"])
async def test_without_tenants_the_engine_gets_what_the_client_sent(
    make_bench: MakeBench, engine: Engine, path: str, keys: tuple[str, ...]
) -> None:
    bench = await salted_bench(make_bench, engine, db_path=None, api_keys=keys)
    for more in ({}, {"cache_salt": "s"}):
        bench.upstream.bodies = engine.bodies = []
        await bench.ask({"model": "base", **ENGINES[path], **more}, path, authorization=f"Bearer {KEYS[0]}")
        assert engine.salts() == [more.get("cache_salt")]


@pytest.mark.io
async def test_no_spelling_of_a_request_reaches_the_engine_without_its_tenants_salt(
    make_bench: MakeBench, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = await salted_bench(make_bench, engine)
    monkeypatch.setattr(request_body, "REQUEST_BYTES_MAX", 1000)
    plain = {"model": "base", "messages": CHAT_MESSAGES}
    as_json = [("content-type", "application/json")]
    own = json.dumps(plain)[:-1].encode()
    spellings: dict[str, tuple[bytes, list[tuple[str, str]]]] = {
        "plain": (own + b"}", as_json),
        "not stored": (own + b"}", [*as_json, ("cache-control", "no-store")]),
        "computed anew": (own + b"}", [*as_json, ("cache-control", "no-cache")]),
        "twice a salt": (own + b',"cache_salt":"a","cache_salt":"b"}', as_json),
        "null": (own + b',"cache_salt":null}', as_json),
        "too long": (own + b',"user":"' + b"x" * 2000 + b'"}', as_json),
        "two types": (own + b"}", [*as_json, ("content-type", "text/plain")]),
        "two keys": (own + b"}", [*as_json, ("authorization", f"Bearer {KEYS[1]}")]),
        "a long name": (own + b"}", [*as_json, ("x-request-id", "x" * 300)]),
        "in UTF-16": ((own + b"}").decode().encode("utf-16"), as_json),
        "streamed": (own + b',"stream":true,"seed":1}', as_json),
        "uncacheable": (own + b',"background":true}', as_json),
        "another model": (own.replace(b"base", b"unknown") + b"}", as_json),
    }
    salts = {}
    for name, (content, headers) in spellings.items():
        headers = [("authorization", f"Bearer {KEYS[0]}"), ("cache-control", "no-cache"), *headers]
        await bench.client.post("/v1/chat/completions", content=content, headers=headers)
        (salts[name],) = engine.salts()
    assert salts.pop("twice a salt") == engine_salt(KEYS[0], "b")
    assert set(salts.values()) == {engine_salt(KEYS[0], None)}


def test_what_vllm_refuses_as_a_salt_is_left_for_it_to_refuse() -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    salts: tuple[object, ...] = ("", 5, ["s"], {})
    for refused in salts:
        assert engine_salt(KEYS[0], refused) == refused
        with pytest.raises(Exception, match="cache_salt"):
            ChatCompletionRequest.model_validate({"messages": CHAT_MESSAGES, "cache_salt": refused})
    longest = engine_salt(KEYS[0], "s" * 1024)
    assert (
        ChatCompletionRequest.model_validate({"messages": CHAT_MESSAGES, "cache_salt": longest}).cache_salt == longest
    )


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(600)
@pytest.mark.feature("tenants do not see each other's prompts in vLLM's prefix cache")
def test_the_engines_prefix_cache_tells_no_tenant_what_another_asked(tmp_path: Path) -> None:
    with Server("tenants", MODELS["tiny"], tmp_path, arguments=("--api-key", *KEYS[:2])) as server:
        server.ready()

        def cached(key: str, number: int, path: str = "/v1/completions", **more: object) -> int:
            prompt = f"{number} " + "the sky is blue " * 100  # several blocks of 128 tokens
            shape = {"messages": [{"role": "user", "content": prompt}]} if path.endswith("chat/completions") else {}
            body: dict[str, object] = {"model": "demo", "max_tokens": 1, **(shape or {"prompt": prompt}), **more}
            headers = {"Authorization": f"Bearer {key}", "Cache-Control": "no-store"}
            answer = httpx.post(server.url + path, json=body, headers=headers, timeout=300)
            assert answer.status_code == 200, answer.text
            return (answer.json()["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0

        for number, path in enumerate(("/v1/completions", "/v1/chat/completions")):
            assert cached(KEYS[0], number, path) == 0
            assert cached(KEYS[1], number, path) == 0
            assert cached(KEYS[0], number, path) > 0
            assert cached(KEYS[1], number, path) > 0
            assert cached(KEYS[0], number, path, cache_salt="s") == 0
            assert cached(KEYS[1], number, path, cache_salt="s") == 0
            assert cached(KEYS[0], number, path, cache_salt="s") > 0
