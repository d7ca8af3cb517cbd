"""libp2p for an asyncio program: py-libp2p in its own thread, behind calls with deadlines and bounded queues.

py-libp2p is trio, the node is asyncio. Calls are handed over by `run_sync_soon`; results and events come back in one
queue, which wakes the loop once for any number of them (0.12 ms a hop). Nothing outside libp2p_*.py depends on libp2p,
so that another engine can replace it.

When the thread dies, every waiting caller gets PeerFailed(unreachable), every peer is reported disconnected, and the
thread starts again on the same address.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Protocol, TypeVar

import trio
from nacl.signing import SigningKey

from ...core.peers.gossip_gate import GossipGate
from ...core.records.ids import PeerId, peer_id
from ...core.records.limits import STREAM_FRAME_BYTES_MAX
from ...core.records.rank import Tier
from ...core.records.reason import Reason
from ..peer_failed import PeerFailed
from .libp2p_mdns import Mdns
from .libp2p_node import Libp2pNode, NodeSettings

CALLS_MAX = 1024  # open calls
PUBLISH_MAX = 64  # messages on their way to the thread
GOSSIP_MAX = 256  # messages on their way to the loop
EVENTS_PER_TURN = 64
START_S = 20.0
CLOSE_S = 5.0
GRACE_S = 0.25  # after a call's deadline, for the thread to report it itself
RESTART_S = (1.0, 2.0, 5.0, 15.0)

logger = logging.getLogger(__name__)
T = TypeVar("T")


class HostHandler(Protocol):
    """The network's events for a node; called on the asyncio loop."""

    async def on_request(self, peer: PeerId, protocol: str, frame: bytes) -> bytes | None:
        """The answer to a peer's request; None resets the stream."""

    def on_gossip(self, topic: str, relay: PeerId, payload: bytes) -> None:
        """A message that the gate accepted arrived on a topic through a neighbour, which need not be its author."""

    def on_gossip_spoiled(self, relay: PeerId) -> None:
        """A neighbour passed on more invalid messages than an honest one does."""

    def on_connected(self, peer: PeerId) -> None:
        """The first connection to a peer is open."""

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


