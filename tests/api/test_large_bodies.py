"""Large requests are read beside the event loop: other requests don't wait, and none waits for long."""

import asyncio
import gc
import json
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import JSONResponse

from hyperspace_vllm.api import database_lookup as lookup
from hyperspace_vllm.api import large_bodies, middleware, relay, request_context, stored_answer
from hyperspace_vllm.api.database_lookup import Recent
from hyperspace_vllm.api.http_headers import RawHeaders
from hyperspace_vllm.api.large_bodies import Busy, LargeBodies
from hyperspace_vllm.api.own_ids import OwnIds
from hyperspace_vllm.api.states import computed_answer
from hyperspace_vllm.api.streams.collect import CompletionCollector
from hyperspace_vllm.core.local.response_cache_messages import StoreResponse
from hyperspace_vllm.core.records.limits import (
    INLINE_BODY_BYTES,
    LARGE_BODIES_BYTES_MAX,
    REQUEST_BYTES_MAX,
    USUAL_BODY_BYTES,
)
from hyperspace_vllm.core.response.request_fields import Endpoint
from tests.support.cached_server import CHAT, CHAT_PATH, STREAM, TEXT, TEXT_PATH, Bench, MakeBench, benches, text_of
from tests.support.large_requests import AS_JSON, LARGE, LARGEST, PATIENT_S, emptied, taken
from tests.support.until import until_async

# --- the line -----------------------------------------------------------------------------------


async def test_what_is_small_is_done_at_once_and_what_is_large_in_one_other_thread() -> None:
    bodies = LargeBodies(PATIENT_S)
    here = threading.get_ident()
    assert await bodies.work(INLINE_BODY_BYTES, threading.get_ident) == here
    others = {await bodies.work(LARGE, threading.get_ident) for _ in range(3)}
    assert len(others) == 1
    assert here not in others


async def test_errors_of_the_work_are_those_of_who_asked_for_it() -> None:
    with pytest.raises(ZeroDivisionError):
        await LargeBodies(PATIENT_S).work(LARGE, lambda: 1 // 0)


async def test_a_full_line_takes_nothing_more_and_makes_no_request_wait() -> None:
    bodies = LargeBodies(PATIENT_S)
    async with taken(bodies, LARGE_BODIES_BYTES_MAX):
        with pytest.raises(Busy):
            await bodies.work(LARGEST, lambda: None)
        here = threading.get_ident()
        assert await bodies.always(LARGEST, threading.get_ident) == here
    await emptied(bodies)
    assert await bodies.work(LARGEST, lambda: "again") == "again"


async def test_a_body_of_usual_length_does_not_wait_behind_the_largest() -> None:
    bodies = LargeBodies(PATIENT_S)
    async with taken(bodies, LARGE_BODIES_BYTES_MAX):
        assert await bodies.work(USUAL_BODY_BYTES, lambda: "done") == "done"


@pytest.mark.parametrize("leaves", ["by its deadline", "by itself"])
async def test_work_that_no_request_waits_for_any_more_is_not_begun(leaves: str) -> None:
    bodies = LargeBodies(0.05 if leaves == "by its deadline" else PATIENT_S)
    begun: list[str] = []
    async with taken(bodies, LARGE):
        late = asyncio.ensure_future(bodies.work(LARGE, lambda: begun.append("late")))
        await until_async(lambda: bodies.waiting > LARGE)
        if leaves == "by itself":
            late.cancel()
        with pytest.raises(asyncio.CancelledError if leaves == "by itself" else Busy):
            await late
        assert bodies.waiting == 2 * LARGE  # its place is free once its turn has come
    await emptied(bodies)
    assert begun == []


async def test_a_request_waits_for_all_its_turns_together_no_longer_than_for_one() -> None:
    bodies = LargeBodies(2.0)
    waited_s = []

    async def steps() -> None:
        for _ in range(5):
            began_s = time.monotonic()
            with pytest.raises(Busy):
                await bodies.work(LARGE, lambda: None)
            waited_s.append(time.monotonic() - began_s)

    async with taken(bodies, LARGE):
        with pytest.raises(Busy):  # another one's patience is not spent
            await bodies.work(LARGE, lambda: None)
        await asyncio.create_task(steps())
    assert waited_s[0] >= 1.0
    assert max(waited_s[1:]) < 0.5  # they are not even asked for


async def test_what_is_larger_than_the_line_is_taken_where_it_is_empty() -> None:
    bodies = LargeBodies(PATIENT_S)
    assert await bodies.work(LARGE_BODIES_BYTES_MAX + 1, lambda: "done") == "done"
    async with taken(bodies, LARGEST):
        with pytest.raises(Busy):
            await bodies.work(LARGE_BODIES_BYTES_MAX, lambda: "done")


# --- the event loop -----------------------------------------------------------------------------


def messages() -> dict[str, Any]:
    return {"model": "base", "messages": [{"role": "user", "content": "a"}] * 100_000}


def tools() -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    inner = schema
    for _ in range(40):
        inner["properties"] = {f"p{at}": {"type": "string"} for at in range(2300)}
        inner["properties"]["inner"] = inner = {"type": "object"}
    return CHAT | {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]}


