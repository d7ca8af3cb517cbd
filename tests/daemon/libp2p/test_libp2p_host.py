"""The libp2p host over real sockets: what it delivers, what garbage, silence and death cost, what is kept of peers."""

import asyncio
import gc
import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from importlib.metadata import version
from itertools import pairwise
from typing import Any
from unittest.mock import ANY

import libp2p.kad_dht.kad_dht as kad_module
import libp2p.kad_dht.provider_store as provider_module
import pytest
import trio
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.exceptions import ParseError
from libp2p.host.exceptions import StreamFailure
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.io.utils import read_exactly
from libp2p.kad_dht.pb.kademlia_pb2 import Message as DhtMessage
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.pubsub.pb import rpc_pb2
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.utils import encode_varint_prefixed
from libp2p.utils.varint import read_varint_prefixed_bytes_limited
from nacl.signing import SigningKey

from hyperspace_vllm.core.peers import slots
from hyperspace_vllm.core.peers.gossip_gate import BURST_S, GossipGate, Verdict
from hyperspace_vllm.core.records.announcement import (
    RESPONSE_TOPIC,
    Announcement,
    ResponseEntry,
    decode_announcement,
    encode_announcement,
)
from hyperspace_vllm.core.records.ids import PeerId, peer_id
from hyperspace_vllm.core.records.limits import GOSSIP_OF_AUTHOR_PER_S, RESPONSE_TTL_MS, STREAM_FRAME_BYTES_MAX, MiB
from hyperspace_vllm.core.records.standing import Rank, Standing, Tier
from hyperspace_vllm.daemon.libp2p import (
    libp2p_dht,
    libp2p_gossip,
    libp2p_node,
    libp2p_overrides,
    libp2p_streams,
    libp2p_swarm,
    libp2p_time,
    libp2p_yamux,
)
from hyperspace_vllm.daemon.libp2p.libp2p_host import Libp2pHost
from hyperspace_vllm.daemon.libp2p.libp2p_mdns import peers_in
from hyperspace_vllm.daemon.libp2p.libp2p_node import Libp2pNode, NodeSettings, dht_key, reachable_hosts, split_address
from hyperspace_vllm.daemon.libp2p.libp2p_swarm import NodePeerStore
from hyperspace_vllm.daemon.libp2p.libp2p_time import PeerTime
from hyperspace_vllm.daemon.peer_failed import PeerFailed
from hyperspace_vllm.daemon.token_bucket import TokenBucket
from tests.support.network_world import NETWORK, OpenGate

pytestmark = pytest.mark.io
PROTOCOL = "/hyperspace/cache/1.0.0"
TOPIC = "hyperspace/test"


class Member:
    """A host with a handler that notes what happens and answers with what it was asked."""

    def __init__(
        self,
        network_key: bytes | None = None,
        mdns: bool = False,
        listen: str = "127.0.0.1:0",
        topic: str = TOPIC,
        gate: GossipGate | None = None,
    ) -> None:
        self.key = SigningKey.generate()
        self.peer = peer_id(self.key.verify_key.encode())
        self.topic = topic
        self.gate = gate or OpenGate()
        self.host = Libp2pHost(self.key, listen, network_key, mdns, (PROTOCOL,), (topic,), self, self.gate)
        self.gossip: list[tuple[PeerId, bytes]] = []
        self.spoilers: list[PeerId] = []
        self.asked_to_dial: list[tuple[PeerId, str, str]] = []
        self.dials = True
        self.changes: list[tuple[PeerId, bool]] = []
        self.violations: list[PeerId] = []
        self.discovered: dict[PeerId, str] = {}
        self.answer: Callable[[bytes], Awaitable[bytes | None]] = self.echo
        self.answering = 0

    async def echo(self, frame: bytes) -> bytes | None:
        return frame

    async def on_request(self, peer: PeerId, protocol: str, frame: bytes) -> bytes | None:
        assert protocol == PROTOCOL
        self.answering += 1
        try:
            return await self.answer(frame)
        finally:
            self.answering -= 1

    def on_gossip(self, topic: str, relay: PeerId, payload: bytes) -> None:
        assert topic == self.topic
        self.gossip.append((relay, payload))

    def on_gossip_spoiled(self, relay: PeerId) -> None:
        self.spoilers.append(relay)

    def on_connected(self, peer: PeerId) -> None:
        self.changes.append((peer, True))

    def on_disconnected(self, peer: PeerId) -> None:
        self.changes.append((peer, False))

    def on_violation(self, peer: PeerId) -> None:
        self.violations.append(peer)

    def tier(self, peer: PeerId) -> Tier:
        return Tier.PROVEN

    def on_discovered(self, peer: PeerId, address: str, told_from: str) -> None:
        self.discovered[peer] = address

    def may_dial(self, peer: PeerId, address: str, told_from: str) -> bool:
        self.asked_to_dial.append((peer, address, told_from))
        return self.dials

    async def meet(self, *others: "Member") -> None:
        for other in others:
            await self.host.connect(other.peer, other.host.address, 5)

    async def ask(self, other: "Member", frame: bytes = b"?", timeout_s: float = 5) -> bytes:
        return await self.host.request(other.peer, PROTOCOL, frame, timeout_s)


Members = Callable[..., Awaitable[list[Member]]]


@pytest.fixture
async def members() -> AsyncIterator[Members]:
    """Starts hosts; with `meet` every one of them is connected to every other."""
    all_of_them: list[Member] = []

    async def start(count: int, meet: bool = True, **options: object) -> list[Member]:
        started = [Member(**options) for _ in range(count)]  # type: ignore[arg-type]
        all_of_them.extend(started)
        for member in started:
            await member.host.start()
        if meet:
            for number, member in enumerate(started):
                await member.meet(*started[:number])
            # Who dials is through a moment before who is dialled.
            await until(lambda: all(len(member.host.connected) >= count - 1 for member in started))
        return started

    yield start
    await asyncio.gather(*(member.host.close() for member in all_of_them))


async def until(condition: Callable[[], object], timeout_s: float = 60) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 (what is waited for is in other threads and processes)
            await asyncio.sleep(0.02)


def connections(member: Member, other: Member) -> int:
    link = member.host._link
    return len(link.node._swarm.live(ID.from_base58(other.peer))) if link is not None else 0


async def failure(call: Awaitable[object]) -> str:
    with pytest.raises(PeerFailed) as caught:
        await call
    return caught.value.reason


class Silent:
    """The events of a node that nobody listens to."""

    async def answer(self, peer: PeerId, protocol: str, frame: bytes) -> bytes | None:
        return None

    def gossip(self, topic: str, relay: PeerId, payload: bytes) -> None:
        pass

    def gossip_spoiled(self, relay: PeerId) -> None:
        pass

    def violated(self, peer: PeerId) -> None:
        pass

    def tier(self, peer: PeerId) -> Tier:
        return Tier.PROVEN

    async def may_dial(self, peer: PeerId, address: str, told_from: str) -> bool:
        return False

    def peer_changed(self, peer: PeerId, host: str | None) -> None:
        pass


