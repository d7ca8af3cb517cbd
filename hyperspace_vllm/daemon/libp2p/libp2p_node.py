"""The trio side of the libp2p host: assembles py-libp2p's parts, and offers the calls on them.

Runs inside the host's thread (libp2p_host.py); everything here is trio. Every wait has a deadline, except the one for
the end.
"""

import ipaddress
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import ifaddr
import trio
from libp2p import generate_peer_id_from
from libp2p.abc import INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as new_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.validators import signature_validator
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from multiaddr import Multiaddr
from nacl.signing import SigningKey

from ...core.peers.gossip_gate import GossipGate, Verdict
from ...core.records.endpoint import Endpoint
from ...core.records.errors import ProtocolViolation
from ...core.records.ids import NetworkId, PeerId, public_key_of, sha256
from ...core.records.limits import PEER_CONNECTIONS_MAX
from ...core.records.peer_wire import Expected
from ...core.records.rank import Tier
from ...core.records.reason import Reason
from .. import clock
from ..peer_failed import PeerFailed
from . import libp2p_swarm as swarm
from .libp2p_dht import NodeDht
from .libp2p_gossip import NodeGossip, NodePubsub
from .libp2p_overrides import patch_library, running
from .libp2p_streams import Answerer, StreamClient
from .libp2p_swarm import NodeHost, NodePeerStore, NodeSwarm, NodeUpgrader, address_of, multiaddr_of
from .libp2p_time import Account, PeerTime, answer_s
from .libp2p_yamux import PROTOCOL as YAMUX
from .libp2p_yamux import YamuxConnection

logger = logging.getLogger(__name__)

_SHA2_256 = b"\x12\x20"  # multihash: code and length


@dataclass(frozen=True)
class NodeSettings:
    """What defines a node: see `Libp2pHost`."""

    signing_key: SigningKey
    listen: str
    network_key: bytes | None
    protocols: tuple[str, ...]
    topics: tuple[str, ...]
    gate: GossipGate | None = None  # without one no author is known, and no gossip received


class NodeEvents(Protocol):
    """What a node reports; called in the trio thread, must not block."""

    async def answer(self, peer: PeerId, protocol: str, frame: bytes) -> bytes | None: ...
    def gossip(self, topic: str, relay: PeerId, payload: bytes) -> None: ...
    def gossip_spoiled(self, relay: PeerId) -> None: ...
    async def may_dial(self, peer: PeerId, address: str, told_from: str) -> bool: ...
    def violated(self, peer: PeerId) -> None: ...
    def tier(self, peer: PeerId) -> Tier: ...
    def peer_changed(self, peer: PeerId, host: str | None) -> None: ...  # None: it has disconnected


def dht_key(key: str) -> bytes:
    """The multihash (sha2-256) that a key string of any length has in the DHT: a CID can name it."""
    return _SHA2_256 + sha256(key.encode())


def reachable_hosts(host: str) -> list[str]:
    """Where a node that listens on `host` can be dialled: for a wildcard, a few of the machine's own addresses."""
    address = ipaddress.ip_address(host)
    if not address.is_unspecified:
        return [host]
    found = []
    for adapter in ifaddr.get_adapters():
        for each in adapter.ips:
            own = ipaddress.ip_address(each.ip if isinstance(each.ip, str) else each.ip[0])
            if not own.is_loopback and not own.is_link_local and (own.version == 4 or address.version == 6):
                found.append(str(own))
    return found[: swarm.ADDRESSES_PER_PEER_MAX] or ["::1" if address.version == 6 else "127.0.0.1"]


async def _resolve(address: str) -> list[Multiaddr]:
    endpoint = Endpoint.parse(address)
    found = await trio.socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    hosts = dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found)
    return [multiaddr_of(each, endpoint.port) for each in list(hosts)[: swarm.ADDRESSES_PER_PEER_MAX]]


