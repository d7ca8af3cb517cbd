"""One stream of yamux/1.0.0, with its windows; and the frames of which the protocol consists.

frame = version u8 (0) | type u8 | flags u16 | stream id u32 | length u32 || length bytes, for type 0 only
"""

import struct
from abc import abstractmethod
from types import TracebackType

import trio
from libp2p.abc import IMuxedConn, IMuxedStream
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError, MuxedStreamReset

from ...core.records.limits import KiB, MiB

WINDOW_BYTES = 256 * KiB  # the protocol's initial window
WINDOW_BYTES_MAX = 1 * MiB  # 20 MB/s over 50 ms
DATA_BYTES = 16 * KiB  # per frame: streams take turns

HEAD = struct.Struct("!BBHII")
DATA, WINDOW, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8


class BrokenRule(Exception):
    """The peer violated the protocol or a bound."""


class StreamsConnection(IMuxedConn):
    """What a stream uses of its connection; `unread_bytes` counts what its streams' readers have not taken."""

    unread_bytes: int

    @property
    @abstractmethod
    def has_room(self) -> bool:
        """Whether a data frame may be queued."""

    @abstractmethod
    def get_remote_address(self) -> tuple[str, int] | None:
        """The peer's host and port."""

    @abstractmethod
    async def wait_room(self) -> None:
        """Return when `has_room` may have become true."""

    @abstractmethod
    def queue(self, frame: bytes, data: bool) -> None:
        """Write a frame soon."""

    @abstractmethod
    def control(self, kind: int, flags: int, stream_id: int, value: int) -> None:
        """Write a frame without data soon."""

    @abstractmethod
    def forget(self, stream: "YamuxStream") -> None:
        """Forget a stream that is over on both sides."""


class YamuxStream(IMuxedStream):
    """One stream of a connection (YamuxConnection)."""

    def __init__(self, conn: StreamsConnection, stream_id: int) -> None:
        self.muxed_conn = conn
        self.stream_id = stream_id
        self._conn = conn
        self._buffer = bytearray()
        self._readable = trio.Event()
        self._writable = trio.Event()
        self._send_window = WINDOW_BYTES
        self._window = WINDOW_BYTES  # bytes the peer may have in flight or unread
        self._granted = WINDOW_BYTES  # the part of it that the peer has not used yet
        self._consumed = 0
        self._ended = False  # the peer's FIN
        self._closed = False  # ours
        self._turn = trio.Lock()  # the library writes to a gossip stream from several tasks
        self._reset = False
        self.closed_at = 0.0

    async def read(self, n: int | None = None) -> bytes:
        """Whatever has arrived, at least one byte and at most `n`; MuxedStreamEOF, MuxedStreamReset."""
        if n == 0:
            return b""
        while not self._buffer:
            if self._reset:
                raise MuxedStreamReset("reset")
            if self._ended or self._closed:
                raise MuxedStreamEOF("closed")
            self._readable = trio.Event()
            await self._readable.wait()
        size = len(self._buffer) if n is None or n < 0 else min(n, len(self._buffer))
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        self._conn.unread_bytes -= size
        self._consumed += size
        if self._consumed >= self._window // 2 and not self._ended:
            self._grant()
        return data

    async def write(self, data: bytes) -> None:
        """Return when all of it is queued; the queue is short."""
        async with self._turn:
            await self._write(data)

    async def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            if self._reset:
                raise MuxedStreamReset("reset")
            if self._closed:
                raise MuxedStreamError("closed")
            size = min(len(view), self._send_window, DATA_BYTES)
            if size == 0:
                self._writable = trio.Event()
                await self._writable.wait()
            elif not self._conn.has_room:
                await self._conn.wait_room()
            else:
                self._send_window -= size
                self._conn.queue(HEAD.pack(0, DATA, 0, self.stream_id, size) + view[:size], data=True)
                view = view[size:]

    async def close(self) -> None:
        """Tell the peer that no data follows, and accept none either."""
        if not self._closed and not self._reset:
            self._closed = True
            self.closed_at = trio.current_time()
            self._conn.control(WINDOW, FIN, self.stream_id, 0)
            self._drop_buffer()
            if self._ended:
                self._conn.forget(self)
            self._wake()

    async def reset(self) -> None:
        """End the stream in both directions."""
        if not self._reset:
            if not (self._closed and self._ended):
                self._conn.control(WINDOW, RST, self.stream_id, 0)
            self.on_reset()

    def set_deadline(self, ttl: int) -> None:
        """Not offered: callers set their own deadlines."""
        raise NotImplementedError

    def get_remote_address(self) -> tuple[str, int] | None:
        """The peer's host and port."""
        return self._conn.get_remote_address()

    async def __aenter__(self) -> "YamuxStream":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    # --- called by the connection ---------------------------------------------------------------

    def on_data(self, data: bytes) -> None:
        """Take bytes from the peer."""
        if len(data) > self._granted:
            raise BrokenRule("more than the window")
        self._granted -= len(data)
        if not self._closed:
            self._buffer += data
            self._conn.unread_bytes += len(data)
            self._readable.set()

    def on_window(self, increment: int) -> None:
        """The peer's window has grown."""
        self._send_window = min(self._send_window + increment, 0xFFFFFFFF)
        self._writable.set()

    def on_end(self) -> None:
        """The peer sends no more data."""
        self._ended = True
        self._readable.set()
        if self._closed:
            self._conn.forget(self)

    def on_reset(self) -> None:
        """The stream is gone, with its unread data."""
        self._reset = True
        self._drop_buffer()
        self._conn.forget(self)
        self._wake()

    def _grant(self) -> None:
        increment = self._consumed
        self._consumed = 0
        if self._window < WINDOW_BYTES_MAX:
            increment += self._window
            self._window *= 2
        self._granted += increment
        self._conn.control(WINDOW, 0, self.stream_id, increment)

    def _drop_buffer(self) -> None:
        self._conn.unread_bytes -= len(self._buffer)
        self._buffer.clear()

    def _wake(self) -> None:
        self._readable.set()
        self._writable.set()
