"""py-libp2p 0.8.1 with the defaults a node needs: what each of its parts may keep, do and cost (DESIGN §9).

The library trusts its peers more than we do, and loses a host to a single malformed message. Every override says what
it is for; `tests/test_libp2p_host.py` fails when the library's side of one changes.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from types import ModuleType
from typing import Any

import libp2p.kad_dht.kad_dht as kad_module
import libp2p.kad_dht.peer_routing as peer_routing_module
import libp2p.kad_dht.provider_store as provider_module
import libp2p.network.connection.swarm_connection as swarm_connection_module
import libp2p.protocol_muxer.multiselect_communicator as communicator_module
import libp2p.pubsub.gossipsub as gossipsub_module
import libp2p.pubsub.pubsub as pubsub_module
import trio
from libp2p.abc import IHost, IMuxedConn, INetConn, INetStream, IRawConnection, ISecureConn
from libp2p.custom_types import TProtocol
from libp2p.exceptions import ParseError
from libp2p.host.basic_host import BasicHost
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import MessageTooLarge
from libp2p.io.trio import TrioTCPStream
from libp2p.kad_dht.common import BUCKET_SIZE, PROTOCOL_ID
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.kad_dht.provider_store import ProviderStore
from libp2p.kad_dht.routing_table import RoutingTable
from libp2p.kad_dht.utils import sort_peer_ids_by_distance
from libp2p.kad_dht.value_store import ValueStore
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from libp2p.peer.envelope import Envelope
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.peer.peerstore import PeerStore
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.rpc_queue import RpcQueue
from libp2p.pubsub.utils import maybe_consume_signed_record
from libp2p.tools.anyio_service import Service
from libp2p.tools.anyio_service.trio_manager import TrioManager
from libp2p.transport.exceptions import MuxerUpgradeFailure, OpenConnectionError
from libp2p.transport.tcp.tcp import TCP
from libp2p.transport.upgrader import TransportUpgrader
from libp2p.utils.varint import encode_varint_prefixed, read_varint_prefixed_bytes_limited
from multiaddr import Multiaddr

from ..core.records.limits import KiB, MiB
from .libp2p_yamux import YamuxConnection

logger = logging.getLogger(__name__)

# --- connections --------------------------------------------------------------------------------
CONNECTIONS_MAX = 64
CONNECTIONS_INBOUND_MAX = 48  # the rest is for peers that this node chose
CONNECTIONS_PER_PEER_MAX = 3  # two when both sides dial at once
HANDSHAKES_MAX = 16
UPGRADE_S = 5.0
NEGOTIATION_S = 5
PROTOCOL_NAME_BYTES_MAX = 256

# --- what is kept of peers -----------------------------------------------------------------------
PEERS_KEPT_MAX = 512
ADDRESSES_PER_PEER_MAX = 4
PROTOCOLS_PER_PEER_MAX = 32
PEER_ENVELOPE_BYTES_MAX = 2 * KiB
FOREVER_S = 10 * 365 * 24 * 3600  # peers are forgotten by number, not by age

# --- DHT ----------------------------------------------------------------------------------------
QUERY_S = 1.5  # a frozen peer costs a lookup this much, once
PROVIDER_TTL_S = 15 * 60  # three missed renewals
PROVIDER_RENEWAL_S = 5 * 60
MAINTENANCE_S = 60.0
DHT_MESSAGE_BYTES_MAX = 64 * KiB  # 20 peers of about 500 B, and as many providers
DHT_STREAMS_MAX = 256
DHT_STREAMS_PER_PEER_MAX = 32
DHT_STREAM_S = 10.0
PROVIDER_MESSAGES_PER_10_S = 2_000  # of one peer; what they may add is bounded below
PROVIDERS_MAX = 50_000
PROVIDERS_PER_PEER_MAX = 4_000
PROVIDED_MAX = 1_000  # keys that this node renews: the newest
REPLICAS = 8  # peers that hold a provider record
DHT_ASKED_MAX = 16
DHT_DIALS_MAX = 4  # of one lookup, to peers that others claim exist
DHT_PARALLEL = 4

# --- gossip -------------------------------------------------------------------------------------
GOSSIP_BYTES_MAX = 64 * KiB
GOSSIP_RPC_BYTES_MAX = 256 * KiB
GOSSIP_PER_S = 50.0  # new messages of one neighbour
GOSSIP_BURST = 200.0
GOSSIP_BYTES_PER_S = 1.0 * MiB
GOSSIP_BYTES_BURST = 4.0 * MiB
GOSSIP_QUEUE_MAX = 128
GOSSIP_QUEUE_BYTES_MAX = 2 * MiB
CONTROL_ENTRIES_MAX = 64
CONTROL_IDS_MAX = 1_000
HEARTBEAT_S = 1


def patch_library() -> None:
    """Set what can only be set for the whole process; safe to call again."""
    replaced: dict[str, Any] = {
        "QUERY_TIMEOUT": QUERY_S,
        "MAX_DHT_MESSAGE_SIZE": DHT_MESSAGE_BYTES_MAX,
        "PROVIDER_RECORD_EXPIRATION_INTERVAL": PROVIDER_TTL_S,
        "PROVIDER_RECORD_REPUBLISH_INTERVAL": PROVIDER_RENEWAL_S,
        "RpcQueue": _GossipQueue,  # 32 messages otherwise, lost silently beyond
        "read_delim": _read_protocol_name,
        "maybe_consume_signed_record": _check_record,
        # It logs through the root logger, which thereby gets a handler that writes to stderr.
        "logging": logging.getLogger("libp2p.network.connection"),
    }
    for module, names in _REPLACED_IN:
        for name in names:
            assert hasattr(module, name), f"py-libp2p has changed: no {name} in {module.__name__}"
            setattr(module, name, replaced[name])
    library = logging.getLogger("libp2p")
    library.setLevel(logging.CRITICAL)
    library.propagate = False
    if not library.handlers:
        library.addHandler(logging.NullHandler())


_DHT_NAMES = ("QUERY_TIMEOUT", "MAX_DHT_MESSAGE_SIZE")
_REPLACED_IN: tuple[tuple[ModuleType, tuple[str, ...]], ...] = (
    (kad_module, _DHT_NAMES),
    (peer_routing_module, _DHT_NAMES),
    (
        provider_module,
        (*_DHT_NAMES, "PROVIDER_RECORD_EXPIRATION_INTERVAL", "PROVIDER_RECORD_REPUBLISH_INTERVAL"),
    ),
    (pubsub_module, ("RpcQueue", "maybe_consume_signed_record")),
    (gossipsub_module, ("maybe_consume_signed_record",)),
    (communicator_module, ("read_delim",)),
    (swarm_connection_module, ("logging",)),
)


async def _read_protocol_name(reader: ReadWriteCloser) -> bytes:
    # The library's takes any length up to 2^64, before anybody has proved who he is.
    try:
        name = await read_varint_prefixed_bytes_limited(reader, PROTOCOL_NAME_BYTES_MAX)
    except MessageTooLarge as error:
        raise ParseError("protocol name") from error
    if not name.endswith(b"\n") or not name.isascii():
        raise ParseError("protocol name")
    return name[:-1]


class _Once:
    """Checks a sender's signed addresses once: the library verifies them twice for every gossip message."""

    def __init__(self, check: Callable[..., bool]) -> None:
        self._check = check
        self._known: OrderedDict[tuple[bytes, bytes], None] = OrderedDict()

    def __call__(self, msg: rpc_pb2.RPC, host: IHost, peer_id: ID) -> bool:
        key = peer_id.to_bytes(), msg.senderRecord
        if key in self._known:
            return True
        if len(msg.senderRecord) > PEER_ENVELOPE_BYTES_MAX or not self._check(msg, host, peer_id):
            return False
        self._known[key] = None
        if len(self._known) > PEERS_KEPT_MAX:
            self._known.popitem(last=False)
        return True


