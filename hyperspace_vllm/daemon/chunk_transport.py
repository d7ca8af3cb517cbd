"""The bulk transport between nodes: ZeroMQ with CURVE both ways, peers pinned by their identity.

One ROUTER serves (chunk_server.py); one DEALER per configured peer asks. Nothing waits without a deadline: what didn't
come is `PeerFailed` with a reason. Frames of chunks are handed on as they were received, uncopied.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from itertools import count
from typing import assert_never

import zmq
from zmq.utils import z85

from ..config import Config
from ..core.records import wire
from ..core.records.errors import ProtocolViolation
from ..core.records.ids import ManifestDigest, PeerId, RowId
from ..core.records.limits import PEER_MESSAGE_BYTES_MAX
from .chunk_server import ChunkServer
from .chunk_store import ChunkStore
from .identity import Identity, curve_public_of
from .metrics import Metrics
from .peer_failed import PeerFailed
from .zmq_pump import Pump, Socket, set_link_options

RECONNECT_MS = 100
RECONNECT_MS_MAX = 5_000
CONNECT_S = 1.0  # not connected for longer: requests fail at once until ZeroMQ has reconnected
REQUESTS_QUEUED_MAX = 256  # small messages
REPLIES_QUEUED_MAX = 32  # 32 chunks of 4 MiB = 128 MiB a peer at the very most

Chunks = list[tuple[int, memoryview]]
_Request = Callable[[int], wire.PeerRequest]
log = logging.getLogger(__name__)


class ChunkTransport:
    """Serves this node's chunks and asks the configured peers for theirs. Lives on one event loop."""

    def __init__(self, config: Config, identity: Identity, store: ChunkStore, metrics: Metrics) -> None:
        self._metrics = metrics
        self._addresses = dict(_split_peer(peer) for peer in config.peers)
        self.charges: Counter[tuple[PeerId, str]] = Counter()
        self._context: zmq.Context[Socket] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 4096)
        members = {z85.decode(curve_public_of(peer)): peer for peer in self._addresses}
        self._server = ChunkServer(self._context, config.listen, identity, members, store, metrics, self.charge)
        self._peers = {
            peer: _PeerLink(self._context, peer, address, identity, self.charge)
            for peer, address in self._addresses.items()
        }
        metrics.peers.set(len(self._peers))

    @property
    def endpoint(self) -> str:
        """host:port that peers reach this node at."""
        return self._server.endpoint

    @property
    def peers(self) -> tuple[PeerId, ...]:
        """The configured peers: who is asked, served and trusted."""
        return tuple(self._addresses)

    def is_connected(self, peer: PeerId) -> bool:
        """Whether a request would leave at once."""
        return self._peers[peer].connected

    def charge(self, peer: PeerId, reason: str) -> None:
        """Hold something against a peer."""
        self.charges[peer, reason] += 1
        self._metrics.failures_total.labels("l2", f"peer_{reason}").inc()

    async def find(self, peer: PeerId, row_ids: tuple[RowId, ...], timeout_s: float) -> wire.HaveReply:
        """Which of the rows the peer serves; offers' indexes are within `row_ids`."""
        link = self._peers[peer]
        reply = await link.ask(lambda n: wire.Have(n, row_ids), wire.HaveReply, timeout_s)
        assert isinstance(reply, wire.HaveReply)
        indexes = {offer.index for offer in reply.offers}
        if len(indexes) != len(reply.offers) or max(indexes, default=0) >= len(row_ids):
            raise link.violated("offers of rows that weren't asked for, or two of one")
        return reply

    async def manifest(self, peer: PeerId, digest: ManifestDigest, timeout_s: float) -> wire.ManifestReply:
        """An object's manifest, digest table and proof, none of it checked."""
        link = self._peers[peer]
        reply = await link.ask(lambda n: wire.GetManifest(n, digest), wire.ManifestReply, timeout_s)
        assert isinstance(reply, wire.ManifestReply)
        return reply

    def chunks(
        self,
        peer: PeerId,
        digest: ManifestDigest,
        row: int,
        columns: tuple[int, ...],
        chunk_bytes: int,
        timeout_s: float,
    ) -> AsyncGenerator[Chunks, None]:
        """Unchecked (column, bytes), as many at a time as have arrived, each column once.

        `PeerFailed` at the end if some never came. `timeout_s` is for all of them. Close the iterator to cancel.
        """
        return self._peers[peer].chunks(digest, row, columns, chunk_bytes, timeout_s)

    async def close(self) -> None:
        """End everything at once."""
        await self._server.close()
        for link in self._peers.values():
            link.close()
        self._context.destroy(linger=0)


@dataclass(slots=True)
class _Open:
    """A request under way: what may answer it, and what has."""

    answered_by: type[wire.PeerReply]
    lacking: set[int]  # columns still to come
    chunk_bytes: int
    arrived: Chunks = field(default_factory=list)
    reply: wire.PeerReply | None = None
    failure: str = ""
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def over(self) -> bool:
        return self.reply is not None or (not self.lacking and self.answered_by is wire.Chunk) or self.broken

    @property
    def broken(self) -> bool:
        return bool(self.failure) and (self.failure == "protocol" or self.answered_by is not wire.Chunk)


