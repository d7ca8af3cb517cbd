"""The node's end of the local socket: sessions, their leases, and messages turned into events of the core.

A session is a process: it says Hello, keeps its lease by heartbeats, and loses everything when it goes silent for
LEASE_MS. Nothing here waits: what can't be sent or served at once is refused, and the client computes instead.
"""

import asyncio
import os
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Literal, Protocol, assert_never

import msgspec
import zmq

from ... import session_lock
from ...config import Config
from ...core.events.kv_events import (
    ClientGone,
    Event,
    PrefixReleased,
    PrefixWanted,
    RequestOver,
    RowArrived,
    SegmentKeyKnown,
)
from ...core.local.messages import (
    LOCAL_PROTOCOL,
    NO_ENGINE,
    ClaimRequest,
    ClientMessage,
    FindResponse,
    FindSimilar,
    GetStatus,
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    Hello,
    LeaseLost,
    LoadedRow,
    LookupPrefix,
    NodeMessage,
    PrefixAnswer,
    PrefixesInMemory,
    PurgeResponses,
    RegisterLayout,
    Rejected,
    ReleaseLookup,
    ReleaseResponse,
    RememberQuestion,
    RequestDone,
    RequestEnded,
    ResponseAudited,
    RowStaged,
    SegmentNamed,
    SimilarChecked,
    SimilarFound,
    SimilarNotFound,
    Slab,
    StagingGranted,
    StagingUnused,
    Status,
    StoreResponse,
    TouchResponses,
    WantStaging,
    Welcome,
    decode_client_message,
    encode,
)
from ...core.records.errors import ProtocolViolation
from ...core.records.ids import SegmentKey, network_id
from ...core.records.layout import Layout
from ...core.records.limits import CLIENTS_MAX, LEASE_MS, LOCAL_MESSAGE_BYTES_MAX, LOOKUPS_PER_CLIENT_MAX
from ..identity import Identity
from ..kv.row_cache import RowCache
from ..metrics import Metrics
from ..responses.response_lookups import FoundResponse, ResponseFinder, ResponseLookups
from ..served import Served
from .request_leases import RequestLeases
from .staging import Staging

_MESSAGES_PER_TURN = 64  # then the loop's other work has its turn
_QUEUED_MESSAGES_MAX = 1024  # per client and direction; beyond, sending fails
_REASON_CHARS_MAX = 256  # local.Name

Source = Literal["none", "memory", "disk", "network"]


class Responses(Protocol):
    """The response store, as far as clients reach it."""

    def store(self, message: StoreResponse) -> bool:
        """Sign and store a response; never blocks (False: it is not stored)."""

    def touch(self, keys: Iterable[bytes]) -> None:
        """Count hits; never blocks."""

    def purge(self, keys: Iterable[bytes]) -> bool:
        """Delete entries; never blocks (False: the queue is full)."""


class Similar(Protocol):
    """Who knows which stored responses answer a question in other words."""

    def find(self, want: FindSimilar, answer: Callable[[SimilarFound | SimilarNotFound], None]) -> None:
        """Look for one; `answer` is called once, from any thread. Never blocks."""

    def remember(self, message: StoreResponse) -> None:
        """Have a response with a question stored; never blocks."""

    def remember_question(self, message: RememberQuestion) -> None:
        """Have a question stored with a response that is here, or about to be; never blocks."""

    def check(self, message: SimilarChecked) -> None:
        """Compare two answers; never blocks."""


@dataclass(slots=True)
class _Session:
    route: bytes  # the ROUTER's name of its connection
    key: bytes
    role: Literal["api", "scheduler", "worker", "cli"]
    name: str
    expires_at: float
    layout: Layout | None = None
    engine: str = ""  # what an engine's scheduler and workers have in common and no other engine has
    lookups: dict[int, int] = field(default_factory=dict)  # the client's number -> ours
    owed: dict[int, int] = field(default_factory=dict)  # row bytes -> slabs asked for that didn't fit

    def registered_layout(self) -> Layout:
        if self.layout is None:
            raise ProtocolViolation("layout: register it first")
        return self.layout

    def known_engine(self) -> str:
        if not self.engine:
            raise ProtocolViolation("engine: register it first")
        return self.engine


