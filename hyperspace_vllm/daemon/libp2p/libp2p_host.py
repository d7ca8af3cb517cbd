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
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TypeVar

import trio
from nacl.signing import SigningKey

from ...core.peers.gossip_gate import GossipGate
from ...core.records.ids import PeerId, peer_id
from ...core.records.limits import STREAM_FRAME_BYTES_MAX
from ...core.records.peer_wire import ANYTHING, Expected
from ...core.records.reason import Reason
from ..peer_failed import PeerFailed
from .libp2p_inbox import HostHandler, Inbox, LoopEvents, ThreadRun
from .libp2p_mdns import Mdns
from .libp2p_node import Libp2pNode, NodeSettings

CALLS_MAX = 1024  # open calls
PUBLISH_MAX = 64  # messages on their way to the thread
START_S = 20.0
CLOSE_S = 5.0
GRACE_S = 0.25  # after a call's deadline, for the thread to report it itself
RESTART_S = (1.0, 2.0, 5.0, 15.0)

logger = logging.getLogger(__name__)
T = TypeVar("T")


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
        self._connected: set[PeerId] = set()
        self._calls: set[asyncio.Future[object]] = set()
        self._publishing = 0
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._link: ThreadRun | None = None

    async def start(self) -> None:
        """Listen; OSError when that is impossible, TimeoutError."""
        self._loop = asyncio.get_running_loop()
        self._inbox = Inbox(self._loop)
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

    async def connect(self, peer: PeerId, address: str, timeout_s: float) -> None:
        """Open a connection to `peer` at `host:port`, unless there is one; PeerFailed(timeout | unreachable)."""
        await self._call(lambda node: node.connect(peer, address), timeout_s)

    async def disconnect(self, peer: PeerId) -> None:
        """Close every connection to a peer; returns when all are closed."""
        with suppress(PeerFailed):
            await self._call(lambda node: node.disconnect(peer), CLOSE_S)

    async def request(
        self, peer: PeerId, protocol: str, frame: bytes, timeout_s: float, expected: Expected = ANYTHING
    ) -> bytes:
        """A connected peer's answer; PeerFailed(timeout | unreachable | protocol | busy)."""
        assert len(frame) <= STREAM_FRAME_BYTES_MAX
        return await self._call(lambda node: node.request(peer, protocol, frame, expected), timeout_s)

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
        node = Libp2pNode(self._settings, LoopEvents(self._handler, self._on_peer, self._inbox))
        async with node.running() as address, trio.open_nursery() as nursery:
            link = ThreadRun(node, trio.lowlevel.current_trio_token(), nursery)
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
            self._on_peer(peer, None)

    def _on_peer(self, peer: PeerId, host: str | None) -> None:
        """A peer connected, or disconnected (None)."""
        if (host is not None) == (peer in self._connected):
            return
        if host is not None:
            self._connected.add(peer)
            self._handler.on_connected(peer, host)
        else:
            self._connected.discard(peer)
            self._handler.on_disconnected(peer)


def _fail(started: "asyncio.Future[None]", error: BaseException | None) -> None:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if not started.done():
        started.set_exception(error if isinstance(error, OSError) else OSError(f"libp2p: {error!r}"))
