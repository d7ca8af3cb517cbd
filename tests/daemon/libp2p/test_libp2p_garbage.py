"""Peers that send garbage, too much, too slowly or nothing: what they cost a real host."""

import asyncio
import secrets
import socket
from contextlib import suppress
from dataclasses import astuple

import pytest
import trio
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.io.utils import read_exactly
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.utils import encode_varint_prefixed
from nacl.signing import SigningKey

from hyperspace_vllm.core.records.endpoint import Endpoint
from hyperspace_vllm.core.records.ids import peer_id
from hyperspace_vllm.core.records.limits import MiB
from hyperspace_vllm.core.records.rank import Tier
from hyperspace_vllm.daemon.libp2p import (
    libp2p_streams,
    libp2p_swarm,
    libp2p_time,
    libp2p_yamux,
    libp2p_yamux_stream,
)
from hyperspace_vllm.daemon.libp2p.libp2p_node import Libp2pNode
from hyperspace_vllm.daemon.libp2p.libp2p_time import PeerTime
from hyperspace_vllm.daemon.peer_failed import PeerFailed
from tests.support.libp2p_members import PROTOCOL, Members, attack, open_stream, wait_closed
from tests.support.until import until_async

pytestmark = pytest.mark.io


async def test_strangers_without_manners_cost_nothing(members: Members) -> None:
    a, b = await members(2)
    at = astuple(Endpoint.parse(a.host.address))
    multistream = b"\x13/multistream/1.0.0\n"
    openings = [
        b"",
        secrets.token_bytes(5000),
        b"\xff" * 100,
        b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f" + bytes(100),  # a protocol name of 2^63 bytes
        multistream + b"\x07/noise\n" + b"\xff\xff" + secrets.token_bytes(70_000),
        multistream + b"\x03ls\n" * 1000,
        b"GET / HTTP/1.1\r\n\r\n",
    ]
    for opening in openings * 3:
        with suppress(OSError), socket.create_connection(at, 5) as stranger:
            stranger.settimeout(0.1)
            stranger.sendall(opening)
            stranger.recv(1000)
    assert await b.ask(a) == b"?"
    (c,) = await members(1)
    await c.meet(a)


async def test_garbage_on_any_stream_ends_at_most_its_connection(members: Members) -> None:
    a, b = await members(2)
    spoken = [str(protocol) for protocol in a.host._link.node._host.get_mux().get_protocols()]  # type: ignore[union-attr]
    assert PROTOCOL in spoken
    assert "/ipfs/kad/1.0.0" in spoken
    heads = [b"\xff\xff\xff\xff", b"\x00\x00\x00\x05ab", b"", b"\xff" * 11, b"\x05\x08\xff\xff\xff\x7f", b"\x01"]

    async def babble(node: Libp2pNode, victim: ID) -> None:
        for protocol in spoken:
            for head in heads:
                for end in ("reset", "close", "leave"):
                    with suppress(Exception):  # refused: it has too many already
                        stream = await open_stream(node, victim, protocol)
                        await stream.write(head + secrets.token_bytes(200))
                        if end != "leave":
                            await getattr(stream, end)()
        await trio.sleep(0.3)

    await attack(a, babble)
    assert await b.ask(a) == b"?"
    assert a.host.connected == {b.peer}
    assert b.changes == [(a.peer, True)]


async def test_garbage_below_the_streams_ends_only_that_connection(members: Members) -> None:
    a, b = await members(2)
    head = libp2p_yamux_stream.HEAD.pack
    frames = [
        secrets.token_bytes(4000),
        head(1, 0, 0, 1, 0),
        head(0, 9, 0, 1, 0),
        head(0, 0, 1, 2, 0),  # a stream id of the other side
        head(0, 0, 1, 0, 0),
        head(0, 0, 1, 999, 0xFFFFFFFF),
        head(0, 0, 1, 999, 262_145) + bytes(262_145),  # more than the window
        head(0, 2, 1, 0, 7) * 5000,
        b"".join(head(0, 1, 1, number, 0) for number in range(1001, 7001, 2)),
        head(0, 1, 0, 1, 0xFFFFFFFF) * 3 + head(0, 3, 0, 0, 0),
    ]

    for frame in frames:

        async def mangle(node: Libp2pNode, victim: ID, frame: bytes = frame) -> None:
            (conn,) = node._swarm.live(victim)
            with suppress(Exception):  # it closes before it has read all of it
                await conn.muxed_conn.secured_conn.write(frame)  # type: ignore[attr-defined]
            with trio.fail_after(5):
                await conn.event_closed.wait()

        await attack(a, mangle)
        assert await b.ask(a) == b"?"
    await until_async(lambda: a.host.connected == {b.peer})