async def attack(victim: Member, deed: Callable[[Libp2pNode, ID], Awaitable[None]], *also: Member) -> None:
    """Run `deed(node, victim's id)` as a stranger who is connected to the victim."""

    async def main() -> None:
        node = Libp2pNode(NodeSettings(SigningKey.generate(), "127.0.0.1:0", None, (), (TOPIC,)), Silent())
        with trio.fail_after(30):
            async with node.running():
                for member in (victim, *also):
                    await node.connect(member.peer, member.host.address)
                await deed(node, ID.from_base58(victim.peer))

    await asyncio.to_thread(trio.run, main)


async def open_stream(node: Libp2pNode, victim: ID, protocol: str = PROTOCOL) -> INetStream:
    return await node._host.new_stream(victim, [TProtocol(protocol)])


async def wait_closed(stream: INetStream, timeout_s: float) -> None:
    with trio.fail_after(timeout_s), suppress(Exception):
        while await stream.read(65536):
            pass


# --- connections --------------------------------------------------------------------------------


async def test_the_hosts_libp2p_identity_is_the_nodes(members: Members) -> None:
    a, b = await members(2)
    assert a.host.connected == {b.peer}
    assert b.host.connected == {a.peer}
    assert ID.from_base58(a.peer).to_base58() == a.peer


async def test_connect_proves_who_is_there(members: Members) -> None:
    a, b = await members(2, meet=False)
    stranger = Member().peer
    assert await failure(a.host.connect(stranger, b.host.address, 5)) == "unreachable"
    assert a.host.connected == frozenset()
    await a.meet(b)  # the failure is not held against the address
    assert a.host.connected == {b.peer}


@pytest.mark.parametrize("network_key", [None, bytes(32)])
async def test_each_side_knows_the_address_at_the_other_end(members: Members, network_key: bytes | None) -> None:
    a, b = await members(2, network_key=network_key)
    assert a.host.host_of(b.peer) == b.host.host_of(a.peer) == "127.0.0.1"
    await a.host.disconnect(b.peer)
    await until(lambda: b.host.host_of(a.peer) == "")


async def test_connect_fails_within_its_deadline(members: Members) -> None:
    (a,) = await members(1)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        began = time.monotonic()
        assert await failure(a.host.connect(Member().peer, address, 0.5)) == "timeout"
        assert time.monotonic() - began < 10
    for nowhere in (address, "no-such-host.invalid:1", "127.0.0.1", "127.0.0.1:99999", "[::zz]:1", "a/b:1"):
        assert await failure(a.host.connect(Member().peer, nowhere, 5)) in ("unreachable", "timeout"), nowhere


async def test_names_and_ipv6_addresses_are_dialled(members: Members) -> None:
    a, b = await members(2, meet=False)
    await a.host.connect(b.peer, "localhost:" + b.host.address.rpartition(":")[2], 5)
    try:
        (c,) = await members(1, listen="[::1]:0")
    except OSError:
        pytest.skip("no IPv6 here")
    assert c.host.address.startswith("[::1]:")
    await a.meet(c)
    assert a.host.connected == {b.peer, c.peer}


async def test_an_address_in_use_is_an_error(members: Members) -> None:
    (a,) = await members(1)
    second = Member(listen=a.host.address)
    with pytest.raises(OSError, match="in use"):
        await second.host.start()
    await second.host.close()


async def test_connections_are_told_exactly_when_both_sides_dial(members: Members) -> None:
    a, b = await members(2, meet=False)
    for turn in range(5):
        await asyncio.gather(a.meet(b), b.meet(a), a.meet(b))
        # A dial that only one side has finished would survive the disconnecting.
        await until(lambda: connections(a, b) == connections(b, a) > 0)
        await (a if turn % 2 else b).host.disconnect((b if turn % 2 else a).peer)
        await until(lambda: not a.host.connected and not b.host.connected)
    assert a.changes == [(b.peer, True), (b.peer, False)] * 5
    assert b.changes == [(a.peer, True), (a.peer, False)] * 5


async def test_a_closed_host_is_noticed_and_gives_its_port_back(members: Members) -> None:
    a, b = await members(2)
    began = time.monotonic()
    await b.host.close()
    assert time.monotonic() - began < 10
    await until(lambda: not a.host.connected)
    assert b.changes == [(a.peer, True), (a.peer, False)]
    assert await failure(a.ask(b)) == "unreachable"
    assert await failure(b.ask(a)) == "unreachable"
    assert not b.host.publish(TOPIC, b"late")
    with socket.create_server(("127.0.0.1", int(b.host.address.rpartition(":")[2]))):
        pass
    await b.host.close()  # twice is no error


async def test_only_holders_of_the_network_key_get_in(members: Members) -> None:
    a, b = await members(2, network_key=bytes(32))
    (wrong,) = await members(1, network_key=bytes(31) + b"\x01")
    (none,) = await members(1)
    assert await a.ask(b) == b"?"
    for outsider in (wrong, none):
        assert await failure(outsider.host.connect(a.peer, a.host.address, 2)) in ("unreachable", "timeout")
    assert a.host.connected == {b.peer}


async def test_connections_are_bounded_by_peer_and_in_all(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libp2p_swarm, "PEER_CONNECTIONS_INBOUND_MAX", 4)
    (a,) = await members(1)

    async def dial_again(node: Libp2pNode, victim: ID) -> None:
        (address,) = await libp2p_node._resolve(a.host.address)
        for _ in range(6):
            with suppress(Exception):
                await node._swarm.dial_addr(address, victim)
        await trio.sleep(0.3)
        assert len(node._swarm.live(victim)) <= libp2p_swarm.CONNECTIONS_PER_PEER_MAX

    await attack(a, dial_again)
    await until(lambda: not a.host.connected)
    others = await members(6, meet=False)
    for other in others:  # one after another: of those that come at once fewer may be left
        with suppress(Exception):
            await other.meet(a)
        assert len(a.host.connected) <= 4
    await until(lambda: sum(bool(other.host.connected) for other in others) == len(a.host.connected) == 4)


async def test_second_connections_of_a_peer_make_room_for_others(
    members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libp2p_swarm, "PEER_CONNECTIONS_INBOUND_MAX", 3)
    (a,) = await members(1)
    others = await members(2, meet=False)
    dialled, met = threading.Event(), threading.Event()

    async def dial_again(node: Libp2pNode, victim: ID) -> None:
        (address,) = await libp2p_node._resolve(a.host.address)
        while len(node._swarm.live(victim)) < 3:
            await node._swarm.dial_addr(address, victim)
        dialled.set()
        await trio.to_thread.run_sync(met.wait)

    attacking = asyncio.create_task(attack(a, dial_again))
    await asyncio.to_thread(dialled.wait, 30)
    for other in others:
        await other.meet(a)
    await until(lambda: len(a.host.connected) == 3)
    met.set()
    await attacking


