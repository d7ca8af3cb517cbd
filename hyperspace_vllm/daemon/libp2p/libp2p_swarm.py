"""Connections for py-libp2p: TCP, Noise and our yamux, counted and bounded; and the stored facts about peers.

The library listens on a port that another process uses, holds a slot for every inbound connection until the process
ends, refuses a peer for a minute after one failed dial, dials every peer it learns of, and evicts its own keys once it
knows a thousand peers.
"""

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import trio
from libp2p.abc import IMuxedConn, INetConn, INetStream, IRawConnection, ISecureConn
from libp2p.host.basic_host import BasicHost
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.trio import TrioTCPStream
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from libp2p.peer.envelope import Envelope
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.transport.exceptions import MuxerUpgradeFailure, OpenConnectionError
from libp2p.transport.tcp.tcp import TCP
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from ...core.peers.address import may_dial
from ...core.peers.slots import Handshakes
from ...core.records.endpoint import Endpoint
from ...core.records.limits import PEER_CONNECTIONS_INBOUND_MAX, PEER_HANDSHAKES_MAX, KiB
from .libp2p_time import PeerTime
from .libp2p_yamux import YamuxConnection

CONNECTIONS_PER_PEER_MAX = 3  # two when both sides dial at once
UPGRADE_S = 5.0
NEGOTIATION_S = 5
PROTOCOL_NAME_BYTES_MAX = 256
PROTOCOL_NAMES_MAX = 9  # in one negotiation: multistream's own, and eight to choose from
IDENTIFY_BYTES_MAX = 8 * KiB
PEER_ID_BYTES_MAX = 64  # of an Ed25519 key: 38

PEERS_KEPT_MAX = 512
ADDRESSES_PER_PEER_MAX = 4
PROTOCOLS_PER_PEER_MAX = 32
PEER_ENVELOPE_BYTES_MAX = 2 * KiB
FOREVER_S = 10 * 365 * 24 * 3600  # peers are evicted by number, not by age

logger = logging.getLogger(__name__)