@pytest.mark.parametrize(("kind", "is_open", "length"), [(0, False, 0), (1, False, 7), (0, True, 0), (1, True, 0)])
async def test_who_sends_frames_for_nothing_is_let_go_and_told_of(
    members: Members, kind: int, is_open: bool, length: int
) -> None:
    a, b = await members(2)

    async def send(node: Libp2pNode, victim: ID) -> None:
        stream = await open_stream(node, victim)
        stream_id = stream.muxed_stream.stream_id if is_open else 99_999  # type: ignore[attr-defined]
        stray = libp2p_yamux_stream.HEAD.pack(0, kind, 0, stream_id, length)
        (conn,) = node._swarm.live(victim)
        wire = conn.muxed_conn.secured_conn  # type: ignore[attr-defined]
        await wire.write(stray * int(libp2p_yamux.STRAYS_PER_S))  # as many as a reset of many streams leaves
        await trio.sleep(0.3)
        assert not conn.is_closed
        assert not a.violations
        with suppress(Exception):  # it closes before it has read all of them
            for _ in range(20):
                await wire.write(stray * int(libp2p_yamux.STRAYS_PER_S))
        with trio.fail_after(5):
            await conn.event_closed.wait()

    await attack(a, send)
    await until_async(lambda: len(a.violations) == 1)
    assert await b.ask(a) == b"?"