class Libp2pNode:
    """A running node. All methods are for the trio thread."""

    def __init__(self, settings: NodeSettings, events: NodeEvents) -> None:
        patch_library()
        self._events = events
        key_pair = create_new_key_pair(settings.signing_key.encode())
        own_id = generate_peer_id_from(key_pair)
        self._own_id = own_id
        topics = frozenset(settings.topics)
        store = NodePeerStore(
            lambda peer_id: peer_id == own_id or bool(self._swarm.live(peer_id)),
            lambda peer_id: None if peer_id == own_id else self._swarm.host_of(peer_id),
        )
        store.add_key_pair(own_id, key_pair)
        self._time = PeerTime(self._tier)
        self._swarm = NodeSwarm(
            own_id,
            store,
            NodeUpgrader(
                self._time,
                self._on_violation,
                {NOISE: NoiseTransport(key_pair, noise_privkey=new_noise_key_pair().private_key)},
                {TProtocol(YAMUX): YamuxConnection},
                swarm.NEGOTIATION_S,
            ),
            self._on_peer,
            self._admit,
            retry_config=RetryConfig(max_retries=0),
            connection_config=_connection_config(),
            psk=settings.network_key.hex() if settings.network_key is not None else None,
        )
        self._host = NodeHost(
            self._swarm,
            self._identified,
            negotiate_timeout=swarm.NEGOTIATION_S,
            disable_identify_address_discovery=True,
            addrs_factory=_announced,
        )
        # One failing inbound stream must not end the connection, let alone the host.
        self._swarm.set_stream_handler(_guarded(self._host._swarm_stream_handler))
        self._dht = NodeDht(self._host, self._dial_told, self._tier)
        self._gate = settings.gate or GossipGate(NetworkId(bytes(32)), clock.now())
        self._gossip = NodeGossip(topics, lambda peer_id: self._gate.acquaintance(PeerId(peer_id.to_base58())))
        self._pubsub = NodePubsub(self._host, self._gossip, topics, self._judge, self._on_message)
        self._topics = settings.topics
        self._listen = settings.listen
        self._asker = StreamClient(self._host, lambda peer_id: bool(self._swarm.live(peer_id)))
        self._answerer = Answerer(self._on_request, self._on_violation, self._spend, self._tier)
        self._dialling: dict[ID, trio.Lock] = {}
        for protocol in settings.protocols:
            self._host.set_stream_handler(TProtocol(protocol), partial(self._answerer.serve, protocol=protocol))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        """Run until the block ends; yields the address it listens on. OSError when that is taken."""
        try:
            async with AsyncExitStack() as stack:
                # Before the swarm: a peer that connects at once would find no pubsub, and would not be noticed later.
                await stack.enter_async_context(running(self._pubsub))
                await stack.enter_async_context(running(self._gossip))
                await stack.enter_async_context(running(self._swarm))
                wanted = Endpoint.parse(self._listen)
                if not await self._swarm.listen(multiaddr_of(wanted.host, wanted.port)):
                    raise self._swarm.tcp.listen_error or OSError(f"cannot listen on {self._listen}")
                await stack.enter_async_context(running(self._dht))
                for topic in self._topics:
                    await self._pubsub.subscribe(topic)
                (bound,) = self._host.get_transport_addrs()
                yield str(Endpoint(wanted.host, int(bound.value_for_protocol("tcp"))))
        finally:
            self._pubsub.seen_messages.stop()
            self._swarm.close_sockets()

    async def connect(self, peer: PeerId, address: str) -> None:
        """Dial, unless connected; PeerFailed(unreachable), also when another peer answers there."""
        peer_id = ID.from_base58(peer)
        lock = self._dialling.setdefault(peer_id, trio.Lock())
        try:
            async with lock:
                if not self._swarm.live(peer_id):
                    await self._dial(peer_id, address)
        finally:
            if not lock.locked():
                self._dialling.pop(peer_id, None)

    async def _dial(self, peer_id: ID, address: str) -> None:
        try:
            candidates = await _resolve(address)
        except (OSError, ValueError, UnicodeError) as error:
            raise PeerFailed(Reason.UNREACHABLE) from error
        for candidate in candidates:
            with suppress(SwarmException):
                # Not host.connect(): it takes at least 250 ms, and refuses for a minute after one failure.
                await self._swarm.dial_addr(candidate, peer_id)
                self._host.get_peerstore().add_addrs(peer_id, [candidate], 0)
                return
        raise PeerFailed(Reason.UNREACHABLE)

    async def _dial_told(self, peer_id: ID, addresses: list[Multiaddr], told_from: str) -> bool:
        """Dial a peer that an answer from `told_from` names, at the first of its addresses that the core permits."""
        peer = PeerId(peer_id.to_base58())
        for each in addresses if _is_node(peer) else []:
            if not self._swarm.tcp.can_dial(each):
                continue
            address = address_of(each)
            if await self._events.may_dial(peer, address, told_from):
                with suppress(PeerFailed):
                    await self.connect(peer, address)
                    return True
                return False
        return False

    async def disconnect(self, peer: PeerId) -> None:
        """End every connection to a peer."""
        peer_id = ID.from_base58(peer)
        for conn in self._swarm.drop(peer_id):
            await conn.event_closed.wait()

    async def request(self, peer: PeerId, protocol: str, frame: bytes, expected: Expected) -> bytes:
        """A peer's answer, which takes of the peer's time as a request of its own does; PeerFailed."""
        peer_id = ID.from_base58(peer)
        held_s, began_s = self._held_s(peer_id), trio.current_time()
        account = self._account(peer_id)
        try:
            answer = await self._asker.ask(peer_id, protocol, frame, expected.bytes_max)
            await account.spend(answer_s(len(answer), expected.records_max))
            return answer
        except trio.Cancelled:
            if self._held_s(peer_id) - held_s > (trio.current_time() - began_s) / 2:
                raise PeerFailed(Reason.BUSY) from None  # busy with other peers: the answer may be here unread
            raise

    def _held_s(self, peer_id: ID) -> float:
        return max((conn.muxed_conn.held_s for conn in self._swarm.live(peer_id)), default=0.0)  # type: ignore[attr-defined]

    async def publish(self, topic: str, payload: bytes) -> None:
        """Send to the topic's mesh."""
        await self._pubsub.publish(topic, payload)

    async def provide(self, key: str) -> bool:
        """Become a provider of a key; returns whether any peer was told."""
        return await self._dht.provider_store.provide(dht_key(key))

    async def find_providers(self, key: str, count: int) -> tuple[tuple[PeerId, ...], float]:
        """The providers of a key, and the search's cost in milliseconds of this thread's CPU time."""
        began = time.thread_time()
        found = await self._dht.provider_store.find_providers(dht_key(key), count)
        peers = tuple(PeerId(info.peer_id.to_base58()) for info in found)
        return tuple(peer for peer in peers if _is_node(peer)), (time.thread_time() - began) * 1000

    async def _admit(self, peer_id: ID) -> None:
        # Added before identify has confirmed it: all our nodes serve the DHT, and others are removed later.
        with trio.move_on_after(1):
            await self._dht.add_peer(peer_id, skip_server_mode_check=True)

    async def _identified(self, peer_id: ID) -> None:
        # A peer that doesn't speak the DHT's protocol leaves the routing table.
        if not await self._dht.add_peer(peer_id):
            self._dht.routing_table.remove_peer(peer_id)

    def _on_peer(self, peer_id: ID, connected: bool) -> None:
        if not connected:
            self._asker.forget(peer_id)
            self._pubsub.forget(peer_id)
            self._gate.forget(PeerId(peer_id.to_base58()))
            self._dht.routing_table.remove_peer(peer_id)
        peer = PeerId(peer_id.to_base58())
        if _is_node(peer):
            self._events.peer_changed(peer, self._swarm.host_of(peer_id) if connected else None)

    def _judge(self, link: ID, msg: rpc_pb2.Message) -> bool:
        relay, author = PeerId(link.to_base58()), PeerId(ID(msg.from_id).to_base58())
        verdict = self._gate.judge(
            relay, msg.topicIDs[0], author, msg.data, lambda: signature_validator(msg), clock.now()
        )
        if verdict is Verdict.MUTE:
            self._events.gossip_spoiled(relay)
        return verdict is Verdict.ACCEPT

    def _on_message(self, topic: str, relay: ID, payload: bytes) -> None:
        self._events.gossip(topic, PeerId(relay.to_base58()), payload)

    def _on_violation(self, peer_id: ID) -> None:
        peer = PeerId(peer_id.to_base58())
        if _is_node(peer):
            self._events.violated(peer)

    def _tier(self, peer: PeerId) -> Tier:
        return self._events.tier(peer) if _is_node(peer) else Tier.STRANGER

    async def _spend(self, peer_id: ID, cost_s: float) -> None:
        await self._account(peer_id).spend(cost_s)

    def _account(self, peer_id: ID) -> Account:
        return self._time.account(PeerId(peer_id.to_base58()), self._swarm.host_of(peer_id))

    async def _on_request(self, peer_id: ID, protocol: str, frame: bytes) -> bytes | None:
        peer = PeerId(peer_id.to_base58())
        return await self._events.answer(peer, protocol, frame) if _is_node(peer) else None


