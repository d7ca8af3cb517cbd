"""Requests and answers between real hosts: sizes, reuse of streams, refusals, bounds."""

import asyncio
import secrets
import threading
import time

import pytest
import trio
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID

from hyperspace_vllm.core.records.limits import STREAM_FRAME_BYTES_MAX, MiB
from hyperspace_vllm.core.records.peer_wire import (
    Expected,
    Greet,
    PeerRequest,
    Ping,
    WantDeltas,
    WantPeers,
    expected_answer,
)
from hyperspace_vllm.daemon.libp2p import (
    libp2p_streams,
)
from hyperspace_vllm.daemon.libp2p.libp2p_node import Libp2pNode
from hyperspace_vllm.daemon.libp2p.libp2p_time import BURST_S, PEER_SHARE, RECORD_BYTES_MIN, RECORD_S, REQUEST_S
from tests.support.libp2p_members import PROTOCOL, Member, Members, attack, failure, open_stream, wait_closed
from tests.support.until import until_async

pytestmark = pytest.mark.io


async def test_requests_of_every_size_are_answered(members: Members) -> None:
    a, b = await members(2)
    frames = [secrets.token_bytes(size) for size in (1, 1000, 16 * 1024, 300_000, STREAM_FRAME_BYTES_MAX)]
    for frame in frames:
        assert await a.ask(b, frame, 10) == frame
    several = frames[:-1] * 8 + frames[-1:]
    assert await asyncio.gather(*(b.ask(a, frame, 20) for frame in several)) == several


async def test_a_stream_is_used_again(members: Members) -> None:
    a, b = await members(2)
    await a.ask(b)
    node, key = a.host._link.node, (ID.from_base58(b.peer), PROTOCOL)  # type: ignore[union-attr]
    ((first, _),) = node._asker._spare[key]
    for _ in range(50):
        await a.ask(b)
        ((stream, _),) = node._asker._spare[key]
        assert stream is first
    assert len(node._swarm.live(ID.from_base58(b.peer))[0].streams) <= 4


async def test_a_handler_may_refuse_fail_and_be_slow(members: Members) -> None:
    a, b = await members(2)

    async def refuse(frame: bytes) -> bytes | None:
        return None

    async def fail(frame: bytes) -> bytes | None:
        raise RuntimeError("a bug")

    async def sleep(frame: bytes) -> bytes | None:
        await asyncio.sleep(60)
        return frame

    for answer, reason in ((refuse, "unreachable"), (fail, "unreachable"), (sleep, "timeout")):
        b.answer = answer
        assert await failure(a.ask(b, timeout_s=0.5)) == reason
    b.answer = b.echo
    assert await a.ask(b) == b"?"
    assert await failure(a.host.request(b.peer, "/nobody/speaks/this", b"?", 5)) == "unreachable"
    assert await failure(a.host.request(Member().peer, PROTOCOL, b"?", 5)) == "unreachable"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "unreachable"),
        (b"\0\0", "unreachable"),
        (b"\0\0\0\5half", "unreachable"),
        ((STREAM_FRAME_BYTES_MAX + 1).to_bytes(4, "big"), "protocol"),
    ],
)
async def test_a_stream_that_breaks_is_no_breach_of_the_protocol_and_a_malformed_frame_is(
    members: Members, answer: bytes, reason: str
) -> None:
    (a,) = await members(1)
    asked = threading.Event()

    async def reply(stream: INetStream) -> None:
        await stream.read(5)
        await stream.write(answer)
        await (stream.reset() if not answer else stream.close())

    async def serve(node: Libp2pNode, victim: ID) -> None:
        node._host.set_stream_handler(TProtocol(PROTOCOL), reply)
        await trio.to_thread.run_sync(asked.wait)

    serving = asyncio.create_task(attack(a, serve))
    await until_async(lambda: a.host.connected)
    (peer,) = a.host.connected
    try:
        assert await failure(a.host.request(peer, PROTOCOL, b"?", 5)) == reason
    finally:
        asked.set()
        await serving


@pytest.mark.parametrize(
    "request_", [Ping(), Greet(b""), WantPeers(b""), WantDeltas(())], ids=lambda each: each.__class__
)
async def test_an_answer_longer_than_what_was_asked_for_is_refused_before_it_is_read(
    members: Members, request_: PeerRequest
) -> None:
    a, b = await members(2)
    expected = expected_answer(request_)

    async def ask(size: int) -> bytes:
        async def answer(frame: bytes) -> bytes:
            return bytes(size)

        b.answer = answer
        return await a.host.request(b.peer, PROTOCOL, b"?", 20, expected)

    assert len(await ask(expected.bytes_max)) == expected.bytes_max
    assert await failure(ask(expected.bytes_max + 1)) == "protocol"


async def test_answers_take_of_the_time_of_who_sends_them(members: Members) -> None:
    a, b = await members(2)
    expected = Expected(64 * RECORD_BYTES_MIN, 64)

    async def answer(frame: bytes) -> bytes:
        return bytes(expected.bytes_max)

    b.answer = answer
    count, began_s = 8, time.monotonic()
    await asyncio.gather(*(a.host.request(b.peer, PROTOCOL, b"?", 20, expected) for _ in range(count)))
    cost_s = count * (REQUEST_S + 64 * RECORD_S)
    assert time.monotonic() - began_s > (cost_s - 2 * BURST_S) / PEER_SHARE


async def test_who_sends_a_frame_that_is_too_long_is_told_of(members: Members) -> None:
    (a,) = await members(1)

    async def announce(node: Libp2pNode, victim: ID) -> None:
        stream = await open_stream(node, victim)
        await stream.write((STREAM_FRAME_BYTES_MAX + 1).to_bytes(4, "big"))
        await wait_closed(stream, 10)

    await attack(a, announce)
    await until_async(lambda: len(a.violations) == 1)


async def test_more_requests_than_a_peer_may_have_are_refused_as_busy(members: Members) -> None:
    a, b = await members(2)
    gate = asyncio.Event()

    async def wait(frame: bytes) -> bytes | None:
        await gate.wait()
        return frame

    b.answer = wait
    asked = [asyncio.create_task(a.ask(b, timeout_s=10)) for _ in range(libp2p_streams.REQUESTS_PER_PEER_MAX)]
    await until_async(lambda: b.answering == libp2p_streams.REQUESTS_PER_PEER_MAX)
    assert await failure(a.ask(b)) == "busy"

    async def ask_too_much(node: Libp2pNode, victim: ID) -> None:  # one who doesn't count his own
        streams = [await open_stream(node, victim) for _ in range(libp2p_streams.REQUESTS_PER_PEER_MAX + 5)]
        for stream in streams:
            await libp2p_streams.write_frame(stream, b"?")
        refused: list[bytes] = []

        async def read(stream: INetStream) -> None:
            refused.append(await stream.read(4))

        with trio.move_on_after(1):
            async with trio.open_nursery() as nursery:
                for stream in streams:
                    nursery.start_soon(read, stream)
        assert refused == [bytes(4)] * 5

    await attack(b, ask_too_much)
    gate.set()
    assert await asyncio.gather(*asked) == [b"?"] * len(asked)
    assert await a.ask(b) == b"?"


async def test_a_cancelled_request_leaves_the_connection_whole(members: Members) -> None:
    a, b = await members(2)
    big = bytes(4 * MiB)
    for _ in range(20):
        request = asyncio.create_task(a.ask(b, big))
        await asyncio.sleep(0.005)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
    assert await a.ask(b) == b"?"
    assert (b.peer, False) not in a.changes
