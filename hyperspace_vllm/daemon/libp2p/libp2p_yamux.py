"""yamux/1.0.0 over one secured connection: many streams, bounded memory, and no caller that waits for a frame's write.

py-libp2p's own answers every `read()` with an encrypted window update, formats a dozen log lines a frame, accepts any
number of streams and bytes from a peer, blocks `close()` behind a frozen peer, and breaks the connection when a write
is cancelled half-way. Here one task writes everything that is due in one encrypted message, so that cancelling a caller
cancels nothing on the wire, windows are updated once half of them is used, and a peer that exceeds a bound, stays
silent or doesn't read for too long loses its connection. libp2p_time bounds what all frames together may cost.
"""

import logging
from collections import deque
from collections.abc import Awaitable, Callable
from weakref import WeakSet

import trio
from libp2p.abc import ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamError
from multiaddr import Multiaddr

from ...core.records.ids import PeerId
from ...core.records.limits import KiB, MiB
from ..token_bucket import TokenBucket
from .libp2p_time import BYTE_S, FRAME_S, MESSAGE_S, STREAM_S, PeerTime
from .libp2p_yamux_stream import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    HEAD,
    PING,
    RST,
    SYN,
    WINDOW,
    WINDOW_BYTES_MAX,
    BrokenRule,
    StreamsConnection,
    YamuxStream,
)

logger = logging.getLogger(__name__)

PROTOCOL = "/yamux/1.0.0"
INBOUND_STREAMS_MAX = 96  # per connection: 64 requests, and what identify, gossip and the DHT need
OUTBOUND_STREAMS_MAX = 256
UNREAD_BYTES_MAX = 16 * MiB  # per connection: 64 streams with a window of 256 KiB each
UNREAD_FREE_BYTES = 1 * MiB  # per connection, whatever the others hold
UNREAD_ALL_BYTES_MAX = 256 * MiB  # of all connections together
QUEUED_BYTES_MAX = 256 * KiB  # data frames waiting to be written; above it the streams' writers wait
OPENED_PER_S = 500.0  # streams opened by the peer
PINGS_PER_S = 10.0
# Frames that carry nothing, or belong to no stream: after a reset here, frames already in flight still arrive.
STRAYS_PER_S = 1000.0
FRAMES_AT_ONCE = 64  # before other connections get their turn
CONTROL_FRAMES_MAX = 4096  # acks, updates, pings: a peer that is owed more than this doesn't read
MESSAGE_BYTES = 60 * KiB  # into one Noise message of at most 65,519

WRITE_S = 10.0  # for one message
PING_S = 10.0
SILENCE_S = 35.0  # three pings without a byte
LINGER_S = 20.0  # for the peer to close its half of a stream that we have closed


class _Over(Exception):
    """The connection ends without a broken rule."""


