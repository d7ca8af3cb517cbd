"""One node's link to one peer on the bulk transport: sends requests; matches, checks and passes on replies uncopied."""

import asyncio
import logging
import socket
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import assert_never

import zmq

from ...core.records import wire
from ...core.records.endpoint import Endpoint
from ...core.records.errors import ProtocolViolation
from ...core.records.ids import ManifestDigest, PeerId
from ...core.records.limits import KV_REPLY_BYTES_HELD_MAX, PEER_MESSAGE_BYTES_MAX
from ...core.records.reason import Reason
from ..identity import Identity, curve_public_of
from ..peer_failed import PeerFailed
from ..zmq_pump import Pump, Socket, set_link_options
from .frame_meter import FrameMeter
from .kv_passage import Passage, detach

DIAL_S = 3.0
DIAL_AGAIN_S = 0.1  # doubled each time, until a connection lasts LASTED_S
DIAL_AGAIN_S_MAX = 5.0
LASTED_S = 5.0  # a connection that lasted this long was a good one
CONNECT_S = 1.0  # after this long without a connection requests fail at once until ZeroMQ has reconnected
REQUESTS_QUEUED_MAX = 256  # small messages
REPLIES_QUEUED_MAX = 32  # 32 chunks of 4 MiB = 128 MiB a peer at most

Chunks = list[tuple[int, memoryview]]
Request = Callable[[int], wire.PeerRequest]
_FINAL = (Reason.PROTOCOL, Reason.UNREACHABLE)  # after these no chunk will come, whichever was asked for
log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Open:
    """An open request: what may answer it, and what has."""

    answered_by: type[wire.PeerReply]
    lacking: set[int]  # columns still to come
    chunk_bytes: int
    arrived: Chunks = field(default_factory=list)
    reply: wire.PeerReply | None = None
    failure: Reason | None = None
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def over(self) -> bool:
        return self.reply is not None or (not self.lacking and self.answered_by is wire.Chunk) or self.broken

    @property
    def broken(self) -> bool:
        return self.failure is not None and (self.failure in _FINAL or self.answered_by is not wire.Chunk)