class LocalServer:
    """Serves the clients of one host; `submit` hands events to the core, on the loop that runs `run`."""

    def __init__(
        self,
        config: Config,
        identity: Identity,
        cache: RowCache,
        submit: Callable[[Event], None],
        responses: Responses | None,
        status: Callable[[], bytes],
        metrics: Metrics,
        finder: ResponseFinder | None,
        served: Served,
        lease_ms: int = LEASE_MS,
        similar: Similar | None = None,
        audited: Callable[[ResponseAudited], None] = lambda audit: None,
    ) -> None:
        self._config = config
        self._identity = identity
        self._arena = cache.arena
        self._staging = Staging(cache, metrics)
        self._submit = submit
        self._responses = responses
        self._status = status
        self._metrics = metrics
        self._response_lookups = ResponseLookups(finder, self._send)
        self._leases = RequestLeases(self._send)
        self._served = served
        self._similar = similar
        self._audited = audited
        self._lease_s = lease_ms / 1000
        self._epoch = secrets.randbits(63)
        self._sessions: dict[bytes, _Session] = {}  # by route
        self.had_engine = False  # a session that needed the node, however short
        self._lookups: dict[int, tuple[_Session, int]] = {}
        self._numbers = count(1)
        self._drain_due = False
        self._bound: os.stat_result | None = None
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)

    @property
    def engine_leases(self) -> int:
        """Sessions that need the node; a `hyperspace status` doesn't."""
        return sum(session.role != "cli" for session in self._sessions.values())

    def bind(self) -> None:
        """Take the socket's path; OSError or ZMQError when that is impossible. Clients wait until `run`."""
        session_lock.remove_leftovers(self._config.data_dir)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a full or gone client is an error here, not a silent loss
        self._socket.setsockopt(zmq.MAXMSGSIZE, LOCAL_MESSAGE_BYTES_MAX)
        self._socket.setsockopt(zmq.SNDHWM, _QUEUED_MESSAGES_MAX)
        self._socket.setsockopt(zmq.RCVHWM, _QUEUED_MESSAGES_MAX)
        path = self._config.socket_path
        self._socket.bind(f"ipc://{path}")
        self._bound = os.stat(path)
        os.chmod(path, 0o600)  # the directory is 0700 from the start

    async def run(self) -> None:
        """Serve until cancelled; `bind` comes before."""
        self._loop = asyncio.get_running_loop()
        descriptor = self._socket.fileno()
        self._loop.add_reader(descriptor, self._drain)
        self._drain_soon()  # the descriptor signals edges, and clients may have come since `bind`
        try:
            while True:
                await asyncio.sleep(self._lease_s / 10)
                # A node that was itself paused finds heartbeats in its queue: read them before judging.
                if self._drain():
                    self._expire(self._loop.time())
                self._staging.reclaim(partial(session_lock.look, self._config.data_dir))
                for session in self._sessions.values():
                    self._grant_owed(session)
        finally:
            self._loop.remove_reader(descriptor)

    def close(self) -> None:
        """Let go of the socket, bound or not."""
        self._socket.close(linger=0)
        self._context.term()
        # Another node's, if the directory was replaced meanwhile.
        with suppress(OSError):
            if self._bound is not None and os.path.samestat(self._bound, os.stat(self._config.socket_path)):
                self._config.socket_path.unlink()

    def answer_prefix(
        self,
        lookup: int,
        end_segment: int,
        rows: tuple[LoadedRow, ...],
        source: Source,
        verified_by: str,
        reason: str,
    ) -> None:
        """Answer a lookup; one that was released meanwhile is ignored. The lease on `rows` is the lookup's."""
        session, client_lookup = self._lookups.get(lookup, (None, 0))
        if session is None:
            return
        answer = PrefixAnswer(
            client_lookup,
            end_segment,
            rows,
            source,
            verified_by[:_REASON_CHARS_MAX],
            reason[:_REASON_CHARS_MAX],
        )
        sent = self._send(session.route, answer)
        if end_segment == 0 or not sent:
            del self._lookups[lookup], session.lookups[client_lookup]
        if end_segment and not sent:
            # Not from here: the core is in the middle of the event that led to this answer.
            self._loop.call_soon(self._submit, PrefixReleased(lookup))

    def hint_response(self, lookup: int, hinted: bool) -> None:
        """Say whether some peer is known to have what the lookup wants; one that was released is ignored."""
        self._response_lookups.hint(lookup, hinted)

    def try_response(self, lookup: int, body: bytes, proof: bytes) -> None:
        """Have a response audited that isn't served, for its signer isn't trusted."""
        self._response_lookups.let_try(lookup, body, proof)

    def answer_response(self, lookup: int, found: FoundResponse | None, reason: str) -> None:
        """End a lookup; one that was released meanwhile is ignored. `reason` says why nothing was found."""
        self._response_lookups.answer(lookup, found, reason)

    def take_staged(self, staged: int) -> Slab | None:
        """The staged slab, now the caller's to keep or free; None if it is gone."""
        return self._staging.take(staged)

    def drop_staged(self, staged: int, reason: str) -> None:
        """Free a staged slab; `reason` is a metric label."""
        self._staging.drop(staged, reason)

    # --- the socket -----------------------------------------------------------------------------

    def _drain(self) -> bool:
        """Handle what has arrived; False if there may be more (then it is due again at once)."""
        self._drain_due = False
        for _ in range(_MESSAGES_PER_TURN):
            try:
                route, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return True
            self._receive(route, frames)
        self._drain_soon()
        return False

    def _drain_soon(self) -> None:
        if not self._drain_due:
            self._drain_due = True
            self._loop.call_soon(self._drain_if_open)

    def _drain_if_open(self) -> None:
        if not self._socket.closed:
            self._drain()

    def _send(self, route: bytes, message: NodeMessage) -> bool:
        try:
            self._socket.send_multipart([route, encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            return False
        # The descriptor signals edges, and sending may have consumed one.
        if int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._drain_soon()
        return True

    # --- sessions -------------------------------------------------------------------------------

    def _receive(self, route: bytes, frames: list[bytes]) -> None:
        try:
            if len(frames) != 1:
                raise ProtocolViolation(f"local message: {len(frames)} frames, expected 1")
            message = decode_client_message(frames[0])
            if isinstance(message, Hello):
                self._welcome(route, message)
            elif route not in self._sessions:
                self._send(route, LeaseLost())
            else:
                self._handle(self._sessions[route], message)
        except ProtocolViolation as error:
            self._metrics.failures_total.labels("local", "protocol").inc()
            self._send(route, Rejected(str(error)[:_REASON_CHARS_MAX]))

    def _welcome(self, route: bytes, hello: Hello) -> None:
        if hello.protocol != LOCAL_PROTOCOL:
            raise ProtocolViolation(f"protocol {hello.protocol}: this node speaks {LOCAL_PROTOCOL}")
        if route in self._sessions:
            self._end(self._sessions[route], vanished=True)
        if any(session.key == hello.session for session in self._sessions.values()):
            raise ProtocolViolation("session: in use by another connection")
        if len(self._sessions) >= CLIENTS_MAX:
            raise ProtocolViolation(f"session: {CLIENTS_MAX} clients are here already")
        welcome = Welcome(
            LOCAL_PROTOCOL,
            self._epoch,
            self._identity.peer_id,
            network_id(self._config.network),
            str(self._arena.path),
            self._arena.size,
        )
        if self._send(route, welcome):
            expires_at = self._loop.time() + self._lease_s
            self._sessions[route] = _Session(route, hello.session, hello.role, hello.name, expires_at)
            self.had_engine = self.had_engine or hello.role != "cli"
            self._metrics.clients.set(len(self._sessions))

    def _expire(self, now: float) -> None:
        for session in [s for s in self._sessions.values() if s.expires_at <= now]:
            self._end(session, vanished=True)
            self._send(session.route, LeaseLost())

    def _end(self, session: _Session, vanished: bool) -> None:
        del self._sessions[session.route]
        self._metrics.clients.set(len(self._sessions))
        for lookup in session.lookups.values():
            del self._lookups[lookup]
            self._submit(PrefixReleased(lookup))
        self._response_lookups.end(session.route)
        self._leases.end(session.route)
        self._served.ended(session.key)
        self._staging.end(session.key, vanished)
        # Without its scheduler nobody names what an engine staged; a new one starts with new requests.
        others = any(s.engine == session.engine for s in self._sessions.values())
        if session.engine and (session.role == "scheduler" or not others):
            self._submit(ClientGone(session.engine))

    # --- messages -------------------------------------------------------------------------------

    def _handle(self, session: _Session, message: ClientMessage) -> None:
        session.expires_at = self._loop.time() + self._lease_s
        match message:
            case Heartbeat():
                api_servers = sum(each.role == "api" for each in self._sessions.values())
                self._send(session.route, HeartbeatAck(self._epoch, api_servers))
            case Goodbye():
                self._end(session, vanished=False)
            case RegisterLayout(layout, engine):
                session.layout = layout
                session.engine = engine.hex() if engine != NO_ENGINE else ""
                self._served.fingerprint(session.key, layout.fingerprint)
            case WantStaging():
                self._grant(session, message)
            case RowStaged():
                self._accept(session, message)
            case StagingUnused(slab):
                self._staging.give_back(session.key, slab)
            case SegmentNamed(request_id, segment, segment_key, scope):
                self._submit(
                    SegmentKeyKnown(
                        session.known_engine(),
                        request_id,
                        segment,
                        SegmentKey(segment_key),
                        session.registered_layout(),
                        scope != "private",
                    )
                )
            case RequestEnded(request_id):
                if session.engine:
                    self._submit(RequestOver(session.engine, request_id))
            case LookupPrefix():
                self._look_up(session, message)
            case ReleaseLookup(lookup):
                self._release(session, lookup)
            case PrefixesInMemory():
                self._served.prefixes(session.key, message)
            case StoreResponse():
                self._served.model(session.key, message.model_digest)
                reach = self._config.share if message.scope == "network" else message.scope
                message = msgspec.structs.replace(message, scope=reach)
                if self._similar is not None and message.question is not None:
                    self._similar.remember(message)
                elif self._responses is not None:
                    self._responses.store(message)
                self._leases.over(session.route, message.request_key)
            case TouchResponses(request_keys):
                if self._responses is not None:
                    self._responses.touch(request_keys)
            case PurgeResponses(request_keys):
                if self._responses is not None:
                    self._responses.purge(request_keys)
                self._response_lookups.purge(request_keys)
            case ResponseAudited():
                self._audited(message)
                if message.far:
                    self._response_lookups.purge((message.request_key,))
            case ClaimRequest():
                self._leases.claim(session.route, message)
            case RequestDone(request_key):
                self._leases.over(session.route, request_key)
            case FindSimilar():
                self._find_similar(session.route, message)
            case SimilarChecked():
                if self._similar is not None:
                    self._similar.check(message)
            case RememberQuestion():
                if self._similar is not None:
                    self._similar.remember_question(message)
            case FindResponse():
                self._served.model(session.key, message.model_digest)
                self._response_lookups.find(session.route, message)
            case ReleaseResponse(lookup):
                self._response_lookups.release(session.route, lookup)
            case GetStatus():
                self._send(session.route, Status(self._status()))
            case Hello():
                raise AssertionError("handled before")
            case _:
                assert_never(message)

    def _find_similar(self, route: bytes, want: FindSimilar) -> None:
        if self._similar is None:
            self._send(route, SimilarNotFound(want.lookup, "off"))
            return

        def answer(found: SimilarFound | SimilarNotFound) -> None:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._send, route, found)

        self._similar.find(want, answer)

    def _grant(self, session: _Session, want: WantStaging) -> None:
        layout = session.registered_layout()
        if all(part.row_bytes != want.row_bytes for part in layout.parts):
            raise ProtocolViolation(f"row_bytes {want.row_bytes}: no part of the layout has such rows")
        wanted = want.count if self._config.kv_cache else 0
        slabs = self._staging.grant(session.key, want.row_bytes, wanted, layout)
        if not self._send(session.route, StagingGranted(want.row_bytes, slabs)):
            for slab in slabs:
                self._staging.give_back(session.key, slab)
        session.owed[want.row_bytes] = wanted - len(slabs)

    def _grant_owed(self, session: _Session) -> None:
        """Grant what didn't fit when the session asked: else the next prompt would find the slabs of a busy moment."""
        for row_bytes, wanted in session.owed.items():
            slabs = self._staging.grant(session.key, row_bytes, wanted, session.registered_layout())
            if slabs and not self._send(session.route, StagingGranted(row_bytes, slabs)):
                for slab in slabs:
                    self._staging.give_back(session.key, slab)
                continue
            session.owed[row_bytes] = wanted - len(slabs)

    def _accept(self, session: _Session, row: RowStaged) -> None:
        layout, engine = session.registered_layout(), session.known_engine()
        if row.part >= len(layout.parts) or row.rank >= layout.ranks:
            raise ProtocolViolation(f"row part {row.part} rank {row.rank}: the layout has no such row")
        if row.slab.length != layout.parts[row.part].row_bytes:
            raise ProtocolViolation(f"row length {row.slab.length}: not that of part {row.part}")
        staged = self._staging.accept(session.key, row.slab)
        self._submit(
            RowArrived(
                engine,
                row.request_id,
                row.segment,
                row.part,
                row.rank,
                staged,
                row.slab.length,
                layout,
            )
        )

    def _look_up(self, session: _Session, want: LookupPrefix) -> None:
        layout = session.registered_layout()
        if want.lookup in session.lookups:
            raise ProtocolViolation(f"lookup {want.lookup}: under way already")
        if len(session.lookups) >= LOOKUPS_PER_CLIENT_MAX or not self._config.kv_cache:
            reason = "busy" if self._config.kv_cache else "off"
            self._send(session.route, PrefixAnswer(want.lookup, 0, (), "none", "", reason))
            return
        lookup = next(self._numbers)
        session.lookups[want.lookup] = lookup
        self._lookups[lookup] = (session, want.lookup)
        self._submit(
            PrefixWanted(
                lookup,
                layout,
                tuple(SegmentKey(key) for key in want.segment_keys),
                want.start_token,
                want.prefill_ms,
                want.deadline_ms,
                want.scope != "private",
            )
        )

    def _release(self, session: _Session, client_lookup: int) -> None:
        # Unknown is fine: a miss ends by itself, and its answer may have crossed the release.
        lookup = session.lookups.pop(client_lookup, None)
        if lookup is not None:
            del self._lookups[lookup]
            self._submit(PrefixReleased(lookup))
