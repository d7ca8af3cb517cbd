"""The listening side of the bulk transport: which peers may connect, how many times, and for how long without a proof.

A connection has one descriptor until its peer has sent something, and from then on a ZeroMQ socket of its own (four
descriptors). CURVE and ZAP identify its peer within HANDSHAKE_S; when all places are taken, the least useful connection
makes room (core/peers/slots.py).
"""

import asyncio
import socket
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from itertools import count

import zmq

from ...core.peers.address import source_of
from ...core.peers.slots import Handshakes, Place, evicted_for
from ...core.records.endpoint import Endpoint
from ...core.records.errors import ProtocolViolation
from ...core.records.ids import PeerId
from ...core.records.limits import (
    KV_CONNECTIONS_MAX,
    KV_HANDSHAKES_MAX,
    KV_REQUEST_BYTES_HELD_MAX,
    PEER_CONTROL_BYTES_MAX,
    PEER_REQUESTS_MAX,
    KiB,
)
from ...core.records.reason import Reason
from ..identity import Identity
from ..metrics import Metrics
from ..zmq_pump import Pump, Socket, set_link_options
from .frame_meter import GREETING_BYTES, FrameMeter
from .kv_passage import Passage, hang_up

ZAP_ENDPOINT = "inproc://zeromq.zap.01"  # RFC 27: per context
HANDSHAKE_S = 2.0
BACKLOG = 128
ACCEPT_AGAIN_S = 0.1  # after an error, for example when this process may open no more files
CONNECTIONS_PER_PEER_MAX = 2  # one may be dead without having been noticed
# pyzmq copies frames below this and ZeroMQ's queue bounds them by number; larger ones are counted in bytes.
COPIED_BYTES_MAX = 64 * KiB
QUEUED_MESSAGES_MAX = 128  # to one connection: 8 MiB

Receive = Callable[["Connection", list[zmq.Frame]], None]


class Connection:
    """One peer's connection; `peer` is '' until ZAP knows it. `hang_up` closes it, a moment later."""

    def __init__(
        self, tcp: socket.socket, zmq_socket: Socket, place: Place, receive: Receive, on_proof: Callable[[], None]
    ) -> None:
        self.peer = PeerId("")
        self.place = place
        self.on_proof = on_proof
        self.hang_up = partial(hang_up, tcp)
        self._receive = receive
        meter = FrameMeter(PEER_CONTROL_BYTES_MAX, KV_REQUEST_BYTES_HELD_MAX)
        self._passage = Passage(tcp, zmq_socket, meter, self._close)
        self._pump = Pump(zmq_socket, self._received)
        self.send = self._pump.send  # None: no room, or closed
        self.hold = self._passage.hold
        self.closed = False

    async def run(self, first: bytes) -> None:
        """As Passage.run."""
        try:
            await self._passage.run(first)
        finally:
            self._close()

    def _close(self) -> None:
        if not self.closed:
            self.closed = True
            self._pump.close()

    def _received(self, frames: list[zmq.Frame]) -> None:
        self._passage.came_out(frames)
        self._receive(self, frames)