_check_record = _Once(maybe_consume_signed_record)


class TokenBucket:
    """At most `burst` at once and `per_s` a second in the long run."""

    def __init__(self, per_s: float, burst: float) -> None:
        self._per_s = per_s
        self._burst = burst
        self._tokens = burst
        self._at = time.monotonic()

    def take(self, amount: float) -> bool:
        """Whether `amount` may pass now."""
        now = time.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._per_s)
        self._at = now
        if amount > self._tokens:
            return False
        self._tokens -= amount
        return True


# --- services -----------------------------------------------------------------------------------


class _Manager(TrioManager):
    """Runs a service whose tasks may fail: the library's ends the service, and so the host, at the first one."""

    def run_task(
        self, async_fn: Any, *args: Any, daemon: bool = False, name: str | None = None, _internal: bool = False
    ) -> None:
        if _internal:  # the service itself
            super().run_task(async_fn, *args, daemon=daemon, name=name, _internal=True)
        elif daemon:
            super().run_task(_forever, async_fn, args, daemon=True, name=name)
        else:
            super().run_task(_once, async_fn, args, name=name or "task")


async def _once(async_fn: Callable[..., Awaitable[None]], args: tuple[Any, ...]) -> None:
    try:
        await async_fn(*args)
    except Exception as error:
        logger.debug("libp2p task %s failed: %r", getattr(async_fn, "__name__", async_fn), error)


