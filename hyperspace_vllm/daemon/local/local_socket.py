"""The node's end of the local socket: a ZeroMQ ROUTER that only this user can reach; it never waits."""

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import zmq

from ...core.local.messages import NodeMessage, encode
from ...core.records.limits import LOCAL_MESSAGE_BYTES_MAX

_MESSAGES_PER_TURN = 64  # then the loop runs its other tasks
_QUEUED_MESSAGES_MAX = 1024  # per client and direction; beyond, sending fails

Receive = Callable[[bytes, list[bytes]], None]  # (route, frames)


class LocalSocket:
    """Clients are named by their routes, the ROUTER's names of their connections."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._bound: os.stat_result | None = None
        self._reading: _Reading | None = None
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)

    def bind(self) -> None:
        """Take the socket's path; OSError or ZMQError when that is impossible. Clients wait until `serving`."""
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a full or gone client is an error here, not a silent loss
        self._socket.setsockopt(zmq.MAXMSGSIZE, LOCAL_MESSAGE_BYTES_MAX)
        self._socket.setsockopt(zmq.SNDHWM, _QUEUED_MESSAGES_MAX)
        self._socket.setsockopt(zmq.RCVHWM, _QUEUED_MESSAGES_MAX)
        self._socket.bind(f"ipc://{self._path}")
        self._bound = os.stat(self._path)
        os.chmod(self._path, 0o600)  # the directory is 0700 from the start

    @contextmanager
    def serving(self, receive: Receive) -> Iterator[Callable[[], bool]]:
        """Inside, `receive` is called with every message; `bind` comes before.

        Yields a function that handles what has arrived; it returns False if there may be more.
        """
        loop = asyncio.get_running_loop()
        descriptor = self._socket.fileno()
        self._reading = reading = _Reading(self._socket, receive, loop)
        loop.add_reader(descriptor, reading.drain)
        reading.drain_soon()  # the descriptor signals edges, and clients may have come since `bind`
        try:
            yield reading.drain
        finally:
            loop.remove_reader(descriptor)

    def send(self, route: bytes, message: NodeMessage) -> bool:
        """Queue a message for a client; False if its queue is full, or the client has gone."""
        try:
            self._socket.send_multipart([route, encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            return False
        # The descriptor signals edges, and sending may have consumed one.
        if self._reading is not None and int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._reading.drain_soon()
        return True

    def close(self) -> None:
        """Close the socket, bound or not."""
        self._socket.close(linger=0)
        self._context.term()
        # Another node's, if the directory was replaced meanwhile.
        with suppress(OSError):
            if self._bound is not None and os.path.samestat(self._bound, os.stat(self._path)):
                self._path.unlink()


class _Reading:
    """Passes a socket's messages on, a few per turn of the loop."""

    def __init__(self, socket: zmq.Socket[bytes], receive: Receive, loop: asyncio.AbstractEventLoop) -> None:
        self._socket = socket
        self._receive = receive
        self._loop = loop
        self._drain_due = False

    def drain(self) -> bool:
        """Handle what has arrived; False if there may be more (then it is due again at once)."""
        self._drain_due = False
        for _ in range(_MESSAGES_PER_TURN):
            try:
                route, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return True
            self._receive(route, frames)
        self.drain_soon()
        return False

    def drain_soon(self) -> None:
        if not self._drain_due:
            self._drain_due = True
            self._loop.call_soon(self._drain_if_open)

    def _drain_if_open(self) -> None:
        if not self._socket.closed:
            self.drain()
