"""Embeddings, an input at a time: stored ones and computed ones in one answer."""

import asyncio
import base64
import json
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hyperspace_vllm.api import stored_answer
from hyperspace_vllm.api.embeddings import INPUTS_MAX
from hyperspace_vllm.api.request_body import replayed
from hyperspace_vllm.core.records.limits import REQUEST_BYTES_MAX, SENDING_BYTES_MAX
from tests.support.cached_server import Bench, benches, said
from tests.support.until import until_async

pytestmark = pytest.mark.io

PATH = "/v1/embeddings"


class Engine:
    """Embeds a text as its length and the number of its computation, in float32 as vLLM does."""

    def __init__(self) -> None:
        self.inputs: list[Any] = []
        self.refused: set[str] = set()
        self.together = 0
        self.disconnects = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self._at_once = 0

    async def answer(self, request: Request) -> Response:
        body = json.loads(await request.body())
        given = body["input"]
        several = isinstance(given, list) and not (given and isinstance(given[0], int))
        inputs = given if several else [given]
        self.inputs += inputs
        if not await self._works(request):
            self.disconnects += 1
            return Response(status_code=499)
        if not inputs or any(str(each) in self.refused for each in inputs):
            return JSONResponse({"error": {"message": f"bad input in {given}", "code": 400}}, 400)
        vectors = [struct.pack("<3f", len(each), len(self.inputs), 0.1) for each in inputs]
        encoded = [
            base64.b64encode(vector).decode()
            if body.get("encoding_format") == "base64"
            else list(struct.unpack("<3f", vector))
            for vector in vectors
        ]
        tokens = sum(len(each) for each in inputs)
        answer = {
            "id": f"embd-{len(self.inputs)}",
            "object": "list",
            "created": 100 + len(self.inputs),
            "model": "base",
            "data": [{"index": at, "object": "embedding", "embedding": each} for at, each in enumerate(encoded)],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
        }
        return JSONResponse(answer)

    async def _works(self, request: Request) -> bool:
        """Until the gate opens; False when the client leaves before."""
        self._at_once += 1
        self.together = max(self.together, self._at_once)
        gone = asyncio.ensure_future(request.receive())
        opened = asyncio.create_task(self.gate.wait())
        await asyncio.wait((gone, opened), return_when=asyncio.FIRST_COMPLETED)
        for task in (gone, opened):
            task.cancel()
        self._at_once -= 1
        return self.gate.is_set()


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
async def bench(tmp_path: Path, engine: Engine) -> AsyncIterator[Bench]:
    async with benches(tmp_path) as make:
        yield await make(more_routes={PATH: engine.answer})


def body(given: object, **more: object) -> dict[str, object]:
    return {"model": "base", "input": given, **more}


async def embed(bench: Bench, given: object, **more: object) -> httpx.Response:
    return await bench.ask(body(given, **more), PATH)


def vectors(answer: httpx.Response) -> list[Any]:
    entries = answer.json()["data"]
    assert [entry["index"] for entry in entries] == list(range(len(entries)))
    return [entry["embedding"] for entry in entries]


async def test_what_is_stored_is_not_computed_again(bench: Bench, engine: Engine) -> None:
    first = await embed(bench, ["a", "bb", "ccc"])
    assert first.headers["cache-status"] == "hyperspace; fwd=uri-miss; stored"
    second = await embed(bench, ["ccc", "dddd", "bb"])
    assert second.headers["cache-status"] == 'hyperspace; fwd=partial; stored; detail="2 of 3 stored"'
    assert sorted(engine.inputs) == ["a", "bb", "ccc", "dddd"]
    assert [vector[0] for vector in vectors(second)] == [3, 4, 2]
    assert vectors(second)[0] == vectors(first)[2]
    assert second.json()["usage"] == {"prompt_tokens": 9, "total_tokens": 9, "completion_tokens": 0}
    assert second.json()["id"] not in ("", first.json()["id"])
    third = await embed(bench, ["dddd", "a"])
    assert third.headers["cache-status"].endswith("; detail=exact")
    assert "; hit; ttl=86" in third.headers["cache-status"]
    assert len(engine.inputs) == 4


async def test_one_input_is_replayed_as_it_was(bench: Bench, engine: Engine) -> None:
    first = await embed(bench, "hello")
    for given in ("hello", ["hello"]):
        again = await embed(bench, given)
        assert said(again) == said(first)
        assert again.json()["id"] != first.json()["id"]
        assert "; hit" in again.headers["cache-status"]
    assert engine.inputs == ["hello"]


async def test_each_caller_gets_its_encoding(bench: Bench, engine: Engine) -> None:
    (floats,) = vectors(await embed(bench, "hello"))
    (encoded,) = vectors(await embed(bench, "hello", encoding_format="base64"))
    assert list(struct.unpack("<3f", base64.b64decode(encoded))) == floats
    assert floats == [5.0, 1.0, struct.unpack("<f", struct.pack("<f", 0.1))[0]]
    assert engine.inputs == ["hello"]


async def test_an_input_that_comes_twice_is_computed_once_and_counted_twice(bench: Bench, engine: Engine) -> None:
    answer = await embed(bench, ["abc", "abc"])
    assert engine.inputs == ["abc"]
    assert answer.json()["usage"]["prompt_tokens"] == 6
    assert vectors(answer)[0] == vectors(answer)[1]


async def test_tokens_are_one_input_and_lists_of_them_are_several(bench: Bench, engine: Engine) -> None:
    await embed(bench, [1, 2, 3])
    answer = await embed(bench, [[1, 2, 3], [4]])
    assert engine.inputs == [[1, 2, 3], [4]]
    assert [vector[0] for vector in vectors(answer)] == [3, 1]