def _announced(bound: list[Multiaddr]) -> list[Multiaddr]:
    announced = []
    for each in bound:
        host = each.value_for_protocol(each.protocols()[0].name)
        announced += [multiaddr_of(own, int(each.value_for_protocol("tcp"))) for own in reachable_hosts(host)]
    return announced


def _is_node(peer: PeerId) -> bool:
    # Other libp2p peers may have keys of other kinds; our nodes don't.
    try:
        public_key_of(peer)
    except ProtocolViolation:
        return False
    return True


def _guarded(handle: Callable[[INetStream], Awaitable[None]]) -> Callable[[INetStream], Awaitable[None]]:
    async def guarded(stream: INetStream) -> None:
        try:
            await handle(stream)
        except Exception as error:
            logger.debug("stream of %s failed: %r", stream.muxed_conn.peer_id, error)
            with suppress(Exception):
                await stream.reset()

    return guarded


def _connection_config() -> ConnectionConfig:
    return ConnectionConfig(
        max_connections=PEER_CONNECTIONS_MAX,
        min_connections=0,
        low_watermark=0,
        high_watermark=PEER_CONNECTIONS_MAX,
        max_connections_per_peer=swarm.CONNECTIONS_PER_PEER_MAX,
        dial_timeout=swarm.UPGRADE_S,
        inbound_upgrade_timeout=swarm.UPGRADE_S,
        outbound_upgrade_timeout=swarm.UPGRADE_S,
        outbound_stream_protocol_negotiation_timeout=swarm.NEGOTIATION_S,
        inbound_stream_protocol_negotiation_timeout=swarm.NEGOTIATION_S,
    )
