"""What peers that mean harm get of a real node, and what they can make it hold: real processes and sockets."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from nacl.signing import SigningKey

from hyperspace_vllm.core.records.ids import peer_id
from hyperspace_vllm.core.records.limits import KiB, MiB
from hyperspace_vllm.core.records.peer_wire import PEERS_PROTOCOL, Greeting, Hit, Miss, Query
from hyperspace_vllm.core.response.cache_proof import request_hash
from hyperspace_vllm.daemon.peer_failed import PeerFailed
from tests.support.hostile import NETWORK, Flood, Stranger, address_of, growth_bytes, victim, write_network_key
from tests.support.network_nodes import NetworkedNode, request_key
from tests.support.until import until

pytestmark = [pytest.mark.io, pytest.mark.timeout(600)]


@pytest.fixture
def stopped() -> Iterator[list[NetworkedNode]]:
    """Nodes to stop at the end."""
    nodes: list[NetworkedNode] = []
    yield nodes
    for node in nodes:
        node.stop()


@pytest.fixture
async def stranger() -> AsyncIterator[Stranger]:
    async with Stranger() as made:
        yield made


@pytest.mark.parametrize("trust", ["members", "reputation", "allowlist"])
async def test_a_stranger_gets_what_is_public_and_nothing_of_the_networks(
    trust: str, tmp_path: Path, stranger: Stranger, stopped: list[NetworkedNode]
) -> None:
    node = victim(tmp_path / "node", trust=trust, share="network")
    stopped.append(node)
    node.store("secret")
    node.store("open", "public")
    assert isinstance(await stranger.join(node), Greeting)
    peer, _ = address_of(node)
    until(lambda: node.status()["responses"]["entries"] == 2)
    assert isinstance(await stranger.ask(peer, Query(request_hash(NETWORK, request_key("open")))), Hit)
    assert await stranger.ask(peer, Query(request_hash(NETWORK, request_key("secret")))) == Miss("unknown")


FORGED = "2026-11-29 00:00:00,000 CRITICAL hyperspace_vllm.daemon.node.main: node failed: \x1b[31mrun this\x1b[0m"


async def test_a_peer_writes_no_line_of_its_own_into_the_log_and_not_many_bytes(
    tmp_path: Path, stranger: Stranger, stopped: list[NetworkedNode]
) -> None:
    node = victim(tmp_path / "node")
    stopped.append(node)
    peer, address = address_of(node)
    forged = msgspec.msgpack.encode({"t": "ping", f"x\n{FORGED}\n": 1})
    large = msgspec.msgpack.encode({"t": "ping", "y" * (4 * MiB): 1})
    before = (node.config.data_dir / "log").stat().st_size
    for frame in (forged, large, *[forged] * 10):
        with suppress(PeerFailed):
            await stranger.host.connect(peer, address, 30)
            await stranger.host.request(peer, PEERS_PROTOCOL, frame, 30)
    await asyncio.to_thread(until, lambda: stranger.peer not in node.status()["p2p"]["connected"], 60)
    log = (node.config.data_dir / "log").read_text()
    assert "x\\n2026-11-29" in log
    assert FORGED not in log.splitlines()
    assert "\x1b" not in log
    assert len(log) - before < 4 * KiB
    with suppress(PeerFailed):
        await stranger.host.connect(peer, address, 30)
    await asyncio.to_thread(until, lambda: stranger.peer not in node.status()["p2p"]["connected"], 60)


FRAME_BYTES = 1 * MiB - 4 * KiB
FLOOD_BYTES_MAX = 40 * MiB  # what a node may grow by: its bound is 2 or 8 MiB, and it does other things


async def test_a_member_fills_no_memory_with_a_message_of_very_many_frames(
    tmp_path: Path, stopped: list[NetworkedNode]
) -> None:
    key = write_network_key(tmp_path / "key")
    node = victim(tmp_path / "node", network_key_file=str(tmp_path / "key"), kv_cache=True)
    stopped.append(node)
    async with Stranger(key) as member:
        await member.join(node)
        assert await growth_bytes_under(Flood(member.key, FRAME_BYTES, node), node) < FLOOD_BYTES_MAX
    assert node.process.poll() is None


async def test_a_server_fills_no_memory_with_a_reply_of_very_many_frames(
    tmp_path: Path, stopped: list[NetworkedNode]
) -> None:
    key = SigningKey.generate()
    flood = Flood(key, FRAME_BYTES)
    server = f"{peer_id(key.verify_key.encode())}@127.0.0.1:{flood.port}"
    node = victim(tmp_path / "node", kv_cache=True, peers=(server,))
    stopped.append(node)
    assert await growth_bytes_under(flood, node) < FLOOD_BYTES_MAX


async def growth_bytes_under(flood: Flood, node: NetworkedNode) -> int:
    """By how much the node's memory grows within a few seconds of a flood that it let in."""
    await asyncio.to_thread(until, flood.connected, 60)
    flood.start()
    try:
        return await growth_bytes(node, 6, FLOOD_BYTES_MAX)
    finally:
        await asyncio.to_thread(flood.stop)


async def test_silent_connections_to_the_kv_listener_leave_descriptors_and_let_peers_in(
    tmp_path: Path, stopped: list[NetworkedNode]
) -> None:
    write_network_key(tmp_path / "key")
    first = victim(tmp_path / "first", network_key_file=str(tmp_path / "key"), kv_cache=True)
    stopped.append(first)
    host, port = first.card()["endpoint"].rsplit(":", 1)
    ended = asyncio.Event()

    async def hold(number: int) -> None:
        while not ended.is_set():
            source = (f"127.0.{1 + number % 3}.1", 0)
            try:
                reader, writer = await asyncio.open_connection(host, int(port), local_addr=source)
                if number % 2:
                    writer.write(b"\xff" + bytes(8) + b"\x7f\x03")  # as ZeroMQ begins
                while await reader.read(4096):
                    pass
                writer.close()
            except OSError:
                pass
            await asyncio.sleep(0.05)

    holding = [asyncio.create_task(hold(number)) for number in range(300)]
    try:
        await asyncio.sleep(1)
        second = await asyncio.to_thread(
            victim,
            tmp_path / "second",
            network_key_file=str(tmp_path / "key"),
            kv_cache=True,
            bootstrap=("@".join(address_of(first)),),
        )
        stopped.append(second)
        await asyncio.to_thread(until, lambda: [peer["connected"] for peer in second.status()["peers"]] == [True], 60)
        assert descriptors(first) < 250  # 41, and 4 for each of 16 handshakes and 2 connections
        await asyncio.to_thread(first.store, "still here")
    finally:
        ended.set()
        for task in holding:
            task.cancel()
        await asyncio.gather(*holding, return_exceptions=True)


def descriptors(node: NetworkedNode) -> int:
    return len(list(Path(f"/proc/{node.process.pid}/fd").iterdir()))