async def test_missing_inputs_are_computed_at_the_same_time(bench: Bench, engine: Engine) -> None:
    engine.gate.clear()
    asking = asyncio.create_task(embed(bench, [str(number) for number in range(8)]))
    await until_async(lambda: engine.together == 8)
    engine.gate.set()
    assert (await asking).status_code == 200


async def test_an_error_is_the_servers_own(bench: Bench, engine: Engine) -> None:
    engine.refused = {"bad"}
    answer = await embed(bench, ["good", "bad"])
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "bad input in ['good', 'bad']"
    assert answer.headers["cache-status"] == "hyperspace; fwd=uri-miss; detail=failed"


async def test_a_refused_input_costs_no_second_computation_of_the_others(bench: Bench, engine: Engine) -> None:
    engine.refused = {"bad"}
    good = [f"text {number}" for number in range(20)]
    assert (await embed(bench, [*good, "bad"])).status_code == 400
    await bench.stored(20)
    engine.inputs.clear()
    assert (await embed(bench, [*good, "bad"])).status_code == 400
    assert engine.inputs == ["bad", *good, "bad"]  # alone, and in the whole request, whose refusal is vLLM's own
    engine.inputs.clear()
    assert "; hit; " in (await embed(bench, good)).headers["cache-status"]
    assert engine.inputs == []


async def test_a_refused_input_ends_what_is_computed_of_the_others(bench: Bench, engine: Engine) -> None:
    engine.gate.clear()
    engine.refused = {"bad"}
    inner, refused_at_once = bench.cache.app, asyncio.Event()

    async def refuse_at_once(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        if json.loads(message["body"])["input"] == "bad":
            await until_async(lambda: engine.together == 3)
            await send({"type": "http.response.start", "status": 400, "headers": []})
            await send({"type": "http.response.body", "body": b"{}"})
            return
        if "bad" in json.loads(message["body"])["input"]:
            refused_at_once.set()
            engine.gate.set()
        await inner(scope, replayed([message], receive), send)

    bench.cache.app = refuse_at_once
    answer = await embed(bench, ["a", "bb", "ccc", "bad"])
    assert answer.status_code == 400
    assert refused_at_once.is_set()
    assert bench.node.store.stats()["stored"] == 0


@pytest.mark.parametrize(
    ("more", "detail"),
    [
        ({"encoding_format": "bytes"}, "encoding"),
        ({"embed_dtype": "float16"}, "encoding"),
        ({"endianness": "big"}, "encoding"),
        ({"input": ["a"] * (INPUTS_MAX + 1)}, "batch"),
        ({"input": []}, "batch"),
        ({"input": ["a", "b"], "user": "u" * (REQUEST_BYTES_MAX // 2)}, "batch"),
        ({"input": [5, "a"]}, "field_type"),
        ({"input": ["a", [1, 2]]}, "field_type"),
        ({"model": "nobody"}, "unknown_model"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages"),
    ],
)
async def test_what_is_not_cached_passes_by(bench: Bench, engine: Engine, more: dict[str, Any], detail: str) -> None:
    for _ in range(2):
        answer = await bench.ask(body("a") | more, PATH)
        assert answer.headers["cache-status"] == f"hyperspace; fwd=bypass; detail={detail}"
    assert len(bench.node.scopes) == 0


async def test_parameters_and_salts_separate_inputs(bench: Bench, engine: Engine) -> None:
    others: tuple[dict[str, object], ...] = ({}, {"dimensions": 2}, {"cache_salt": "x"}, {"truncate_prompt_tokens": 1})
    for more in others:
        assert "fwd=uri-miss" in (await embed(bench, "a", **more)).headers["cache-status"]
    assert len(engine.inputs) == len(others)


async def test_cache_control_is_obeyed_and_nothing_leaves_the_node(bench: Bench, engine: Engine) -> None:
    assert (await bench.ask(body(["a", "b"]), PATH, cache_control="only-if-cached")).status_code == 504
    await embed(bench, "a")
    assert (await bench.ask(body(["a", "b"]), PATH, cache_control="only-if-cached")).status_code == 504
    assert (await bench.ask(body("a"), PATH, cache_control="only-if-cached")).status_code == 200
    anew = await bench.ask(body("a"), PATH, cache_control="no-cache")
    assert anew.headers["cache-status"] == "hyperspace; fwd=request; stored"
    assert engine.inputs == ["a", "a"]
    unstored = await bench.ask(body("c"), PATH, cache_control="no-store")
    assert unstored.headers["cache-status"] == "hyperspace; fwd=request; detail=no-store"
    assert set(bench.node.scopes) == {"private"}
    assert bench.node.asked == []


async def test_a_client_that_leaves_ends_what_is_computed_for_it(bench: Bench, engine: Engine) -> None:
    engine.gate.clear()
    with pytest.raises(httpx.ReadTimeout):
        await bench.client.post(PATH, json=body(["a", "b"]), timeout=0.2)
    await until_async(lambda: engine.disconnects >= 2)


async def test_stored_embeddings_for_which_there_is_no_room_are_computed(
    bench: Bench, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [f"{at} " + "x" * 20_000 for at in range(4)]
    monkeypatch.setattr(stored_answer, "_MESSAGE_BYTES", 100)
    await embed(bench, given)
    await bench.stored(4)
    answer = await embed(bench, given)
    assert "; hit; " in answer.headers["cache-status"]
    with bench.cache.sending.holding([bytes(SENDING_BYTES_MAX)]):
        answer = await embed(bench, given)
        assert answer.headers["cache-status"] == "hyperspace; fwd=stale; detail=busy"
        assert len(engine.inputs) == 8
        answer = await bench.ask(body(given), PATH, cache_control="only-if-cached")
        assert answer.status_code == 504
    assert len(engine.inputs) == 8
    assert bench.cache.sending.bytes == 0