class _PeerLink:
    """The DEALER to one peer, connected from the start: the first lookup shouldn't pay for the handshake."""

    def __init__(
        self,
        context: zmq.Context[Socket],
        peer: PeerId,
        address: str,
        identity: Identity,
        charge: Callable[[PeerId, str], None],
    ) -> None:
        self._peer = peer
        self._charge = charge
        self._open: dict[int, _Open] = {}
        self._numbers = count()
        self._loop = asyncio.get_running_loop()
        self._silent_since: float | None = self._loop.time()
        socket = context.socket(zmq.DEALER)
        set_link_options(socket)
        socket.setsockopt(zmq.CURVE_SERVERKEY, curve_public_of(peer))
        socket.setsockopt(zmq.CURVE_PUBLICKEY, identity.curve_public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, identity.curve_secret)
        socket.setsockopt(zmq.IMMEDIATE, 1)  # queue nothing for a peer that isn't there
        socket.setsockopt(zmq.MAXMSGSIZE, PEER_MESSAGE_BYTES_MAX)
        socket.setsockopt(zmq.SNDHWM, REQUESTS_QUEUED_MAX)
        socket.setsockopt(zmq.RCVHWM, REPLIES_QUEUED_MAX)
        socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MS_MAX)
        socket.connect(f"tcp://{address}")
        self._pump = Pump(socket, self._receive)

    @property
    def connected(self) -> bool:
        return self._pump.writable

    async def ask(self, request: _Request, answered_by: type[wire.PeerReply], timeout_s: float) -> wire.PeerReply:
        opened = _Open(answered_by, set(), 0)
        number = self._begin(opened)
        deadline = self._loop.time() + timeout_s
        try:
            await self._send(request(number), deadline)
            await self._wait(opened, deadline)
        finally:
            del self._open[number]
        if opened.failure:
            raise PeerFailed(opened.failure)
        assert opened.reply is not None
        return opened.reply

    async def chunks(
        self, digest: ManifestDigest, row: int, columns: tuple[int, ...], chunk_bytes: int, timeout_s: float
    ) -> AsyncGenerator[Chunks, None]:
        opened = _Open(wire.Chunk, set(columns), chunk_bytes)
        number = self._begin(opened)
        deadline = self._loop.time() + timeout_s
        try:
            await self._send(wire.GetChunks(number, digest, row, columns), deadline)
            while opened.arrived or not opened.over:
                await self._wait(opened, deadline)
                batch, opened.arrived = opened.arrived, []
                if batch:
                    yield batch
        finally:
            del self._open[number]
            if opened.lacking:
                self._pump.send([wire.encode(wire.Cancel(number))])
        if opened.failure:
            raise PeerFailed(opened.failure)

    def violated(self, detail: str) -> PeerFailed:
        """Charge the peer for breaking the protocol; what its request then fails with."""
        log.info("peer %s broke the protocol: %s", self._peer, detail)
        self._charge(self._peer, "protocol")
        return PeerFailed("protocol")

    def close(self) -> None:
        self._pump.close()

    def _begin(self, opened: _Open) -> int:
        number = next(self._numbers) % (1 << 32)
        self._open[number] = opened
        return number

    async def _send(self, message: wire.PeerRequest, deadline: float) -> None:
        frames: list[bytes | memoryview] = [wire.encode(message)]
        if self._pump.send(frames) is None:
            now = self._loop.time()
            self._silent_since = self._silent_since or now
            patience_s = min(deadline, self._silent_since + CONNECT_S) - now
            try:
                await self._pump.wait_writable(max(patience_s, 0))
            except TimeoutError:
                raise PeerFailed("unreachable") from None
            if self._pump.send(frames) is None:
                raise PeerFailed("unreachable")
        self._silent_since = None

    async def _wait(self, opened: _Open, deadline: float) -> None:
        """Until there is something to look at."""
        try:
            async with asyncio.timeout_at(deadline):
                while not opened.over and not opened.arrived:
                    opened.wake.clear()
                    await opened.wake.wait()
        except TimeoutError:
            raise PeerFailed("timeout") from None

    def _receive(self, frames: list[zmq.Frame]) -> None:
        try:
            reply = wire.decode_reply(frames[0].buffer)
        except ProtocolViolation as error:
            self.violated(str(error))
            return
        opened = self._open.get(reply.request)
        if opened is None:
            return  # too late, or made up
        if not _accept(opened, reply, frames[1:]):
            opened.failure = self.violated(f"unexpected {type(reply).__name__}").reason
        opened.wake.set()


def _accept(opened: _Open, reply: wire.PeerReply, payload: list[zmq.Frame]) -> bool:
    """Take a reply into its request; False if it is none that the request allows."""
    match reply:
        case wire.Chunk(_, column, size):
            if column not in opened.lacking or len(payload) != 1:
                return False
            chunk = payload[0].buffer
            if len(chunk) != size or size != opened.chunk_bytes:
                return False
            opened.lacking.remove(column)
            opened.arrived.append((column, chunk))
            return True
        case wire.NotHere(_, reason, columns):
            opened.lacking -= set(columns) or opened.lacking
            opened.failure = "not_here" if reason in ("unknown", "refused") else reason
            return not payload
        case wire.HaveReply() | wire.ManifestReply():
            opened.reply = reply
            return isinstance(reply, opened.answered_by) and not payload
        case _:
            assert_never(reply)


def _split_peer(peer: str) -> tuple[PeerId, str]:
    peer_id, _, address = peer.partition("@")
    return PeerId(peer_id), address