class PeerLink:
    """The DEALER to one peer, connected from the start: the first lookup shouldn't pay for the handshake.

    `may_dial` is called before each dial; once it returns False the link is `over`. ValueError unless `address` is
    host:port.
    """

    def __init__(
        self,
        context: zmq.Context[Socket],
        peer: PeerId,
        address: str,
        identity: Identity,
        charge: Callable[[PeerId, Reason], None],
        may_dial: Callable[[], bool],
    ) -> None:
        self.address = address
        self._endpoint = Endpoint.parse(address)
        self._peer = peer
        self._charge = charge
        self._may_dial = may_dial
        self.over = False
        self.has_answered = False
        self._open: dict[int, _Open] = {}
        self._numbers = count()
        self._loop = asyncio.get_running_loop()
        self._silent_since: float | None = self._loop.time()
        self.useful_at = self._loop.time()  # when it was created or last answered
        self._socket = made = context.socket(zmq.DEALER)
        set_link_options(made)
        made.setsockopt(zmq.CURVE_SERVERKEY, curve_public_of(peer))
        made.setsockopt(zmq.CURVE_PUBLICKEY, identity.curve_public)
        made.setsockopt(zmq.CURVE_SECRETKEY, identity.curve_secret)
        made.setsockopt(zmq.MAXMSGSIZE, PEER_MESSAGE_BYTES_MAX)
        made.setsockopt(zmq.SNDHWM, REQUESTS_QUEUED_MAX)
        made.setsockopt(zmq.RCVHWM, REPLIES_QUEUED_MAX)
        self._pump = Pump(made, self._receive)
        self._passage: Passage | None = None
        self._connecting = self._loop.create_task(self._stay_connected())

    @property
    def connected(self) -> bool:
        """Whether a request would be sent at once."""
        return self._pump.writable

    @property
    def busy(self) -> bool:
        """Whether it has open requests."""
        return bool(self._open)

    async def ask(self, request: Request, answered_by: type[wire.PeerReply], timeout_s: float) -> wire.PeerReply:
        """The answer to `request`, which is called with the request's number; `PeerFailed`."""
        opened = _Open(answered_by, set(), 0)
        number = self._begin(opened)
        deadline = self._loop.time() + timeout_s
        try:
            await self._send(request(number), deadline)
            await self._wait(opened, deadline)
        finally:
            del self._open[number]
        if opened.failure is not None:
            raise PeerFailed(opened.failure)
        assert opened.reply is not None
        return opened.reply

    async def chunks(
        self, digest: ManifestDigest, row: int, columns: tuple[int, ...], chunk_bytes: int, timeout_s: float
    ) -> AsyncGenerator[Chunks, None]:
        """As ChunkTransport.chunks."""
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
        if opened.failure is not None:
            raise PeerFailed(opened.failure)

    def violated(self, detail: str) -> PeerFailed:
        """Charge the peer for breaking the protocol; returns the error for its request."""
        log.info("peer %s broke the protocol: %s", self._peer, detail, extra={"peer": self._peer})
        self._charge(self._peer, Reason.PROTOCOL)
        return PeerFailed(Reason.PROTOCOL)

    def close(self) -> None:
        """Disconnect; open requests fail as `unreachable`."""
        self._connecting.cancel()
        self._pump.close()
        for opened in self._open.values():
            opened.failure = Reason.UNREACHABLE
            opened.wake.set()

    async def _stay_connected(self) -> None:
        delay_s = DIAL_AGAIN_S
        while self._may_dial():
            began = self._loop.time()
            try:
                async with asyncio.timeout(DIAL_S):
                    tcp = await self._dial()
                meter = FrameMeter(PEER_MESSAGE_BYTES_MAX, KV_REPLY_BYTES_HELD_MAX)
                self._passage = Passage(tcp, self._socket, meter, partial(detach, self._socket))
                await self._passage.run()
            except OSError:
                pass
            except ProtocolViolation as violation:
                self.violated(str(violation))
            detach(self._socket)
            if self._loop.time() - began > LASTED_S:
                delay_s = DIAL_AGAIN_S
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, DIAL_AGAIN_S_MAX)
        self.over = True

    async def _dial(self) -> socket.socket:
        """A TCP connection to the peer; OSError."""
        found = await self._loop.getaddrinfo(self._endpoint.host, self._endpoint.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, where = found[0]
        tcp = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
        try:
            await self._loop.sock_connect(tcp, where)
        except BaseException:
            tcp.close()
            raise
        return tcp

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
                raise PeerFailed(Reason.UNREACHABLE) from None
            if self._pump.send(frames) is None:
                raise PeerFailed(Reason.UNREACHABLE)
        self._silent_since = None

    async def _wait(self, opened: _Open, deadline: float) -> None:
        """Wait until there is something to read."""
        try:
            async with asyncio.timeout_at(deadline):
                while not opened.over and not opened.arrived:
                    opened.wake.clear()
                    await opened.wake.wait()
        except TimeoutError:
            raise PeerFailed(Reason.TIMEOUT) from None

    def _receive(self, frames: list[zmq.Frame]) -> None:
        self.has_answered = True  # with any message: CURVE has authenticated it
        if self._passage is not None:
            self._passage.came_out(frames)
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
        elif not isinstance(reply, wire.NotHere):
            self.useful_at = self._loop.time()
        opened.wake.set()


def _accept(opened: _Open, reply: wire.PeerReply, payload: list[zmq.Frame]) -> bool:
    """Take a reply into its request; False if the request doesn't allow it."""
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
            opened.failure = Reason.NOT_HERE if reason in ("unknown", "refused") else Reason(reason)
            return not payload
        case wire.HaveReply() | wire.ManifestReply():
            opened.reply = reply
            return isinstance(reply, opened.answered_by) and not payload
        case _:
            assert_never(reply)
