"""Passes bytes between a TCP connection and a ZeroMQ socket of ours, and bounds what the socket holds for the peer.

    peer ── TCP ── Passage ── Unix socket ── ZeroMQ (CURVE, messages)

Context: ZeroMQ accepts any number of connections before their peers have proved their identity, and holds a message's
frames without a bound (frame_meter.py). Choice: this module owns the TCP side; bytes stay encrypted. Rejected: a
separate process with a memory limit, which one peer could end for all others; a periodic check of how much has arrived,
which is too late on a busy machine. Cost: one more copy, a third of the CPU time that CURVE takes. The Unix socket has
a path in a directory of this user's alone, which exists until it is connected.
"""

import asyncio
import os
import secrets
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from tempfile import TemporaryDirectory

import zmq

from ...core.records.errors import ProtocolViolation
from ...core.records.limits import KiB
from ..zmq_pump import Socket
from .frame_meter import FrameMeter

PIECE_BYTES = 256 * KiB  # pages of the buffer that no message needs are never touched
HELD_BACK_BYTES = 64 * KiB  # read at once of a peer that has sent too much within HELD_BACK_S
HELD_BACK_S = 1.0
UNFINISHED_S = 5.0  # a message that fills the meter and isn't whole by then never will be
BACKLOG = 128  # other processes may come first
PATH_BYTES_MAX = 107  # of a Unix socket
ATTACH_S = 5.0  # for ZeroMQ to connect within this process, or to disconnect


class Passage:
    """One connection's passage. `zmq_socket` must not be connected yet, and must not reconnect by itself.

    `let_go` ends ZeroMQ's side of the connection. ZeroMQ goes first: if this side closed under a socket whose input it
    has stopped (RCVHWM), its next heartbeat would find that and abort the process (stream_engine_base.cpp).
    """

    def __init__(self, tcp: socket.socket, zmq_socket: Socket, meter: FrameMeter, let_go: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._tcp = tcp
        self._zmq = zmq_socket
        self._meter = meter
        self._let_go = let_go
        self._came_out = asyncio.Event()
        self._held_until = float("-inf")

    def hold(self, time_s: float) -> None:
        """Pass nothing on for so long, so that TCP holds the peer back."""
        self._held_until = max(self._held_until, self._loop.time() + time_s)

    def came_out(self, frames: Iterable[zmq.Frame]) -> None:
        """Count a message that the socket gave out."""
        self._meter.came_out(len(frame) for frame in frames)
        self._came_out.set()

    async def run(self, first: bytes = b"") -> None:
        """Run until either end closes; `first` was read from TCP already. `ProtocolViolation`: the peer's fault."""
        with self._tcp:
            self._tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            with await attach(self._zmq) as local:
                ways = [asyncio.ensure_future(self._inward(local, first)), asyncio.ensure_future(self._outward(local))]
                try:
                    await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for way in ways:
                        way.cancel()
                    ended = await asyncio.gather(*ways, return_exceptions=True)
                    self._let_go()
                    await self._wait_for_zmq(local)
        for each in ended:
            if isinstance(each, ProtocolViolation):
                raise each

    async def _inward(self, local: socket.socket, first: bytes) -> None:
        buffer = memoryview(bytearray(PIECE_BYTES))
        buffer[: len(first)] = first
        size = len(first) or await self._loop.sock_recv_into(self._tcp, buffer)
        while size:
            self._meter.put_in(buffer[:size])
            left_s = self._held_until - self._loop.time()
            if left_s > 0:
                await asyncio.sleep(left_s)
            await self._loop.sock_sendall(local, buffer[:size])
            await self._wait_for_room()
            was_held = self._held_until > self._loop.time() - HELD_BACK_S
            size = await self._loop.sock_recv_into(self._tcp, buffer[:HELD_BACK_BYTES] if was_held else buffer)

    async def _outward(self, local: socket.socket) -> None:
        buffer = memoryview(bytearray(PIECE_BYTES))
        while size := await self._loop.sock_recv_into(local, buffer):
            await self._loop.sock_sendall(self._tcp, buffer[:size])

    async def _wait_for_zmq(self, local: socket.socket) -> None:
        with suppress(OSError):  # TimeoutError is one
            async with asyncio.timeout(ATTACH_S):
                while await self._loop.sock_recv(local, PIECE_BYTES):
                    pass

    async def _wait_for_room(self) -> None:
        if not self._meter.full:
            return
        try:
            async with asyncio.timeout(UNFINISHED_S):
                while self._meter.full:
                    self._came_out.clear()
                    await self._came_out.wait()
        except TimeoutError:
            raise ProtocolViolation("a message of more frames or bytes than any of ours") from None


async def attach(zmq_socket: Socket) -> socket.socket:
    """This process's end of a new connection of `zmq_socket`; OSError, also when it takes too long."""
    with _name() as name, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as listener:
        listener.bind(name)
        listener.listen(BACKLOG)
        zmq_socket.connect(f"ipc://{name.replace(chr(0), '@')}")
        async with asyncio.timeout(ATTACH_S):  # TimeoutError is an OSError
            return await _accept_own(listener)


@contextmanager
def _name() -> Iterator[str]:
    """Where to meet ZeroMQ: a path that no other user reaches, or an abstract name if there can be none."""
    with ExitStack() as stack:
        path = ""
        with suppress(OSError):
            directory = TemporaryDirectory(prefix="hyperspace-", ignore_cleanup_errors=True)
            path = f"{stack.enter_context(directory)}/kv"
        fits = 0 < len(os.fsencode(path)) <= PATH_BYTES_MAX
        yield path if fits else f"\0hyperspace-{secrets.token_hex(16)}"


async def _accept_own(listener: socket.socket) -> socket.socket:
    loop = asyncio.get_running_loop()
    while True:
        local, _ = await loop.sock_accept(listener)
        credentials = local.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        if struct.unpack("3i", credentials)[0] == os.getpid():
            return local
        local.close()  # another process, which saw the abstract name


def detach(zmq_socket: Socket) -> None:
    """Remove the connection that `attach` made, if ZeroMQ hasn't yet."""
    if not zmq_socket.closed:
        with suppress(zmq.ZMQError):
            zmq_socket.disconnect(zmq_socket.getsockopt_string(zmq.LAST_ENDPOINT))


def hang_up(tcp: socket.socket) -> None:
    """End a connection that another task reads: that task sees end of stream."""
    with suppress(OSError):
        tcp.shutdown(socket.SHUT_RDWR)
