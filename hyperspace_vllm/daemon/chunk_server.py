"""The serving half of the bulk transport: answers peers' requests from the chunk store, over CURVE.

Who asks is what the CURVE handshake proved (ZAP's user id), never what a message claims. A peer may have
PEER_REQUESTS_MAX requests open and PEER_BYTES_IN_FLIGHT_MAX chunk bytes queued here; beyond that it is answered `busy`
or waits. The loop never does: disk reads happen in a thread, sends are tried until a deadline.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, TypeVar, assert_never

import zmq

from ..core.records import wire
from ..core.records.errors import ProtocolViolation, Refused
from ..core.records.ids import ManifestDigest, PeerId
from ..core.records.limits import (
    PEER_BYTES_IN_FLIGHT_MAX,
    PEER_CONTROL_BYTES_MAX,
    PEER_REQUESTS_MAX,
    KiB,
    MiB,
)
from .chunk_store import ChunkStore
from .identity import Identity
from .metrics import Metrics
from .zmq_pump import Pump, Socket, set_link_options

ZAP_ENDPOINT = "inproc://zeromq.zap.01"  # RFC 27: per context
SEND_TRY_S = 0.002  # a ROUTER can't say when a peer's queue has room again
SEND_STALL_S = 5.0  # a peer that takes nothing for so long has its request dropped
READ_BATCH_BYTES = 1 * MiB
# pyzmq copies frames below this and ZeroMQ's queue bounds them by number; larger ones are counted in bytes.
COPIED_BYTES_MAX = 64 * KiB
QUEUED_MESSAGES_MAX = PEER_BYTES_IN_FLIGHT_MAX // 2 // COPIED_BYTES_MAX
TRACKED_BYTES_MAX = PEER_BYTES_IN_FLIGHT_MAX // 2

T = TypeVar("T")


class _PeerGone(Exception):
    """The connection that a reply belongs to is closed, or takes nothing."""


@dataclass(slots=True)
class _Peer:
    requests: dict[tuple[bytes, int], asyncio.Task[None]] = field(default_factory=dict)
    sending: asyncio.Lock = field(default_factory=asyncio.Lock)  # at most one batch a peer in this process's memory
    in_flight: deque[tuple[zmq.MessageTracker, int]] = field(default_factory=deque)
    in_flight_bytes: int = 0

    def bytes_in_flight(self) -> int:
        """Of large chunks; those of an older connection may finish later and hold the newer ones' place."""
        while self.in_flight and self.in_flight[0][0].done:
            self.in_flight_bytes -= self.in_flight.popleft()[1]
        return self.in_flight_bytes


