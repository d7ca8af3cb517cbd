"""Joining the network: builds the network's parts of a node from its configuration, and takes them down again.

Importing and starting libp2p takes seconds, for which no engine waits: a node serves its host first, and joins then.
"""

import os
import random
import stat
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

from ..config import Config
from ..core.node.network import NetworkNode, NetworkOptions
from ..core.peers.reputation import Reputation
from ..core.peers.trust import Trust
from ..core.records.announcement import PREFIX_TOPIC, RESPONSE_TOPIC
from ..core.records.ids import PeerId, network_id, public_key_of
from ..core.records.peer_record import PeerRecord
from ..core.records.peer_wire import CACHE_PROTOCOL, PEERS_PROTOCOL
from .identity import Identity, IdentityError
from .metrics import Metrics
from .network_driver import Clients, NetworkDriver, Stored
from .response_server import ResponseServer

_KEY_BYTES = 32


def load_network_key(config: Config) -> bytes | None:
    """The 32 bytes in `network_key_file`, None without one; `IdentityError` if it is unsafe or damaged."""
    if not config.network_key_file:
        return None
    path = Path(config.network_key_file).expanduser()
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise IdentityError(f"network_key_file {path}: {error.strerror}") from error
    try:
        if stat.S_IMODE(os.fstat(descriptor).st_mode) & 0o077:
            raise IdentityError(f"network_key_file {path} can be read by others: run `chmod 600 {path}`")
        text = os.read(descriptor, 1024).decode("ascii", "replace").strip()
    finally:
        os.close(descriptor)
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        raise IdentityError(f"network_key_file {path}: expected 64 hex digits")
    return key


def make_trust(config: Config, identity: Identity, network_key: bytes | None) -> Trust:
    """Who counts, as the configuration says."""
    listed = frozenset(public_key_of(entry.partition("@")[0]) for entry in (*config.peers, *config.bootstrap))
    allowed = frozenset(public_key_of(peer) for peer in config.allowed)
    return Trust(config.trust, identity.public_key, listed, allowed, network_key, Reputation())


async def join(
    parts: AsyncExitStack,
    config: Config,
    identity: Identity,
    trust: Trust,
    network_key: bytes | None,
    endpoint: str,
    store: Stored | None,
    responses: ResponseServer | None,
    clients: Clients,
    metrics: Metrics,
    on_peers: Callable[[tuple[PeerRecord, ...]], None],
) -> NetworkDriver:
    """A driver whose node has begun to join; everything it needs is closed with `parts`. `OSError`: address in use."""
    from .libp2p_host import Libp2pHost
    from .redis_registry import RedisRegistry
    from .registry_documents import RegistryDocuments

    network = network_id(config.network)
    redis = None
    if config.registry:
        redis = RedisRegistry(config.registry, network, identity.peer_id, _now_ms)
        parts.push_async_callback(redis.close)
    documents = None if redis else RegistryDocuments(network, identity.signing_key, _now_ms, config.nice)
    if documents:
        parts.push_async_callback(documents.close)
    relay = _Relay()
    host = Libp2pHost(
        identity.signing_key,
        config.p2p_listen,
        network_key,
        config.mdns,
        (CACHE_PROTOCOL, PEERS_PROTOCOL),
        (RESPONSE_TOPIC, PREFIX_TOPIC),
        relay,
    )
    await host.start()
    parts.push_async_callback(host.close)
    bootstrap = tuple((PeerId(entry.partition("@")[0]), entry.partition("@")[2]) for entry in config.bootstrap)
    options = NetworkOptions(
        network,
        _advertised(config, host.address),
        _advertised(config, endpoint) if endpoint else "",
        bootstrap,
        network_key,
        config.disk_bytes + config.response_bytes,
        documents is not None,
    )
    node = NetworkNode(options, identity.signing_key, trust, random.Random(), _now_ms())
    scope = config.share if config.share == "public" else "network"
    driver = NetworkDriver(node, network, trust, store, responses, documents, redis, metrics, on_peers, scope)
    driver.clients, driver.host, relay.driver = clients, host, driver
    metrics.connected_peers.set_function(lambda: len(host.connected))
    parts.push_async_callback(driver.close)
    await driver.start()
    return driver


class _Relay:
    """Between host and driver, which need each other: nothing is heard before the driver is there."""

    driver: NetworkDriver | None = None

    async def on_request(self, peer: PeerId, protocol: str, frame: bytes) -> bytes | None:
        return await self.driver.on_request(peer, protocol, frame) if self.driver else None

    def on_gossip(self, topic: str, relay: PeerId, payload: bytes) -> None:
        if self.driver:
            self.driver.on_gossip(topic, relay, payload)

    def on_connected(self, peer: PeerId) -> None:
        if self.driver:
            self.driver.on_connected(peer)

    def on_disconnected(self, peer: PeerId) -> None:
        if self.driver:
            self.driver.on_disconnected(peer)

    def on_discovered(self, peer: PeerId, address: str) -> None:
        if self.driver:
            self.driver.on_discovered(peer, address)


def _advertised(config: Config, address: str) -> str:
    return f"{config.advertise}:{address.rpartition(':')[2]}" if config.advertise else address


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
