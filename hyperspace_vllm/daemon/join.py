"""Joining the network: builds the network's parts of a node from its configuration, and takes them down again.

Importing and starting libp2p takes seconds, for which no engine waits: a node serves its host first, and joins then.
"""

import asyncio
import logging
import os
import random
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack, suppress
from pathlib import Path

from ..config import Config
from ..core.events.network_effects import KvEndpoint
from ..core.events.network_events import AnswerAudited, RowsStored, ServedChanged
from ..core.local.messages import Scope
from ..core.node.network_node import NetworkNode, NetworkOptions
from ..core.peers.dials import Dials
from ..core.peers.gossip_gate import GossipGate
from ..core.peers.trust import Trust
from ..core.records.announcement import PREFIX_TOPIC, RESPONSE_TOPIC
from ..core.records.endpoint import Endpoint
from ..core.records.ids import PeerId, RequestKey, RowId, network_id, public_key_of
from ..core.records.peer_record import PeerRecord
from ..core.records.peer_wire import CACHE_PROTOCOL, PEERS_PROTOCOL
from ..core.records.standing import Tier
from ..core.response.evidence import verdict
from ..response_db import database_path
from .address_book import AddressBook
from .identity import Identity, IdentityError
from .metrics import Metrics
from .network_driver import Clients, NetworkDriver
from .responses.fetched_response import Stored
from .responses.response_server import ResponseServer
from .responses.store_changes import ServableEntry
from .start_error import StartError, needed

log = logging.getLogger(__name__)

JOIN_AGAIN_S = 10.0
BEFORE_MAX = 20_000  # news from before libp2p had started
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