class ChunkServer:
    """A ROUTER bound to `listen` (host:port). Nobody gets in before `admit`; `vouch` gives producers' member tags."""

    def __init__(
        self,
        context: zmq.Context[Socket],
        listen: str,
        identity: Identity,
        store: ChunkStore,
        metrics: Metrics,
        charge: Callable[[PeerId, str], None],
        vouch: Callable[[bytes], bytes],
    ) -> None:
        self._by_curve_key: Mapping[bytes, PeerId] = {}
        self._admitted: frozenset[PeerId] = frozenset()
        self._vouch = vouch
        self._store = store
        self._metrics = metrics
        self._charge = charge
        self._peers: dict[PeerId, _Peer] = {}
        self._reader = ThreadPoolExecutor(1, "hyperspace-serve")
        zap = context.socket(zmq.ROUTER)
        zap.setsockopt(zmq.LINGER, 0)
        zap.bind(ZAP_ENDPOINT)
        socket = context.socket(zmq.ROUTER)
        set_link_options(socket)
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, identity.curve_secret)
        socket.setsockopt(zmq.ZAP_DOMAIN, b"hyperspace")
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without an answer from ZAP nobody gets in
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a full or closed connection is an error, not a silent loss
        socket.setsockopt(zmq.MAXMSGSIZE, PEER_CONTROL_BYTES_MAX)
        socket.setsockopt(zmq.SNDHWM, QUEUED_MESSAGES_MAX)
        socket.setsockopt(zmq.RCVHWM, PEER_REQUESTS_MAX)
        socket.setsockopt(zmq.IPV6, listen.startswith("["))  # else a name would be bound for IPv6 alone
        socket.bind(f"tcp://{listen}")
        self.endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT).removeprefix("tcp://")
        self._zap = Pump(zap, self._authenticate)
        self._pump = Pump(socket, self._receive)

    def admit(self, peers: Mapping[bytes, PeerId]) -> None:
        """Serve these, by CURVE key (32 raw bytes), and nobody else; what others have under way ends unanswered."""
        self._by_curve_key, self._admitted = peers, frozenset(peers.values())
        for peer_id in self._peers.keys() - self._admitted:
            for task in self._peers.pop(peer_id).requests.values():
                task.cancel()

    async def close(self) -> None:
        """Stop serving at once."""
        tasks = [task for peer in self._peers.values() for task in peer.requests.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._pump.close()
        self._zap.close()
        self._reader.shutdown(wait=False, cancel_futures=True)

    # --- who may connect ------------------------------------------------------------------------

    def _authenticate(self, frames: list[zmq.Frame]) -> None:
        # ROUTER instead of REP: [route, empty] version, request id, domain, address, identity, mechanism, key
        route, empty, version, request, _domain, _address, _identity, mechanism, *key = [f.bytes for f in frames]
        peer = self._by_curve_key.get(key[0]) if mechanism == b"CURVE" and key else None
        if peer is None:
            self._metrics.failures_total.labels("l2", "unknown_peer").inc()
            # 300: it tries again after HANDSHAKE_MS. After a 400, ZeroMQ 4.3 never does, and peers often dial before
            # they are known here.
            answer = [b"300", b"not a member", b"", b""]
        else:
            answer = [b"200", b"OK", peer.encode(), b""]
        self._zap.send([route, empty, version, request, *answer])

    # --- requests -------------------------------------------------------------------------------

    def _receive(self, frames: list[zmq.Frame]) -> None:
        peer_id = PeerId(str(frames[-1].get("User-Id")))
        if peer_id not in self._admitted:
            self._metrics.failures_total.labels("l2", "unknown_peer").inc()
            return  # its connection is older than the decision not to serve it any more
        try:
            if len(frames) != 2:
                raise ProtocolViolation(f"peer request: {len(frames) - 1} frames, expected 1")
            request = wire.decode_request(frames[1].buffer)
        except ProtocolViolation:
            self._charge(peer_id, "protocol")
            return
        route = frames[0].bytes
        peer = self._peers.setdefault(peer_id, _Peer())
        running = peer.requests.get((route, request.request))
        if isinstance(request, wire.Cancel):
            if running is not None:
                running.cancel()
        elif running is not None:
            self._charge(peer_id, "protocol")  # the number is taken
        elif len(peer.requests) >= PEER_REQUESTS_MAX:
            self._metrics.failures_total.labels("l2", "peer_busy").inc()
            self._pump_send(route, wire.NotHere(request.request, "busy"))
        else:
            task = asyncio.create_task(self._answer(peer, route, request))
            peer.requests[route, request.request] = task
            task.add_done_callback(lambda _: peer.requests.pop((route, request.request)))

    def _pump_send(self, route: bytes, reply: wire.PeerReply) -> None:
        try:
            self._pump.send([route, wire.encode(reply)])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise

    async def _answer(self, peer: _Peer, route: bytes, request: wire.PeerRequest) -> None:
        try:
            match request:
                case wire.Have(number, row_ids):
                    offers = await self._read(lambda: self._store.offers(row_ids))
                    await self._send(peer, route, wire.HaveReply(number, offers))
                case wire.GetManifest(number, digest):
                    await self._send(peer, route, self._manifest_reply(number, ManifestDigest(digest)))
                case wire.GetChunks():
                    await self._send_chunks(peer, route, request)
                case wire.Cancel():
                    raise AssertionError("handled before")
                case _:
                    assert_never(request)
        except _PeerGone:
            self._metrics.failures_total.labels("l2", "peer_gone").inc()

    def _manifest_reply(self, number: int, digest: ManifestDigest) -> wire.PeerReply:
        record = self._store.record(digest, for_peer=True)
        if record is None:
            return wire.NotHere(number, "unknown")
        return wire.ManifestReply(
            number, record.raw, record.digests, record.proof, self._vouch(record.manifest.producer)
        )

    async def _send_chunks(self, peer: _Peer, route: bytes, asked: wire.GetChunks) -> None:
        digest = ManifestDigest(asked.manifest)
        record = self._store.record(digest, for_peer=True)
        if record is None or asked.row >= len(record.manifest.rows):
            await self._send(peer, route, wire.NotHere(asked.request, "unknown", asked.columns))
            return
        columns = list(dict.fromkeys(asked.columns))
        per_batch = max(READ_BATCH_BYTES // record.manifest.chunk_bytes, 1)
        for start in range(0, len(columns), per_batch):
            batch = columns[start : start + per_batch]
            async with peer.sending:
                missing = await self._send_batch(peer, route, asked, batch)
            if missing is not None:
                await self._send(peer, route, wire.NotHere(asked.request, missing, tuple(columns[start:])))
                return

    async def _send_batch(
        self, peer: _Peer, route: bytes, asked: wire.GetChunks, columns: list[int]
    ) -> Literal["unknown", "io_error"] | None:
        """Send these chunks, and word of those that aren't held; a reason when the disk gave none."""
        digest = ManifestDigest(asked.manifest)
        try:
            chunks = await self._read(lambda: self._store.read_chunks(digest, asked.row, columns))
        except Refused as refused:
            self._metrics.failures_total.labels("l2", refused.reason).inc()
            return "unknown" if refused.reason == "evicted" else "io_error"
        for column, chunk in chunks:
            await self._send(peer, route, wire.Chunk(asked.request, column, len(chunk)), chunk)
            self._metrics.bytes_total.labels("served").inc(len(chunk))
        lacking = tuple(set(columns) - {column for column, _ in chunks})
        if lacking:
            await self._send(peer, route, wire.NotHere(asked.request, "unknown", lacking))
        return None

    async def _send(self, peer: _Peer, route: bytes, reply: wire.PeerReply, chunk: memoryview | None = None) -> None:
        frames: list[bytes | memoryview] = [route, wire.encode(reply)]
        if chunk is not None:
            frames.append(chunk)
        tracked_bytes = len(chunk) if chunk is not None and len(chunk) >= COPIED_BYTES_MAX else 0
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + SEND_STALL_S
        while not self._try_send(peer, frames, tracked_bytes):
            if loop.time() >= give_up_at:
                raise _PeerGone
            await asyncio.sleep(SEND_TRY_S)

    def _try_send(self, peer: _Peer, frames: list[bytes | memoryview], tracked_bytes: int) -> bool:
        if tracked_bytes and peer.bytes_in_flight() + tracked_bytes > TRACKED_BYTES_MAX:
            return False
        try:
            tracker = self._pump.send(frames)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            raise _PeerGone from error
        if tracker is not None and tracked_bytes:
            peer.in_flight.append((tracker, tracked_bytes))
            peer.in_flight_bytes += tracked_bytes
        return tracker is not None

    async def _read(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._reader, function)
