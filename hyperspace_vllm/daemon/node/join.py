"""Joining the network: builds the network's parts of a node from its configuration, and takes them down again.

Importing and starting libp2p takes seconds, for which no engine waits: a node serves its host first, and joins then.
"""

import asyncio
import os
import socket
import stat
import threading
from contextlib import AsyncExitStack, suppress
from pathlib import Path

from ...config import Config
from ...core.events.node_state import NetworkJoined
from ...core.node.node_options import NodeOptions
from ...core.peers.gossip_gate import GossipGate
from ...core.peers.trust import Trust
from ...core.records.announcement import PREFIX_TOPIC, RESPONSE_TOPIC
from ...core.records.endpoint import Endpoint
from ...core.records.ids import network_id, public_key_of
from ...core.records.peer_wire import CACHE_PROTOCOL, PEERS_PROTOCOL
from ...response_db import database_path
from .. import clock
from ..identity import Identity, IdentityError
from ..responses.response_server import ResponseServer
from ..start_error import needed
from .address_book import AddressBook
from .joined_network import Joined
from .peer_events import PeerEvents

_KEY_BYTES = 32


def load_network_key(config: Config) -> bytes | None:
    """The 32 bytes in `network_key_file`, None without one; `IdentityError` if it is unsafe or damaged."""
    if not config.network_key_file:
        return None
    try:
        path = Path(config.network_key_file).expanduser()
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, RuntimeError) as error:  # RuntimeError: ~nobody
        reason = getattr(error, "strerror", error)
        raise IdentityError(f"network_key_file {config.network_key_file}: {reason}") from error
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise IdentityError(
                f"network_key_file {path} can be read by others (mode {stat.S_IMODE(status.st_mode):04o}, owner "
                f"{status.st_uid}): run `chmod 600 {path}`, and `chown` if it isn't yours"
            )
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
    listed = frozenset(public_key_of(each.peer) for each in (*config.peer_addresses, *config.bootstrap_addresses))
    allowed = frozenset(public_key_of(peer) for peer in config.allowed)
    is_public = config.share == "public"
    return Trust(config.trust, identity.public_key, listed, allowed, network_key, is_public)


def node_options(config: Config, network_key: bytes | None) -> NodeOptions:
    """What the core knows of the configuration."""
    return NodeOptions(
        network_id(config.network),
        network_key,
        bootstrap=tuple((each.peer, str(each.endpoint)) for each in config.bootstrap_addresses),
        kv_peers=tuple(each.peer for each in config.peer_addresses),
        fetch=config.fetch,
        capacity_bytes=config.disk_bytes + config.response_bytes,
        joins=bool(config.p2p_listen),
        shares=config.share != "private",
        registry=not config.registry,
    )


class Joining:
    """Joins the network of a configuration, as often as asked to.

    `endpoint` is the bulk transport's, '' without one; `serves` whether this node has responses; `handler` hears what
    libp2p reports.
    """

    def __init__(
        self,
        config: Config,
        identity: Identity,
        network_key: bytes | None,
        trust: Trust,
        endpoint: str,
        serves: bool,
        handler: PeerEvents,
    ) -> None:
        self._config = config
        self._identity = identity
        self._network = network_id(config.network)
        self._key = network_key
        self._trust = trust
        self._endpoint = endpoint
        self._serves = serves
        self._handler = handler

    async def join(self, parts: AsyncExitStack) -> Joined:
        """Listen, and build what performs the effects of the network; everything is closed with `parts`."""
        await _libp2p_imported()  # seconds, in which engines are served
        from ..libp2p.libp2p_host import Libp2pHost
        from ..workers.registry_documents import RegistryDocuments

        config, identity = self._config, self._identity
        redis = None
        if config.registry:
            from ..redis.redis_registry import RedisRegistry

            with needed("registry", "correct its URL (HYPERSPACE_REGISTRY)"):
                redis = RedisRegistry(config.registry, self._network, identity.peer_id, clock.wall_ms)
            parts.push_async_callback(redis.close)
        documents = None
        if redis is None:
            documents = RegistryDocuments(self._network, identity.signing_key, clock.wall_ms, config.nice)
            parts.push_async_callback(documents.close)
        responses = None
        if self._serves:
            responses = ResponseServer(database_path(config.data_dir), self._network, self._trust.vouch)
            parts.callback(responses.close)
        topics, protocols = (RESPONSE_TOPIC, PREFIX_TOPIC), (CACHE_PROTOCOL, PEERS_PROTOCOL)
        gate = GossipGate(self._network, clock.now())
        host = Libp2pHost(
            identity.signing_key, config.p2p_listen, self._key, config.mdns, protocols, topics, self._handler, gate
        )
        parts.push_async_callback(host.close)
        choose = "choose an address and a free port of this machine (HYPERSPACE_P2P_LISTEN)"
        with needed(f"p2p_listen = {config.p2p_listen!r}", choose):
            await host.start()
        book = AddressBook(config.data_dir)
        parts.callback(book.close)
        with needed(f"advertise = {config.advertise!r}", "name an address of this host (HYPERSPACE_ADVERTISE)"):
            address, endpoint = (_reachable(config.advertise, bound) for bound in (host.address, self._endpoint))
        event = NetworkJoined(address, endpoint, book.read(address))
        return Joined(event, host, gate, book, responses, documents, redis)


async def _libp2p_imported() -> None:
    """Import libp2p in a thread that a node which stops doesn't wait for."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if not ended.done():
            ended.set_exception(error) if error else ended.set_result(None)

    def run() -> None:
        error: BaseException | None = None
        try:
            from ..libp2p import libp2p_host  # noqa: F401
        except Exception as failure:
            error = failure
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=run, name="hyperspace-import", daemon=True).start()
    await ended


def _reachable(advertise: str, listens_at: str) -> str:
    """host:port to tell others: the configured host, else what the listener is bound to, never a wildcard."""
    if not listens_at:
        return ""
    bound = Endpoint.parse(listens_at)
    if advertise:
        host = str(socket.getaddrinfo(advertise, None, type=socket.SOCK_STREAM)[0][4][0])
        return str(Endpoint(host, bound.port))
    return str(Endpoint(_outward_address(), bound.port) if bound.host in ("0.0.0.0", "::", "*") else bound)


def _outward_address() -> str:
    """The address that this host uses towards others; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # TEST-NET-1, RFC 5737
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])