@pytest.mark.parametrize("bound", ["UNREAD_BYTES_MAX", "UNREAD_ALL_BYTES_MAX"])
async def test_what_a_peer_sends_unasked_is_bounded(
    members: Members, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    monkeypatch.setattr(libp2p_yamux, bound, 2 * MiB)
    a, b = await members(2)
    gate = asyncio.Event()

    async def wait(frame: bytes) -> bytes | None:
        await gate.wait()
        return frame

    a.answer = wait

    async def pour(node: Libp2pNode, victim: ID) -> None:
        (conn,) = node._swarm.live(victim)
        with suppress(Exception):
            for _ in range(20):
                stream = await open_stream(node, victim)
                await libp2p_streams.write_frame(stream, b"?")
                await stream.write(bytes(250_000))
        with trio.fail_after(5):
            await conn.event_closed.wait()

    await attack(a, pour)
    gate.set()
    assert await b.ask(a) == b"?"


async def test_a_slow_sender_is_cut_off(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libp2p_streams, "FRAME_S", 0.5)
    monkeypatch.setattr(libp2p_streams, "IDLE_S", 1.0)
    a, b = await members(2)

    async def drip(node: Libp2pNode, victim: ID) -> None:
        idle = await open_stream(node, victim)
        slow = await open_stream(node, victim)
        began = trio.current_time()
        with suppress(Exception):
            for byte in b"\x00\x00\x01\x00" + bytes(256):
                await slow.write(bytes([byte]))
                await trio.sleep(0.1)
        assert trio.current_time() - began < 2
        await wait_closed(idle, 3)

    await attack(a, drip)
    assert await b.ask(a) == b"?"


async def test_who_is_not_read_because_of_others_is_no_failure(
    members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libp2p_time, "HOST_SHARE", 1e-3)
    a, b = await members(2)

    async def crowd(node: Libp2pNode) -> None:
        for _ in range(8):
            account = node._time.account(peer_id(SigningKey.generate().verify_key.encode()), "127.0.0.1")
            trio.lowlevel.spawn_system_task(account.spend, 600.0)

    await a.host._call(crowd, 30)
    reasons = []
    for _ in range(5):  # a slow machine gives up elsewhere first
        with pytest.raises(PeerFailed) as failed:
            await a.host.request(b.peer, PROTOCOL, b"?", 3)
        reasons.append(failed.value.reason)
        if reasons[-1] == "busy":
            break
    assert "busy" in reasons


async def test_pings_are_in_the_time_of_who_sends_them(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libp2p_time, "PING_S", 0.05)
    (a,) = await members(1)
    count, took_s = 12, 0.0

    async def ping(node: Libp2pNode, victim: ID) -> None:
        nonlocal took_s
        stream = await open_stream(node, victim, "/ipfs/ping/1.0.0")
        began_s = trio.current_time()
        await stream.write(bytes(32) * count)
        await read_exactly(stream, 32 * count)
        took_s = trio.current_time() - began_s

    await attack(a, ping)
    assert took_s > (count * 0.05 - 2 * libp2p_time.BURST_S) / libp2p_time.PEER_SHARE


@pytest.mark.parametrize("is_raw", [False, True], ids=["on a stream", "before anybody has proved who he is"])
@pytest.mark.parametrize("name", [b"\x02a\n", b"\x03ls\n"])
async def test_a_few_protocol_names_are_answered_and_then_no_more(members: Members, is_raw: bool, name: bytes) -> None:
    (a,) = await members(1)
    opening = b"\x13/multistream/1.0.0\n" + name * 100
    answers = bytearray()

    async def ask(node: Libp2pNode, victim: ID) -> None:
        stream = await node._swarm.live(victim)[0].muxed_conn.open_stream()
        with suppress(MuxedStreamError):
            await stream.write(opening)
            while data := await stream.read(65536):
                answers.extend(data)

    if is_raw:
        at = astuple(Endpoint.parse(a.host.address))
        with suppress(ConnectionError), socket.create_connection(at, 30) as stranger:
            stranger.sendall(opening)
            while data := await asyncio.to_thread(stranger.recv, 65536):
                answers += data
    else:
        await attack(a, ask)
    listed = b"/noise\n" if is_raw else PROTOCOL.encode()
    assert answers.count(b"na\n" if name == b"\x02a\n" else listed) <= 8


async def test_an_identity_without_an_end_is_not_read(members: Members) -> None:
    (a,) = await members(1)
    known: list[str] = []

    async def push(node: Libp2pNode, victim: ID) -> None:
        link = a.host._link
        assert link is not None
        for name, agent in (("/large", "x" * libp2p_swarm.IDENTIFY_BYTES_MAX), ("/small", "")):
            stream = await open_stream(node, victim, "/ipfs/id/push/1.0.0")
            message = Identify(protocols=[name], agent_version=agent).SerializeToString()
            await stream.write(encode_varint_prefixed(message))
            await wait_closed(stream, 20)
            known.extend(link.node._host.get_peerstore().get_protocols(node._own_id))

    await attack(a, push)
    assert "/small" in known
    assert "/large" not in known


async def test_streams_in_number_are_refused_beyond_a_bound(members: Members) -> None:
    a, b = await members(2)

    async def hoard(node: Libp2pNode, victim: ID) -> None:
        opened = 0
        for _ in range(libp2p_yamux.INBOUND_STREAMS_MAX + 30):
            with suppress(Exception), trio.fail_after(2):
                await open_stream(node, victim)
                opened += 1
        assert opened <= libp2p_yamux.INBOUND_STREAMS_MAX
        assert opened > libp2p_yamux.INBOUND_STREAMS_MAX // 2

    await attack(a, hoard)
    assert await b.ask(a) == b"?"


async def test_windows_are_updated_once_half_of_them_is_used() -> None:
    async def main() -> None:
        sent: list[bytes] = []

        class Wire:
            is_initiator = True

            async def write(self, data: bytes) -> None:
                sent.append(data)

            def get_remote_address(self) -> None: ...

        time = PeerTime(lambda peer: Tier.STRANGER)
        conn = libp2p_yamux.YamuxConnection(Wire(), ID(b"peer"), time, lambda peer: None)  # type: ignore[arg-type]
        stream = await conn.open_stream()
        conn._frames.clear()
        half = libp2p_yamux_stream.WINDOW_BYTES // 2
        stream.on_data(bytes(half))
        for _ in range(half - 1):
            await stream.read(1)
        assert not conn._frames
        await stream.read(1)
        (update,) = conn._frames
        assert libp2p_yamux_stream.HEAD.unpack(update) == (0, 1, 0, 1, half + libp2p_yamux_stream.WINDOW_BYTES)

    await asyncio.to_thread(trio.run, main)
