"""Identical requests at one time share one computation, also when clients leave, fail or read slowly."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from hyperspace_vllm.api import coalesce
from hyperspace_vllm.api.large_bodies import LargeBodies
from tests.support.cached_server import CHAT, CHAT_PATH, STREAM, USAGE, Bench, MakeBench, data_of, text_of
from tests.support.until import until_async

pytestmark = pytest.mark.io


# --- one computation for many -------------------------------------------------------------------


async def open_stream(bench: Bench, stack: AsyncExitStack, body: object) -> tuple[httpx.Response, AsyncIterator[str]]:
    response = await stack.enter_async_context(bench.client.stream("POST", CHAT_PATH, json=body))
    return response, response.aiter_lines()


async def rest_of(lines: AsyncIterator[str]) -> str:
    return "\n".join([line async for line in lines])


async def test_the_first_frame_is_there_before_the_second_is_computed(bench: Bench) -> None:
    bench.upstream.gate.clear()
    async with AsyncExitStack() as stack:
        _, lines = await open_stream(bench, stack, CHAT | STREAM)
        frames = [line for line in [await anext(lines) for _ in range(3)] if line]
        assert "w1.0" in frames[1]
        bench.upstream.gate.set()
        assert "[DONE]" in await rest_of(lines)


@pytest.mark.parametrize("asked_as", [{}, STREAM])
async def test_fifty_identical_requests_are_computed_once(bench: Bench, asked_as: dict[str, Any]) -> None:
    bench.upstream.gate.clear()
    asked = [asyncio.create_task(bench.ask(CHAT | asked_as)) for _ in range(50)]
    await until_async(lambda: bench.cache.flights.readers == 50)
    bench.upstream.gate.set()
    answers = await asyncio.gather(*asked)
    assert {text_of(answer) for answer in answers} == {"w1.0 w1.1 w1.2 "}
    assert len(bench.upstream.bodies) == 1
    statuses = sorted(answer.headers["cache-status"] for answer in answers)
    assert statuses == ["hyperspace; fwd=uri-miss; collapsed"] * 49 + ["hyperspace; fwd=uri-miss; stored"]
    await bench.stored(1)
    assert bench.cache.flights.bytes == 0
    assert bench.cache.flights.readers == 0


async def test_followers_get_usage_if_and_only_if_they_asked_for_it(bench: Bench) -> None:
    bench.upstream.gate.clear()
    bodies = [CHAT | STREAM, CHAT | STREAM | USAGE, CHAT | STREAM]
    asked = [asyncio.create_task(bench.ask(body)) for body in bodies]
    await until_async(lambda: bench.cache.flights.readers == 3)
    bench.upstream.gate.set()
    usages = [sum("usage" in chunk for chunk in data_of(answer)) for answer in await asyncio.gather(*asked)]
    assert usages == [0, 1, 0]
    assert len(bench.upstream.bodies) == 1


@pytest.mark.parametrize("asked_as", [{}, STREAM])
async def test_the_leaders_disconnect_is_nothing_to_its_followers(bench: Bench, asked_as: dict[str, Any]) -> None:
    bench.upstream.gate.clear()
    leader = asyncio.create_task(bench.ask(CHAT | asked_as))
    await until_async(lambda: len(bench.upstream.bodies) == 1)
    follower = asyncio.create_task(bench.ask(CHAT | asked_as))
    await until_async(lambda: bench.cache.flights.readers == 2)
    leader.cancel()
    await until_async(lambda: bench.cache.flights.readers == 1)
    bench.upstream.gate.set()
    answer = await follower
    assert text_of(answer) == "w1.0 w1.1 w1.2 "
    assert bench.upstream.disconnects == 0
    await bench.stored(1)


@pytest.mark.parametrize("asked_as", [{}, STREAM])
async def test_the_server_hears_of_it_when_the_last_client_leaves(bench: Bench, asked_as: dict[str, Any]) -> None:
    bench.upstream.gate.clear()
    asked = [asyncio.create_task(bench.ask(CHAT | asked_as)) for _ in range(3)]
    await until_async(lambda: bench.cache.flights.readers == 3)
    for task in asked:
        task.cancel()
    await until_async(lambda: bench.upstream.disconnects == 1)
    await until_async(lambda: bench.cache.flights.readers == 0)
    assert bench.node.scopes == []
    bench.upstream.gate.set()
    assert (await bench.ask(CHAT | asked_as)).headers["cache-status"] == "hyperspace; fwd=uri-miss; stored"


@pytest.mark.parametrize(
    ("asked_as", "failure"),
    [({}, "refuse"), ({}, "raise"), (STREAM, "refuse"), (STREAM, "error frame")],
)
async def test_followers_share_another_computation_when_the_leader_fails(
    bench: Bench, asked_as: dict[str, Any], failure: str
) -> None:
    bench.upstream.failures = [failure]
    held = asyncio.Event()

    async def hold_the_first(scope: Any, receive: Any, send: Any) -> None:
        if not bench.upstream.bodies:
            await held.wait()
        await inner(scope, receive, send)

    inner, bench.cache.app = bench.cache.app, hold_the_first
    asked = [asyncio.create_task(bench.ask(CHAT | asked_as)) for _ in range(3)]
    await until_async(lambda: bench.cache.flights.readers == 3)
    held.set()
    answers = await asyncio.gather(*asked)
    good = [answer for answer in answers if answer.status_code == 200 and "error" not in answer.text]
    assert len(good) == 2
    assert {text_of(answer)[:2] for answer in good} == {"w2"}
    assert len(bench.upstream.bodies) == 2


async def test_followers_compute_for_themselves_when_the_leader_stalls(make_bench: MakeBench) -> None:
    bench = await make_bench(follow_deadline_s=0.1)
    bench.upstream.failures = ["stall"]
    leader = asyncio.create_task(bench.ask(CHAT | STREAM))
    await until_async(lambda: len(bench.upstream.bodies) == 1)
    answer = await bench.ask(CHAT | STREAM)
    assert text_of(answer) == "w2.0 w2.1 w2.2 "
    assert answer.headers["cache-status"] == "hyperspace; fwd=uri-miss; stored"
    leader.cancel()
    await until_async(lambda: bench.upstream.disconnects == 1)


# --- slow readers -------------------------------------------------------------------------------


def ask_and_not_read(bench: Bench, body: object) -> socket.socket:
    """A client whose receive buffer is small and that reads nothing for now."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", bench.port))
    raw = json.dumps(body).encode()
    head = f"POST {CHAT_PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n"
    sock.sendall(head.encode() + b"connection: close\r\n\r\n" + raw)
    return sock


