"""An engine process's end of the local socket and of the arena.

Nothing here raises or waits because a node is absent, slow or dead: sending returns False, receiving an empty list,
and the caller computes instead. A caller's leases last as long as `epoch`: when it changes, every earlier slab and
lookup is gone.
"""

import logging
import mmap
import os
import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Literal

import zmq

from .config import Config
from .contained import report_error
from .core.local.messages import ClientMessage, NodeMessage, decode_node_message, encode
from .core.local.session_messages import (
    LOCAL_PROTOCOL,
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    Hello,
    LeaseLost,
    Rejected,
    Welcome,
)
from .core.local.slab import Slab
from .core.records.errors import ProtocolViolation
from .core.records.ids import NetworkId
from .core.records.limits import HEARTBEAT_MS, LEASE_MS, LOCAL_MESSAGE_BYTES_MAX
from .node_process import revive_node
from .node_process import start_node as start_node  # a client's other way to a node
from .session_lock import SessionLock

logger = logging.getLogger(__name__)

_QUEUED_MESSAGES_MAX = 1024  # to the node, and from it until the caller receives them
_HELLO_AGAIN_S = 1.0
_LOOK_S = 0.05  # between checks for a node while there is none, at first …
_LOOK_LATER_S = 0.5  # … and once it has been missing for a while
_SOON_S = 10.0
_UNMAPPED_S = 10.0  # a node whose arena can't be mapped may be another one by then
_TOUCH_KV = ("scheduler", "worker")  # roles; a scheduler that couldn't see the arena would promise what no worker loads
_BEAT_S = HEARTBEAT_MS / 1000
_LEASE_S = LEASE_MS / 1000
# Alone for so long: the embedded node is started again, by the engine, or where there is none by the API server.
_REVIVE_AFTER_S = {"scheduler": 2.0, "api": 5.0}
_REVIVE_AGAIN_S = 10.0  # doubled each time, for a node that dies again at once
_REVIVE_AGAIN_S_MAX = 640.0
_REVIVED_S = 60.0  # a session that lasted so long had a healthy node


