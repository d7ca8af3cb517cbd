"""Clients that do not read their answers: what the API server holds for them, and what it counts."""

import asyncio
import gc
import json
import os
import socket
import weakref
from functools import partial
from typing import Any

import pytest

from hyperspace_vllm.api import stored_answer
from hyperspace_vllm.api.database_lookup import Recent
from hyperspace_vllm.api.large_bodies import LargeBodies
from hyperspace_vllm.api.request_facts import RequestFacts
from hyperspace_vllm.api.stored_answer import Sending, StoredAnswer
from hyperspace_vllm.core.records.limits import INLINE_BODY_BYTES, SENDING_BYTES_MAX
from hyperspace_vllm.response_db import StoredResponse
from tests.support.cached_server import CHAT, CHAT_PATH, STREAM, Bench, MakeBench, text_of
from tests.support.network_nodes import memory_bytes
from tests.support.until import until_async

LONG = "x" * 6_000_000
MARK = "a client that does not read"
PIECE = 65_536


class Unread:
    """Clients that send a request and never read."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.sockets: list[socket.socket] = []

    async def ask(self, body: object, path: str = CHAT_PATH) -> None:
        raw = json.dumps(body).encode()
        loop = asyncio.get_running_loop()
        client = socket.socket()
        self.sockets.append(client)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", self.bench.port))
        head = (
            f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
        )
        await loop.sock_sendall(client, head.encode() + raw)

    async def leave(self) -> None:
        for client in self.sockets:
            client.close()
        await until_async(lambda: self.bench.cache.sending.bytes == 0)
        await until_async(lambda: self.bench.requests.running == 0)


def held_of_requests() -> list[object]:
    """What the requests of MARK are kept in: their facts, and messages."""
    gc.collect()
    found: list[object] = []  # by exact types: objects of other libraries answer comparisons in ways of their own
    for each in gc.get_objects():
        raw: object = b""
        if type(each) is RequestFacts:
            raw = each.raw
        elif type(each) is dict and type(kind := each.get("type")) is str and kind == "http.request":
            raw = each.get("body")
        if type(raw) is bytes and MARK.encode() in raw:
            found.append(each)
    return found


def entries() -> list[StoredResponse]:
    """The entries with LONG that are held."""
    gc.collect()
    return [each for each in gc.get_objects() if type(each) is StoredResponse and len(each.body) > len(LONG)]


# --- hits ---------------------------------------------------------------------------------------


@pytest.mark.io
@pytest.mark.parametrize("asked_as", [{}, STREAM], ids=["JSON", "stream"])
async def test_hits_that_clients_do_not_read_take_a_bounded_amount_of_memory(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch, asked_as: dict[str, Any]
) -> None:
    bench = await make_bench()
    bench.upstream.says = [LONG]
    await bench.ask(CHAT)
    await bench.stored(1)
    monkeypatch.setattr(stored_answer, "SENDING_BYTES_MAX", 15_000_000)
    unread = Unread(bench)
    for count in (1, 2):
        await unread.ask(CHAT | asked_as)
        await until_async(lambda count=count: bench.cache.sending.bytes > count * 6e6)  # type: ignore[misc]
    await unread.ask(CHAT | asked_as)
    await until_async(lambda: len(bench.upstream.bodies) == 2)  # vLLM has to
    assert bench.cache.sending.bytes < 15e6
    await unread.leave()


@pytest.mark.io
@pytest.mark.parametrize("asked_as", [{}, STREAM], ids=["JSON", "stream"])
async def test_a_hit_that_waits_for_its_client_holds_neither_its_request_nor_its_entry(
    make_bench: MakeBench, asked_as: dict[str, Any]
) -> None:
    bench = await make_bench()
    bench.upstream.says = [LONG]
    asked = CHAT | asked_as | {"user": MARK}
    await bench.ask(asked)
    await bench.stored(1)
    bench.cache.recent = Recent()
    unread = Unread(bench)
    await unread.ask(asked)
    await until_async(lambda: bench.cache.sending.bytes > 6e6)
    assert not held_of_requests()
    assert not entries()
    assert len(bench.upstream.bodies) == 1
    await unread.leave()


def test_small_hits_are_served_however_much_is_held() -> None:
    sending = Sending()
    with sending.holding([bytes(SENDING_BYTES_MAX)]):
        assert sending.has_room(StoredAnswer([], [b"x" * 60_000]))
        assert not sending.has_room(StoredAnswer([], [b"x" * 70_000]))
    assert sending.bytes == 0


def test_a_body_that_answers_share_counts_once() -> None:
    sending = Sending()
    shared = bytes(SENDING_BYTES_MAX)
    with sending.holding([b"own", shared]):
        assert sending.has_room(StoredAnswer([], [b"other", shared]))
        with sending.holding([b"other", shared]):
            assert sending.bytes == len(shared) + len(b"own") + len(b"other")
        assert sending.bytes == len(shared) + len(b"own")
    assert sending.bytes == 0
    assert not sending.has_room(StoredAnswer([], [bytes(SENDING_BYTES_MAX + 1)]))


@pytest.mark.parametrize(
    ("parts", "sent"),
    [
        ([0], [0]),
        ([PIECE], [PIECE]),
        ([100, 200], [300]),
        ([PIECE + 1], [PIECE, 1]),
        ([PIECE, 7], [PIECE, 7]),
        ([2 * PIECE + 5, 3], [PIECE, PIECE, 5, 3]),
    ],
)
def test_an_answer_is_sent_in_pieces_and_a_small_one_at_once(parts: list[int], sent: list[int]) -> None:
    body = os.urandom(sum(parts))
    answer = StoredAnswer([], [body[sum(parts[:at]) : sum(parts[: at + 1])] for at in range(len(parts))])
    _, *messages = answer.messages(Sending())
    assert [len(message["body"]) for message in messages] == sent
    assert b"".join(message["body"] for message in messages) == body
    assert [message["more_body"] for message in messages] == [True] * (len(sent) - 1) + [False]


# --- computed answers ---------------------------------------------------------------------------


@pytest.mark.io
async def test_followers_that_do_not_read_hold_one_answer_together(make_bench: MakeBench) -> None:
    bench = await make_bench()
    bench.upstream.says = [LONG]
    bench.upstream.gate.clear()
    unread = Unread(bench)
    for readers in range(1, 21):
        await unread.ask(CHAT | {"user": MARK})
        await until_async(lambda readers=readers: bench.cache.flights.readers == readers)  # type: ignore[misc]
    before = memory_bytes(os.getpid())
    bench.upstream.gate.set()
    await until_async(lambda: bench.cache.sending.bytes > 6e6)
    await bench.stored(1)
    bench.cache.recent = Recent()
    await until_async(lambda: bench.requests.running == 19)  # the leader's answer is in its connection's buffer
    assert bench.cache.sending.bytes < 6.1e6
    assert not held_of_requests()
    assert memory_bytes(os.getpid()) - before < 10 * len(LONG)
    assert len(bench.upstream.bodies) == 1
    await unread.leave()


@pytest.mark.io
async def test_followers_of_an_answer_for_which_there_is_no_room_compute(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = await make_bench()
    bench.node.connected = False  # nothing is stored
    bench.upstream.filler = "x" * 100_000
    monkeypatch.setattr(stored_answer, "SENDING_BYTES_MAX", 100_000)
    bench.upstream.gate.clear()
    asked = [asyncio.create_task(bench.ask(CHAT)) for _ in range(4)]
    await until_async(lambda: bench.cache.flights.readers == 4)
    bench.upstream.gate.set()
    answers = await asyncio.gather(*asked)
    assert len(bench.upstream.bodies) > 2
    assert len({text_of(answer)[:2] for answer in answers}) == len(bench.upstream.bodies)
    assert bench.cache.sending.bytes == 0


@pytest.mark.io
async def test_a_computed_answer_that_is_not_read_holds_no_request(make_bench: MakeBench) -> None:
    bench = await make_bench()
    bench.upstream.says = [LONG]
    unread = Unread(bench)
    await unread.ask(CHAT | {"user": MARK})
    await bench.stored(1)
    await until_async(lambda: bench.requests.running == 0)
    assert not held_of_requests()
    await unread.leave()


@pytest.mark.io
async def test_a_request_that_is_computed_although_there_is_an_entry_does_not_hold_it(make_bench: MakeBench) -> None:
    bench = await make_bench()
    bench.upstream.says = [LONG]
    await bench.ask(CHAT)
    await bench.stored(1)
    bench.cache.recent = Recent()
    bench.upstream.gate.clear()
    asked = asyncio.create_task(bench.ask(CHAT, cache_control="min-fresh=999999"))
    await until_async(lambda: len(bench.upstream.bodies) == 2)
    assert not entries()
    bench.upstream.gate.set()
    assert "fwd=stale" in (await asked).headers["cache-status"]


# --- the threads for large bodies ---------------------------------------------------------------


class Result:
    """The result of some work."""


def is_collected(result: weakref.ref[Result]) -> bool:
    gc.collect()
    return result() is None


async def test_the_line_of_large_bodies_keeps_no_result() -> None:
    bodies = LargeBodies(10.0)
    for work in (bodies.work, bodies.in_turn):
        result = weakref.ref(await work(INLINE_BODY_BYTES + 1, Result))
        await until_async(partial(is_collected, result))
