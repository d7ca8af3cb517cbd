"""Connections, requests and deaths of the libp2p host, over real sockets."""

import asyncio
import gc
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import pytest
import trio
from libp2p.peer.id import ID

from hyperspace_vllm.core.peers import slots
from hyperspace_vllm.core.records.ids import PeerId
from hyperspace_vllm.core.records.limits import MiB
from hyperspace_vllm.daemon.libp2p import (
    libp2p_node,
    libp2p_swarm,
    libp2p_yamux,
)
from hyperspace_vllm.daemon.libp2p.libp2p_node import Libp2pNode
from hyperspace_vllm.daemon.peer_failed import PeerFailed
from tests.support.libp2p_members import PROTOCOL, TOPIC, Member, Members, attack, failure, meshed
from tests.support.until import until_async

pytestmark = pytest.mark.io


def connections(member: Member, other: Member) -> int:
    link = member.host._link
    return len(link.node._swarm.live(ID.from_base58(other.peer))) if link is not None else 0


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
    assert a.hosts == {b.peer: "127.0.0.1"}
    assert b.hosts == {a.peer: "127.0.0.1"}
    await a.host.disconnect(b.peer)
    await until_async(lambda: not b.host.connected)


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
        await until_async(lambda: connections(a, b) == connections(b, a) > 0)
        await (a if turn % 2 else b).host.disconnect((b if turn % 2 else a).peer)
        await until_async(lambda: not a.host.connected and not b.host.connected)
    assert a.changes == [(b.peer, True), (b.peer, False)] * 5
    assert b.changes == [(a.peer, True), (a.peer, False)] * 5


async def test_a_closed_host_is_noticed_and_gives_its_port_back(members: Members) -> None:
    a, b = await members(2)
    began = time.monotonic()
    await b.host.close()
    assert time.monotonic() - began < 10
    await until_async(lambda: not a.host.connected)
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
    await until_async(lambda: not a.host.connected)
    others = await members(6, meet=False)
    for other in others:  # one after another: of those that come at once fewer may be left
        with suppress(Exception):
            await other.meet(a)
        assert len(a.host.connected) <= 4
    await until_async(lambda: sum(bool(other.host.connected) for other in others) == len(a.host.connected) == 4)


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
    await until_async(lambda: len(a.host.connected) == 3)
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


async def test_a_frozen_peer_costs_its_callers_their_deadline_and_nobody_else_anything(
    members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libp2p_yamux, "PING_S", 0.5)
    monkeypatch.setattr(libp2p_yamux, "SILENCE_S", 10.0)
    group = await members(4)
    a, b = group[0], group[1]
    code = (
        "import asyncio, sys\n"
        "from tests.support.libp2p_members import Member\n"
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
        await until_async(lambda: len(b.gossip) == 50)
        assert await a.host.provide("/cache/2", 30)
        at = time.monotonic()
        assert (await b.host.find_providers("/cache/2", 1, 30))[0] == (a.peer,)
        assert (await b.host.find_providers("/cache/3", 1, 30))[0] == ()
        assert time.monotonic() - at < 20
        await until_async(lambda: all((PeerId(peer), False) in member.changes for member in group))
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
    await until_async(lambda: a.answering)
    assert b.host._link is not None
    b.host._link.spawn(die)
    assert await failure(waiting) == "unreachable"
    await until_async(lambda: not a.host.connected and not b.host.connected)
    assert b.changes == [(a.peer, True), (a.peer, False)]

    async def connected() -> bool:
        with suppress(PeerFailed):
            await a.host.connect(b.peer, address, 5)
        return b.peer in a.host.connected

    await until_async(connected)
    assert await a.ask(b) == b"?"
    assert b.host.address == address


async def test_connections_that_come_and_go_leave_nothing_behind(members: Members) -> None:
    a, b = await members(2)

    def left(member: Member) -> tuple[int, int, int]:
        node = member.host._link.node  # type: ignore[union-attr]
        gc.collect()
        managers: list[Any] = [node._pubsub.manager, node._swarm.manager]
        tasks = sum(len(each._task_nursery.child_tasks) for each in managers)
        sockets = len(node._swarm._accepted) + len(node._swarm.tcp.sockets)
        return tasks, sockets, len(node._asker._spare) + len(node._dialling)

    async def come_and_go() -> None:
        await asyncio.gather(a.meet(b), b.meet(a))
        await a.ask(b)
        a.host.publish(TOPIC, secrets.token_bytes(8))
        await asyncio.sleep(0.05)
        await a.host.disconnect(b.peer)
        await until_async(lambda: not a.host.connected and not connections(b, a))

    for _ in range(3):
        await come_and_go()
    before = left(a), left(b)
    for _ in range(12):
        await come_and_go()
    await until_async(
        lambda: all(
            now <= was + 2
            for pair in zip((left(a), left(b)), before, strict=True)
            for now, was in zip(*pair, strict=True)
        )
    )


def test_nothing_is_written_to_stderr() -> None:
    code = (
        "import asyncio, socket\n"
        "from dataclasses import astuple\n"
        "from tests.support.libp2p_members import Member, failure\n"
        "from hyperspace_vllm.core.records.endpoint import Endpoint\n"
        "async def main():\n"
        "    a, b = Member(), Member()\n"
        "    await a.host.start(); await b.host.start()\n"
        "    await a.meet(b)\n"
        "    await failure(a.host.connect(Member().peer, b.host.address, 2))\n"
        "    await failure(a.host.request(b.peer, '/no/such', b'?', 2))\n"
        "    socket.create_connection(astuple(Endpoint.parse(b.host.address))).sendall(bytes(1000))\n"
        "    assert await a.ask(b) == b'?'\n"
        "    await b.host.close(); await a.host.close()\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.decode(), done.stdout.decode()) == (0, "", "")
