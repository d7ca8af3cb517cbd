"""An answer that the engine gave up on is not stored, though vLLM calls it complete."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

from hyperspace_vllm.api import aborts
from hyperspace_vllm.vllm_adapter import compat
from tests.support.cached_server import MakeBench, benches

PATH = "/v1/responses"
TEXT: dict[str, Any] = {"type": "output_text", "text": "So.", "annotations": [], "logprobs": None}


def test_what_is_noted_in_a_task_is_seen_by_who_started_it_alone() -> None:
    async def work(gives_up: bool) -> aborts.Abort:
        abort = aborts.watch()

        async def engine() -> None:
            if gives_up:
                aborts.note()

        await asyncio.create_task(engine())
        return abort

    async def both() -> list[aborts.Abort]:
        return list(await asyncio.gather(work(True), work(False)))

    assert [abort.happened for abort in asyncio.run(both())] == [True, False]
    aborts.note()  # nobody watches


def test_vllm_says_why_a_response_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenAIServingResponses, "_raise_if_error", OpenAIServingResponses._raise_if_error)
    noted: list[int] = []
    for _ in range(2):  # vLLM may call us more than once
        assert compat.notice_aborts(lambda: noted.append(1))
    serving = object.__new__(OpenAIServingResponses)
    for reason in ("stop", "length", None, "abort"):
        serving._raise_if_error(reason, "r")
    assert noted == [1]
    with pytest.raises(Exception, match="Internal server error"):
        serving._raise_if_error("error", "r")
    monkeypatch.setenv("VLLM_USE_EXPERIMENTAL_PARSER_CONTEXT", "1")
    assert not compat.notice_aborts(lambda: None)


@pytest.fixture
async def make_bench(tmp_path: Path) -> AsyncIterator[MakeBench]:
    async with benches(tmp_path) as make:
        yield make


def response(status: str) -> dict[str, Any]:
    return {
        "id": "r",
        "object": "response",
        "created_at": 1,
        "model": "base",
        "status": status,
        "output": [{"type": "message", "id": "m", "role": "assistant", "status": status, "content": [TEXT]}],
        "usage": {},
    }


@pytest.mark.io
@pytest.mark.parametrize("stream", [False, True])
async def test_only_what_the_engine_finished_is_stored(make_bench: MakeBench, stream: bool) -> None:
    gives_up = [True, False, False]

    async def answer(request: Request) -> Response:
        body = await request.json()
        if gives_up.pop(0):
            aborts.note()
        if not body.get("stream"):
            return JSONResponse(response("completed"))
        event = JSONResponse({"type": "response.completed", "response": response("completed")}).body
        frames = iter([b"event: response.completed\ndata: " + bytes(event) + b"\n\n"])
        return StreamingResponse(frames, media_type="text/event-stream")

    bench = await make_bench(more_routes={PATH: answer})
    asked = {"model": "base", "input": "Why?", "stream": stream}
    for count in (2, 1, 1):
        assert (await bench.ask(asked, PATH)).status_code == 200
        assert len(gives_up) == count
    blind = await make_bench(more_routes={PATH: answer}, sees_aborts=False)
    other = await blind.ask(asked | {"input": "Why not?"}, PATH)
    assert other.headers["cache-status"] == "hyperspace; fwd=bypass; detail=blind"