class Door:
    """Listens at `listen` (host:port); OSError when it can't. No peer is accepted before `admit`.

    `receive` is called with what admitted peers send, `charge` with peers that break the protocol.
    """

    def __init__(
        self,
        context: zmq.Context[Socket],
        listen: str,
        identity: Identity,
        metrics: Metrics,
        receive: Receive,
        charge: Callable[[PeerId, Reason], None],
    ) -> None:
        self._context = context
        self._identity = identity
        self._metrics = metrics
        self._receive = receive
        self._charge = charge
        self._loop = asyncio.get_running_loop()
        self._by_curve_key: Mapping[bytes, PeerId] = {}
        self._admitted: frozenset[PeerId] = frozenset()
        self._domains = count()
        self._handshakes = Handshakes(KV_HANDSHAKES_MAX)
        self._proving: dict[bytes, Connection] = {}  # by ZAP domain, which tells connections apart
        self._connections: dict[bytes, Connection] = {}  # those whose peer is proven
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener, self.endpoint = _listen(listen)
        zap = context.socket(zmq.ROUTER)
        zap.setsockopt(zmq.LINGER, 0)
        zap.bind(ZAP_ENDPOINT)
        self._zap = Pump(zap, self._authenticate)
        self._spawn(self._accept())

    def admit(self, peers: Mapping[bytes, PeerId]) -> None:
        """Admit these peers, by CURVE key (32 raw bytes). Messages of others are dropped, and they make room first."""
        self._by_curve_key, self._admitted = peers, frozenset(peers.values())
        for connection in self._connections.values():
            connection.place.worth = int(connection.peer in self._admitted)

    async def close(self) -> None:
        """Close every connection at once."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._listener.close()
        self._zap.close()

    async def _accept(self) -> None:
        while True:
            try:
                tcp, address = await self._loop.sock_accept(self._listener)
            except OSError:
                await asyncio.sleep(ACCEPT_AGAIN_S)
                continue
            number = self._handshakes.begin(address[0], self._loop.time(), partial(hang_up, tcp))
            if number is None:
                tcp.close()
            else:
                self._spawn(self._serve(tcp, Place(source_of(address[0]), 0.0), number))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, tcp: socket.socket, place: Place, handshake: int) -> None:
        """Serve one connection, from its first byte to its last."""
        connection = None
        domain = b"%d" % next(self._domains)
        deadline = self._loop.call_later(HANDSHAKE_S, hang_up, tcp)

        def on_proof() -> None:
            deadline.cancel()
            self._handshakes.end(handshake)

        try:
            with tcp:
                first = await self._loop.sock_recv(tcp, GREETING_BYTES)
                if not first:
                    return
                connection = Connection(tcp, self._socket(domain), place, self._received, on_proof)
                self._proving[domain] = connection
                await connection.run(first)
        except OSError:
            pass  # the peer has disconnected
        except ProtocolViolation:
            if connection is not None and connection.peer:
                self._charge(connection.peer, Reason.PROTOCOL)
        finally:
            on_proof()
            self._proving.pop(domain, None)
            self._connections.pop(domain, None)

    def _socket(self, domain: bytes) -> Socket:
        made = self._context.socket(zmq.DEALER)
        set_link_options(made)
        made.setsockopt(zmq.CURVE_SERVER, 1)
        made.setsockopt(zmq.CURVE_SECRETKEY, self._identity.curve_secret)
        made.setsockopt(zmq.ZAP_DOMAIN, domain)
        made.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without an answer from ZAP no peer is accepted
        made.setsockopt(zmq.MAXMSGSIZE, PEER_CONTROL_BYTES_MAX)
        made.setsockopt(zmq.SNDHWM, QUEUED_MESSAGES_MAX)
        made.setsockopt(zmq.RCVHWM, PEER_REQUESTS_MAX)
        return made

    # --- authentication -------------------------------------------------------------------------

    def _authenticate(self, frames: list[zmq.Frame]) -> None:
        # ROUTER instead of REP: [route, empty] version, request id, domain, address, identity, mechanism, key
        route, empty, version, request, domain, _address, _identity, mechanism, *key = [f.bytes for f in frames]
        peer = self._by_curve_key.get(key[0]) if mechanism == b"CURVE" and key else None
        connection = self._proving.pop(domain, None)
        if peer is None or connection is None:
            self._metrics.failures_total.labels("l2", "unknown_peer").inc()
            # 300: the peer tries again after HANDSHAKE_MS. After a 400, ZeroMQ 4.3 never does, and peers often dial
            # before they are known here.
            answer = [b"300", b"not a member", b"", b""]
        else:
            self._give_place(domain, connection, peer)
            answer = [b"200", b"OK", peer.encode(), b""]
        self._zap.send([route, empty, version, request, *answer])

    def _give_place(self, domain: bytes, connection: Connection, peer: PeerId) -> None:
        connection.on_proof()
        connection.peer = peer
        connection.place.used_at, connection.place.worth = self._loop.time(), 1
        others = {domain: each.place for domain, each in self._connections.items()}
        mine = {domain: others[domain] for domain, each in self._connections.items() if each.peer == peer}
        rivals = mine if len(mine) >= CONNECTIONS_PER_PEER_MAX else others
        if rivals is mine or len(others) >= KV_CONNECTIONS_MAX:
            evicted = evicted_for(rivals, connection.place)
            assert evicted is not None  # none is worth more than 1
            self._connections.pop(evicted).hang_up()
        self._connections[domain] = connection

    def _received(self, connection: Connection, frames: list[zmq.Frame]) -> None:
        if connection.peer not in self._admitted:
            self._metrics.failures_total.labels("l2", "unknown_peer").inc()
            return  # connected before it was removed from the served peers
        connection.place.used_at = self._loop.time()
        self._receive(connection, frames)


def _listen(address: str) -> tuple[socket.socket, str]:
    """A listener at host:port, and the host:port that it is bound to."""
    wanted = Endpoint.of_setting(address)
    host = "0.0.0.0" if wanted.host == "*" else wanted.host
    family, kind, protocol, _, where = socket.getaddrinfo(host, wanted.port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(BACKLOG)
        bound = Endpoint(*listener.getsockname()[:2])
    except BaseException:
        listener.close()
        raise
    return listener, str(bound)
