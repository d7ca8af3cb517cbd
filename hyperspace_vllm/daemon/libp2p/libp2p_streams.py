"""Requests and answers on libp2p streams: frames, the asking side's pool of streams, the answering side's bounds.

    frame = length u32 big-endian || payload; an answer of length 0 says `busy`

A stream carries any number of request/answer pairs in turn, because opening one costs two round trips and more CPU time
than the request.
"""

import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Protocol

import trio
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.io.exceptions import IOException
from libp2p.network.stream.exceptions import StreamError
from libp2p.peer.id import ID

from ...core.records.ids import PeerId
from ...core.records.limits import STREAM_FRAME_BYTES_MAX, KiB, MiB
from ...core.records.rank import Tier
from ...core.records.reason import Reason
from ..peer_failed import PeerFailed
from .libp2p_room import Hold, PeerRoom
from .libp2p_time import REQUEST_S, SENT_BYTE_S

REQUESTS_PER_PEER_MAX = 64  # in flight, in either direction
REQUESTS_MAX = 512
FRAME_BYTES_IN_PER_PEER_MAX = 2 * STREAM_FRAME_BYTES_MAX
FRAME_BYTES_IN_MAX = 64 * MiB
FRAME_BYTES_IN_OF_STRANGERS_MAX = 32 * MiB
ANSWER_BYTES_PER_PEER_MAX = 4 * STREAM_FRAME_BYTES_MAX  # answers that a peer has not read yet
ANSWER_BYTES_MAX = 128 * MiB
ANSWER_BYTES_OF_STRANGERS_MAX = 64 * MiB
SPARE_STREAMS_MAX = 4  # kept open for the next request, per peer and protocol
READ_BYTES = 64 * KiB

IDLE_S = 30.0  # between requests
SPARE_S = 20.0  # less than the other side's IDLE_S
FRAME_S = 5.0  # from a request's first byte to its last
HANDLE_S = 30.0  # for this node to compute an answer
ANSWER_S = 15.0  # for a peer to pay for an answer and to read it

_LENGTH = struct.Struct("!I")
_BROKEN = (IOException, StreamError)  # what the library raises for streams and connections that ended


class _BrokenRule(Exception):
    """The peer's frame is too long, or it sends too much at once."""


async def read_frame(
    stream: INetStream, first_byte_s: float, frame_s: float, bytes_max: int, keep: Callable[[bytes], object]
) -> None:
    """Read one frame of at most `bytes_max`, passing each piece to `keep`. TooSlowError, StreamError, _BrokenRule."""
    head = bytearray()
    with trio.fail_after(first_byte_s):
        head += await _read(stream, _LENGTH.size)
    with trio.fail_after(frame_s):
        while len(head) < _LENGTH.size:
            head += await _read(stream, _LENGTH.size - len(head))
        (left,) = _LENGTH.unpack(head)
        if left > bytes_max:
            raise _BrokenRule("frame too long")
        while left > 0:
            # Piece by piece: announcing a length costs the sender nothing, so no memory is reserved for it.
            piece = await _read(stream, min(left, READ_BYTES))
            keep(piece)
            left -= len(piece)


async def _read(stream: INetStream, size: int) -> bytes:
    data = await stream.read(size)
    if not data:
        raise StreamError("ended")
    return data


async def write_frame(stream: INetStream, payload: bytes) -> None:
    """Send one frame."""
    await stream.write(_LENGTH.pack(len(payload)) + payload)


class Answerer:
    """Serves inbound streams: reads requests, calls `answer` and writes the result.

    `violated` is called with a peer that broke a rule; `spend` returns when a peer's share of CPU time allows work of
    so many seconds. A peer that finds no room, or loses it to another, is answered `busy`, which is neither peer's
    fault.
    """

    def __init__(
        self,
        answer: Callable[[ID, str, bytes], Awaitable[bytes | None]],
        violated: Callable[[ID], None],
        spend: Callable[[ID, float], Awaitable[None]],
        tier: Callable[[PeerId], Tier],
    ) -> None:
        self._answer = answer
        self._spend = spend
        self._violated = violated
        self._requests = 0
        self._requests_of: dict[ID, int] = {}
        self._tier = tier
        self._incoming = PeerRoom(FRAME_BYTES_IN_PER_PEER_MAX, FRAME_BYTES_IN_OF_STRANGERS_MAX, FRAME_BYTES_IN_MAX)
        self._outgoing = PeerRoom(ANSWER_BYTES_PER_PEER_MAX, ANSWER_BYTES_OF_STRANGERS_MAX, ANSWER_BYTES_MAX)

    async def serve(self, stream: INetStream, protocol: str) -> None:
        """Serve one stream until it ends, breaks a rule or is idle for too long."""
        peer_id = stream.muxed_conn.peer_id
        try:
            while await self._serve_one(stream, peer_id, protocol):
                pass
            await stream.reset()
        except _BROKEN:
            with suppress(Exception):
                await stream.close()
        except _BrokenRule:
            self._violated(peer_id)
            await stream.reset()
        except trio.TooSlowError:
            await stream.reset()

    async def _serve_one(self, stream: INetStream, peer_id: ID, protocol: str) -> bool:
        peer = PeerId(peer_id.to_base58())
        request = _Request(self._incoming, peer, self._tier(peer))
        try:
            await read_frame(stream, IDLE_S, FRAME_S, STREAM_FRAME_BYTES_MAX, request.keep)
            # Before it counts among the running requests, of which others need some.
            await self._spend(peer_id, REQUEST_S)
            frame = request.take()
            answer = b"" if frame is None else await self._ask(peer_id, protocol, frame)
        finally:
            request.end()
        if answer is None:
            return False
        with trio.CancelScope() as scope:
            hold = Hold(peer, self._tier(peer), scope.cancel)
            cost_s = len(answer) * SENT_BYTE_S  # for one that finds no room as well: it has been read and sealed
            try:
                if not self._outgoing.take(hold, len(answer)):
                    answer = b""
                with trio.fail_after(ANSWER_S):
                    await self._spend(peer_id, cost_s)
                    await write_frame(stream, answer)
            finally:
                self._outgoing.give_back(hold)
        return not scope.cancelled_caught

    async def _ask(self, peer_id: ID, protocol: str, request: bytes) -> bytes | None:
        mine = self._requests_of.get(peer_id, 0)
        if mine >= REQUESTS_PER_PEER_MAX or self._requests >= REQUESTS_MAX:
            return b""
        self._requests += 1
        self._requests_of[peer_id] = mine + 1
        try:
            with trio.fail_after(HANDLE_S):
                return await self._answer(peer_id, protocol, request)
        finally:
            self._requests -= 1
            self._requests_of[peer_id] -= 1
            if not self._requests_of[peer_id]:
                del self._requests_of[peer_id]