def multiaddr_of(host: str, port: int) -> Multiaddr:
    """/ip4|ip6/host/tcp/port."""
    return Multiaddr(f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{port}")


def address_of(maddr: Multiaddr) -> str:
    """host:port of /ip4|ip6/host/tcp/port/…; LookupError."""
    host, port = maddr.value_for_protocol(maddr.protocols()[0].name), maddr.value_for_protocol("tcp")
    return str(Endpoint(host, int(port)))


def may_pass_on(maddr: Multiaddr, told_from: str | None) -> bool:
    """Whether a peer's address reaches as far as the host that it is connected from: a peer that learns it from this
    node judges it by this node's location. None: the address is this node's own."""
    try:
        address = address_of(maddr)
    except LookupError:
        return False
    return may_dial(address, address, told_from)


class _Listener:
    """A TCP listener that fails when the port is taken: the library's own shares it (SO_REUSEPORT).

    `serve` runs a task until the swarm ends, `failed` hears why a port can't be had.
    """

    def __init__(
        self,
        handler: Callable[[ReadWriteCloser], Awaitable[None]],
        serve: Callable[..., None],
        failed: Callable[[OSError], None],
    ) -> None:
        self._handler = handler
        self._serve = serve
        self._failed = failed
        self._listeners: list[trio.SocketListener] = []
        self._addresses: tuple[Multiaddr, ...] = ()

    async def listen(self, maddr: Multiaddr) -> None:
        """Bind and accept in the background."""
        host = maddr.value_for_protocol(maddr.protocols()[0].name)
        try:
            opened = await trio.open_tcp_listeners(int(maddr.value_for_protocol("tcp")), host=host)
            self._listeners = list(opened)
        except OSError as error:
            self._failed(error)
            raise
        self._addresses = tuple(multiaddr_of(*each.socket.getsockname()[:2]) for each in opened)
        for listener in self._listeners:
            self._serve(trio.serve_listeners, self._accept, [listener])

    async def _accept(self, stream: trio.SocketStream) -> None:
        with suppress(Exception):
            await self._handler(TrioTCPStream(stream))

    def get_addrs(self) -> tuple[Multiaddr, ...]:
        """The addresses it listens on."""
        return self._addresses

    async def close(self) -> None:
        """Stop listening."""
        for listener in self._listeners:
            listener.socket.close()


class NodeTransport(TCP):
    """TCP by IP address only; this node resolves names itself, with a deadline.

    `serve` runs a listener's task until the swarm ends. `sockets` are those that were dialled, `listen_error` says why
    the last port could not be had.
    """

    def __init__(self, serve: Callable[..., None]) -> None:
        super().__init__()
        self._serve = serve
        self.sockets: WeakSet[trio.SocketStream] = WeakSet()
        self.listen_error: OSError | None = None

    async def dial(self, maddr: Multiaddr) -> IRawConnection:
        """Connect to an ip4 or ip6 address."""
        host = maddr.value_for_protocol(maddr.protocols()[0].name)
        try:
            stream = await trio.open_tcp_stream(host, int(maddr.value_for_protocol("tcp")))
        except (OSError, ValueError) as error:
            raise OpenConnectionError(f"{maddr}: {error}") from error
        self.sockets.add(stream)
        return RawConnection(TrioTCPStream(stream), True)

    def create_listener(self, handler_function: Any) -> Any:
        """A listener for the swarm."""

        def failed(error: OSError) -> None:
            self.listen_error = error

        return _Listener(handler_function, self._serve, failed)

    def can_dial(self, maddr: Multiaddr) -> bool:
        """Plain /ip4|ip6/…/tcp/…, with or without /p2p/…."""
        names = [protocol.name for protocol in maddr.protocols()]
        return names[:2] in (["ip4", "tcp"], ["ip6", "tcp"]) and names[2:] in ([], ["p2p"])


class NodeUpgrader(TransportUpgrader):
    """Noise, then our own yamux; `time` and `violated` are YamuxConnection's."""

    def __init__(self, time: PeerTime, violated: Callable[[ID], None], *args: Any) -> None:
        super().__init__(*args)
        self._time, self._violated = time, violated

    async def upgrade_connection(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        """Agree on yamux."""
        try:
            with trio.fail_after(UPGRADE_S):
                await self.muxer_multistream.select_transport(conn)
        except Exception as error:
            raise MuxerUpgradeFailure("yamux") from error
        return YamuxConnection(conn, peer_id, self._time, self._violated)


class _NoAutoConnector(AutoConnector):
    """Connects to no peer: the core decides which to dial; the library's own dials every peer it has learnt of."""

    async def run_background_task(self, nursery: trio.Nursery) -> None:
        """Do nothing."""

    async def maybe_connect(self) -> None:
        """Do nothing."""

    def record_disconnect(self, peer_id: ID) -> None:
        """Do nothing."""


class NodeSwarm(Swarm):
    """Connections, counted and bounded; calls `on_peer(peer, connected)` when the first opens and the last closes.

    `admit` is called before a peer's connection is reported; `options` are the library's.
    """

    def __init__(
        self,
        own_id: ID,
        store: PeerStore,
        upgrader: TransportUpgrader,
        on_peer: Callable[[ID, bool], None],
        admit: Callable[[ID], Awaitable[None]],
        **options: Any,
    ) -> None:
        # The manager comes with the task that runs the swarm.
        self.tcp = NodeTransport(lambda *task: self.manager.run_daemon_task(*task))
        super().__init__(own_id, store, upgrader, transports=[self.tcp], **options)
        self._on_peer = on_peer
        self._admit = admit
        self.auto_connector = _NoAutoConnector(self)
        self.notifees.clear()  # a store of tags that is never read
        self._accepted: WeakSet[trio.SocketStream] = WeakSet()
        self._handshakes = Handshakes(PEER_HANDSHAKES_MAX)
        self._inbound: WeakSet[IMuxedConn] = WeakSet()
        self._open: dict[ID, set[INetConn]] = {}

    def live(self, peer_id: ID) -> list[SwarmConn]:
        """The peer's open connections."""
        conns = self.connections.get(peer_id, [])
        return [conn for conn in conns if not conn.is_closed and conn.muxed_conn.is_established]  # type: ignore[misc]

    def host_of(self, peer_id: ID) -> str:
        """The IP address at the other end of the peer's newest connection, '' if there is none."""
        for conn in reversed(self.live(peer_id)):
            address = conn.muxed_conn.get_remote_address()  # type: ignore[attr-defined]
            if address is not None:
                return str(address[0])
        return ""

    def drop(self, peer_id: ID) -> list[SwarmConn]:
        """End every connection to a peer without waiting; returns those that are ending."""
        ending = self.live(peer_id)
        for conn in ending:
            conn.muxed_conn.stop()  # type: ignore[attr-defined]
        return ending

    async def dial_peer(self, peer_id: ID) -> list[INetConn]:
        """Refuse: the library would dial every address that any peer told it; the core decides which to dial."""
        raise SwarmException("not connected")

    async def _handle_inbound_connection(self, read_write_closer: ReadWriteCloser, maddr: Multiaddr) -> None:
        # The library's own holds a slot (and this task) until the swarm ends, however early the connection does.
        host = (read_write_closer.get_remote_address() or ("",))[0]
        scope = trio.CancelScope()
        handshake = self._handshakes.begin(host, trio.current_time(), scope.cancel)
        if handshake is None:
            return
        self._accepted.add(read_write_closer.stream)  # type: ignore[attr-defined]
        try:
            with scope:
                muxed = await self.upgrade_inbound_raw_conn(RawConnection(read_write_closer, False), maddr)
        finally:
            self._handshakes.end(handshake)
        if not scope.cancelled_caught:
            await muxed.event_closed.wait()  # type: ignore[attr-defined]

    async def add_conn(self, muxed_conn: IMuxedConn, direction: str = "unknown") -> SwarmConn:
        """Register a connection, unless the peer has enough of them, or there are enough inbound ones."""
        peer_id = muxed_conn.peer_id
        is_full = direction == "inbound" and not self._has_room()
        if peer_id == self.self_id or is_full or len(self.live(peer_id)) >= CONNECTIONS_PER_PEER_MAX:
            await muxed_conn.close()
            raise SwarmException("enough connections")
        if direction == "inbound":
            self._inbound.add(muxed_conn)
        return await super().add_conn(muxed_conn, direction)

    def _has_room(self) -> bool:
        """Whether there is an inbound place; if not, it takes one from a peer that has several."""
        inbound = [conn for conn in self._inbound if not conn.is_closed]
        if len(inbound) < PEER_CONNECTIONS_INBOUND_MAX:
            return True
        held = Counter(conn.peer_id for conn in inbound)
        spare = next((conn for conn in inbound if held[conn.peer_id] > 1), None)
        if spare is not None:
            spare.stop()  # type: ignore[attr-defined]
        return spare is not None

    def remove_conn(self, swarm_conn: SwarmConn) -> None:
        """Forget a connection."""
        super().remove_conn(swarm_conn)
        peer_id = swarm_conn.muxed_conn.peer_id
        conns = self._open.get(peer_id)
        if conns is not None and swarm_conn in conns:
            conns.discard(swarm_conn)
            if not conns:
                del self._open[peer_id]
                self._on_peer(peer_id, False)

    async def notify_connected(self, conn: INetConn) -> None:
        """Report a connection that is ready."""
        peer_id = conn.muxed_conn.peer_id
        await self._admit(peer_id)
        if not conn.is_closed:
            conns = self._open.setdefault(peer_id, set())
            conns.add(conn)
            if len(conns) == 1:
                self._on_peer(peer_id, True)
        await super().notify_connected(conn)

    async def notify_opened_stream(self, stream: INetStream) -> None:
        """Do nothing: no code listens, and the library would start a task per notifee."""

    async def notify_closed_stream(self, stream: INetStream) -> None:
        """Mark the stream as released; no code listens."""
        stream._resource_released = True  # type: ignore[attr-defined]

    def _schedule_auto_connect(self) -> None:
        return

    def close_sockets(self) -> None:
        """Close every socket at once, which peers notice."""
        for stream in [*self._accepted, *self.tcp.sockets]:
            stream.socket.close()


class NodePeerStore(PeerStore):
    """Addresses and protocols of a bounded number of peers; the library's own evicts its own keys when it is full.

    Its content is what other peers are told in answers of the DHT.
    """

    def __init__(self, keep: Callable[[ID], bool], told_from: Callable[[ID], str | None]) -> None:
        super().__init__(max_peers=PEERS_KEPT_MAX)
        self._keep = keep  # the node itself, and every connected peer
        self._told_from = told_from

    def may_pass_on(self, peer_id: ID, addrs: Sequence[Multiaddr]) -> list[Multiaddr]:
        """Those of a peer's addresses that other peers may be told."""
        told_from = self._told_from(peer_id)
        return [each for each in addrs if may_pass_on(each, told_from)]

    def add_addrs(self, peer_id: ID, addrs: Sequence[Multiaddr], ttl: int = 0) -> None:
        """Remember the newest few of a peer's addresses."""
        super().add_addrs(peer_id, self.may_pass_on(peer_id, addrs[:ADDRESSES_PER_PEER_MAX]), FOREVER_S)
        data = self.peer_data_map.get(peer_id)
        if data is not None and len(data.addrs) > ADDRESSES_PER_PEER_MAX:
            data.addrs = data.addrs[-ADDRESSES_PER_PEER_MAX:]

    def add_protocols(self, peer_id: ID, protocols: Sequence[str]) -> None:
        """Remember the protocols that a peer claims to speak."""
        self.set_protocols(peer_id, protocols)

    def set_protocols(self, peer_id: ID, protocols: Sequence[str]) -> None:
        """Remember the protocols that a peer claims to speak."""
        short = [name for name in protocols[:PROTOCOLS_PER_PEER_MAX] if len(name) <= PROTOCOL_NAME_BYTES_MAX]
        super().set_protocols(peer_id, short)
        self._enforce_peer_limit()

    def consume_peer_record(self, envelope: Envelope, ttl: int) -> bool:
        """Store a signed record of addresses."""
        if len(envelope.raw_payload) > PEER_ENVELOPE_BYTES_MAX:
            return False
        record = envelope.record()
        if len(self.may_pass_on(record.peer_id, record.addrs)) < len(record.addrs):
            return True  # the record is valid; other peers just aren't told of it
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
    """Identifies peers in the background; `identified` is called with each. `options` are the library's."""

    def __init__(self, network: NodeSwarm, identified: Callable[[ID], Awaitable[None]], **options: Any) -> None:
        self._identified = identified
        self._announced: tuple[Multiaddr, ...] = ()
        super().__init__(network, **options)

    def get_addrs(self) -> list[Multiaddr]:
        """The addresses that peers are told: computed once, because every gossip message asks for them."""
        if not self._announced:
            self._announced = tuple(super().get_addrs())
        return list(self._announced)

    async def _identify_task_entry(self, peer_id: ID, reason: str) -> None:
        # It runs as a system task, where an exception ends trio itself.
        try:
            with trio.move_on_after(2 * NEGOTIATION_S):
                await self._identify_peer(peer_id, reason=reason)
                if peer_id in self._identified_peers:
                    await self._identified(peer_id)
        except Exception as error:
            logger.debug("identify %s failed: %r", peer_id, error)
        finally:
            self._identify_inflight.discard(peer_id)

    async def _push_identify_to_all_peers(self) -> None:
        return
