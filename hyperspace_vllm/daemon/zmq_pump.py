"""One ZeroMQ socket on the asyncio loop, without a future for each message.

`zmq.asyncio` costs about 0.1 ms a message, which for chunks of 24 KiB is more than their encryption. Here all messages
that have arrived are handled at once, up to a number per turn. ZeroMQ's descriptor signals edges: it must be drained
after every wake-up and checked again after every send.
"""

import asyncio
from collections.abc import Callable

import zmq

Socket = zmq.Socket[bytes]
MESSAGES_PER_TURN = 64
HEARTBEAT_MS = 1_000
HEARTBEAT_LOST_MS = 3_000  # a frozen peer's connection is dropped; requests to it have timed out long before
HANDSHAKE_MS = 2_000


def set_link_options(socket: Socket) -> None:
    """The options of both ends of a connection between nodes (their bytes pass through kv_passage.py)."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IMMEDIATE, 1)  # queue nothing for a peer that isn't there
    socket.setsockopt(zmq.RECONNECT_IVL, -1)  # the owner of the TCP connection makes the next one
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_LOST_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, HEARTBEAT_LOST_MS)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)


class Pump:
    """Calls `receive(frames)` for every message; sends without ever blocking. Must be closed before its context."""

    def __init__(self, socket: Socket, receive: Callable[[list[zmq.Frame]], None]) -> None:
        self._socket = socket
        self._receive = receive
        self._loop = asyncio.get_running_loop()
        self._fd = int(socket.getsockopt(zmq.FD))
        self._due = False
        self._writers: list[asyncio.Future[None]] = []
        self._loop.add_reader(self._fd, self._drain)
        self._drain_soon()

    @property
    def writable(self) -> bool:
        """Whether a send would be taken now."""
        if self._socket.closed:
            return False
        events = int(self._socket.getsockopt(zmq.EVENTS))
        if events & zmq.POLLIN:  # asking has consumed the descriptor's edge
            self._drain_soon()
        return bool(events & zmq.POLLOUT)

    def send(self, frames: list[bytes | memoryview]) -> zmq.MessageTracker | None:
        """Queue a message without copying large frames; the tracker tells when they left. None: no room, or closed.

        Raises zmq.ZMQError (EHOSTUNREACH) on a ROUTER whose peer is gone.
        """
        if self._socket.closed:
            return None
        try:
            tracker = self._socket.send_multipart(frames, zmq.NOBLOCK, copy=False, track=True)
        except zmq.Again:
            return None
        finally:
            self._drain_soon()
        return tracker

    async def wait_writable(self, timeout_s: float) -> None:
        """Return when a send may succeed; TimeoutError. For sockets with one peer: a ROUTER is always writable."""
        async with asyncio.timeout(timeout_s):
            while not self.writable:
                if self._socket.closed:
                    raise TimeoutError
                waiter = self._loop.create_future()
                self._writers.append(waiter)
                await waiter

    def close(self) -> None:
        """Close the socket at once; what wasn't sent is lost."""
        self._loop.remove_reader(self._fd)
        self._socket.close(linger=0)
        self._wake_writers()

    def _drain_soon(self) -> None:
        if not self._due:
            self._due = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._due = False
        for _ in range(MESSAGES_PER_TURN):
            if self._socket.closed:
                return
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            self._receive(frames)
        else:
            self._drain_soon()
        if self._writers and self.writable:
            self._wake_writers()

    def _wake_writers(self) -> None:
        for waiter in self._writers:
            if not waiter.done():
                waiter.set_result(None)
        self._writers.clear()