async def test_silent_connections_keep_nobody_out(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "ARRIVALS_BURST", 1000.0)  # all the harm that they can do
    (a,) = await members(1, network_key=bytes(32))
    host, port = a.host.address.rsplit(":", 1)
    ended = asyncio.Event()

    async def hold(number: int) -> None:
        while not ended.is_set():
            with suppress(OSError):
                reader, writer = await asyncio.open_connection(host, int(port), local_addr=(f"127.0.1.{1 + number}", 0))
                writer.write(secrets.token_bytes(24))  # as a nonce
                while await reader.read(100):
                    pass
                writer.close()
            await asyncio.sleep(0.05)

    holding = [asyncio.create_task(hold(number % 3)) for number in range(100)]
    await asyncio.sleep(0.5)
    began = time.monotonic()
    (b,) = await members(1, meet=False, network_key=bytes(32))
    await b.meet(a)
    assert time.monotonic() - began < libp2p_swarm.UPGRADE_S  # it waited for none of them to be given up
    ended.set()
    await asyncio.gather(*holding)


# --- requests -----------------------------------------------------------------------------------


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
    await until(lambda: a.host.connected)
    (peer,) = a.host.connected
    try:
        assert await failure(a.host.request(peer, PROTOCOL, b"?", 5)) == reason
    finally:
        asked.set()
        await serving


async def test_who_sends_a_frame_that_is_too_long_is_told_of(members: Members) -> None:
    (a,) = await members(1)

    async def announce(node: Libp2pNode, victim: ID) -> None:
        stream = await open_stream(node, victim)
        await stream.write((STREAM_FRAME_BYTES_MAX + 1).to_bytes(4, "big"))
        await wait_closed(stream, 10)

    await attack(a, announce)
    await until(lambda: len(a.violations) == 1)


async def test_more_requests_than_a_peer_may_have_are_refused_as_busy(members: Members) -> None:
    a, b = await members(2)
    gate = asyncio.Event()

    async def wait(frame: bytes) -> bytes | None:
        await gate.wait()
        return frame

    b.answer = wait
    asked = [asyncio.create_task(a.ask(b, timeout_s=10)) for _ in range(libp2p_streams.REQUESTS_PER_PEER_MAX)]
    await until(lambda: b.answering == libp2p_streams.REQUESTS_PER_PEER_MAX)
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


# --- gossip -------------------------------------------------------------------------------------


async def meshed(*group: Member) -> None:
    """Until what anybody says reaches everybody."""
    for speaker in group:
        probe = secrets.token_bytes(8)

        def heard(probe: bytes = probe, speaker: Member = speaker) -> bool:
            return all(any(payload == probe for _, payload in each.gossip) for each in group if each is not speaker)

        async with asyncio.timeout(60):
            while not heard():
                assert speaker.host.publish(TOPIC, probe)
                await asyncio.sleep(0.1)
    for each in group:
        each.gossip.clear()


async def test_gossip_reaches_everybody_once(members: Members) -> None:
    group = await members(5, meet=False)
    for left, right in pairwise(group):  # a chain: it has to be passed on
        await left.meet(right)
    await meshed(*group)
    payloads = [secrets.token_bytes(30_000) for _ in range(5)]
    for payload in payloads:
        assert group[0].host.publish(TOPIC, payload)
    await until(lambda: all(len(each.gossip) == 5 for each in group[1:]))
    assert sorted(payload for _, payload in group[4].gossip) == sorted(payloads)
    assert {relay for relay, _ in group[4].gossip} == {group[3].peer}  # the neighbour, not the author
    assert group[0].gossip == []


async def test_a_neighbour_that_lost_its_place_in_a_mesh_is_told_of_messages(members: Members) -> None:
    a, b = await members(2)
    await meshed(a, b)
    gossip = a.host._link.node._gossip  # type: ignore[union-attr]
    gossip._add_back_off(ID.from_base58(b.peer), TOPIC, False)
    gossip.mesh[TOPIC].clear()
    assert a.host.publish(TOPIC, b"hello")
    await until(lambda: b.gossip == [(a.peer, b"hello")])
    assert not gossip.mesh[TOPIC]


