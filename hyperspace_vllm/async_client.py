"""An event loop's end of the local socket: the node's messages are handled in the loop's next turn, without polling.

Context: a request waits for the node's answer, and a loop that polls each millisecond adds one to each. ZeroMQ's
descriptor signals edges: any use of the socket may consume one, also by the heartbeat's thread, which must keep the
lease while the loop is busy. Choice: the loop watches the descriptor itself, and the client, which drains the socket
whenever it has used it, wakes the loop if that brought something. Rejected: a thread that waits for the socket, because
each message would then wait for the GIL, up to 5 ms beside busy Python code; `daemon/zmq_pump.py`, which is for a
socket that one thread uses alone. Cost: a drain, a few microseconds, for each message sent.
"""

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress

from .client import NodeClient
from .core.local.messages import ClientMessage, NodeMessage

Hear = Callable[[list[NodeMessage]], None]


class AsyncNodeClient:
    """A `NodeClient` for code on an event loop, asyncio's or uvloop's; all but `listen` works without one."""

    def __init__(self, client: NodeClient) -> None:
        self._client = client
        self._hear: Hear = lambda messages: None
        self._watch: _Watch | None = None

    @property
    def connected(self) -> bool:
        """Does the lease hold, as far as this process knows?"""
        return self._client.connected

    @property
    def api_servers(self) -> int:
        """API servers of this node, as of the last heartbeat."""
        return self._client.api_servers

    @property
    def epoch(self) -> int:
        """0 before the first session; changes with every new one."""
        return self._client.epoch

    def send(self, message: ClientMessage) -> bool:
        """Queue a message for the node; False when there is none, its queue is full or the message is too large."""
        return self._client.send(message)

    def receive(self) -> list[NodeMessage]:
        """The node's messages that the listener has not received yet, for a loop that was too busy to be woken."""
        return self._client.receive()

    def listen(self, hear: Hear) -> None:
        """Call `hear` on the running loop with the node's messages, and with none when the session changes.

        There is one listener, on the loop that called last; calling again costs almost nothing.
        """
        self._hear = hear
        loop = asyncio.get_running_loop()
        if self._watch is not None and self._watch.loop is loop:
            return
        if self._watch is not None:
            self._watch.end()
        self._watch = _Watch(self._client, loop, self._take)

    def close(self) -> None:
        """Send Goodbye and release everything; the client stays unconnected."""
        self._client.close()

    def _take(self) -> None:
        messages = self._client.receive()
        if self._client.closed and self._watch is not None:
            self._watch.end()
        self._hear(messages)


class _Watch:
    """The client's descriptor on one loop.

    It is a duplicate of the socket's: the client may be closed by another thread, and a descriptor that is closed while
    the loop watches it would break what gets its number next.
    """

    def __init__(self, client: NodeClient, loop: asyncio.AbstractEventLoop, take: Callable[[], None]) -> None:
        self.loop = loop
        self._take = take
        self._ended = False
        self._descriptor = client.on_news(self._wake)
        if self._descriptor >= 0:
            loop.add_reader(self._descriptor, self._fire)

    def end(self) -> None:
        """Stop watching; from any thread."""
        self._ended = True
        if self.loop.is_closed():
            self._close()
            return
        with suppress(RuntimeError):  # closed this moment
            self.loop.call_soon_threadsafe(self._close)

    def _fire(self) -> None:
        if not self._ended:  # else another loop listens
            self._take()

    def _close(self) -> None:
        if self._descriptor >= 0:
            if not self.loop.is_closed():
                self.loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def _wake(self) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self._fire)