class Libp2pHost:
    """A libp2p host. It dials peers only for `connect`, or for a DHT search if `handler.may_dial` allows it."""

    address: str

    def __init__(
        self,
        signing_key: SigningKey,
        listen: str,
        network_key: bytes | None,
        mdns: bool,
        protocols: tuple[str, ...],
        topics: tuple[str, ...],
        handler: HostHandler,
        gate: GossipGate | None = None,
    ) -> None:
        """`network_key` is 32 bytes: no handshake begins without it; without `gate` no gossip is received."""
        assert network_key is None or len(network_key) == 32
        self.address = listen
        self._settings = NodeSettings(signing_key, listen, network_key, protocols, topics, gate)
        self._mdns_wanted = mdns
        self._mdns: Mdns | None = None
        self._handler = handler
        self._connected: dict[PeerId, str] = {}  # with the IP address at the other end
        self._calls: set[asyncio.Future[object]] = set()
        self._publishing = 0
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._link: _ThreadRun | None = None

    async def start(self) -> None:
        """Listen; OSError when that is impossible, TimeoutError."""
        self._loop = asyncio.get_running_loop()
        self._inbox = _Inbox(self._loop)
        started: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="libp2p", daemon=True)
        self._thread.start()
        try:
            async with asyncio.timeout(START_S):
                await started
        except BaseException:
            await self.close()
            raise
        if self._mdns_wanted:
            own_id = peer_id(self._settings.signing_key.verify_key.encode())
            self._mdns = Mdns(own_id, self.address, self._settings.network_key, self._handler.on_discovered)
            await self._mdns.start()

    @property
    def connected(self) -> frozenset[PeerId]:
        """Peers with an open connection."""
        return frozenset(self._connected)

    def host_of(self, peer: PeerId) -> str:
        """The IP address that a peer is connected from or to; '' if it isn't connected."""
        return self._connected.get(peer, "")

    async def connect(self, peer: PeerId, address: str, timeout_s: float) -> None:
        """Open a connection to `peer` at `host:port`, unless there is one; PeerFailed(timeout | unreachable)."""
        await self._call(lambda node: node.connect(peer, address), timeout_s)

    async def disconnect(self, peer: PeerId) -> None:
        """Close every connection to a peer; returns when all are closed."""
        with suppress(PeerFailed):
            await self._call(lambda node: node.disconnect(peer), CLOSE_S)

    async def request(self, peer: PeerId, protocol: str, frame: bytes, timeout_s: float) -> bytes:
        """A connected peer's answer; PeerFailed(timeout | unreachable | protocol | busy)."""
        assert len(frame) <= STREAM_FRAME_BYTES_MAX
        return await self._call(lambda node: node.request(peer, protocol, frame), timeout_s)

    def publish(self, topic: str, payload: bytes) -> bool:
        """Send to a topic's subscribers; False: dropped, because the queue is full or there is no network."""
        link = self._link
        if link is None or self._publishing >= PUBLISH_MAX:
            return False
        self._publishing += 1

        def published() -> None:
            self._publishing -= 1

        async def publish() -> None:
            try:
                await link.node.publish(topic, payload)
            except Exception:  # it would end the thread's other work
                logger.exception("a message of gossip was not sent")
            finally:
                self._inbox.put(published)

        if not link.spawn(publish):
            self._publishing -= 1
            return False
        return True

    async def provide(self, key: str, timeout_s: float) -> bool:
        """Become a provider of `key` in the DHT, with automatic renewal; False: no peer was told (yet)."""
        try:
            return await self._call(lambda node: node.provide(key), timeout_s)
        except PeerFailed:
            return False

    async def find_providers(self, key: str, count: int, timeout_s: float) -> tuple[tuple[PeerId, ...], float]:
        """Peers said to provide `key` (hints), and the search's cost in ms of CPU time; PeerFailed(timeout | …)."""
        return await self._call(lambda node: node.find_providers(key, count), timeout_s)

    async def close(self) -> None:
        """Stop; takes CLOSE_S at most."""
        if self._mdns is not None:
            await self._mdns.close()
        self._closing.set()
        link = self._link
        if link is not None:
            link.stop()
        thread = self._thread
        if thread is not None:
            await self._loop.run_in_executor(None, thread.join, CLOSE_S)
            if thread.is_alive():
                logger.error("libp2p did not stop within %.0f s; left behind", CLOSE_S)
        self._lose()

    async def _call(self, job: "Callable[[Libp2pNode], Awaitable[T]]", timeout_s: float) -> T:
        link = self._link
        if link is None:
            raise PeerFailed(Reason.UNREACHABLE)
        if len(self._calls) >= CALLS_MAX:
            raise PeerFailed(Reason.BUSY)
        result: asyncio.Future[object] = self._loop.create_future()
        scope = trio.CancelScope()

        def settle(value: object, error: BaseException | None) -> None:
            if result.done():
                return
            if error is None:
                result.set_result(value)
            else:
                result.set_exception(error)

        async def run() -> None:
            value: object = None
            error: BaseException | None = PeerFailed(Reason.UNREACHABLE)  # the thread is ending
            try:
                with scope, trio.fail_after(timeout_s):
                    value = await job(link.node)
                error = None
            except PeerFailed as failure:
                error = failure
            except trio.TooSlowError:
                error = PeerFailed(Reason.TIMEOUT)
            except Exception as unexpected:
                logger.warning("libp2p call failed", exc_info=unexpected)
                error = PeerFailed(Reason.UNREACHABLE)
            finally:
                self._inbox.put(lambda: settle(value, error))

        self._calls.add(result)
        try:
            if not link.spawn(run):
                raise PeerFailed(Reason.UNREACHABLE)
            async with asyncio.timeout(timeout_s + GRACE_S):
                return await result  # type: ignore[return-value]
        except TimeoutError as error:
            raise PeerFailed(Reason.TIMEOUT) from error
        finally:
            self._calls.discard(result)
            if not result.done() or result.cancelled():
                link.cancel(scope)

    # --- the thread -----------------------------------------------------------------------------

    def _run(self, started: "asyncio.Future[None]") -> None:
        deaths = 0
        while not self._closing.is_set():
            error: BaseException | None = None
            try:
                trio.run(self._main, started)
            except BaseException as failure:
                error = failure
            link, self._link = self._link, None
            if self._closing.is_set():
                return
            if link is None and deaths == 0:  # it never ran
                self._inbox.put(partial(_fail, started, error))
                return
            logger.error("libp2p stopped and is started again", exc_info=error)
            self._inbox.put(self._lose)
            self._closing.wait(RESTART_S[min(deaths, len(RESTART_S) - 1)])
            deaths += 1

    async def _main(self, started: "asyncio.Future[None]") -> None:
        node = Libp2pNode(self._settings, _Events(self, self._inbox))
        async with node.running() as address, trio.open_nursery() as nursery:
            link = _ThreadRun(node, trio.lowlevel.current_trio_token(), nursery)
            self._settings = replace(self._settings, listen=address)  # the same port after a restart

            def ready() -> None:
                self.address = address
                if not started.done():
                    started.set_result(None)

            self._link = link
            self._inbox.put(ready)
            if self._closing.is_set():
                return
            await link.stopped.wait()
            nursery.cancel_scope.cancel()

    # --- on the loop ----------------------------------------------------------------------------

    def _lose(self) -> None:
        self._publishing = 0
        for call in list(self._calls):
            if not call.done():
                call.set_exception(PeerFailed(Reason.UNREACHABLE))
        for peer in list(self._connected):
            self.on_peer(peer, None)

    def on_peer(self, peer: PeerId, host: str | None) -> None:
        """A peer connected, or disconnected (None) (for the thread's events; not part of the interface)."""
        if (host is not None) == (peer in self._connected):
            return
        if host is not None:
            self._connected[peer] = host
            self._handler.on_connected(peer)
        else:
            del self._connected[peer]
            self._handler.on_disconnected(peer)

    @property
    def handler(self) -> HostHandler:
        """The receiver of the events."""
        return self._handler


