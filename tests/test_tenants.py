"""One tenant never gets, nor learns of, what another has asked: by its keys, by its answers, by its time."""

import random
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from hyperspace_vllm.api import exchange, node_lookup
from hyperspace_vllm.core.response import wrongness
from hyperspace_vllm.core.response.canonical import ACRONYMS
from hyperspace_vllm.core.response.request_fields import ENDPOINTS, Endpoint
from hyperspace_vllm.core.response.request_key import request_key
from hyperspace_vllm.core.response.scope import tenant_of
from hyperspace_vllm.core.response.semantic_key import question_of

from .cached_server import MakeBench, benches

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
    """Everything by which an answer to a request may be found."""
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
    """An embedding may take as long as on a busy machine."""
    monkeypatch.setattr(node_lookup, "SIMILAR_S", 30.0)


def chat(question: str) -> dict[str, Any]:
    return {"model": "base", "messages": [{"role": "user", "content": question}]}


@pytest.mark.io
async def test_what_a_tenant_stored_answers_that_tenant_alone(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    for sampling in (exchange, wrongness):  # a match that is computed as well has an answer of its own from then on
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
    # How often one of theirs took longer than one that nobody had asked: 0.5, give or take 0.03; 0 or 1 if it told.
    longer = sum(times[a] > times[b] for a in numbers if a in theirs for b in numbers if b not in theirs)
    assert 0.3 < longer / (len(theirs) * (len(numbers) - len(theirs))) < 0.7
