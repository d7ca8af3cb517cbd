"""Between libp2p's thread and the node's loop: jobs go in by `ThreadRun`, results and events come back by `Inbox`."""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Protocol

import trio

from ...core.records.ids import PeerId
from ...core.records.rank import Tier
from .libp2p_node import Libp2pNode

GOSSIP_MAX = 256  # messages on their way to the loop
EVENTS_PER_TURN = 64

logger = logging.getLogger(__name__)


class HostHandler(Protocol):
    """The network's events for a node; called on the asyncio loop."""

    async def on_request(self, peer: PeerId, protocol: str, frame: bytes) -> bytes | None:
        """The answer to a peer's request; None resets the stream."""

    def on_gossip(self, topic: str, relay: PeerId, payload: bytes) -> None:
        """A message that the gate accepted arrived on a topic through a neighbour, which need not be its author."""

    def on_gossip_spoiled(self, relay: PeerId) -> None:
        """A neighbour passed on more invalid messages than an honest one does."""

    def on_connected(self, peer: PeerId, host: str) -> None:
        """The first connection to a peer is open; `host` is the IP address at its other end."""

    def on_disconnected(self, peer: PeerId) -> None:
        """The last connection to a peer is closed."""

    def may_dial(self, peer: PeerId, address: str, told_from: str) -> bool:
        """Whether a DHT search may dial a peer at an address that an answer from `told_from` (an IP address) names."""

    def on_violation(self, peer: PeerId) -> None:
        """A peer broke a rule of yamux or the streams: a frame too long, too much at once, too many useless frames."""

    def tier(self, peer: PeerId) -> Tier:
        """Which peers take precedence; called in the thread, must not block."""

    def on_discovered(self, peer: PeerId, address: str, told_from: str) -> None:
        """A machine of the local network announces that a peer is there (mDNS, unsigned).

        `told_from` is an IP address that reaches as far as the machine's.
        """


class ThreadRun:
    """Access to one run of the thread."""

    def __init__(self, node: Libp2pNode, token: trio.lowlevel.TrioToken, nursery: trio.Nursery) -> None:
        self.node = node
        self.stopped = trio.Event()
        self._token = token
        self._nursery = nursery

    def spawn(self, job: Callable[[], Awaitable[None]]) -> bool:
        """Run `job`, which must not raise, in the thread; False: the run is over."""

        def start() -> None:
            with suppress(RuntimeError):  # the nursery has closed
                self._nursery.start_soon(job)

        return self._soon(start)

    def cancel(self, scope: trio.CancelScope) -> None:
        """Cancel a job."""
        self._soon(scope.cancel)

    def stop(self) -> None:
        """End the run."""
        self._soon(self.stopped.set)

    def _soon(self, action: Callable[[], object]) -> bool:
        try:
            self._token.run_sync_soon(action)
        except trio.RunFinishedError:
            return False
        return True


class Inbox:
    """Actions for the loop, in order; the loop is woken once for any number of them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._actions: deque[Callable[[], object]] = deque()
        self._due = False

    def put(self, action: Callable[[], object]) -> None:
        """Run `action` on the loop soon; from any thread."""
        self._actions.append(action)
        if not self._due:
            self._due = True
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._due = False
        for _ in range(EVENTS_PER_TURN):
            if not self._actions:
                return
            action = self._actions.popleft()
            try:
                action()
            except Exception:
                logger.exception("an event of the network was not handled")
        if self._actions and not self._due:
            self._due = True
            self._loop.call_soon(self._drain)


class LoopEvents:
    """A node's events in the thread, carried to the handler on the loop; `on_peer` keeps count of connections first."""

    def __init__(self, handler: HostHandler, on_peer: Callable[[PeerId, str | None], None], inbox: Inbox) -> None:
        self._handler = handler
        self._on_peer = on_peer
        self._inbox = inbox
        self._gossip_waiting = 0
        self._answering: set[asyncio.Task[None]] = set()

    def peer_changed(self, peer: PeerId, host: str | None) -> None:
        self._inbox.put(lambda: self._on_peer(peer, host))

    def gossip(self, topic: str, relay: PeerId, payload: bytes) -> None:
        if self._gossip_waiting >= GOSSIP_MAX:
            return
        self._gossip_waiting += 1

        def deliver() -> None:
            self._gossip_waiting -= 1
            self._handler.on_gossip(topic, relay, payload)

        self._inbox.put(deliver)

    def gossip_spoiled(self, relay: PeerId) -> None:
        self._inbox.put(lambda: self._handler.on_gossip_spoiled(relay))

    async def may_dial(self, peer: PeerId, address: str, told_from: str) -> bool:
        token, done, says = trio.lowlevel.current_trio_token(), trio.Event(), [False]

        def ask() -> None:
            try:
                says[0] = self._handler.may_dial(peer, address, told_from)
            finally:
                with suppress(trio.RunFinishedError):
                    token.run_sync_soon(done.set)

        self._inbox.put(ask)
        await done.wait()
        return says[0]

    def tier(self, peer: PeerId) -> Tier:
        return self._handler.tier(peer)

    def violated(self, peer: PeerId) -> None:
        self._inbox.put(lambda: self._handler.on_violation(peer))

    async def answer(self, peer: PeerId, protocol: str, frame: bytes) -> bytes | None:
        token = trio.lowlevel.current_trio_token()
        done = trio.Event()
        answer: list[bytes | None] = []
        tasks: list[asyncio.Task[None]] = []

        async def handle() -> None:
            try:
                answer.append(await self._handler.on_request(peer, protocol, frame))
            except Exception:
                logger.exception("a request of %s was not handled", peer, extra={"peer": peer})
            finally:
                with suppress(trio.RunFinishedError):
                    token.run_sync_soon(done.set)

        def begin() -> None:
            task = asyncio.get_running_loop().create_task(handle())
            tasks.append(task)
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)

        self._inbox.put(begin)
        try:
            await done.wait()
        except trio.Cancelled:  # the stream broke, or the thread ends
            self._inbox.put(lambda: [task.cancel() for task in tasks])
            raise
        return answer[0] if answer else None