def _fail(started: "asyncio.Future[None]", error: BaseException | None) -> None:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if not started.done():
        started.set_exception(error if isinstance(error, OSError) else OSError(f"libp2p: {error!r}"))


class _ThreadRun:
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


class _Inbox:
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


class _Events:
    """The node's events, carried to the handler on the loop."""

    def __init__(self, host: Libp2pHost, inbox: _Inbox) -> None:
        self._host = host
        self._inbox = inbox
        self._gossip_waiting = 0
        self._answering: set[asyncio.Task[None]] = set()

    def peer_changed(self, peer: PeerId, host: str | None) -> None:
        self._inbox.put(lambda: self._host.on_peer(peer, host))

    def gossip(self, topic: str, relay: PeerId, payload: bytes) -> None:
        if self._gossip_waiting >= GOSSIP_MAX:
            return
        self._gossip_waiting += 1

        def deliver() -> None:
            self._gossip_waiting -= 1
            self._host.handler.on_gossip(topic, relay, payload)

        self._inbox.put(deliver)

    def gossip_spoiled(self, relay: PeerId) -> None:
        self._inbox.put(lambda: self._host.handler.on_gossip_spoiled(relay))

    async def may_dial(self, peer: PeerId, address: str, told_from: str) -> bool:
        token, done, says = trio.lowlevel.current_trio_token(), trio.Event(), [False]

        def ask() -> None:
            try:
                says[0] = self._host.handler.may_dial(peer, address, told_from)
            finally:
                with suppress(trio.RunFinishedError):
                    token.run_sync_soon(done.set)

        self._inbox.put(ask)
        await done.wait()
        return says[0]

    def tier(self, peer: PeerId) -> Tier:
        return self._host.handler.tier(peer)

    def violated(self, peer: PeerId) -> None:
        self._inbox.put(lambda: self._host.handler.on_violation(peer))

    async def answer(self, peer: PeerId, protocol: str, frame: bytes) -> bytes | None:
        token = trio.lowlevel.current_trio_token()
        done = trio.Event()
        answer: list[bytes | None] = []
        tasks: list[asyncio.Task[None]] = []

        async def handle() -> None:
            try:
                answer.append(await self._host.handler.on_request(peer, protocol, frame))
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