def read_all(sock: socket.socket) -> bytes:
    received = bytearray()
    while part := sock.recv(1 << 16):
        received += part
    return bytes(received)


async def test_a_slow_client_slows_its_own_computation_as_without_a_cache(bench: Bench) -> None:
    bench.upstream.words, bench.upstream.filler = 4000, "x" * 10_000  # 40 MB, more than any buffer on the way
    with ask_and_not_read(bench, CHAT | STREAM) as sock:
        await until_async(lambda: bench.upstream.frames_sent > 10)
        before = -1
        while bench.upstream.frames_sent != before:
            before = bench.upstream.frames_sent
            await asyncio.sleep(0.2)  # long enough for many frames, had they not stopped
        assert before < 2000
        received = await asyncio.to_thread(read_all, sock)
    assert received.count(b"data: ") == 4000 + 3


async def test_a_slow_client_does_not_slow_those_who_share_its_computation(bench: Bench) -> None:
    bench.upstream.words, bench.upstream.filler = 500, "x" * 10_000  # 5 MB
    bench.upstream.gate.clear()
    with ask_and_not_read(bench, CHAT | STREAM) as sock:
        await until_async(lambda: len(bench.upstream.bodies) == 1)
        follower = asyncio.create_task(bench.ask(CHAT | STREAM))
        await until_async(lambda: bench.cache.flights.readers == 2)
        bench.upstream.gate.set()
        answer = await follower
        assert len(data_of(answer)) == 500 + 2
        received = await asyncio.to_thread(read_all, sock)
        assert received.count(b"data: ") == 500 + 3


async def test_a_client_that_holds_up_the_others_for_too_long_is_cut_off(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coalesce, "LAGGARD_S", 1.0)
    bench.upstream.words, bench.upstream.filler = 4000, "x" * 10_000  # 40 MB
    bench.upstream.gate.clear()
    with ask_and_not_read(bench, CHAT | STREAM) as sock:
        await until_async(lambda: len(bench.upstream.bodies) == 1)
        follower = asyncio.create_task(bench.ask(CHAT | STREAM))
        await until_async(lambda: bench.cache.flights.readers == 2)
        bench.upstream.gate.set()
        assert len(data_of(await follower)) == 4000 + 2
        assert b"[DONE]" not in await asyncio.to_thread(read_all, sock)


async def test_a_client_that_reads_a_little_now_and_then_holds_up_the_others_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(coalesce, "LAGGARD_S", 1.0)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for number in range(400):
            frame = b"data: " + bytes(100_000) + b"\n\n"
            await send({"type": "http.response.body", "body": frame, "more_body": number < 399})

    async def read(reader: coalesce.Reader, pause_s: float) -> None:
        while await reader.next() is not None:  # noqa: ASYNC110  # the pause itself
            await asyncio.sleep(pause_s)

    flight = coalesce.Flight(LargeBodies(1.0), None)
    slow, quick = flight.join(), flight.join()
    flight.start(app, {"type": "http", "headers": []}, b"")
    held_up = asyncio.create_task(read(slow, 0.3))
    async with asyncio.timeout(30):
        await read(quick, 0)
        with pytest.raises(coalesce.Laggard):
            await held_up
