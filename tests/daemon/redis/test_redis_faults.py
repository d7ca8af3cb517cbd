"""Responses in a Redis that is killed, frozen, full or no Redis at all."""

import asyncio
import signal
import time

import pytest
from redis.asyncio import Redis

from hyperspace_vllm.core.records.peer_wire import Hit, Miss
from hyperspace_vllm.core.response import lookup as lookup_machine
from hyperspace_vllm.daemon.node.network_lookups import SHARED_READS_MAX
from hyperspace_vllm.daemon.redis import redis_responses
from hyperspace_vllm.daemon.responses.answer_places import ANSWERS_MAX, OWN_NODE, AskingPeer
from tests.support.daemons import redis_server
from tests.support.daemons.redis_fleet import DEADLINE_S, MakeNode, redis_key, until_found
from tests.support.daemons.redis_server import RedisServer
from tests.support.network_nodes import body_of
from tests.support.until import until_async

pytestmark = [pytest.mark.io, redis_server.NEEDED, pytest.mark.usefixtures("patience")]


async def test_a_killed_redis_is_a_quick_miss_and_its_return_brings_what_was_computed_meanwhile(
    node: MakeNode, server: RedisServer
) -> None:
    a, b = await node("a"), await node("b")
    await a.share("before")
    server.kill()
    assert [await b.find("before") for _ in range(100)] == [None] * 100
    assert b.shared._link._failures < 10  # it isn't asked each time
    assert b.shared.status()["state"] == "away"
    a.compute("meanwhile")
    server.start()
    await until_async(lambda: a.written == 2)
    await until_found(b, "meanwhile")
    assert b.shared.status()["state"] == "on"


async def test_what_a_busy_disk_could_not_read_is_shared_later(node: MakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = await node("a"), await node("b")
    asked: list[bytes] = []
    answer = a.server.answer

    async def counted(request_hash: bytes, popularity: int, asker: AskingPeer) -> Hit | Miss:
        asked.append(request_hash)
        return await answer(request_hash, popularity, asker)

    monkeypatch.setattr(a.server, "answer", counted)
    for _ in range(ANSWERS_MAX):
        await a.server._places.take(OWN_NODE)
    a.compute("x")
    await until_async(lambda: len(asked) >= 1)
    for _ in range(ANSWERS_MAX):
        a.server._places.free(OWN_NODE)
    await until_async(lambda: a.written == 1)
    assert await b.find("x") is not None


async def test_a_frozen_redis_costs_one_lookup_its_deadline_and_the_next_ones_nothing(
    node: MakeNode, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await node("a"), await node("b")
    await a.share("x")
    assert await b.find("nothing") is None  # it is connected
    await until_async(lambda: not b.open_lookups._reading)
    monkeypatch.setattr(lookup_machine, "SHARED_MS", 100)
    server.signal(signal.SIGSTOP)
    began = time.monotonic()
    lookups = [b.begin("x") for _ in range(50)]
    passed_by = [lookup for lookup in lookups if lookup in b.answers]
    assert len(passed_by) == 50 - SHARED_READS_MAX
    await until_async(lambda: b.answers.keys() >= set(lookups))
    assert time.monotonic() - began < DEADLINE_S
    assert b.begin("x") in b.answers  # at once
    monkeypatch.setattr(lookup_machine, "SHARED_MS", 10_000)
    server.signal(signal.SIGCONT)
    await until_found(b, "x")


async def test_only_a_redis_that_is_away_lets_the_api_server_stop_asking(node: MakeNode, server: RedisServer) -> None:
    b = await node("b")
    lookup = b.begin("x")
    await until_async(lambda: lookup in b.answers)
    assert b.answers[lookup] == (None, "not_found")
    server.kill()
    lookup = b.begin("x")
    await until_async(lambda: lookup in b.answers)
    assert b.answers[lookup] == (None, "off")


async def test_a_released_lookup_is_over_and_mixes_no_answers(node: MakeNode) -> None:
    a, b = await node("a"), await node("b")
    await a.share("x")
    await a.share("y")
    for turn in range(50):
        lookup = b.begin("x")
        for _ in range(turn % 5):
            await asyncio.sleep(0)
        was_answered = lookup in b.answers
        b.network.release(lookup)
        found = await b.find("y")
        assert found is not None
        assert found.body == body_of("y")
        assert was_answered or b.answers[lookup] == (None, "released")
    assert b.shared.status()["state"] == "on"


async def test_without_redis_the_queue_is_bounded_and_the_newest_stay(
    node: MakeNode, server: RedisServer, client: "Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_responses, "QUEUE_MAX", 10)
    server.kill()
    a = await node("a")
    for number in range(50):
        a.compute(number)
    await until_async(lambda: a.shared.status()["dropped"] == 40)
    assert a.shared.status()["queued"] == 10
    server.start()
    await until_async(lambda: a.shared.status()["queued"] == 0)
    await until_async(lambda: a.written == 10)
    assert set(await client.keys()) == {redis_key(number).encode() for number in range(40, 50)}


async def test_a_full_redis_takes_nothing_and_is_read_on(node: MakeNode, client: "Redis") -> None:
    a, b = await node("a"), await node("b")
    await a.share("x")
    await client.config_set("maxmemory", 1)
    a.compute("y")
    await until_async(lambda: a.failures("redis_error") == 1)
    assert a.shared.status()["state"] == "on"
    assert await b.find("x") is not None
    await client.config_set("maxmemory", 0)
    await a.share("z")


NONSENSE = [
    b"$abc\r\n",
    b"$-7\r\n",
    b"*1\r\n" * 5000,
    b"hello\r\n",
    b"*99999999999\r\n",
    b":5\r\n" * 99,
    b"\xff" * 100_000,
]


@pytest.mark.parametrize("nonsense", NONSENSE, ids=range(len(NONSENSE)))
async def test_what_speaks_no_redis_is_a_miss(node: MakeNode, nonsense: bytes) -> None:
    async def on_connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            writer.write(nonsense)
        writer.close()

    async with await asyncio.start_server(on_connected, "127.0.0.1", 0) as listener:
        a = await node("a", url=f"redis://127.0.0.1:{listener.sockets[0].getsockname()[1]}/0")
        a.compute("x")
        for name in ("y", "z"):
            began = time.monotonic()
            assert await a.find(name) is None
            assert time.monotonic() - began < DEADLINE_S
        assert not a.shared._writer.done()
        await a.close()