class NodeNetwork:
    """The network as the rest of the node sees it, joined or not yet: what happens before is kept or answered so."""

    def __init__(self, config: Config, identity: Identity, metrics: Metrics) -> None:
        self._config = config
        self._identity = identity
        self._metrics = metrics
        self._network = network_id(config.network)
        self._key = load_network_key(config)
        self.trust = make_trust(config, identity, self._key)
        self.dials = Dials(_now_ms())
        self._loop = asyncio.get_running_loop()
        self._driver: NetworkDriver | None = None
        self._clients: Clients | None = None
        self._stored_before: dict[bytes, ServableEntry] = {}
        self._rows_before: list[RowsStored] = []
        self._served_before: ServedChanged | None = None
        self._failure = ""

    @property
    def address(self) -> str:
        """host:port of libp2p's listener; '' before it listens."""
        return self._driver.host.address if self._driver else ""

    def status(self) -> dict[str, object] | None:
        """What `hyperspace status` shows of the network."""
        if not self._config.p2p_listen:
            return None
        return self._driver.status() if self._driver else {"state": self._failure or "joining"}

    async def run(
        self,
        endpoint: str,
        store: Stored | None,
        clients: Clients,
        on_peers: Callable[[tuple[PeerRecord, ...], tuple[KvEndpoint, ...]], None],
        on_joined: Callable[[], None],
    ) -> None:
        """Join, and stay until cancelled. A listener that can't be had is tried again."""
        self._clients = clients
        while self._config.p2p_listen:
            async with AsyncExitStack() as parts:
                try:
                    self._driver = await self._join(parts, endpoint, store, clients, on_peers)
                except (StartError, OSError, ImportError) as error:
                    self._failure = str(error)
                    log.error("not joined, and tried again every %.0f s: %s", JOIN_AGAIN_S, error)
                else:
                    self._tell_what_was_before(self._driver)
                    on_joined()
                    await asyncio.Event().wait()
            await asyncio.sleep(JOIN_AGAIN_S)

    def find(self, lookup: int, request_key: RequestKey, model_digest: bytes, deadline_ms: int) -> None:
        """Look for a response at other nodes (response_lookups.ResponseFinder)."""
        if self._driver is not None and self._config.share != "private":
            self._driver.find(lookup, request_key, model_digest, deadline_ms)
        elif self._clients is not None:
            self._clients.answer_response(lookup, None, "off" if not self._config.p2p_listen else "no_peers")

    def release(self, lookup: int) -> None:
        """Nobody waits for the lookup any more."""
        if self._driver is not None:
            self._driver.release(lookup)

    def purge(self, keys: Iterable[bytes]) -> None:
        """The operator wants these gone, from lookups too: what peers have fetched stays there until it expires."""
        if self._driver is not None:
            self._driver.purge(keys)

    def used(self, keys: Iterable[bytes]) -> None:
        """Clients of this host had hits of these RequestKeys."""
        if self._driver is not None:
            self._driver.used(keys)

    def misbehaved(self, peer: PeerId) -> None:
        """It broke the protocol of the bulk transport."""
        if self._driver is not None:
            self._driver.on_violation(peer)

    def audited(self, event: AnswerAudited) -> bool:
        """An audit of this host; whether its signer is convicted. Others hear that, if this node shares with any."""
        evidence = event.evidence
        if self._driver is not None and self._config.share != "private":
            self._driver.submit(event)
        else:
            found = verdict(evidence.far)
            self.trust.audited(evidence.signer, evidence.tokens, found, event.source, _now_ms())
        return self.trust.is_convicted(evidence.signer, _now_ms())

    def heard(self, stored: tuple[ServableEntry, ...], gone: tuple[bytes, ...]) -> None:
        """What the response store can serve now, and what no more (response_news.Listener); from any thread."""
        self._loop.call_soon_threadsafe(self._heard, stored, gone)

    def rows_stored(self, event: RowsStored) -> None:
        """KV rows that this node can serve now."""
        if self._driver is not None:
            self._driver.submit(event)
        elif len(self._rows_before) < BEFORE_MAX:
            self._rows_before.append(event)

    def served(self, event: ServedChanged) -> None:
        """What the engines of this host serve now; of a node that shares nothing, nobody need know."""
        if self._config.share == "private":
            return
        if self._driver is not None:
            self._driver.submit(event)
        else:
            self._served_before = event

    def hints(self, row_id: RowId) -> tuple[PeerId, ...]:
        """Who says that it serves a KV row."""
        return self._driver.row_hints(row_id) if self._driver else ()

    def _heard(self, stored: tuple[ServableEntry, ...], gone: tuple[bytes, ...]) -> None:
        if self._config.share == "private":
            return
        if self._driver is not None:
            self._driver.heard(stored, gone)
            return
        for each in stored:
            if len(self._stored_before) < BEFORE_MAX:
                self._stored_before[each.request_hash] = each
        for name in gone:
            self._stored_before.pop(name, None)

    def _tell_what_was_before(self, driver: NetworkDriver) -> None:
        driver.heard(tuple(self._stored_before.values()), ())
        for event in self._rows_before:
            driver.submit(event)
        if self._served_before is not None:
            driver.submit(self._served_before)
        self._served_before = None
        self._stored_before.clear()
        self._rows_before.clear()

    async def _join(
        self,
        parts: AsyncExitStack,
        endpoint: str,
        store: Stored | None,
        clients: Clients,
        on_peers: Callable[[tuple[PeerRecord, ...], tuple[KvEndpoint, ...]], None],
    ) -> NetworkDriver:
        """A driver whose node has begun to join; everything it needs is closed with `parts`."""
        await _libp2p_imported()  # seconds, in which engines are served
        from .libp2p.libp2p_host import Libp2pHost
        from .workers.registry_documents import RegistryDocuments

        config, identity = self._config, self._identity
        redis = None
        if config.registry:
            from .redis.redis_registry import RedisRegistry

            with needed("registry", "correct its URL (HYPERSPACE_REGISTRY)"):
                redis = RedisRegistry(config.registry, self._network, identity.peer_id, _now_ms)
            parts.push_async_callback(redis.close)
        documents = None if redis else RegistryDocuments(self._network, identity.signing_key, _now_ms, config.nice)
        if documents:
            parts.push_async_callback(documents.close)
        responses = None
        if store is not None:
            responses = ResponseServer(database_path(config.data_dir), self._network, self.trust.vouch)
            parts.callback(responses.close)
        relay = _Relay()
        topics, protocols = (RESPONSE_TOPIC, PREFIX_TOPIC), (CACHE_PROTOCOL, PEERS_PROTOCOL)
        gate = GossipGate(self._network, _now_ms())
        host = Libp2pHost(
            identity.signing_key, config.p2p_listen, self._key, config.mdns, protocols, topics, relay, gate
        )
        parts.push_async_callback(host.close)
        choose = "choose an address and a free port of this machine (HYPERSPACE_P2P_LISTEN)"
        with needed(f"p2p_listen = {config.p2p_listen!r}", choose):
            await host.start()
        bootstrap = tuple((each.peer, str(each.endpoint)) for each in config.bootstrap_addresses)
        book = AddressBook(config.data_dir)
        parts.callback(book.close)
        with needed(f"advertise = {config.advertise!r}", "name an address of this host (HYPERSPACE_ADVERTISE)"):
            address, endpoint = (_reachable(config.advertise, bound) for bound in (host.address, endpoint))
        options = NetworkOptions(
            self._network,
            address,
            endpoint,
            bootstrap,
            self._key,
            config.disk_bytes + config.response_bytes,
            documents is not None,
            book.read(address),
        )

        def tell(usable: tuple[PeerRecord, ...], endpoints: tuple[KvEndpoint, ...]) -> None:
            book.note(node.members.addresses(_now_ms()))
            on_peers(usable, endpoints)

        node = NetworkNode(options, identity.signing_key, self.trust, self.dials, random.Random(), _now_ms())
        scope: Scope = "public" if config.share == "public" else "network"
        driver = NetworkDriver(
            node, self._network, self.trust, store, responses, documents, redis, self._metrics, tell, scope, gate
        )
        driver.clients, driver.host, relay.driver = clients, host, driver
        self._metrics.connected_peers.set_function(lambda: len(host.connected))
        parts.push_async_callback(driver.close)
        driver.start()
        return driver


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
            from .libp2p import libp2p_host  # noqa: F401
        except Exception as failure:
            error = failure
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=run, name="hyperspace-import", daemon=True).start()
    await ended


