"""The serving half of the bulk transport: answers peers' requests from the chunk store, over CURVE.

The CURVE handshake proves the requesting peer's identity (ZAP's user id); what a message claims doesn't count. A peer
may have PEER_REQUESTS_MAX requests open and PEER_BYTES_IN_FLIGHT_MAX chunk bytes queued here; beyond that it is
answered `busy` or waits. Requests, and answers other than chunks, take of the peer's share of CPU time; a peer that has
used it up is not read for a while. The loop never blocks: disk reads happen in a thread, sends are tried until a
deadline.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeVar, assert_never

import msgspec
import zmq

from ...core.records import wire
from ...core.records.errors import ProtocolViolation, Refused
from ...core.records.ids import ManifestDigest, PeerId
from ...core.records.limits import PEER_BYTES_IN_FLIGHT_MAX, PEER_REQUESTS_MAX, PEERS_BYTES_IN_FLIGHT_MAX, MiB
from ...core.records.reason import Reason
from ..identity import Identity
from ..metrics import Metrics
from ..token_bucket import TokenBucket
from ..zmq_pump import Socket
from .chunk_store import ChunkStore
from .kv_door import COPIED_BYTES_MAX, Connection, Door

SEND_TRY_S = 0.002  # polled: no event says that the sum of a peer's chunks in flight has room again
SEND_STALL_S = 5.0  # a connection that accepts nothing for this long is closed
READ_BATCH_BYTES = 1 * MiB
CPU_SHARE = 0.1  # of a core, for one peer's requests
CPU_BURST_S = 0.5  # at once; a fetch of 64 MiB with a request for each chunk takes a fifth of it
MESSAGE_S = 100e-6  # on a slow core
BYTE_S = 40e-9  # a row id has 34, and is decoded and looked up
REPLY_BYTE_S = 20e-9  # offers, mostly
HAVE_BATCH = 256  # ids that are looked up at once: under a millisecond

T = TypeVar("T")


class _PeerGone(Exception):
    """The connection that a reply belongs to is closed, or accepts nothing."""


@dataclass(slots=True)
class _Peer:
    requests: dict[tuple[Connection, int], asyncio.Task[None]] = field(default_factory=dict)
    looking_up: asyncio.Lock = field(default_factory=asyncio.Lock)  # at most one slice per peer waits for the reader
    sending: asyncio.Lock = field(default_factory=asyncio.Lock)  # at most one batch per peer in this process's memory
    in_flight: deque[tuple[zmq.MessageTracker, int]] = field(default_factory=deque)
    in_flight_bytes: int = 0
    cpu: TokenBucket = field(default_factory=lambda: TokenBucket(CPU_SHARE, CPU_BURST_S))

    def bytes_in_flight(self) -> int:
        """Bytes of large chunks; those of an older connection may finish later, and until then newer ones count too."""
        while self.in_flight and self.in_flight[0][0].done:
            self.in_flight_bytes -= self.in_flight.popleft()[1]
        return self.in_flight_bytes


class ChunkServer:
    """Serves at `listen` (host:port), no peers before `admit`. `vouch` gives producers' member tags."""

    def __init__(
        self,
        context: zmq.Context[Socket],
        listen: str,
        identity: Identity,
        store: ChunkStore,
        metrics: Metrics,
        charge: Callable[[PeerId, Reason], None],
        vouch: Callable[[bytes], bytes],
    ) -> None:
        self._vouch = vouch
        self._store = store
        self._metrics = metrics
        self._charge = charge
        self._peers: dict[PeerId, _Peer] = {}
        self._reader = ThreadPoolExecutor(1, "hyperspace-serve")
        self._door = Door(context, listen, identity, metrics, self._receive, charge)
        self.endpoint = self._door.endpoint

    def admit(self, peers: Mapping[bytes, PeerId]) -> None:
        """Serve only these peers, by CURVE key (32 raw bytes); open requests of all others end unanswered."""
        self._door.admit(peers)
        for peer_id in self._peers.keys() - set(peers.values()):
            for task in self._peers.pop(peer_id).requests.values():
                task.cancel()

    async def close(self) -> None:
        """Stop serving at once."""
        tasks = [task for peer in self._peers.values() for task in peer.requests.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._door.close()
        self._reader.shutdown(wait=False, cancel_futures=True)

    # --- requests -------------------------------------------------------------------------------

    def _receive(self, connection: Connection, frames: list[zmq.Frame]) -> None:
        peer = self._peers.setdefault(connection.peer, _Peer())
        connection.hold(peer.cpu.owe(MESSAGE_S + sum(map(len, frames)) * BYTE_S))
        try:
            if len(frames) != 1:
                raise ProtocolViolation(f"peer request: {len(frames)} frames, expected 1")
            request = wire.decode_request(frames[0].buffer)
        except ProtocolViolation:
            self._charge(connection.peer, Reason.PROTOCOL)
            return
        running = peer.requests.get((connection, request.request))
        if isinstance(request, wire.Cancel):
            if running is not None:
                running.cancel()
        elif running is not None:
            self._charge(connection.peer, Reason.PROTOCOL)  # the request number is in use
        elif len(peer.requests) >= PEER_REQUESTS_MAX:
            self._metrics.failures_total.labels("l2", "peer_busy").inc()
            connection.send([wire.encode(wire.NotHere(request.request, "busy"))])
        else:
            task = asyncio.create_task(self._answer(peer, connection, request))
            peer.requests[connection, request.request] = task
            task.add_done_callback(lambda _: peer.requests.pop((connection, request.request)))

    async def _answer(self, peer: _Peer, connection: Connection, request: wire.PeerRequest) -> None:
        try:
            match request:
                case wire.Have(number, row_ids):
                    async with peer.looking_up:
                        offers = await self._offers(row_ids)
                    await self._send(peer, connection, wire.HaveReply(number, offers))
                case wire.GetManifest(number, digest):
                    await self._send(peer, connection, self._manifest_reply(number, ManifestDigest(digest)))
                case wire.GetChunks():
                    await self._send_chunks(peer, connection, request)
                case wire.Cancel():
                    raise AssertionError("handled before")
                case _:
                    assert_never(request)
        except _PeerGone:
            self._metrics.failures_total.labels("l2", "peer_gone").inc()

    async def _offers(self, row_ids: Sequence[bytes]) -> tuple[wire.Offer, ...]:
        """Look these rows up in slices, between which the reader serves other peers."""
        offers: list[wire.Offer] = []
        for start in range(0, len(row_ids), HAVE_BATCH):
            batch = row_ids[start : start + HAVE_BATCH]
            found = await self._read(partial(self._store.offers, batch))
            offers += [msgspec.structs.replace(offer, index=start + offer.index) for offer in found]
        return tuple(offers)

    def _manifest_reply(self, number: int, digest: ManifestDigest) -> wire.PeerReply:
        record = self._store.record(digest, for_peer=True)
        if record is None:
            return wire.NotHere(number, "unknown")
        return wire.ManifestReply(
            number, record.raw, record.digests, record.proof, self._vouch(record.manifest.producer)
        )

    async def _send_chunks(self, peer: _Peer, connection: Connection, asked: wire.GetChunks) -> None:
        digest = ManifestDigest(asked.manifest)
        record = self._store.record(digest, for_peer=True)
        if record is None or asked.row >= len(record.manifest.rows):
            await self._send(peer, connection, wire.NotHere(asked.request, "unknown", asked.columns))
            return
        columns = list(dict.fromkeys(asked.columns))
        per_batch = max(READ_BATCH_BYTES // record.manifest.chunk_bytes, 1)
        for start in range(0, len(columns), per_batch):
            batch = columns[start : start + per_batch]
            async with peer.sending:
                missing = await self._send_batch(peer, connection, asked, batch)
            if missing is not None:
                await self._send(peer, connection, wire.NotHere(asked.request, missing, tuple(columns[start:])))
                return

    async def _send_batch(
        self, peer: _Peer, connection: Connection, asked: wire.GetChunks, columns: list[int]
    ) -> Literal["unknown", "io_error"] | None:
        """Send these chunks, and report those that aren't held; returns a reason when the disk gave none."""
        digest = ManifestDigest(asked.manifest)
        try:
            chunks = await self._read(lambda: self._store.read_chunks(digest, asked.row, columns))
        except Refused as refused:
            self._metrics.failures_total.labels("l2", refused.reason).inc()
            return "unknown" if refused.reason == "evicted" else "io_error"
        for column, chunk in chunks:
            await self._send(peer, connection, wire.Chunk(asked.request, column, len(chunk)), chunk)
            self._metrics.bytes_total.labels("served").inc(len(chunk))
        lacking = tuple(set(columns) - {column for column, _ in chunks})
        if lacking:
            await self._send(peer, connection, wire.NotHere(asked.request, "unknown", lacking))
        return None

    async def _send(
        self, peer: _Peer, connection: Connection, reply: wire.PeerReply, chunk: memoryview | None = None
    ) -> None:
        frames: list[bytes | memoryview] = [wire.encode(reply)]
        if chunk is None:
            connection.hold(peer.cpu.owe(len(frames[0]) * REPLY_BYTE_S))
        if chunk is not None:
            frames.append(chunk)
        tracked_bytes = len(chunk) if chunk is not None and len(chunk) >= COPIED_BYTES_MAX else 0
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + SEND_STALL_S
        while not self._try_send(peer, connection, frames, tracked_bytes):
            if loop.time() >= give_up_at:
                connection.hang_up()
                raise _PeerGone
            await asyncio.sleep(SEND_TRY_S)

    def _try_send(
        self, peer: _Peer, connection: Connection, frames: list[bytes | memoryview], tracked_bytes: int
    ) -> bool:
        if connection.closed:
            raise _PeerGone
        if tracked_bytes and not self._has_room(peer, tracked_bytes):
            return False
        tracker = connection.send(frames)
        if tracker is not None and tracked_bytes:
            peer.in_flight.append((tracker, tracked_bytes))
            peer.in_flight_bytes += tracked_bytes
        return tracker is not None

    def _has_room(self, peer: _Peer, size: int) -> bool:
        mine = peer.bytes_in_flight()
        if mine + size > PEER_BYTES_IN_FLIGHT_MAX:
            return False
        return not mine or sum(each.bytes_in_flight() for each in self._peers.values()) <= PEERS_BYTES_IN_FLIGHT_MAX

    async def _read(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._reader, function)