async def _forever(async_fn: Callable[..., Awaitable[None]], args: tuple[Any, ...]) -> None:
    while True:
        try:
            await async_fn(*args)
        except Exception as error:
            logger.warning("libp2p task %s failed: %r", getattr(async_fn, "__name__", async_fn), error)
        await trio.sleep(1)


@asynccontextmanager
async def running(service: Service) -> AsyncIterator[None]:
    """Run one of the library's services until the block ends."""
    manager = _Manager(service)
    service._manager = manager
    async with trio.open_nursery() as nursery:
        nursery.start_soon(manager.run)
        await manager.wait_started()
        yield
        nursery.cancel_scope.cancel()


# --- transport and connections -------------------------------------------------------------------


class _Listener:
    """A TCP listener that fails when the port is taken: the library's shares it (SO_REUSEPORT)."""

    def __init__(self, handler: Callable[[ReadWriteCloser], Awaitable[None]], swarm: "NodeSwarm") -> None:
        self._handler = handler
        self._swarm = swarm
        self._listeners: list[trio.SocketListener] = []

    async def listen(self, maddr: Multiaddr) -> None:
        """Bind and accept in the background."""
        host = maddr.value_for_protocol(maddr.protocols()[0].name)
        try:
            opened = await trio.open_tcp_listeners(int(maddr.value_for_protocol("tcp")), host=host)
            self._listeners = list(opened)
        except OSError as error:
            self._swarm.listen_error = error
            raise
        for listener in self._listeners:
            self._swarm.manager.run_task(trio.serve_listeners, self._accept, [listener])

    async def _accept(self, stream: trio.SocketStream) -> None:
        with suppress(Exception):
            await self._handler(TrioTCPStream(stream))

    def get_addrs(self) -> tuple[Multiaddr, ...]:
        """The addresses it listens on."""
        addresses = []
        for listener in self._listeners:
            host, port = listener.socket.getsockname()[:2]
            addresses.append(Multiaddr(f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{port}"))
        return tuple(addresses)

    async def close(self) -> None:
        """Stop listening."""
        for listener in self._listeners:
            listener.socket.close()


class NodeTransport(TCP):
    """TCP by address only; names are resolved by us, with a deadline."""

    swarm: "NodeSwarm"

    async def dial(self, maddr: Multiaddr) -> IRawConnection:
        """Connect to an ip4 or ip6 address."""
        host = maddr.value_for_protocol(maddr.protocols()[0].name)
        try:
            stream = await trio.open_tcp_stream(host, int(maddr.value_for_protocol("tcp")))
        except (OSError, ValueError) as error:
            raise OpenConnectionError(f"{maddr}: {error}") from error
        self.swarm.sockets.add(stream)
        return RawConnection(TrioTCPStream(stream), True)

    def create_listener(self, handler_function: Any) -> Any:
        """A listener for the swarm."""
        return _Listener(handler_function, self.swarm)

    def can_dial(self, maddr: Multiaddr) -> bool:
        """Plain /ip4|ip6/…/tcp/…, with or without /p2p/…."""
        names = [protocol.name for protocol in maddr.protocols()]
        return names[:2] in (["ip4", "tcp"], ["ip6", "tcp"]) and names[2:] in ([], ["p2p"])


class NodeUpgrader(TransportUpgrader):
    """Noise, then our own yamux."""

    async def upgrade_connection(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        """Agree on yamux."""
        try:
            with trio.fail_after(UPGRADE_S):
                await self.muxer_multistream.select_transport(conn)
        except Exception as error:
            raise MuxerUpgradeFailure("yamux") from error
        return YamuxConnection(conn, peer_id)


class _NoAutoConnector(AutoConnector):
    """The core decides whom to connect to; the library's dials whomever it has heard of."""

    async def run_background_task(self, nursery: trio.Nursery) -> None:
        """Nothing."""

    async def maybe_connect(self) -> None:
        """Nothing."""

    def record_disconnect(self, peer_id: ID) -> None:
        """Nothing."""


class NodeSwarm(Swarm):
    """Connections, counted and bounded; tells `on_peer(peer, connected)` when the first opens and the last closes."""

    on_peer: Callable[[ID, bool], None]
    listen_error: OSError | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.auto_connector = _NoAutoConnector(self)
        self.notifees.clear()  # a store of tags that nobody reads
        self.sockets: set[trio.SocketStream] = set()
        self._handshakes = trio.CapacityLimiter(HANDSHAKES_MAX)
        self._inbound = 0
        self._open: dict[ID, set[int]] = {}

    def live(self, peer_id: ID) -> list[SwarmConn]:
        """The peer's open connections."""
        return [conn for conn in self.connections.get(peer_id, []) if not conn.is_closed]  # type: ignore[misc]

    def drop(self, peer_id: ID) -> list[SwarmConn]:
        """End every connection to a peer, without waiting for anything; those that are ending."""
        ending = self.live(peer_id)
        for conn in ending:
            conn.muxed_conn.stop()  # type: ignore[attr-defined]
        return ending

    async def _handle_inbound_connection(self, read_write_closer: ReadWriteCloser, maddr: Multiaddr) -> None:
        # The library's holds a slot (and this task) until the swarm ends, however early the connection does.
        if self._inbound >= CONNECTIONS_INBOUND_MAX or self._handshakes.available_tokens < 1:
            return
        self._inbound += 1
        stream = read_write_closer.stream  # type: ignore[attr-defined]
        self.sockets.add(stream)
        try:
            async with self._handshakes:
                muxed = await self.upgrade_inbound_raw_conn(RawConnection(read_write_closer, False), maddr)
            await muxed.event_closed.wait()  # type: ignore[attr-defined]
        finally:
            self._inbound -= 1
            self.sockets.discard(stream)

    async def add_conn(self, muxed_conn: IMuxedConn, direction: str = "unknown") -> SwarmConn:
        """Register a connection, unless the peer has enough."""
        peer_id = muxed_conn.peer_id
        if peer_id == self.self_id or len(self.live(peer_id)) >= CONNECTIONS_PER_PEER_MAX:
            await muxed_conn.close()
            raise SwarmException("enough connections to this peer")
        return await super().add_conn(muxed_conn, direction)

    def remove_conn(self, swarm_conn: SwarmConn) -> None:
        """Forget a connection."""
        super().remove_conn(swarm_conn)
        peer_id = swarm_conn.muxed_conn.peer_id
        with suppress(AttributeError):
            self.sockets.discard(swarm_conn.muxed_conn.secured_conn.conn.read_writer.read_write_closer.stream.stream)  # type: ignore[attr-defined]
        ids = self._open.get(peer_id)
        if ids is not None and id(swarm_conn) in ids:
            ids.discard(id(swarm_conn))
            if not ids:
                del self._open[peer_id]
                self.on_peer(peer_id, False)

    async def notify_connected(self, conn: INetConn) -> None:
        """A connection is ready."""
        peer_id = conn.muxed_conn.peer_id
        if not conn.is_closed:
            ids = self._open.setdefault(peer_id, set())
            ids.add(id(conn))
            if len(ids) == 1:
                self.on_peer(peer_id, True)
        await super().notify_connected(conn)

    async def notify_opened_stream(self, stream: INetStream) -> None:
        """Nobody wants to know; the library starts a task per notifee."""

    async def notify_closed_stream(self, stream: INetStream) -> None:
        """Nobody wants to know."""
        stream._resource_released = True  # type: ignore[attr-defined]

    def _schedule_auto_connect(self) -> None:
        return

    def close_sockets(self) -> None:
        """Close everything at once: peers notice."""
        for stream in self.sockets:
            stream.socket.close()
        self.sockets.clear()


# --- what is kept of peers ------------------------------------------------------------------------


class NodePeerStore(PeerStore):
    """Addresses and protocols of a bounded number of peers; the library's evicts its own keys when it is full."""

    def __init__(self, keep: Callable[[ID], bool]) -> None:
        super().__init__(max_peers=PEERS_KEPT_MAX)
        self._keep = keep  # the node itself, and whoever is connected

    def add_addrs(self, peer_id: ID, addrs: Sequence[Multiaddr], ttl: int = 0) -> None:
        """Remember the newest few of a peer's addresses."""
        super().add_addrs(peer_id, addrs[:ADDRESSES_PER_PEER_MAX], FOREVER_S)
        data = self.peer_data_map.get(peer_id)
        if data is not None and len(data.addrs) > ADDRESSES_PER_PEER_MAX:
            data.addrs = data.addrs[-ADDRESSES_PER_PEER_MAX:]

    def add_protocols(self, peer_id: ID, protocols: Sequence[str]) -> None:
        """Remember what a peer says it speaks."""
        self.set_protocols(peer_id, protocols)

    def set_protocols(self, peer_id: ID, protocols: Sequence[str]) -> None:
        """Remember what a peer says it speaks."""
        short = [name for name in protocols[:PROTOCOLS_PER_PEER_MAX] if len(name) <= PROTOCOL_NAME_BYTES_MAX]
        super().set_protocols(peer_id, short)
        self._enforce_peer_limit()

    def consume_peer_record(self, envelope: Envelope, ttl: int) -> bool:
        """Take a signed record of addresses."""
        if len(envelope.raw_payload) > PEER_ENVELOPE_BYTES_MAX:
            return False
        return super().consume_peer_record(envelope, ttl)

    def _enforce_peer_limit(self) -> None:
        if len(self.peer_data_map) <= self.max_peers:
            return
        for peer_id in [peer_id for peer_id in self.peer_data_map if not self._keep(peer_id)]:
            if len(self.peer_data_map) <= self.max_peers * 9 // 10:
                break
            del self.peer_data_map[peer_id]
            self.peer_record_map.pop(peer_id, None)


class NodeHost(BasicHost):
    """Identify in the background; a peer that speaks the DHT's protocol enters the routing table."""

    dht: "NodeDht"

    async def _identify_task_entry(self, peer_id: ID, reason: str) -> None:
        # It runs as a system task, where an exception ends trio itself.
        try:
            with trio.move_on_after(2 * NEGOTIATION_S):
                await self._identify_peer(peer_id, reason=reason)
                if peer_id in self._identified_peers:
                    await self.dht.add_peer(peer_id)
        except Exception as error:
            logger.debug("identify %s failed: %r", peer_id, error)
        finally:
            self._identify_inflight.discard(peer_id)

    async def _push_identify_to_all_peers(self) -> None:
        return


# --- DHT ----------------------------------------------------------------------------------------


class _ConnectedOnly(RoutingTable):
    """Peers that are connected: whom others merely name isn't believed to exist."""

    async def add_peer(self, peer_obj: PeerInfo | ID, *, skip_server_mode_check: bool = False) -> bool:
        """Add a connected peer."""
        peer_id = peer_obj.peer_id if isinstance(peer_obj, PeerInfo) else peer_obj
        network: Any = self.host.get_network()
        if not network.live(peer_id):
            return False
        try:
            addresses = self.host.get_peerstore().addrs(peer_id)
        except KeyError:
            addresses = []
        return await super().add_peer(PeerInfo(peer_id, addresses), skip_server_mode_check=skip_server_mode_check)


class _NoValues(ValueStore):
    """Value records have no use here, and a peer could store 50,000 of a mebibyte each."""

    def put_record(self, key: bytes, record: Any) -> None:
        """Refuse."""
        raise ValueError("no value records here")


class NodeProviders(ProviderStore):
    """Provider records: bounded in all and by peer, found without a search of the whole network first.

    The library's asks the 20 closest peers for closer ones before it asks the first for providers, remembers what it
    found for two days, and keeps any number of keys.
    """

    def __init__(self, host: IHost, routing: Any, table: RoutingTable) -> None:
        super().__init__(host, routing)
        self._table = table
        self._keys_of: dict[ID, OrderedDict[bytes, None]] = {}
        self._info_of: dict[ID, PeerInfo] = {}
        self._count = 0
        self._provided: OrderedDict[bytes, float] = OrderedDict()

    def add_provider(self, key: bytes, provider: PeerInfo) -> None:
        """Remember that a peer provides a key; its oldest records make room, or those of whoever has the most."""
        peer_id = provider.peer_id
        keys = self._keys_of.setdefault(peer_id, OrderedDict())
        known = self.providers.get(key, {})
        if str(peer_id) not in known and len(known) >= BUCKET_SIZE:
            if not keys:
                del self._keys_of[peer_id]
            return
        if key in keys:
            keys.move_to_end(key)
        else:
            if len(keys) >= PROVIDERS_PER_PEER_MAX:
                self._forget(peer_id, next(iter(keys)))
            elif self._count >= PROVIDERS_MAX:
                greediest = max(self._keys_of, key=lambda peer: len(self._keys_of[peer]))
                self._forget(greediest, next(iter(self._keys_of[greediest])))
            self._keys_of.setdefault(peer_id, keys)[key] = None
            self._count += 1
        # One list of addresses per peer, not per key.
        self._info_of[peer_id] = PeerInfo(peer_id, provider.addrs[:ADDRESSES_PER_PEER_MAX])
        super().add_provider(key, self._info_of[peer_id])

    def _forget(self, peer_id: ID, key: bytes) -> None:
        records = self.providers.get(key)
        if records is not None:
            records.pop(str(peer_id), None)
            if not records:
                del self.providers[key]
        keys = self._keys_of.get(peer_id)
        if keys is not None and key in keys:
            del keys[key]
            self._count -= 1
            if not keys:
                del self._keys_of[peer_id]
                self._info_of.pop(peer_id, None)

    def get_providers(self, key: bytes) -> list[PeerInfo]:
        """Who is known to provide a key, as far as not expired."""
        records = self.providers.get(key, {})
        for record in [record for record in records.values() if record.is_expired()]:
            self._forget(record.peer_id, key)
        return [PeerInfo(record.peer_id, record.addresses) for record in records.values()]

    def cleanup_expired(self) -> None:
        """Forget what is older than PROVIDER_TTL_S."""
        for key, records in list(self.providers.items()):
            for record in [record for record in records.values() if record.is_expired()]:
                self._forget(record.peer_id, key)

    async def provide(self, key: bytes) -> bool:
        """Tell the closest peers, now and every PROVIDER_RENEWAL_S, until PROVIDED_MAX newer keys were provided."""
        self._provided[key] = time.monotonic()
        self._provided.move_to_end(key)
        while len(self._provided) > PROVIDED_MAX:
            self._provided.popitem(last=False)
        self.add_provider(key, PeerInfo(self.local_peer_id, self.host.get_addrs()))
        near = self._table.find_local_closest_peers(key, BUCKET_SIZE)
        if self._table.size() > BUCKET_SIZE:  # else this node knows everybody whom it could find
            near = await self._walk(key, near, self._ask_closer(key))
        return await self._tell({peer_id: [key] for peer_id in near[:REPLICAS]}) > 0

    async def renew(self) -> None:
        """Provide again what is due: one stream a peer, however many keys."""
        now = time.monotonic()
        keys_for: dict[ID, list[bytes]] = {}
        for key in [key for key, at in self._provided.items() if now - at >= PROVIDER_RENEWAL_S]:
            self._provided[key] = now
            self.add_provider(key, PeerInfo(self.local_peer_id, self.host.get_addrs()))
            for peer_id in self._table.find_local_closest_peers(key, REPLICAS):
                keys_for.setdefault(peer_id, []).append(key)
        await self._tell(keys_for)

    async def find_providers(self, key: bytes, count: int = 20) -> list[PeerInfo]:
        """Who provides a key: known here first, then asked from the closest peers outwards until `count` are found."""
        found = {info.peer_id: info for info in self.get_providers(key) if info.peer_id != self.local_peer_id}

        async def ask(peer_id: ID) -> tuple[list[ID], bool]:
            answer = await self._query(peer_id, Message(type=Message.MessageType.GET_PROVIDERS, key=key))
            for provider in answer.providerPeers[:BUCKET_SIZE]:
                found_id = ID(provider.id)
                if found_id != self.local_peer_id:
                    found.setdefault(found_id, PeerInfo(found_id, []))
            return _closer_peers(answer), len(found) >= count

        if len(found) < count:
            await self._walk(key, self._table.find_local_closest_peers(key, BUCKET_SIZE), ask)
        return list(found.values())[:count]

    def _ask_closer(self, key: bytes) -> Callable[[ID], Awaitable[tuple[list[ID], bool]]]:
        async def ask(peer_id: ID) -> tuple[list[ID], bool]:
            answer = await self._query(peer_id, Message(type=Message.MessageType.FIND_NODE, key=key))
            return _closer_peers(answer), False

        return ask

    async def _query(self, peer_id: ID, question: Message) -> Message:
        # Without the signed addresses that the library sends and checks with each message: identify has told them.
        stream = await self.host.new_stream(peer_id, [PROTOCOL_ID])
        try:
            await stream.write(encode_varint_prefixed(question.SerializeToString()))
            answer = Message()
            answer.ParseFromString(await read_varint_prefixed_bytes_limited(stream, DHT_MESSAGE_BYTES_MAX))
            return answer
        finally:
            with trio.CancelScope(shield=True):
                await stream.reset()

    async def _tell(self, keys_for: dict[ID, list[bytes]]) -> int:
        # Nobody reads the echoes: they say no more than that the message came, even if it was dropped.
        provider = Message.Peer(
            id=self.local_peer_id.to_bytes(), addrs=[address.to_bytes() for address in self.host.get_addrs()]
        )
        told = 0
        limiter = trio.CapacityLimiter(DHT_PARALLEL)

        async def tell(peer_id: ID, keys: list[bytes]) -> None:
            nonlocal told
            with suppress(Exception):
                async with limiter:
                    with trio.fail_after(QUERY_S):
                        stream = await self.host.new_stream(peer_id, [PROTOCOL_ID])
                        kind = Message.MessageType.ADD_PROVIDER
                        for key in keys:
                            message = Message(type=kind, key=key, providerPeers=[provider])
                            await stream.write(encode_varint_prefixed(message.SerializeToString()))
                        await stream.close()
                        told += 1

        async with trio.open_nursery() as nursery:
            for peer_id, keys in keys_for.items():
                nursery.start_soon(tell, peer_id, keys)
        return told

    async def _walk(
        self, key: bytes, near: list[ID], ask: Callable[[ID], Awaitable[tuple[list[ID], bool]]]
    ) -> list[ID]:
        # The closest peers found: from the closest outwards, DHT_PARALLEL at a time, and whom those asked know.
        network: Any = self.host.get_network()
        asked: set[ID] = set()
        dials = 0
        answers_in, answers_out = trio.open_memory_channel[tuple[list[ID], bool]](DHT_ASKED_MAX)

        async def one(peer_id: ID) -> None:
            answer: tuple[list[ID], bool] = [], False
            with suppress(Exception), trio.move_on_after(QUERY_S):
                answer = await ask(peer_id)
            answers_in.send_nowait(answer)

        async with trio.open_nursery() as nursery:
            running_now = 0
            while True:
                for peer_id in near:
                    if running_now >= DHT_PARALLEL or len(asked) >= DHT_ASKED_MAX:
                        break
                    if peer_id in asked or peer_id == self.local_peer_id:
                        continue
                    if not network.live(peer_id):
                        if dials >= DHT_DIALS_MAX:
                            continue
                        dials += 1
                    asked.add(peer_id)
                    running_now += 1
                    nursery.start_soon(one, peer_id)
                if running_now == 0:
                    return near
                closer, done = await answers_out.receive()
                running_now -= 1
                if done:
                    nursery.cancel_scope.cancel()
                    return near
                fresh = [peer_id for peer_id in closer[:BUCKET_SIZE] if peer_id not in near]
                if fresh:
                    near = sort_peer_ids_by_distance(key, [*near, *fresh])[:BUCKET_SIZE]


def _closer_peers(answer: Message) -> list[ID]:
    return [ID(peer.id) for peer in answer.closerPeers[:BUCKET_SIZE] if 34 <= len(peer.id) <= 64]


class NodeDht(KadDHT):
    """Provider records only, in server mode; streams bounded in number and time."""

    def __init__(self, host: IHost) -> None:
        super().__init__(host, DHTMode.SERVER)
        self.routing_table = _ConnectedOnly(host.get_id(), host, max_peers_per_subnet=0)
        self.peer_routing.routing_table = self.routing_table
        self.value_store = _NoValues(host, host.get_id())
        self.provider_store: NodeProviders = NodeProviders(host, self.peer_routing, self.routing_table)
        self._provider_rate_max = PROVIDER_MESSAGES_PER_10_S
        self._inbound_limiter = trio.CapacityLimiter(DHT_STREAMS_MAX)
        self._streams_of: dict[ID, int] = {}

    async def handle_stream(self, stream: INetStream) -> None:
        """Answer one peer's stream, for a bounded time."""
        peer_id = stream.muxed_conn.peer_id
        if self._streams_of.get(peer_id, 0) >= DHT_STREAMS_PER_PEER_MAX:
            await stream.reset()
            return
        self._streams_of[peer_id] = self._streams_of.get(peer_id, 0) + 1
        try:
            with trio.move_on_after(DHT_STREAM_S) as scope:
                await super().handle_stream(stream)
            if scope.cancelled_caught:
                await stream.reset()
        finally:
            self._streams_of[peer_id] -= 1
            if not self._streams_of[peer_id]:
                del self._streams_of[peer_id]

    async def _run_main_loop(self) -> None:
        # Whom to know is the core's business (peer exchange), so nothing here searches for peers.
        while True:
            await trio.sleep(MAINTENANCE_S)
            with suppress(Exception):
                self.provider_store.cleanup_expired()
                await self.provider_store.renew()


# --- gossip -------------------------------------------------------------------------------------


class _GossipQueue(RpcQueue):
    """A neighbour's outgoing messages, bounded in number and bytes."""

    def __init__(self) -> None:
        super().__init__(max_size=GOSSIP_QUEUE_MAX, max_message_size=GOSSIP_RPC_BYTES_MAX)
        self._bytes = 0

    def push(self, rpc: rpc_pb2.RPC, priority: bool = False) -> bool:
        """Queue it, unless there is no room."""
        size = rpc.ByteSize()
        if self._bytes + size > GOSSIP_QUEUE_BYTES_MAX or not super().push(rpc, priority):
            return False
        self._bytes += size
        return True

    async def pop(self) -> rpc_pb2.RPC | None:
        """The next one."""
        rpc = await super().pop()
        if rpc is not None:
            self._bytes -= rpc.ByteSize()
        return rpc


class NodeGossip(GossipSub):
    """GossipSub 1.1 on our topics only; peer exchange and adaptive features off."""

    def __init__(self, topics: frozenset[str]) -> None:
        super().__init__(
            protocols=[TProtocol("/meshsub/1.1.0")],
            degree=6,
            degree_low=4,
            degree_high=12,
            heartbeat_interval=HEARTBEAT_S,
            do_px=False,
            adaptive_gossip_enabled=False,
            spam_protection_enabled=False,  # ten messages a second; TokenBucket bounds neighbours instead
            eclipse_protection_enabled=False,
            max_pending_messages_per_peer=8,
        )
        self._topics = topics

    async def handle_rpc(self, rpc: rpc_pb2.RPC, sender_peer_id: ID) -> None:
        """Handle a neighbour's control messages, as far as they are about our topics and not too many."""
        control: Any = rpc.control
        for field in (control.graft, control.prune, control.ihave):
            kept = [entry for entry in field[:CONTROL_ENTRIES_MAX] if entry.topicID in self._topics]
            if len(kept) != len(field):
                del field[:]
                field.extend(kept)
        for field in (control.ihave, control.iwant, control.idontwant):
            del field[CONTROL_ENTRIES_MAX:]
            for entry in field:
                del entry.messageIDs[CONTROL_IDS_MAX:]
        await super().handle_rpc(rpc, sender_peer_id)

    async def _do_px(self, px_peers: Any) -> None:
        return

    def _check_equivocation(self, msg: rpc_pb2.Message) -> bool:
        return True  # it keeps 1,000 messages; the seen cache drops the second one

    async def publish(self, msg_forwarder: ID, pubsub_msg: rpc_pb2.Message) -> None:
        """Pass a message on."""
        await super().publish(msg_forwarder, pubsub_msg)
        self.recent_message_deliveries.clear()  # a time stamp per message, for a feature that is off


class NodePubsub(Pubsub):
    """Messages of bounded size and rate, on our topics, handed to `on_message(topic, relay, payload)`."""

    def __init__(
        self, host: IHost, router: NodeGossip, topics: frozenset[str], on_message: Callable[[str, ID, bytes], None]
    ) -> None:
        super().__init__(
            host,
            router,
            max_inbound_rpc_size=GOSSIP_RPC_BYTES_MAX,
            max_subscriptions_per_rpc=CONTROL_ENTRIES_MAX,
            max_subscriptions_per_peer=len(topics),
            allowed_topics=topics,
        )
        self._topics = topics
        self._buckets: dict[ID, tuple[TokenBucket, TokenBucket]] = {}
        self._on_message = on_message
        for topic in topics:
            self.set_topic_validator(topic, self._deliver, False)

    async def push_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        """Take a message from a neighbour (or ourselves), check it, deliver it and pass it on."""
        if len(msg.topicIDs) != 1 or msg.topicIDs[0] not in self._topics or len(msg.data) > GOSSIP_BYTES_MAX:
            return
        if len(msg.from_id) > 64 or len(msg.seqno) > 16 or self._is_msg_seen(msg):
            return
        if msg_forwarder != self.my_id and not self._may_pass(msg_forwarder, len(msg.data)):
            return
        try:
            await super().push_msg(msg_forwarder, msg)
        except Exception as error:
            logger.debug("message from %s refused: %r", msg_forwarder, error)

    def forget(self, peer_id: ID) -> None:
        """The neighbour is gone."""
        self._buckets.pop(peer_id, None)

    def notify_subscriptions(self, publish_message: rpc_pb2.Message) -> None:
        """Nobody reads the library's queues of 32."""

    def _may_pass(self, peer_id: ID, size: int) -> bool:
        buckets = self._buckets.get(peer_id)
        if buckets is None:
            buckets = TokenBucket(GOSSIP_PER_S, GOSSIP_BURST), TokenBucket(GOSSIP_BYTES_PER_S, GOSSIP_BYTES_BURST)
            self._buckets[peer_id] = buckets
        return buckets[0].take(1) and buckets[1].take(size)

    def _deliver(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> bool:
        # Called once a message, after its signature was checked; tells who passed it on, which a subscription doesn't.
        if msg_forwarder != self.my_id and ID(msg.from_id) != self.my_id:
            self._on_message(msg.topicIDs[0], msg_forwarder, bytes(msg.data))
        return True