class NodeClient:
    """One process's session with the node of `config.data_dir`. Thread-safe; a forked child gets its own session."""

    def __init__(self, config: Config, role: Literal["api", "scheduler", "worker", "cli"], name: str) -> None:
        self._config = config
        self._role: Literal["api", "scheduler", "worker", "cli"] = role
        self._name = name[:256]
        self._lock = threading.Lock()
        self._link: _NodeSession | None = None
        self._epoch = 0
        self._closed = False
        this = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _forget_link(this))
        with self._lock:
            self._current()  # look for the node now, so that the first request already finds it

    @property
    def connected(self) -> bool:
        """Does the lease hold, as far as this process knows?"""
        with self._lock:
            return self._current().welcome is not None

    @property
    def closed(self) -> bool:
        """Whether `close` was called: there will be no session any more."""
        return self._closed

    @property
    def api_servers(self) -> int:
        """API servers of this node, as of the last heartbeat."""
        with self._lock:
            return self._current().api_servers

    @property
    def epoch(self) -> int:
        """0 before the first session; changes with every new one."""
        with self._lock:
            return self._current().epoch

    @property
    def arena_bytes(self) -> int:
        """Size of the node's arena; 0 before the first session."""
        with self._lock:
            seen = self._current().last_welcome
            return seen.arena_bytes if seen else 0

    @property
    def peer_id(self) -> str:
        """The node's peer id; '' before the first session."""
        with self._lock:
            seen = self._current().last_welcome
            return seen.peer_id if seen else ""

    @property
    def network_id(self) -> NetworkId:
        """The node's network; 32 zero bytes before the first session."""
        with self._lock:
            seen = self._current().last_welcome
            return NetworkId(seen.network_id if seen else bytes(32))

    def send(self, message: ClientMessage) -> bool:
        """Queue a message for the node; False when there is none, its queue is full or the message is too large."""
        frame = encode(message)
        with self._lock:
            link = self._current()
            sent = link.welcome is not None and len(frame) <= LOCAL_MESSAGE_BYTES_MAX and link.send(frame)
            link.tell()
            return sent

    def receive(self) -> list[NodeMessage]:
        """What the node has sent since the last call, without the messages that keep the session."""
        with self._lock:
            link = self._current()
            link.drain()
            messages = list(link.inbox)
            link.inbox.clear()
            link.has_news = False
            return messages

    def on_news(self, wake: Callable[[], None]) -> int:
        """A duplicate of the socket's descriptor, for a listener that receives when it is readable or `wake` is called.

        `wake` is called from any thread: when a message came in while something was sent, which the descriptor then
        doesn't signal, and when the session began or ended. There is one listener; a forked child has none. -1: closed.
        """
        with self._lock:
            link = self._current()
            link.wake = wake
            link.tell()
            return -1 if self._closed else os.dup(link.descriptor)

    def view(self, slab: Slab) -> memoryview:
        """The slab's bytes in the arena, writable; `LookupError` once it is no longer current."""
        with self._lock:
            link = self._current()
            # A slab of a lost session must not become a window on what lies there now.
            if link.arena is None or not link.is_current(slab):
                raise LookupError(f"slab {slab.slot}/{slab.generation}: its lease is over")
            return link.arena[slab.offset : slab.offset + slab.length]

    def is_current(self, slab: Slab) -> bool:
        """Is the slab still what it was when it was leased? Ask *after* copying from it."""
        with self._lock:
            return self._current().is_current(slab)

    def take_earlier_locks(self) -> list[SessionLock]:
        """The locks of sessions that are over; release them once nothing writes into their slabs any more."""
        with self._lock:
            return self._current().take_earlier_locks()

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait for a session; False when there is none by then."""
        deadline = time.monotonic() + timeout_s
        while not self.connected:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.01)
        return True

    def close(self) -> None:
        """Say goodbye and let everything go; the client stays unconnected."""
        with self._lock:
            self._closed = True
            if self._link is not None:
                self._link.close()
                self._link.tell()

    def _current(self) -> "_NodeSession":
        if self._link is None:
            self._link = _NodeSession(self._config, self._role, self._name, self._epoch)
            if self._closed:
                self._link.close()
            else:
                beat = threading.Thread(
                    target=_beat, args=(weakref.ref(self),), name="hyperspace-heartbeat", daemon=True
                )
                beat.start()
        self._epoch = self._link.epoch
        return self._link


def _forget_link(client: "weakref.ref[NodeClient]") -> None:
    # In a forked child: the parent's heartbeat thread is not here, its lock may be held for ever, and its socket is
    # the parent's (pyzmq doesn't close what another process opened).
    if (forked := client()) is not None:
        forked._lock = threading.Lock()
        forked._link = None


def _beat(client: "weakref.ref[NodeClient]") -> None:
    try:
        _keep(client)
    except Exception:
        report_error("the heartbeat to the node")
        if (ours := client()) is not None:
            ours.close()  # one that looked connected would have requests wait for a node that has forgotten it


def _keep(client: "weakref.ref[NodeClient]") -> None:
    pause_s = 0.0
    while True:
        time.sleep(pause_s)
        if (ours := client()) is None or ours._closed:
            return
        with ours._lock:
            if ours._closed:
                return
            link, now = ours._current(), time.monotonic()
            pause_s = link.tick(now)
            link.tell()
            revive = link.revival_due(now)
        if revive:
            revive_node(ours._config)
        del ours, link  # sleep without keeping the client alive


class _NodeSession:
    """Socket, session and mapped arena of one process. The caller holds the client's lock."""

    def __init__(
        self, config: Config, role: Literal["api", "scheduler", "worker", "cli"], name: str, epoch: int
    ) -> None:
        self.epoch = epoch
        self.welcome: Welcome | None = None  # None: no lease
        self.last_welcome: Welcome | None = None
        self.api_servers = 0
        self.inbox: deque[NodeMessage] = deque(maxlen=_QUEUED_MESSAGES_MAX)
        self.has_news = False  # a message, or another session, for the receiver
        self.wake: Callable[[], None] | None = None
        self.arena: memoryview | None = None
        self.generations: memoryview | None = None
        self._role = role
        self._name = name
        self._data_dir = config.data_dir
        self._session: bytes | None = None  # the next Hello's, or that of the session it began
        self._locks: dict[bytes, SessionLock] = {}  # by session
        self._complaints: set[str] = set()
        self._hello_at = self._heartbeat_at = float("-inf")
        self._heard_at = self._alone_since = self._welcomed_at = time.monotonic()
        self._revived_at = float("-inf")
        self._revive_again_s = _REVIVE_AGAIN_S
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.IMMEDIATE, 1),  # without a node nothing is queued
            (zmq.SNDHWM, _QUEUED_MESSAGES_MAX),
            (zmq.RCVHWM, _QUEUED_MESSAGES_MAX),
            (zmq.MAXMSGSIZE, LOCAL_MESSAGE_BYTES_MAX),
            (zmq.RECONNECT_IVL, 50),
            (zmq.RECONNECT_IVL_MAX, 500),
        ):
            self._socket.setsockopt(option, value)
        self._socket.connect(f"ipc://{config.socket_path}")
        self.descriptor = int(self._socket.getsockopt(zmq.FD))
        # A client may be dropped, not closed: the garbage collector could take the context first, which waits for ever.
        self._dropped = weakref.finalize(self, _close_dropped, self._socket, self._context)

    def send(self, frame: bytes) -> bool:
        """Queue a frame; False when there is no node or its queue is full."""
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.ZMQError:  # EAGAIN: full, or no peer; ENOTSOCK: closed meanwhile
            return False
        return True

    def drain(self) -> None:
        """Take in what has arrived."""
        while True:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.ZMQError:
                return
            try:
                self._take(decode_node_message(frame))
            except ProtocolViolation as error:
                logger.warning("hyperspace node: %s", error)

    def tell(self) -> None:
        """Wake the listener if there is news; to be called after every use of the socket, which may consume an edge."""
        if self.wake is None:
            return
        self.drain()
        if self.has_news:
            self.has_news = False
            self.wake()

    def is_current(self, slab: Slab) -> bool:
        """Does the slab lie in the arena that is mapped now, with its generation unchanged?"""
        return (
            self.generations is not None
            and slab.slot < len(self.generations)
            and self.generations[slab.slot] == slab.generation
        )

    def tick(self, now: float) -> float:
        """Keep or regain the lease; seconds until the next tick."""
        self.drain()
        if self.welcome is not None and now - self._heard_at > _LEASE_S:
            self._lose(now)
        if self.welcome is not None:
            if now - self._heartbeat_at >= _BEAT_S:
                self._heartbeat_at = now
                self.send(encode(Heartbeat()))
            return _BEAT_S / 2
        if now - self._hello_at >= _HELLO_AGAIN_S:
            hello = Hello(LOCAL_PROTOCOL, self._role, self._new_session(), self._name)
            if self.send(encode(hello)):
                self._hello_at = now
        return _LOOK_S if now - self._alone_since < _SOON_S else _LOOK_LATER_S

    def revival_due(self, now: float) -> bool:
        """Is it time to see whether the node that was here has died? Says so once, then after ever longer pauses."""
        after_s = _REVIVE_AFTER_S.get(self._role)
        if after_s is None or self.welcome is not None or self.last_welcome is None:
            return False
        if now - self._alone_since < after_s or now - self._revived_at < self._revive_again_s:
            return False
        if self._revived_at > self._welcomed_at or now - self._revived_at < _REVIVED_S:
            self._revive_again_s = min(2 * self._revive_again_s, _REVIVE_AGAIN_S_MAX)
        else:
            self._revive_again_s = _REVIVE_AGAIN_S
        self._revived_at = now
        return True

    def close(self) -> None:
        """End the session and the connection."""
        if self.welcome is not None and self.send(encode(Goodbye())):
            self._socket.setsockopt(zmq.LINGER, 200)
        self._lose(time.monotonic())
        self.arena = self.generations = None
        self._dropped.detach()
        self._socket.close()
        self._context.destroy()
        for lock in self.take_earlier_locks():
            lock.release()

    def take_earlier_locks(self) -> list[SessionLock]:
        """Those of every session but the present one."""
        earlier = [session for session in self._locks if session != self._session]
        return [self._locks.pop(session) for session in earlier]

    def _new_session(self) -> bytes:
        if self._session is None:
            self._session = secrets.token_bytes(16)
        if self._role == "worker" and self._session not in self._locks:
            try:
                self._locks[self._session] = SessionLock(self._data_dir, self._session)
            except OSError as error:  # then the node never reuses what this session leaves behind
                self._warn_once(f"no session lock in {self._data_dir}, its slabs are used only once: {error.strerror}")
        return self._session

    def _warn_once(self, complaint: str) -> None:
        if complaint not in self._complaints:
            logger.warning("hyperspace: %s", complaint)
        self._complaints.add(complaint)

    def _lose(self, now: float) -> None:
        self.has_news = True
        self.welcome = self._session = None
        self.inbox.clear()
        self._hello_at = float("-inf")
        self._alone_since = now

    def _take(self, message: NodeMessage) -> None:
        now = self._heard_at = time.monotonic()
        match message:
            case Welcome():
                self._begin(message, now)
            case LeaseLost():
                # Without a lease it answers what the last session sent before our Hello.
                if self.welcome is not None:
                    self._lose(now)
            case HeartbeatAck():
                self.api_servers = message.api_servers
            case Rejected(detail):
                logger.warning("hyperspace node rejected a message: %s", detail)
                if self.welcome is not None:
                    self._put(message)
            case _:
                self._put(message)

    def _put(self, message: NodeMessage) -> None:
        self.has_news = True
        self.inbox.append(message)

    def _begin(self, welcome: Welcome, now: float) -> None:
        if welcome.protocol != LOCAL_PROTOCOL:
            logger.warning("hyperspace node speaks protocol %d, this is %d", welcome.protocol, LOCAL_PROTOCOL)
            return
        known = self.last_welcome
        # By the node, not by the path: in the data directory the arenas of all of its nodes have the same one.
        if self._role in _TOUCH_KV and (self.arena is None or known is None or known.epoch != welcome.epoch):
            try:
                self.arena = _map_arena(welcome)
            except (OSError, ValueError) as error:
                self._warn_once(
                    f"KV sharing (L2) is off, the node's arena can't be mapped: {getattr(error, 'strerror', error)}. "
                    "Containers that share a node must share its data directory and /dev/shm; otherwise choose another "
                    "HYPERSPACE_DATA_DIR for this one."
                )
                self.send(encode(Goodbye()))
                self._hello_at = now + _UNMAPPED_S
                return
            self.generations = self.arena[: len(self.arena) // 8 * 8].cast("Q")
        self.welcome = self.last_welcome = welcome
        self.epoch += 1
        self.has_news = True
        self.inbox.clear()
        self._heartbeat_at = self._welcomed_at = now


def _close_dropped(socket: zmq.Socket[bytes], context: zmq.Context[zmq.Socket[bytes]]) -> None:
    socket.close(linger=0)
    context.term()


def _map_arena(welcome: Welcome) -> memoryview:
    descriptor = os.open(welcome.arena_path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return memoryview(mmap.mmap(descriptor, welcome.arena_bytes))  # ValueError: the file is shorter
    finally:
        os.close(descriptor)