class _Relay:
    """Between host and driver, which need each other: nothing is heard before the driver is there."""

    driver: NetworkDriver | None = None

    async def on_request(self, peer: PeerId, protocol: str, frame: bytes) -> bytes | None:
        return await self.driver.on_request(peer, protocol, frame) if self.driver else None

    def on_gossip(self, topic: str, relay: PeerId, payload: bytes) -> None:
        if self.driver:
            self.driver.on_gossip(topic, relay, payload)

    def on_gossip_spoiled(self, relay: PeerId) -> None:
        if self.driver:
            self.driver.on_gossip_spoiled(relay)

    def on_connected(self, peer: PeerId) -> None:
        if self.driver:
            self.driver.on_connected(peer)

    def on_disconnected(self, peer: PeerId) -> None:
        if self.driver:
            self.driver.on_disconnected(peer)

    def on_violation(self, peer: PeerId) -> None:
        if self.driver:
            self.driver.on_violation(peer)

    def tier(self, peer: PeerId) -> Tier:
        return self.driver.tier(peer) if self.driver else Tier.STRANGER

    def on_discovered(self, peer: PeerId, address: str, told_from: str) -> None:
        if self.driver:
            self.driver.on_discovered(peer, address, told_from)

    def may_dial(self, peer: PeerId, address: str, told_from: str) -> bool:
        return self.driver is not None and self.driver.may_dial(peer, address, told_from)


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


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
