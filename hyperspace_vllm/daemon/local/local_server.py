"""The clients of one host: their sessions and leases, and the dispatch of their messages.

A session is a process: it sends Hello, keeps its lease by heartbeats, and loses everything when it is silent for
LEASE_MS. Nothing here waits: a message that cannot be sent or served at once is refused, and the client computes
instead.
"""

import asyncio
import secrets
from collections.abc import Callable
from typing import assert_never

from ...core.local.messages import ClientMessage, decode_client_message
from ...core.local.session_messages import (
    LOCAL_PROTOCOL,
    GetStatus,
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    Hello,
    LeaseLost,
    Rejected,
    Status,
    Welcome,
)
from ...core.records.errors import ProtocolViolation
from ...core.records.ids import NetworkId, PeerId
from ...core.records.limits import CLIENTS_MAX, LEASE_MS
from ..kv.arena import Arena
from ..metrics import Metrics
from .engine_messages import EngineMessage, EngineMessages
from .local_socket import LocalSocket
from .response_messages import ResponseMessage, ResponseMessages
from .served import Served
from .session import Session

_REASON_CHARS_MAX = 256  # local.Name


def make_welcome(peer: PeerId, network: NetworkId, arena: Arena) -> Welcome:
    """The Welcome of this run of the node, for every client."""
    return Welcome(LOCAL_PROTOCOL, secrets.randbits(63), peer, network, str(arena.path), arena.size)


class LocalServer:
    """Serves the clients of one host, on the loop that runs `run`; `socket` has been bound before."""

    def __init__(
        self,
        socket: LocalSocket,
        welcome: Welcome,
        engines: EngineMessages,
        responses: ResponseMessages,
        served: Served,
        status: Callable[[], bytes],
        metrics: Metrics,
        lease_ms: int = LEASE_MS,
    ) -> None:
        self._socket = socket
        self._said = welcome
        self._engines = engines
        self._responses = responses
        self._served = served
        self._status = status
        self._metrics = metrics
        self._lease_s = lease_ms / 1000
        self._sessions: dict[bytes, Session] = {}  # by route
        self.had_engine = False  # there was a session that needed the node

    @property
    def engine_leases(self) -> int:
        """Sessions that need the node; a `hyperspace status` does not."""
        return sum(session.role != "cli" for session in self._sessions.values())

    async def run(self) -> None:
        """Serve until cancelled."""
        self._loop = asyncio.get_running_loop()
        with self._socket.serving(self._receive) as drain:
            while True:
                await asyncio.sleep(self._lease_s / 10)
                # A node that was itself paused finds heartbeats in its queue: read them before judging.
                if drain():
                    self._expire(self._loop.time())
                self._engines.look_after(self._sessions.values())

    # --- sessions -------------------------------------------------------------------------------

    def _receive(self, route: bytes, frames: list[bytes]) -> None:
        try:
            if len(frames) != 1:
                raise ProtocolViolation(f"local message: {len(frames)} frames, expected 1")
            message = decode_client_message(frames[0])
            if isinstance(message, Hello):
                self._welcome(route, message)
            elif route not in self._sessions:
                self._socket.send(route, LeaseLost())
            else:
                self._handle(self._sessions[route], message)
        except ProtocolViolation as error:
            self._metrics.failures_total.labels("local", "protocol").inc()
            self._socket.send(route, Rejected(str(error)[:_REASON_CHARS_MAX]))

    def _welcome(self, route: bytes, hello: Hello) -> None:
        if hello.protocol != LOCAL_PROTOCOL:
            raise ProtocolViolation(f"protocol {hello.protocol}: this node speaks {LOCAL_PROTOCOL}")
        if route in self._sessions:
            self._end(self._sessions[route], vanished=True)
        if any(session.key == hello.session for session in self._sessions.values()):
            raise ProtocolViolation("session: in use by another connection")
        if len(self._sessions) >= CLIENTS_MAX:
            raise ProtocolViolation(f"session: {CLIENTS_MAX} clients are here already")
        if self._socket.send(route, self._said):
            expires_at = self._loop.time() + self._lease_s
            self._sessions[route] = Session(route, hello.session, hello.role, hello.name, expires_at)
            self.had_engine = self.had_engine or hello.role != "cli"
            self._metrics.clients.set(len(self._sessions))

    def _expire(self, now: float) -> None:
        for session in [s for s in self._sessions.values() if s.expires_at <= now]:
            self._end(session, vanished=True)
            self._socket.send(session.route, LeaseLost())

    def _end(self, session: Session, vanished: bool) -> None:
        del self._sessions[session.route]
        self._metrics.clients.set(len(self._sessions))
        self._responses.ended(session)
        self._served.ended(session.key)
        self._engines.ended(session, self._sessions.values(), vanished)

    # --- messages -------------------------------------------------------------------------------

    def _handle(self, session: Session, message: ClientMessage) -> None:
        session.expires_at = self._loop.time() + self._lease_s
        if isinstance(message, EngineMessage):
            self._engines.handle(session, message)
            return
        if isinstance(message, ResponseMessage):
            self._responses.handle(session, message)
            return
        match message:
            case Heartbeat():
                api_servers = sum(each.role == "api" for each in self._sessions.values())
                self._socket.send(session.route, HeartbeatAck(self._said.epoch, api_servers))
            case Goodbye():
                self._end(session, vanished=False)
            case GetStatus():
                self._socket.send(session.route, Status(self._status()))
            case Hello():
                raise AssertionError("handled before")
            case _:
                assert_never(message)
