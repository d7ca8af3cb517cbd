"""Malicious peers, on real sockets: each greets as an honest node would, and then attacks."""

import asyncio
import secrets
import threading
import time
from pathlib import Path
from typing import Any

import zmq
from nacl.signing import SigningKey
from zmq.utils import z85

from hyperspace_vllm.config import Config
from hyperspace_vllm.core.records.ids import NetworkId, PeerId, network_id, peer_id
from hyperspace_vllm.core.records.limits import PEER_RECORD_TTL_MS, MiB
from hyperspace_vllm.core.records.peer_record import PeerRecord
from hyperspace_vllm.core.records.peer_wire import (
    CACHE_PROTOCOL,
    PEERS_PROTOCOL,
    Greet,
    Greeting,
    PeerAnswer,
    PeerRequest,
    Ping,
    Pong,
    Refusal,
    decode_answer,
    decode_request,
    encode,
    protocol_of,
)
from hyperspace_vllm.core.records.rank import Tier
from hyperspace_vllm.core.records.signing import NO_MEMBER_TAG, member_tag
from hyperspace_vllm.daemon.identity import curve_public_of
from hyperspace_vllm.daemon.libp2p.libp2p_host import Libp2pHost
from tests.support.network_nodes import NetworkedNode, memory_bytes
from tests.support.until import until

NETWORK = NetworkId(network_id("default"))


def victim(directory: Path, **settings: Any) -> NetworkedNode:
    """A node process that has joined (alone, unless `settings` say otherwise)."""
    directory.mkdir(mode=0o700)
    defaults: dict[str, Any] = {"data_dir": directory, "kv_cache": False, "arena_bytes": MiB}
    node = NetworkedNode(Config(**(defaults | settings)))
    until(lambda: node.card().get("p2p"), 600)
    return node


def write_network_key(path: Path) -> bytes:
    key = secrets.token_bytes(32)
    path.touch(0o600)
    path.write_text(key.hex())
    return key


def address_of(node: NetworkedNode) -> tuple[PeerId, str]:
    card = node.card()
    return PeerId(card["peer_id"]), card["p2p"]


class Stranger:
    """One identity with a real libp2p host. With the network key it is a member all the same."""

    def __init__(self, network_key: bytes | None = None) -> None:
        self.key = SigningKey.generate()
        self.public_key = self.key.verify_key.encode()
        self.peer = peer_id(self.public_key)
        self._network_key = network_key
        protocols = (CACHE_PROTOCOL, PEERS_PROTOCOL)
        self.host = Libp2pHost(self.key, "127.0.0.1:0", network_key, False, protocols, (), self)

    async def __aenter__(self) -> "Stranger":
        await self.host.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.host.close()

    async def join(self, node: NetworkedNode) -> PeerAnswer:
        """Connect and greet."""
        peer, address = address_of(node)
        await self.host.connect(peer, address, 30)
        return await self.ask(peer, Greet(self._record()))

    async def ask(self, peer: PeerId, message: PeerRequest, timeout_s: float = 30) -> PeerAnswer:
        return decode_answer(await self.host.request(peer, protocol_of(message), encode(message), timeout_s))

    def _record(self) -> bytes:
        now_ms = time.time_ns() // 1_000_000
        tag = member_tag(self._network_key, self.public_key) if self._network_key else NO_MEMBER_TAG
        expires_at_ms, address = now_ms + PEER_RECORD_TTL_MS, self.host.address
        return (
            PeerRecord(NETWORK, self.public_key, now_ms, expires_at_ms, address, member_tag=tag).sign(self.key).encode()
        )

    # --- libp2p_host.HostHandler ----------------------------------------------------------------

    async def on_request(self, peer: PeerId, protocol: str, frame: bytes) -> bytes | None:
        match decode_request(frame):
            case Ping():
                return encode(Pong())
            case Greet():
                return encode(Greeting(self._record()))
        return encode(Refusal("busy"))

    def on_gossip(self, topic: str, relay: PeerId, payload: bytes) -> None: ...

    def on_gossip_spoiled(self, relay: PeerId) -> None: ...

    def on_connected(self, peer: PeerId, host: str) -> None: ...

    def on_disconnected(self, peer: PeerId) -> None: ...

    def on_violation(self, peer: PeerId) -> None: ...

    def tier(self, peer: PeerId) -> Tier:
        return Tier.STRANGER

    def on_discovered(self, peer: PeerId, address: str, told_from: str) -> None: ...

    def may_dial(self, peer: PeerId, address: str, told_from: str) -> bool:
        return False


class Flood(threading.Thread):
    """Sends messages of very many frames, to a server or from one: 400 MiB each, in frames of `frame_bytes`."""

    MESSAGE_BYTES = 400 * MiB

    def __init__(self, key: SigningKey, frame_bytes: int, server: NetworkedNode | None = None) -> None:
        super().__init__(daemon=True)
        self._context = zmq.Context()
        self._frame = bytes(frame_bytes)  # one buffer, sent repeatedly
        self._ended = threading.Event()
        made = self._socket = self._context.socket(zmq.DEALER)
        made.setsockopt(zmq.LINGER, 0)
        made.setsockopt(zmq.SNDHWM, 1)
        made.setsockopt(zmq.CURVE_SECRETKEY, z85.encode(key.to_curve25519_private_key().encode()))
        self._monitor = made.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        if server is None:
            made.setsockopt(zmq.CURVE_SERVER, 1)
            self.port = made.bind_to_random_port("tcp://127.0.0.1")
        else:
            made.setsockopt(zmq.CURVE_PUBLICKEY, z85.encode(key.verify_key.to_curve25519_public_key().encode()))
            made.setsockopt(zmq.CURVE_SERVERKEY, curve_public_of(server.card()["peer_id"]))
            made.connect(f"tcp://{server.card()['endpoint']}")

    def connected(self) -> bool:
        """Whether the other side has accepted it since the last call."""
        if not self._monitor.poll(0):
            return False
        self._monitor.recv_multipart()
        return True

    def run(self) -> None:
        while not self._ended.is_set():
            if not self._socket.poll(100, zmq.POLLOUT):
                continue
            for _ in range(self.MESSAGE_BYTES // max(len(self._frame), 64)):
                self._socket.send(self._frame, zmq.SNDMORE, copy=False)
            self._socket.send(b"end")
        self._socket.disable_monitor()
        self._socket.close()
        self._context.destroy(linger=0)

    def stop(self) -> None:
        self._ended.set()
        self.join(60)


async def growth_bytes(node: NetworkedNode, for_s: float, enough: int) -> int:
    """The growth of a node's memory within `for_s` seconds; returns early once it is `enough`."""
    before, most, until_s = memory_bytes(node.process.pid), 0, time.monotonic() + for_s
    while time.monotonic() < until_s and most < enough:
        most = max(most, memory_bytes(node.process.pid) - before)
        await asyncio.sleep(0.02)
    return most