class _Request:
    """A partly received request; until it is complete and started, it makes room for those of others."""

    def __init__(self, room: PeerRoom, peer: PeerId, tier: Tier) -> None:
        self._room = room
        self._hold = Hold(peer, tier, self._lose)
        self._payload: bytearray | None = bytearray()

    def keep(self, piece: bytes) -> None:
        """Add a piece, unless there is no room: then the rest is read and dropped. _BrokenRule."""
        if self._payload is None:
            return
        if self._room.is_over(self._hold.peer, len(piece)):
            raise _BrokenRule("too much at once")
        if self._room.take(self._hold, len(piece)):
            self._payload += piece
        else:
            self.end()
            self._lose()

    def take(self) -> bytes | None:
        """The complete request, which from now on makes room for no other; None: there was no room."""
        self._hold.lose = None
        return None if self._payload is None else bytes(self._payload)

    def end(self) -> None:
        """Give its room back."""
        self._room.give_back(self._hold)

    def _lose(self) -> None:
        self._payload = None


class _Network(Protocol):
    async def new_stream(self, peer_id: ID, protocol_ids: list[TProtocol]) -> INetStream: ...


class StreamClient:
    """Sends requests on streams that it keeps open for the next one. The caller sets deadlines (trio.fail_after)."""

    def __init__(self, host: _Network, is_connected: Callable[[ID], bool]) -> None:
        self._host = host
        self._is_connected = is_connected
        self._spare: dict[tuple[ID, str], list[tuple[INetStream, float]]] = {}
        self._requests_of: dict[ID, int] = {}

    async def ask(self, peer_id: ID, protocol: str, request: bytes, bytes_max: int) -> bytes:
        """The answer; PeerFailed(unreachable | protocol | busy): `protocol` only for a frame over `bytes_max`.

        Streams break for many reasons, this node's own load among them, so a broken stream is not charged to the peer.
        """
        if not self._is_connected(peer_id):
            raise PeerFailed(Reason.UNREACHABLE)
        mine = self._requests_of.get(peer_id, 0)
        if mine >= REQUESTS_PER_PEER_MAX:
            raise PeerFailed(Reason.BUSY)
        self._requests_of[peer_id] = mine + 1
        try:
            return await self._ask(peer_id, protocol, request, bytes_max)
        finally:
            self._requests_of[peer_id] -= 1
            if not self._requests_of[peer_id]:
                del self._requests_of[peer_id]

    def forget(self, peer_id: ID) -> None:
        """Forget the streams of a peer that has disconnected."""
        for key in [key for key in self._spare if key[0] == peer_id]:
            del self._spare[key]

    async def _ask(self, peer_id: ID, protocol: str, request: bytes, bytes_max: int) -> bytes:
        spare = await self._take_spare(peer_id, protocol)
        if spare is not None:
            with suppress(*_BROKEN):  # the other side closed it in the meantime: nothing was asked
                return await self._exchange(spare, peer_id, protocol, request, bytes_max)
        try:
            stream = await self._host.new_stream(peer_id, [TProtocol(protocol)])
        except Exception as error:  # the library raises a dozen kinds
            raise PeerFailed(Reason.UNREACHABLE) from error
        try:
            return await self._exchange(stream, peer_id, protocol, request, bytes_max)
        except _BROKEN as error:
            raise PeerFailed(Reason.UNREACHABLE) from error

    async def _take_spare(self, peer_id: ID, protocol: str) -> INetStream | None:
        spares = self._spare.get((peer_id, protocol), [])
        while spares:
            stream, since = spares.pop()
            if trio.current_time() - since < SPARE_S:
                return stream
            await stream.reset()
        return None

    async def _exchange(self, stream: INetStream, peer_id: ID, protocol: str, request: bytes, bytes_max: int) -> bytes:
        try:
            answer = bytearray()
            await write_frame(stream, request)
            await read_frame(stream, float("inf"), float("inf"), bytes_max, answer.extend)
        except _BrokenRule as error:
            await stream.reset()
            raise PeerFailed(Reason.PROTOCOL) from error
        except BaseException:  # the deadline, or the stream broke
            with trio.CancelScope(shield=True), suppress(Exception):
                await stream.reset()
            raise
        if self._is_connected(peer_id):
            spares = self._spare.setdefault((peer_id, protocol), [])
            if len(spares) < SPARE_STREAMS_MAX:
                spares.append((stream, trio.current_time()))
            else:
                await stream.close()
        if not answer:
            raise PeerFailed(Reason.BUSY)
        return bytes(answer)