async def test_a_neighbour_that_subscribes_again_and_again_is_sent_recent_messages_once(
    members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, sent = libp2p_gossip.NodePubsub.write_msg, 0

    async def counted(pubsub: libp2p_gossip.NodePubsub, stream: INetStream, rpc: rpc_pb2.RPC) -> bool:
        nonlocal sent
        sent += len(rpc.publish)
        return await write(pubsub, stream, rpc)

    async def subscribe(node: Libp2pNode, victim: ID) -> None:
        stream = await open_stream(node, victim, "/meshsub/1.1.0")
        for number in range(300):
            options = rpc_pb2.RPC.SubOpts(subscribe=bool(number % 2), topicid=TOPIC)
            await stream.write(encode_varint_prefixed(rpc_pb2.RPC(subscriptions=[options]).SerializeToString()))
        await stream.write(encode_varint_prefixed(rpc_pb2.RPC(publish=[gossip_message(b"last")]).SerializeToString()))
        while not a.gossip:  # noqa: ASYNC110 (it comes in another thread)
            await trio.sleep(0.02)

    monkeypatch.setattr(libp2p_gossip.NodePubsub, "write_msg", counted)
    (a,) = await members(1)
    attacking, published = asyncio.create_task(attack(a, subscribe)), 0
    while not attacking.done():
        published += a.host.publish(TOPIC, secrets.token_bytes(8))
        await asyncio.wait([attacking], timeout=0.1)
    await attacking
    assert 0 < sent <= 2 * published


async def test_a_message_that_cannot_be_sent_is_told_with_its_traceback_and_takes_no_place(
    members: Members, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: object) -> None:
        raise ZeroDivisionError

    (a,) = await members(1, meet=False)
    monkeypatch.setattr(Libp2pNode, "publish", broken)
    assert a.host.publish(TOPIC, b"hello")
    await until(lambda: "a message of gossip was not sent" in caplog.text and a.host._publishing == 0)
    assert "ZeroDivisionError" in caplog.text


async def test_a_burst_is_not_lost(members: Members) -> None:
    a, b = await members(2)
    await meshed(a, b)
    sent = 0
    while sent < 100:
        sent += a.host.publish(TOPIC, sent.to_bytes(4, "big"))
        await asyncio.sleep(0)
    await until(lambda: len(b.gossip) == 100)


def announcement(author: Member, number: int) -> bytes:
    at_ms = time.time_ns() // 1_000_000
    entries = (ResponseEntry(number.to_bytes(32, "big"), at_ms + RESPONSE_TTL_MS),)
    return encode_announcement(
        Announcement(NETWORK, author.key.verify_key.encode(), number, at_ms, entries), author.key
    )


def numbers_heard(member: Member, author: Member) -> list[int]:
    batches = [decode_announcement(payload) for _, payload in member.gossip]
    return [batch.sequence for batch in batches if batch.sender == author.key.verify_key.encode()]


async def test_rubbish_of_strangers_is_not_passed_on_and_costs_a_neighbour_none_of_its_own_announcements(
    members: Members,
) -> None:
    """Who relays for eight strangers that say what doesn't decode is heard, and they are not."""
    gates = [GossipGate(NETWORK, 0) for _ in range(3)]
    a, b, c = [(await members(1, topic=RESPONSE_TOPIC, gate=gate))[0] for gate in gates]
    for gate in gates:
        gate.authors = {each.peer: Standing(Rank.MET, "127.0.0.1") for each in (a, b, c)}
    await a.meet(b, c)
    sent = 0

    def speak() -> list[int]:
        nonlocal sent
        sent += 1
        b.host.publish(RESPONSE_TOPIC, announcement(b, sent))
        return numbers_heard(c, b)

    async def flood(stranger: Member) -> None:
        while True:
            stranger.host.publish(RESPONSE_TOPIC, secrets.token_bytes(100))
            await asyncio.sleep(1 / 40)

    await until(speak)
    strangers = await members(8, meet=False, topic=RESPONSE_TOPIC)
    for stranger in strangers:
        await stranger.meet(b)
    floods = [asyncio.create_task(flood(stranger)) for stranger in strangers]
    try:
        await until(lambda: len(set(b.spoilers)) >= 3)  # the mesh takes no more of them
        first = sent + 1
        for _ in range(40):
            speak()
            await asyncio.sleep(0.1)
        for listener in (a, c):
            await until(lambda: set(range(first, first + 40)) <= set(numbers_heard(listener, b)))  # noqa: B023
            assert len(listener.gossip) == len(numbers_heard(listener, b))
            assert listener.spoilers == []
        assert set(b.spoilers) <= {stranger.peer for stranger in strangers}
    finally:
        for each in floods:
            each.cancel()


async def test_an_authors_flood_is_cut_off_at_its_allowance_and_others_still_pass(members: Members) -> None:
    gate = GossipGate(NETWORK, 0)
    (a,) = await members(1, topic=RESPONSE_TOPIC, gate=gate)
    b, flooder = await members(2, meet=False, topic=RESPONSE_TOPIC)
    gate.authors = {each.peer: Standing(Rank.MET, each.peer) for each in (b, flooder)}
    await a.meet(b, flooder)
    for number in range(1, 10_000):
        flooder.host.publish(RESPONSE_TOPIC, announcement(flooder, number))
        b.host.publish(RESPONSE_TOPIC, announcement(b, number))
        await asyncio.sleep(0.02 if numbers_heard(a, flooder) else 0.1)
        if number > 100 and len(numbers_heard(a, flooder)) > 10 and len(numbers_heard(a, b)) > 10:
            break
    began = time.monotonic()
    for number in range(10_000, 12_000):
        await until(lambda: flooder.host.publish(RESPONSE_TOPIC, announcement(flooder, number)))  # noqa: B023
    b.host.publish(RESPONSE_TOPIC, announcement(b, 20_000))
    await until(lambda: 20_000 in numbers_heard(a, b))
    took_s = time.monotonic() - began
    allowed = GOSSIP_OF_AUTHOR_PER_S * (BURST_S + took_s) + 100
    assert len([number for number in numbers_heard(a, flooder) if number >= 10_000]) <= allowed < 2_000
    assert a.spoilers == []


def test_a_bucket_lets_pass_a_burst_and_then_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    bucket = TokenBucket(10, 20)
    assert [bucket.take(1) for _ in range(21)] == [True] * 20 + [False]
    now += 0.5
    assert [bucket.take(1) for _ in range(6)] == [True] * 5 + [False]
    now += 1000
    assert not bucket.take(21)
    assert bucket.take(20)


# --- DHT ----------------------------------------------------------------------------------------


async def test_providers_are_found_by_any_key_string(members: Members) -> None:
    group = await members(4)
    keys = ("/cache/" + "ab" * 32, "/kv-prefix/" + "cd" * 32 + "/" + "ef" * 32)
    for key in keys:
        assert await group[0].host.provide(key, 5)
        for member in group[1:]:
            peers, cost_ms = await member.host.find_providers(key, 2, 5)
            assert peers == (group[0].peer,)
            assert 0 <= cost_ms < 1000
    assert (await group[0].host.find_providers(keys[0], 2, 5))[0] == ()  # oneself is no provider to oneself
    assert (await group[1].host.find_providers("/cache/unknown", 2, 5))[0] == ()
    (alone,) = await members(1)
    assert not await alone.host.provide(keys[0], 5)
    assert (await alone.host.find_providers(keys[0], 2, 5))[0] == ()


async def test_a_search_dials_whom_it_is_led_to_only_where_it_may(members: Members) -> None:
    """The seeker knows one peer, which knows the one that keeps the record."""
    provider, keeper, middle, seeker = await members(4, meet=False)
    await provider.meet(keeper)
    assert await provider.host.provide("/cache/1", 5)
    await provider.host.disconnect(keeper.peer)
    await middle.meet(keeper)
    await seeker.meet(middle)
    seeker.dials = False
    async with asyncio.timeout(60):
        while not seeker.asked_to_dial:  # peers hear each other's addresses a moment after they have connected
            assert await seeker.host.find_providers("/cache/1", 2, 5) == ((), ANY)
    assert set(seeker.asked_to_dial) == {(keeper.peer, keeper.host.address, "127.0.0.1")}
    assert seeker.host.connected == {middle.peer}
    seeker.dials = True
    async with asyncio.timeout(60):
        while await seeker.host.find_providers("/cache/1", 2, 5) != ((provider.peer,), ANY):
            pass
    assert keeper.peer in seeker.host.connected


async def test_the_dht_passes_on_no_address_that_reaches_less_far_than_where_its_peer_is_connected_from(
    members: Members,
) -> None:
    """A peer at another address of this machine says that it is at 127.0.0.1, to a node whom a third asks."""
    outward = reachable_hosts("0.0.0.0")[0]
    if outward == "127.0.0.1":
        pytest.skip("this machine has no other address than loopback")
    liar, seeker = await members(2, meet=False)
    (middle,) = await members(1, meet=False, listen="0.0.0.0:0")
    _, port = split_address(middle.host.address)
    await liar.host.connect(middle.peer, f"{outward}:{port}", 5)
    await seeker.host.connect(middle.peer, f"127.0.0.1:{port}", 5)
    assert await liar.host.provide("/cache/1", 5)
    store = middle.host._link.node._host.get_peerstore()  # type: ignore[union-attr]
    await until(lambda: all(PROTOCOL in _protocols(store, each) for each in (liar, seeker)))  # they are identified
    assert await seeker.host.find_providers("/cache/1", 2, 5) == ((liar.peer,), ANY)
    assert seeker.asked_to_dial == []
    told = [store.addrs(ID.from_base58(each.peer)) for each in (seeker, liar)]
    assert [len(each) for each in told] == [1, 0]
    assert store.get_peer_record(ID.from_base58(liar.peer)) is None
    providers = middle.host._link.node._dht.provider_store.get_providers(dht_key("/cache/1"))  # type: ignore[union-attr]
    assert [(str(each.peer_id), each.addrs) for each in providers] == [(liar.peer, [])]


def _protocols(store: NodePeerStore, member: Member) -> list[str]:
    with suppress(Exception):
        return list(store.get_protocols(ID.from_base58(member.peer)))
    return []


async def test_nobody_is_dialled_because_a_stream_to_it_is_wanted(members: Members) -> None:
    a, b = await members(2)
    await a.host.disconnect(b.peer)
    await until(lambda: not b.host.connected)
    link = a.host._link
    assert link is not None
    opened: list[BaseException | None] = []

    async def open_stream() -> None:
        try:
            await link.node._host.new_stream(ID.from_base58(b.peer), [TProtocol(PROTOCOL)])
            opened.append(None)
        except Exception as error:
            opened.append(error)

    link.spawn(open_stream)
    await until(lambda: opened)
    assert opened != [None]
    assert a.host.connected == b.host.connected == frozenset()


async def test_providers_are_renewed_and_expire(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = await members(2)
    assert await a.host.provide("/cache/1", 5)
    store = b.host._link.node._dht.provider_store  # type: ignore[union-attr]
    monkeypatch.setattr(libp2p_dht, "PROVIDER_RENEWAL_S", 0)
    store._forget(ID.from_base58(a.peer), dht_key("/cache/1"))
    assert (await b.host.find_providers("/cache/1", 1, 5))[0] == (a.peer,)  # a itself still says so
    renewing = a.host._link.node._dht.provider_store  # type: ignore[union-attr]
    assert await a.host._call(lambda node: _renew(renewing), 5)
    await until(lambda: store.get_providers(dht_key("/cache/1")))
    monkeypatch.setattr(provider_module, "PROVIDER_RECORD_EXPIRATION_INTERVAL", 0)
    store.cleanup_expired()
    assert not store.providers
    assert not store._keys_of


async def _renew(store: libp2p_dht.NodeProviders) -> bool:
    await store.renew()
    return True


async def test_provider_records_are_bounded_by_peer_and_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libp2p_dht, "PROVIDERS_PER_PEER_MAX", 10)
    monkeypatch.setattr(libp2p_dht, "PROVIDERS_MAX", 25)

    async def main() -> None:
        node = Libp2pNode(NodeSettings(SigningKey.generate(), "127.0.0.1:0", None, (), (TOPIC,)), Silent())
        store = node._dht.provider_store
        peers = [ID.from_base58(Member().peer) for _ in range(30)]
        for number in range(1000):
            store.add_provider(number.to_bytes(4, "big"), PeerInfo(peers[0], []))
        assert len(store.providers) == 10
        assert (999).to_bytes(4, "big") in store.providers  # the newest stay
        for number, peer in enumerate(peers):
            for turn in range(8):
                store.add_provider(b"x" + bytes([number, turn]), PeerInfo(peer, []))
        assert sum(len(records) for records in store.providers.values()) == 25
        assert sum(len(keys) for keys in store._keys_of.values()) == store._count == 25
        for peer in peers:
            store.add_provider(b"popular", PeerInfo(peer, []))
        assert len(store.providers[b"popular"]) <= kad_module.BUCKET_SIZE
        assert sum(len(keys) for keys in store._keys_of.values()) == store._count <= 25
        node._pubsub.seen_messages.stop()

    await asyncio.to_thread(trio.run, main)


async def test_what_is_kept_of_peers_is_bounded_and_never_the_nodes_own_key() -> None:
    async def main() -> None:
        node = Libp2pNode(NodeSettings(SigningKey.generate(), "127.0.0.1:0", None, (), (TOPIC,)), Silent())
        store = node._host.get_peerstore()
        addresses = [libp2p_swarm.multiaddr_of("127.0.0.1", port) for port in range(1, 50)]
        for _ in range(libp2p_swarm.PEERS_KEPT_MAX + 100):
            peer = ID(b"\x00\x24\x08\x01\x12\x20" + os.urandom(32))
            store.add_addrs(peer, addresses, 60)
            store.add_protocols(peer, [f"/p/{number}" for number in range(500)])
        assert len(store.peer_ids()) <= libp2p_swarm.PEERS_KEPT_MAX
        assert len(store.addrs(peer)) <= libp2p_swarm.ADDRESSES_PER_PEER_MAX
        assert len(store.get_protocols(peer)) <= libp2p_swarm.PROTOCOLS_PER_PEER_MAX
        assert node._host.get_private_key()
        node._pubsub.seen_messages.stop()

    await asyncio.to_thread(trio.run, main)


# --- garbage, silence, death ---------------------------------------------------------------------


async def test_strangers_without_manners_cost_nothing(members: Members) -> None:
    a, b = await members(2)
    host, port = split_address(a.host.address)
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
        with suppress(OSError), socket.create_connection((host, port), 5) as stranger:
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
    head = libp2p_yamux._HEAD.pack
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
    await until(lambda: a.host.connected == {b.peer})


@pytest.mark.parametrize(("kind", "is_open", "length"), [(0, False, 0), (1, False, 7), (0, True, 0), (1, True, 0)])
async def test_who_sends_frames_for_nothing_is_let_go_and_told_of(
    members: Members, kind: int, is_open: bool, length: int
) -> None:
    a, b = await members(2)

    async def send(node: Libp2pNode, victim: ID) -> None:
        stream = await open_stream(node, victim)
        stream_id = stream.muxed_stream.stream_id if is_open else 99_999  # type: ignore[attr-defined]
        stray = libp2p_yamux._HEAD.pack(0, kind, 0, stream_id, length)
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
    await until(lambda: len(a.violations) == 1)
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


async def test_an_idle_stream_of_the_dht_ends_soon(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libp2p_dht, "DHT_STREAM_S", 600.0)
    (a,) = await members(1)

    async def idle(node: Libp2pNode, victim: ID) -> None:
        await wait_closed(await open_stream(node, victim, "/ipfs/kad/1.0.0"), 60)

    await attack(a, idle)


async def test_idle_streams_of_the_dht_keep_no_peer_out(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libp2p_overrides, "DHT_IDLE_S", 600.0)
    monkeypatch.setattr(libp2p_dht, "DHT_STREAM_S", 600.0)
    monkeypatch.setattr(libp2p_dht, "DHT_STREAMS_MAX", 8)
    monkeypatch.setattr(libp2p_dht, "DHT_STREAMS_OF_STRANGERS_MAX", 8)
    (a,) = await members(1)
    find = DhtMessage(type=DhtMessage.MessageType.FIND_NODE, key=bytes(34)).SerializeToString()
    held = 0

    async def hold(node: Libp2pNode, victim: ID) -> None:
        nonlocal held
        for _ in range(12):
            with suppress(StreamFailure):  # beyond the places
                await open_stream(node, victim, "/ipfs/kad/1.0.0")
        other = Libp2pNode(NodeSettings(SigningKey.generate(), "127.0.0.1:0", None, (), (TOPIC,)), Silent())
        async with other.running():
            await other.connect(a.peer, a.host.address)
            stream = await open_stream(other, victim, "/ipfs/kad/1.0.0")
            await stream.write(bytes([len(find)]) + find)
            assert await read_varint_prefixed_bytes_limited(stream, 100_000)
            held += 1

    await attack(a, hold)
    assert held


async def test_messages_of_the_dht_are_in_the_time_of_who_sends_them(
    members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libp2p_time, "DHT_MESSAGE_S", 0.05)
    (a,) = await members(1)
    count, took_s = 12, 0.0
    find = DhtMessage(type=DhtMessage.MessageType.FIND_NODE, key=bytes(34)).SerializeToString()

    async def ask(node: Libp2pNode, victim: ID) -> None:
        nonlocal took_s
        stream = await open_stream(node, victim, "/ipfs/kad/1.0.0")
        began_s = trio.current_time()
        await stream.write((bytes([len(find)]) + find) * count)
        for _ in range(count):
            await read_varint_prefixed_bytes_limited(stream, 100_000)
        took_s = trio.current_time() - began_s

    await attack(a, ask)
    assert took_s > (count * 0.05 - 2 * libp2p_time.BURST_S) / libp2p_time.PEER_SHARE


class Ignoring(OpenGate):
    """Accepts one message, and counts those that it makes no use of."""

    ignored = 0

    def judge(self, *args: Any) -> Verdict:
        payload: bytes = args[3]
        self.ignored += payload != b"last"
        return Verdict.ACCEPT if payload == b"last" else Verdict.IGNORE


def gossip_message(payload: bytes, number: int = 0) -> rpc_pb2.Message:
    sender = ID.from_base58(peer_id(SigningKey.generate().verify_key.encode()))
    return rpc_pb2.Message(from_id=sender.to_bytes(), data=payload, seqno=bytes([number]), topicIDs=[TOPIC])


def prune() -> rpc_pb2.RPC:
    return rpc_pb2.RPC(control=rpc_pb2.ControlMessage(prune=[rpc_pb2.ControlPrune(topicID=TOPIC)] * 64))


@pytest.mark.parametrize(
    ("price", "items", "rpcs"),
    [
        ("GOSSIP_RPC_S", 12, [rpc_pb2.RPC()] * 12),
        ("GOSSIP_FIELD_S", 12, [rpc_pb2.RPC(publish=[rpc_pb2.Message()] * 12)]),
        ("GOSSIP_MESSAGE_S", 12, [rpc_pb2.RPC(publish=[gossip_message(b"?", number) for number in range(12)])]),
        ("GOSSIP_CONTROL_S", 12, [prune()] * 12),
        ("GOSSIP_CONTROL_S", 12, [rpc_pb2.RPC(subscriptions=[rpc_pb2.RPC.SubOpts(topicid=TOPIC)] * 12)]),
        ("GOSSIP_RECORD_S", 12, [rpc_pb2.RPC(senderRecord=bytes([number])) for number in range(12)]),
    ],
    ids=["RPCs", "empty messages", "ignored messages", "PRUNEs", "subscriptions", "records"],
)
async def test_whatever_gossip_holds_is_in_the_time_of_who_sends_it(
    members: Members, monkeypatch: pytest.MonkeyPatch, price: str, items: int, rpcs: list[rpc_pb2.RPC]
) -> None:
    monkeypatch.setattr(libp2p_time, price, 0.05)
    gate = Ignoring()
    (a,) = await members(1, gate=gate)
    took_s = 0.0

    async def gossip(node: Libp2pNode, victim: ID) -> None:
        nonlocal took_s
        stream = await open_stream(node, victim, "/meshsub/1.1.0")
        began_s = trio.current_time()
        for rpc in (*rpcs, rpc_pb2.RPC(publish=[gossip_message(b"last")])):
            await stream.write(encode_varint_prefixed(rpc.SerializeToString()))
        while not a.gossip:  # noqa: ASYNC110 (it comes in another thread)
            await trio.sleep(0.02)
        took_s = trio.current_time() - began_s

    await attack(a, gossip)
    assert took_s > (items * 0.05 - 2 * libp2p_time.BURST_S) / libp2p_time.PEER_SHARE
    assert gate.ignored == (12 if price == "GOSSIP_MESSAGE_S" else 0)
    assert not a.violations


@pytest.mark.parametrize(
    "rpc",
    [
        b"\x12\x00" * 1000 + b"\x12\x05",
        b"\x12\x00" * (libp2p_gossip.GOSSIP_FIELDS_MAX + 1),
        rpc_pb2.RPC(publish=[rpc_pb2.Message(topicIDs=[""] * libp2p_gossip.GOSSIP_FIELDS_MAX)]).SerializeToString(),
        rpc_pb2.RPC(
            control=rpc_pb2.ControlMessage(
                iwant=[rpc_pb2.ControlIWant(messageIDs=[b""] * libp2p_gossip.GOSSIP_FIELDS_MAX)]
            )
        ).SerializeToString(),
    ],
    ids=["malformed", "messages", "topics", "ids"],
)
async def test_who_sends_an_rpc_that_is_malformed_or_of_too_many_entries_is_let_go_and_told_of(
    members: Members, rpc: bytes
) -> None:
    a, b = await members(2)

    async def gossip(node: Libp2pNode, victim: ID) -> None:
        (conn,) = node._swarm.live(victim)
        stream = await open_stream(node, victim, "/meshsub/1.1.0")
        with suppress(Exception):
            await stream.write(encode_varint_prefixed(rpc))
        with trio.fail_after(20):
            await conn.event_closed.wait()

    await attack(a, gossip)
    await until(lambda: len(a.violations) == 1)
    assert await b.ask(a) == b"?"


def test_the_fullest_honest_rpcs_are_within_the_bound() -> None:
    message = gossip_message(announcement(Member(), 1))
    message.signature, message.key = bytes(64), bytes(36)
    each = rpc_pb2.RPC(publish=[message]).ByteSize()
    wanted = rpc_pb2.RPC(publish=[message] * (libp2p_gossip.GOSSIP_RPC_BYTES_MAX // each)).SerializeToString()
    assert libp2p_gossip.count_fields(wanted) == libp2p_gossip.GOSSIP_RPC_BYTES_MAX // each * 7
    ids = [bytes(46)] * (libp2p_gossip.GOSSIP_RPC_BYTES_MAX // 48 - 2)
    had = rpc_pb2.RPC(
        control=rpc_pb2.ControlMessage(ihave=[rpc_pb2.ControlIHave(topicID=TOPIC, messageIDs=ids)])
    ).SerializeToString()
    assert libp2p_gossip.count_fields(had) == len(ids) + 3
    for rpc in (wanted, had):
        assert libp2p_gossip.GOSSIP_RPC_BYTES_MAX * 0.99 < len(rpc) <= libp2p_gossip.GOSSIP_RPC_BYTES_MAX
        assert libp2p_gossip.count_fields(rpc) <= libp2p_gossip.GOSSIP_FIELDS_MAX
    for malformed in (b"\x12\x05a", b"\x80", b"\x12", b"\x0b", b"\x12\x02\x0a\x05abcdef"):
        with pytest.raises(ParseError):
            libp2p_gossip.count_fields(malformed)


def test_of_a_neighbours_control_messages_one_of_each_topic_is_kept_and_each_id_once() -> None:
    node = libp2p_gossip.NodeGossip(frozenset([TOPIC]), lambda peer: Standing(Rank.MET, ""))
    control = rpc_pb2.ControlMessage(
        graft=[rpc_pb2.ControlGraft(topicID=topic) for topic in (TOPIC, "another") * 20],
        prune=[rpc_pb2.ControlPrune(topicID=TOPIC)] * 20,
        ihave=[rpc_pb2.ControlIHave(topicID=TOPIC, messageIDs=[b"a", b"b"])] * 20,
        iwant=[rpc_pb2.ControlIWant(messageIDs=[b"a", b"b"] * 20)],
    )
    assert node.keep_ours(control) == 4
    assert [entry.topicID for entry in (*control.graft, *control.prune, *control.ihave)] == [TOPIC] * 3
    assert list(control.iwant[0].messageIDs) == [b"a", b"b"]


async def test_a_back_off_ends_in_time_and_is_forgotten_then(monkeypatch: pytest.MonkeyPatch) -> None:
    gossip = libp2p_gossip.NodeGossip(frozenset({TOPIC}), lambda _: Standing(Rank.TOLD, ""))
    peer = ID.from_base58(peer_id(SigningKey.generate().verify_key.encode()))
    control = rpc_pb2.ControlMessage(prune=[rpc_pb2.ControlPrune(topicID=TOPIC, backoff=1 << 62)])
    gossip.keep_ours(control)
    gossip.add_peer(peer, TProtocol("/meshsub/1.1.0"))
    await gossip.handle_prune(control.prune[0], peer)
    gossip.remove_peer(peer)
    gossip.gossip_heartbeat()
    assert gossip._check_back_off(peer, TOPIC)
    later_s = time.time() + libp2p_gossip.BACK_OFF_MAX_S + 1
    monkeypatch.setattr(libp2p_gossip.time, "time", lambda: later_s)
    gossip.gossip_heartbeat()
    assert gossip.back_off == {TOPIC: {}}


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
        with suppress(ConnectionError), socket.create_connection(split_address(a.host.address), 30) as stranger:
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


async def test_a_frozen_peer_costs_its_callers_their_deadline_and_nobody_else_anything(
    members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libp2p_yamux, "PING_S", 0.5)
    monkeypatch.setattr(libp2p_yamux, "SILENCE_S", 10.0)
    group = await members(4)
    a, b = group[0], group[1]
    code = (
        "import asyncio, sys\n"
        "from tests.daemon.libp2p.test_libp2p_host import Member\n"
        "async def main():\n"
        "    member = Member()\n"
        "    await member.host.start()\n"
        "    print(member.peer, member.host.address, flush=True)\n"
        "    await asyncio.to_thread(sys.stdin.read)\n"
        "    await member.host.close()\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        peer, address = (await process.stdout.readline()).decode().split()
        for member in group:
            await member.host.connect(PeerId(peer), address, 10)
        assert await a.host.request(PeerId(peer), PROTOCOL, b"?", 5) == b"?"
        await meshed(*group)
        process.send_signal(signal.SIGSTOP)
        pending = [asyncio.create_task(a.host.request(PeerId(peer), PROTOCOL, bytes(MiB), 5.0)) for _ in range(20)]
        worst = 0.0
        for number in range(50):
            at = time.monotonic()
            assert await a.ask(b) == b"?"
            worst = max(worst, time.monotonic() - at)
            a.host.publish(TOPIC, number.to_bytes(4, "big") + bytes(20_000))
        assert worst < 4
        assert {await failure(call) for call in pending} == {"timeout"}
        await until(lambda: len(b.gossip) == 50)
        assert await a.host.provide("/cache/2", 30)
        at = time.monotonic()
        assert (await b.host.find_providers("/cache/2", 1, 30))[0] == (a.peer,)
        assert (await b.host.find_providers("/cache/3", 1, 30))[0] == ()
        assert time.monotonic() - at < 20
        await until(lambda: all((PeerId(peer), False) in member.changes for member in group))
    finally:
        process.send_signal(signal.SIGCONT)
        process.stdin.close()
        await asyncio.wait_for(process.wait(), 20)


async def test_a_host_whose_thread_died_comes_back_at_its_address(
    members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hyperspace_vllm.daemon.libp2p.libp2p_host.RESTART_S", (0.2,))
    a, b = await members(2)
    address = b.host.address

    async def wait(frame: bytes) -> bytes | None:
        await asyncio.sleep(60)
        return frame

    async def die() -> None:
        raise RuntimeError("a bug in there")

    a.answer = wait
    waiting = asyncio.create_task(b.ask(a, timeout_s=30))
    await until(lambda: a.answering)
    assert b.host._link is not None
    b.host._link.spawn(die)
    assert await failure(waiting) == "unreachable"
    await until(lambda: not a.host.connected and not b.host.connected)
    assert b.changes == [(a.peer, True), (a.peer, False)]

    async with asyncio.timeout(60):
        while b.peer not in a.host.connected:
            with suppress(PeerFailed):
                await a.host.connect(b.peer, address, 5)
            await asyncio.sleep(0.1)
    assert await a.ask(b) == b"?"
    assert b.host.address == address


async def test_connections_that_come_and_go_leave_nothing_behind(members: Members) -> None:
    a, b = await members(2)

    def left(member: Member) -> tuple[int, int, int]:
        node = member.host._link.node  # type: ignore[union-attr]
        gc.collect()
        tasks = sum(len(each.manager._task_nursery.child_tasks) for each in (node._pubsub, node._swarm))
        return tasks, len(node._swarm.sockets), len(node._asker._spare) + len(node._dialling)

    async def come_and_go() -> None:
        await asyncio.gather(a.meet(b), b.meet(a))
        await a.ask(b)
        a.host.publish(TOPIC, secrets.token_bytes(8))
        await asyncio.sleep(0.05)
        await a.host.disconnect(b.peer)
        await until(lambda: not a.host.connected and not connections(b, a))

    for _ in range(3):
        await come_and_go()
    before = left(a), left(b)
    for _ in range(12):
        await come_and_go()
    await until(
        lambda: all(
            now <= was + 2
            for pair in zip((left(a), left(b)), before, strict=True)
            for now, was in zip(*pair, strict=True)
        )
    )


def test_nothing_is_written_to_stderr() -> None:
    code = (
        "import asyncio, socket\n"
        "from tests.daemon.libp2p.test_libp2p_host import Member, failure\n"
        "from hyperspace_vllm.daemon.libp2p.libp2p_node import split_address\n"
        "async def main():\n"
        "    a, b = Member(), Member()\n"
        "    await a.host.start(); await b.host.start()\n"
        "    await a.meet(b)\n"
        "    await failure(a.host.connect(Member().peer, b.host.address, 2))\n"
        "    await failure(a.host.request(b.peer, '/no/such', b'?', 2))\n"
        "    socket.create_connection(split_address(b.host.address)).sendall(bytes(1000))\n"
        "    assert await a.ask(b) == b'?'\n"
        "    await b.host.close(); await a.host.close()\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.decode(), done.stdout.decode()) == (0, "", "")


# --- mDNS ---------------------------------------------------------------------------------------


async def test_nodes_on_one_network_discover_each_other(members: Members) -> None:
    a, b = await members(2, meet=False, mdns=True, network_key=bytes(32))
    (other,) = await members(1, meet=False, mdns=True)
    try:
        await until(lambda: b.peer in a.discovered and a.peer in b.discovered, 20)
    except TimeoutError:
        pytest.skip("no multicast on this machine's loopback")
    assert a.discovered == {b.peer: b.host.address}
    assert other.discovered == {}  # a private network has a name of its own
    assert a.host.connected == frozenset()


def test_only_addresses_of_nodes_are_read_from_a_txt_record() -> None:
    peer = Member().peer
    good = f"/ip4/192.0.2.1/tcp/7000/p2p/{peer}".encode()
    records: dict[bytes, bytes | None] = {
        b"dnsaddr": good,
        b"dnsaddr1": f"/ip6/2001:db8::1/tcp/7000/p2p/{peer}".encode(),
        b"dnsaddr2": None,
        b"dnsaddr3": b"\xff/\xff",
        b"dnsaddr4": f"/ip4/192.0.2.1/udp/7000/p2p/{peer}".encode(),
        b"dnsaddr5": b"/ip4/192.0.2.1/tcp/99999/p2p/" + peer.encode(),
        b"dnsaddr6": b"/ip4/192.0.2.1/tcp/1/p2p/12D3KooWnobody",
        b"other": good,
    }
    assert peers_in(records) == [(peer, "192.0.2.1:7000"), (peer, "[2001:db8::1]:7000")]


def test_a_wildcard_is_announced_as_addresses_that_can_be_dialled() -> None:
    assert reachable_hosts("127.0.0.1") == ["127.0.0.1"]
    assert reachable_hosts("::1") == ["::1"]
    for wildcard in ("0.0.0.0", "::"):
        hosts = reachable_hosts(wildcard)
        assert hosts
        assert wildcard not in hosts


# --- what is overridden -------------------------------------------------------------------------


def test_the_library_is_the_one_that_was_read() -> None:
    """Everything below was found by reading this version; read the next one before changing the number."""
    assert version("libp2p") == "0.8.1"


@pytest.mark.parametrize(
    "ours",
    [
        libp2p_swarm.NodeSwarm,
        libp2p_swarm.NodePeerStore,
        libp2p_swarm.NodeHost,
        libp2p_swarm.NodeTransport,
        libp2p_swarm.NodeUpgrader,
        libp2p_swarm._NoAutoConnector,
        libp2p_dht.NodeDht,
        libp2p_dht.NodeProviders,
        libp2p_dht._ConnectedOnly,
        libp2p_dht._NoValues,
        libp2p_gossip.NodeGossip,
        libp2p_gossip.NodePubsub,
        libp2p_gossip.GossipQueue,
    ],
)
def test_every_overridden_method_is_still_the_librarys(ours: type) -> None:
    new = {
        *("live", "host_of", "drop", "close_sockets", "_has_room", "forget", "_least", "renew", "_tell", "may_pass_on"),
        *("keep_ours", "_take", "_forget", "_ask_closer", "_query", "_walk", "_learn_addresses"),
    }
    for name, value in vars(ours).items():
        if callable(value) and name not in new and not name.startswith("__"):
            assert any(name in vars(base) for base in ours.__mro__[1:]), f"{ours.__name__}.{name} overrides nothing"


async def test_every_default_of_the_library_that_matters_is_set() -> None:
    async def main() -> None:
        node = Libp2pNode(NodeSettings(SigningKey.generate(), "127.0.0.1:0", bytes(32), (), (TOPIC,)), Silent())
        for module in (kad_module, provider_module):
            assert module.QUERY_TIMEOUT == 1.5  # type: ignore[attr-defined]
        assert provider_module.PROVIDER_RECORD_EXPIRATION_INTERVAL == 15 * 60
        assert provider_module.PROVIDER_RECORD_REPUBLISH_INTERVAL == 5 * 60
        dht, gossip, swarm = node._dht, node._gossip, node._swarm
        # Names that the library reads: were they renamed, these would be ours alone and do nothing.
        for name in ("_provider_rate_max", "_inbound_limiter", "value_store", "provider_store", "routing_table"):
            assert f"self.{name}" in _source(kad_module), name
        assert dht._provider_rate_max == libp2p_dht.PROVIDER_MESSAGES_PER_10_S
        assert dht._inbound_limiter.total_tokens == math.inf  # our own bound makes room
        assert not gossip.spam_protection_enabled
        assert not gossip.eclipse_protection_enabled
        assert not gossip.adaptive_gossip_enabled
        assert gossip.heartbeat_interval == 1
        assert swarm.connection_config.max_connections == 64
        assert swarm.retry_config.max_retries == 0
        assert swarm.psk == bytes(32).hex()
        # Noise and our yamux, nothing else: the library's own offer holds plaintext and SECIO.
        assert list(swarm.upgrader.security_multistream.transports) == ["/noise"]
        assert list(swarm.upgrader.muxer_multistream.transports) == ["/yamux/1.0.0"]
        node._pubsub.seen_messages.stop()

    await asyncio.to_thread(trio.run, main)


def _source(module: object) -> str:
    with open(module.__file__) as file:  # type: ignore[attr-defined]
        return file.read()


async def test_windows_are_updated_once_half_of_them_is_used() -> None:
    async def main() -> None:
        sent: list[bytes] = []

        class Wire:
            is_initiator = True

            async def write(self, data: bytes) -> None:
                sent.append(data)

            def get_remote_address(self) -> None: ...

        time = PeerTime(lambda peer: False)
        conn = libp2p_yamux.YamuxConnection(Wire(), ID(b"peer"), time, lambda peer: None)  # type: ignore[arg-type]
        stream = await conn.open_stream()
        conn._frames.clear()
        half = libp2p_yamux.WINDOW_BYTES // 2
        stream.on_data(bytes(half))
        for _ in range(half - 1):
            await stream.read(1)
        assert not conn._frames
        await stream.read(1)
        (update,) = conn._frames
        assert libp2p_yamux._HEAD.unpack(update) == (0, 1, 0, 1, half + libp2p_yamux.WINDOW_BYTES)

    await asyncio.to_thread(trio.run, main)