async def longest_wait_s(work: Callable[[], Any]) -> float:
    """The longest time that a task which is always ready had to wait meanwhile."""
    longest_s, last_s = 0.0, time.perf_counter()

    async def beat() -> None:
        nonlocal longest_s, last_s
        while True:
            await asyncio.sleep(0.001)
            now_s = time.perf_counter()
            longest_s, last_s = max(longest_s, now_s - last_s), now_s

    beating = asyncio.create_task(beat())
    await asyncio.sleep(0.01)
    longest_s = 0.0
    await work()
    await asyncio.sleep(0.002)
    beating.cancel()
    return longest_s


def reads(endpoint: Endpoint, body: bytes, headers: RawHeaders) -> bool:
    """What every server must do at least, in one go."""
    return isinstance(json.loads(body), dict)


@pytest.fixture
def frozen_heap() -> Iterator[None]:
    """As vLLM's API server has it once it has started: collecting garbage takes no look at what it has imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.io
@pytest.mark.usefixtures("frozen_heap")
@pytest.mark.parametrize("body", [messages(), tools()], ids=["messages", "tools"])
async def test_no_client_waits_longer_for_a_large_request_than_for_the_server_to_read_it(
    make_bench: MakeBench, body: dict[str, Any]
) -> None:
    bench = await make_bench(accepts=reads)
    raw = json.dumps(body).encode()
    read_s, asked_s = [], []

    async def read() -> None:
        json.loads(raw)

    async def ask() -> None:
        answer: list[MutableMapping[str, Any]] = []
        requests = [{"type": "http.request", "body": raw, "more_body": False}]

        async def receive() -> dict[str, Any]:
            return requests.pop() if requests else await asyncio.Future()

        async def send(message: MutableMapping[str, Any]) -> None:
            answer.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": CHAT_PATH, "headers": headers, "asgi": {}}
        await bench.cache(scope, receive, send)
        assert dict(answer[0]["headers"])[b"cache-status"].startswith(b"hyperspace; hit")

    assert (await bench.client.post(CHAT_PATH, content=raw, headers=AS_JSON)).status_code == 200
    await bench.stored(1)
    for _ in range(8):  # others use this machine too: the quickest tell
        read_s.append(await longest_wait_s(read))
        asked_s.append(await longest_wait_s(ask))
        if len(read_s) >= 3 and min(asked_s) < 3 * min(read_s):
            return
    pytest.fail(f"the loop stood still for {min(asked_s):.3f} s, reading the request takes {min(read_s):.3f} s")


@pytest.mark.io
@pytest.mark.parametrize("asked_as", [{}, STREAM])
async def test_a_large_answer_is_made_beside_the_event_loop(
    make_bench: MakeBench, asked_as: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = await make_bench()
    bench.upstream.says.append("word " * INLINE_BODY_BYTES)
    first = await bench.ask(CHAT)
    threads: list[int] = []

    def noted(*args: Any) -> Any:
        threads.append(threading.get_ident())
        return stored_answer.render(*args)

    monkeypatch.setattr(request_context, "render", noted)
    answer = await bench.ask(CHAT | asked_as)
    assert "; hit; " in answer.headers["cache-status"]
    assert text_of(answer) == text_of(first)
    assert threads
    assert threading.get_ident() not in threads


STEPS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "the ids of a JSON answer are taken out for its followers": (relay, "nameless", {}),
    "a JSON answer is judged": (computed_answer, "admit", {}),
    "a stream is taken together": (CompletionCollector, "result", STREAM),
    "a frame is taken in": (CompletionCollector, "feed", STREAM),
    "a frame gets a follower's ids": (OwnIds, "frame", STREAM),
    "an entry is unpacked": (lookup, "intact", {}),
}


@pytest.mark.io
@pytest.mark.parametrize("is_large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("step", STEPS)
async def test_the_steps_of_a_large_answer_are_made_beside_the_event_loop_and_those_of_a_small_one_on_it(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch, step: str, is_large: bool
) -> None:
    where, name, asked_as = STEPS[step]
    threads: list[int] = []
    function = getattr(where, name)

    def noted(*args: Any) -> Any:
        threads.append(threading.get_ident())
        return function(*args)

    monkeypatch.setattr(where, name, noted)
    bench = await make_bench()
    text = "word " * (INLINE_BODY_BYTES if is_large else 1)
    bench.upstream.says.append(text)
    gate = bench.upstream.first if asked_as else bench.upstream.gate
    gate.clear()
    asked = [asyncio.create_task(bench.ask(CHAT | asked_as)) for _ in range(3)]
    await until_async(lambda: bench.cache.flights.readers == 3)
    gate.set()
    assert [text_of(answer) for answer in await asyncio.gather(*asked)] == [text] * 3
    await bench.stored(1)
    bench.cache.recent = Recent()
    hit = await bench.ask(CHAT | asked_as)
    assert "; hit; " in hit.headers["cache-status"]
    assert text_of(hit) == text
    here = threading.get_ident()
    if name in ("feed", "frame"):
        assert (set(threads) != {here}) == is_large
    else:  # once, however many wait for it
        assert [thread == here for thread in threads] == [not is_large]


@pytest.mark.io
async def test_followers_get_a_large_answer_with_ids_inside_under_ids_of_their_own(make_bench: MakeBench) -> None:
    bench = await make_bench()
    call = {"id": f"call_{'0' * 32}", "type": "function", "function": {"name": "f", "arguments": "x" * LARGE}}
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    gate = asyncio.Event()

    async def engine(scope: Any, receive: Any, send: Any) -> None:
        await gate.wait()
        choice = {"index": 0, "message": said, "finish_reason": "tool_calls"}
        answer = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "base", "choices": [choice]}
        await JSONResponse(answer | {"usage": {}})(scope, receive, send)

    bench.cache.app = engine
    asked = [asyncio.create_task(bench.ask(CHAT)) for _ in range(8)]
    await until_async(lambda: bench.cache.flights.readers == 8)
    async with taken(bench.cache.bodies, USUAL_BODY_BYTES):  # they wait for their turns, and not for the engine
        gate.set()
        await until_async(lambda: bench.cache.bodies.waiting > USUAL_BODY_BYTES)
    answers = [answer.json() for answer in await asyncio.gather(*asked)]
    calls = [answer["choices"][0]["message"]["tool_calls"][0] for answer in answers]
    assert len({answer["id"] for answer in answers}) == len({each["id"] for each in calls}) == 8
    assert {each["function"]["arguments"] for each in calls} == {"x" * LARGE}


@pytest.mark.io
@pytest.mark.parametrize(
    ("more", "is_read"),
    [
        ({"user": "a"}, False),
        ({"kv_transfer_params": {"hyperspace": {"scope": "public"}, "other": 1}}, True),
        ({"user": "é"}, True),
    ],
)
@pytest.mark.parametrize("size", [1, LARGE, REQUEST_BYTES_MAX])
@pytest.mark.parametrize("cache_control", ["", "private"])
async def test_a_body_of_another_type_is_read_only_if_it_may_hold_a_scope_and_never_on_the_loop_if_it_is_large(
    make_bench: MakeBench,
    monkeypatch: pytest.MonkeyPatch,
    more: dict[str, Any],
    is_read: bool,
    size: int,
    cache_control: str,
) -> None:
    threads: list[int] = []
    read = middleware._as_vllm_reads

    def noted(raw: bytes) -> dict[str, Any] | None:
        threads.append(threading.get_ident())
        return read(raw)

    monkeypatch.setattr(middleware, "_as_vllm_reads", noted)
    bench = await make_bench()
    raw = json.dumps(TEXT | {"padding": "x" * size} | more).encode()
    headers = {"content-type": "text/plain", "cache-control": cache_control}
    answer = await bench.client.post(TEXT_PATH, content=raw, headers=headers)
    too_large = len(raw) > REQUEST_BYTES_MAX
    assert answer.headers["cache-status"].endswith("too_large" if too_large else "not_json")
    here = threading.get_ident()
    assert [thread == here for thread in threads] == ([size == 1] if is_read and not too_large else [])
    (received,) = bench.upstream.bodies
    if more.get("kv_transfer_params") and not too_large:
        assert json.loads(received)["kv_transfer_params"] == {"other": 1}
    else:
        assert received == raw


# --- either way, the same -----------------------------------------------------------------------


def spellings() -> Iterator[tuple[str, bytes, dict[str, str]]]:
    text, chat = json.dumps(TEXT).encode(), json.dumps(CHAT).encode()
    for path, raw in ((TEXT_PATH, text), (CHAT_PATH, chat)):
        for more in (b"", b',"stream":true', b',"cache_salt":"s"', b',"user":"\\ud800"', b',"user":"\xc3\xa9"'):
            yield path, raw[:-1] + more + b"}", AS_JSON
        yield path, raw[:-1] + b',"stream":true,"stream_options":{"include_usage":true}}', AS_JSON
        yield path, raw[:-1] + b',"model":"base"}', AS_JSON
        yield path, raw[:-1], AS_JSON
        yield path, raw, {"content-type": "text/plain"}
        yield path, raw, AS_JSON | {"cache-control": "private"}
        yield path, raw, AS_JSON | {"cache-control": "no-cache"}
        yield path, raw, AS_JSON | {"cache-control": "only-if-cached"}
        yield path, raw[:-1] + b',"kv_transfer_params":{"hyperspace":{"scope":"public"}}}', AS_JSON
        yield path, raw[:-1] + b',"temperature":NaN}', AS_JSON


@pytest.mark.io
async def test_requests_are_read_alike_beside_the_event_loop_and_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, list[Any]] = {}
    for inline in (0, 1 << 40):
        monkeypatch.setattr(large_bodies, "INLINE_BODY_BYTES", inline)
        (tmp_path / str(inline)).mkdir()
        async with benches(tmp_path / str(inline)) as make:
            bench = await make(semantic="off")
            seen[inline] = [await told(bench, *each) for each in spellings() for _ in range(2)]
            seen[inline] += bench.upstream.bodies
            seen[inline] += [message.request_key for message in bench.node.sent if isinstance(message, StoreResponse)]
    assert seen[0] == seen[1 << 40]
    assert (200, "hyperspace; hit") in seen[0]


async def told(bench: Bench, path: str, raw: bytes, headers: dict[str, str]) -> tuple[int, str]:
    stored = bench.node.store.stats()["stored"]
    answer: httpx.Response = await bench.client.post(path, content=raw, headers=headers)
    status = answer.headers["cache-status"]
    if "; stored" in status:
        await bench.stored(stored + 1)
    return answer.status_code, status.partition("; ttl=")[0]