class YamuxConnection(StreamsConnection):
    """A connection's streams. `start` runs until it is over; then `on_close` is called.

    `violated` is called with a peer that broke a rule.
    """

    def __init__(self, conn: ISecureConn, peer_id: ID, time: PeerTime, violated: Callable[[ID], None]) -> None:
        self.secured_conn = conn
        self.peer_id = peer_id
        host, _ = conn.get_remote_address() or ("", 0)
        self._time = time.account(PeerId(peer_id.to_base58()), host)
        self._violated = violated
        self.event_started = trio.Event()
        self.event_closed = trio.Event()
        self.on_close: Callable[[], Awaitable[None]] | None = None
        self.unread_bytes = 0
        self._streams: dict[int, YamuxStream] = {}
        self._next_id = 1 if conn.is_initiator else 2
        self._accept_in, self._accept_out = trio.open_memory_channel[YamuxStream](INBOUND_STREAMS_MAX)
        self._frames: deque[bytes] = deque()
        self._data_bytes = 0
        self._control_frames = 0
        self._due = trio.Event()
        self._room = trio.Event()
        self._stop = trio.Event()
        self._may_open = TokenBucket(OPENED_PER_S, 2 * OPENED_PER_S)
        self._may_ping = TokenBucket(PINGS_PER_S, 10 * PINGS_PER_S)
        self._may_stray = TokenBucket(STRAYS_PER_S, 4 * STRAYS_PER_S)
        self._opened = 0  # streams, not paid for yet
        self._listens_since = trio.current_time()
        _ALL.add(self)

    async def start(self) -> None:
        """Serve the connection until it breaks or `stop` is called."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._guard, self._read)
                nursery.start_soon(self._guard, self._write)
                nursery.start_soon(self._guard, self._watch)
                self.event_started.set()
                await self._stop.wait()
                nursery.cancel_scope.cancel()
        finally:
            await self._end()

    def stop(self) -> None:
        """End the connection soon, without waiting for anything."""
        self._stop.set()

    async def close(self) -> None:
        """End the connection; returns when it has ended."""
        self.stop()
        if self.event_started.is_set():
            await self.event_closed.wait()
        else:
            self.event_started.set()
            await self._end()

    @property
    def is_initiator(self) -> bool:
        """Whether this side dialled."""
        return self.secured_conn.is_initiator

    @property
    def is_established(self) -> bool:
        """Whether streams can be opened."""
        return self.event_started.is_set() and not self._stop.is_set()

    @property
    def is_closed(self) -> bool:
        """Whether the connection has ended."""
        return self.event_closed.is_set()

    def get_transport_addresses(self) -> list[Multiaddr]:
        """The address of the peer's end of the connection."""
        address = self.get_remote_address()
        if address is None:
            return []
        kind = "ip6" if ":" in address[0] else "ip4"
        return [Multiaddr(f"/{kind}/{address[0]}/tcp/{address[1]}")]

    def get_connection_type(self) -> ConnectionType:
        """Never relayed."""
        return ConnectionType.DIRECT

    def get_remote_address(self) -> tuple[str, int] | None:
        """The peer's host and port."""
        return self.secured_conn.get_remote_address()

    async def open_stream(self) -> YamuxStream:
        """A new stream; MuxedStreamError when there are too many, or the connection is ending."""
        if self._stop.is_set():
            raise MuxedStreamError("the connection is ending")
        if sum(stream_id & 1 == self._next_id & 1 for stream_id in self._streams) >= OUTBOUND_STREAMS_MAX:
            raise MuxedStreamError("too many streams")
        stream = YamuxStream(self, self._next_id)
        self._next_id += 2
        self._streams[stream.stream_id] = stream
        self.control(WINDOW, SYN, stream.stream_id, 0)
        await trio.lowlevel.checkpoint()
        return stream

    async def accept_stream(self) -> YamuxStream:
        """The next stream that the peer opens; MuxedConnUnavailable when there will be none."""
        try:
            return await self._accept_out.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError) as error:
            raise MuxedConnUnavailable("Connection closed") from error

    async def spend(self, cost_s: float) -> None:
        """Return when the peer's share of CPU time allows work of `cost_s`."""
        await self._time.spend(cost_s)

    @property
    def held_s(self) -> float:
        """How long, in all, the peer has waited for this node's time because of other peers."""
        return self._time.held_s

    def refuse(self, why: str) -> None:
        """End the connection soon: the peer broke a rule."""
        logger.debug("peer %s broke a rule: %s", self.peer_id, why)
        self._violated(self.peer_id)
        self.stop()

    # --- called by the streams ------------------------------------------------------------------

    @property
    def has_room(self) -> bool:
        """Whether a data frame may be queued."""
        return self._data_bytes < QUEUED_BYTES_MAX or self._stop.is_set()

    async def wait_room(self) -> None:
        """Return when `has_room` may have become true."""
        self._room = self._room if not self._room.is_set() else trio.Event()
        await self._room.wait()

    def queue(self, frame: bytes, data: bool) -> None:
        """Write a frame soon."""
        if self._stop.is_set():
            return
        if data:
            self._data_bytes += len(frame)
        else:
            self._control_frames += 1
            if self._control_frames > CONTROL_FRAMES_MAX:
                self.stop()
        self._frames.append(frame)
        self._due.set()

    def control(self, kind: int, flags: int, stream_id: int, value: int) -> None:
        """Write a frame without data soon."""
        self.queue(HEAD.pack(0, kind, flags, stream_id, value), data=False)

    def forget(self, stream: YamuxStream) -> None:
        """Forget a stream that is over on both sides."""
        self._streams.pop(stream.stream_id, None)

    # --- tasks ----------------------------------------------------------------------------------

    async def _guard(self, task: Callable[[], Awaitable[None]]) -> None:
        # Any error in here (the library below raises a dozen kinds for a connection that broke, or that carries
        # garbage) ends this connection and nothing else.
        try:
            await task()
        except BrokenRule as broken:
            self.refuse(str(broken))
        except Exception:
            logger.debug("a connection has ended", exc_info=True)
        finally:
            self.stop()

    async def _write(self) -> None:
        while True:
            if not self._frames:
                self._due = trio.Event()
                await self._due.wait()
            message = bytearray()
            while self._frames and len(message) + len(self._frames[0]) <= MESSAGE_BYTES:
                frame = self._frames.popleft()
                message += frame
                if len(frame) > HEAD.size:
                    self._data_bytes -= len(frame)
                else:
                    self._control_frames -= 1
            with trio.fail_after(WRITE_S):
                await self.secured_conn.write(bytes(message))
            self._room.set()

    async def _read(self) -> None:
        buffer = bytearray()
        while True:
            self._listens_since = trio.current_time()
            message = await self.secured_conn.read()
            self._listens_since = float("inf")  # a peer that isn't read can't count as silent
            await self._time.spend(MESSAGE_S + len(message) * BYTE_S)
            buffer += message
            at = frames = 0
            while len(buffer) - at >= HEAD.size:
                version, kind, flags, stream_id, length = HEAD.unpack_from(buffer, at)
                if version != 0 or kind > GO_AWAY or (kind == DATA and length > WINDOW_BYTES_MAX):
                    raise BrokenRule("malformed frame")
                end = at + HEAD.size + (length if kind == DATA else 0)
                if end > len(buffer):
                    break
                self._on_frame(kind, flags, stream_id, length, bytes(buffer[at + HEAD.size : end]))
                at = end
                frames += 1
                if frames == FRAMES_AT_ONCE:
                    await self._pay(frames)
                    frames = 0
            del buffer[:at]
            await self._pay(frames)

    async def _pay(self, frames: int) -> None:
        opened, self._opened = self._opened, 0
        await self._time.spend(frames * FRAME_S + opened * STREAM_S)

    async def _watch(self) -> None:
        nonce = 0
        while True:
            await trio.sleep(PING_S)
            now = trio.current_time()
            if now - self._listens_since > SILENCE_S:
                raise _Over("silent")
            nonce = (nonce + 1) & 0xFFFFFFFF
            self.control(PING, SYN, 0, nonce)
            for stream in list(self._streams.values()):
                if stream.closed_at and now - stream.closed_at > LINGER_S:
                    await stream.reset()

    def _on_frame(self, kind: int, flags: int, stream_id: int, length: int, data: bytes) -> None:
        if kind == PING:
            if not self._may_ping.take(1):
                raise BrokenRule("too many pings")
            if flags & SYN:
                self.control(PING, ACK, 0, length)
            return
        if kind == GO_AWAY:
            raise _Over("the peer ends the connection")
        stream = self._open(stream_id) if flags & SYN else self._streams.get(stream_id)
        is_stray = not flags & SYN and (stream is None or not (flags or length))
        if is_stray and not self._may_stray.take(1):
            raise BrokenRule("too many frames for nothing")
        if stream is None:  # over on this side with frames in flight, or refused for lack of room
            return
        if flags & RST:
            stream.on_reset()
            return
        if kind == DATA:
            stream.on_data(data)
            if self._holds_too_much():
                raise _Over("too much unread")
        elif length:
            stream.on_window(length)
        if flags & FIN:
            stream.on_end()

    def _holds_too_much(self) -> bool:
        if self.unread_bytes <= UNREAD_FREE_BYTES:
            return False
        return self.unread_bytes > UNREAD_BYTES_MAX or sum(each.unread_bytes for each in _ALL) > UNREAD_ALL_BYTES_MAX

    def _open(self, stream_id: int) -> YamuxStream | None:
        ours = self._next_id & 1
        if stream_id == 0 or stream_id & 1 == ours or stream_id in self._streams:
            raise BrokenRule("stream id")
        if not self._may_open.take(1):
            raise BrokenRule("too many streams at once")
        if sum(each & 1 != ours for each in self._streams) >= INBOUND_STREAMS_MAX:
            self.control(WINDOW, RST, stream_id, 0)
            return None
        stream = YamuxStream(self, stream_id)
        try:
            self._accept_in.send_nowait(stream)
        except (trio.WouldBlock, trio.BrokenResourceError):
            self.control(WINDOW, RST, stream_id, 0)
            return None
        self._streams[stream_id] = stream
        self._opened += 1
        self.control(WINDOW, ACK, stream_id, 0)
        return stream

    async def _end(self) -> None:
        if self.event_closed.is_set():
            return
        self.stop()
        with trio.CancelScope(shield=True):
            with trio.move_on_after(0.2):
                # What was queued before the end (a reset, for example) goes out if the peer accepts it now.
                rest = b"".join(self._frames)[:MESSAGE_BYTES] if len(self._frames) < 64 else b""
                await self._farewell(rest + HEAD.pack(0, GO_AWAY, 0, 0, 0))
            with trio.move_on_after(1):
                await self._close_quietly()
        self._frames.clear()
        self._accept_in.close()
        for stream in list(self._streams.values()):
            stream.on_reset()
        self.event_closed.set()
        self._room.set()
        if self.on_close is not None:
            with trio.CancelScope(shield=True), trio.move_on_after(5):
                await self.on_close()

    async def _farewell(self, message: bytes) -> None:
        try:
            await self.secured_conn.write(message)
        except Exception:
            return

    async def _close_quietly(self) -> None:
        try:
            await self.secured_conn.close()
        except Exception:
            return


_ALL: WeakSet[YamuxConnection] = WeakSet()
