"""One computation for concurrent identical requests.

A *flight* runs the application once, independently of every client, and keeps its messages in a log. Each client,
including the first, reads the log at its own pace. So a disconnect or slow reading of the first client does not affect
the others, and the application sees a disconnect when the last reader has left.

Bounds: the application runs at most FLIGHT_WINDOW_BYTES ahead of its fastest reader (with one reader that is the usual
flow control). A log that grows beyond FLIGHT_BYTES_MAX takes no more readers and drops what all have read. Readers that
are that far behind may delay the others for LAGGARD_S of a flight's time in all, and are then cut off.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from starlette.types import ASGIApp, Message, Scope

from ..contained import report_error
from ..core.records.limits import (
    FLIGHT_BYTES_MAX,
    FLIGHT_WINDOW_BYTES,
    FLIGHTS_BYTES_MAX,
    FLIGHTS_MAX,
    RESPONSE_BYTES_MAX,
)
from .http_headers import header
from .large_bodies import LargeBodies
from .streams.collect import FrameKind
from .streams.frames import Collector

T = TypeVar("T")

logger = logging.getLogger(__name__)

LAGGARD_S = 10.0
ABANDONED_GRACE_S = 5.0  # for an application to end by itself after a disconnect


class LeaderFailed(Exception):
    """The computation ended without a complete answer that this reader could use."""


class Laggard(Exception):
    """This reader delayed the others for too long."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What the application sent: the start of the response (`start`), or some of its body."""

    body: bytes
    kind: FrameKind = "other"
    start: Message | None = None


@dataclass(eq=False)
class Reader:
    """One client's place in a flight's log; `bytes_read` counts from the flight's start."""

    flight: "Flight"
    position: int = 0
    bytes_read: int = 0
    gone: bool = False
    cut_off: bool = False
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    async def next(self, deadline_s: float | None = None) -> Piece | None:
        """The next piece; None after the last one, or once this reader's client has gone.

        `LeaderFailed` when the application failed or `deadline_s` passed, `Laggard` when this reader was cut off.
        """
        while not self.gone:
            if self.cut_off:
                raise Laggard
            piece = self.flight.read(self)
            if piece is not None:
                return piece
            if self.flight.complete:
                return None
            if self.flight.ended:
                raise LeaderFailed from self.flight.error
            self.wake.clear()
            try:
                async with asyncio.timeout(deadline_s):
                    await self.wake.wait()
            except TimeoutError as error:
                raise LeaderFailed from error
        return None

    def leave(self) -> None:
        """The client has gone, or needs no more."""
        self.gone = True
        self.wake.set()
        self.flight.leave(self)


class Flight:
    """One run of the application.

    `collector` sees every frame of a streamed 200 response; `body` gathers one that is not a stream. `on_end` is run
    once, when the last byte has been sent or never will be. `from_cache` is set by an application that answers with a
    stored response, whose headers say so already. What takes time by the size of an answer goes through `bodies`.
    """

    def __init__(
        self, bodies: LargeBodies, collector: Collector | None, table: "FlightTable | None" = None, key: object = None
    ) -> None:
        self.bodies = bodies
        self.collector = collector
        self.on_end: Callable[[], Coroutine[Any, Any, None]] | None = None
        self.complete = False
        self.ended = False
        self.error: BaseException | None = None
        self.status = 0
        self.body = bytearray()
        self.streams = False
        self.from_cache = False
        self._table = table
        self._key = key
        self._log: deque[Piece] = deque()
        self._first = 0  # position of _log[0]
        self._bytes = 0  # sent so far
        self._dropped_bytes = 0
        self._patience_s = LAGGARD_S
        self._readers: set[Reader] = set()
        self._partial = b""
        self._moved = asyncio.Event()
        self._abandoned = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._shared: asyncio.Task[Any] | None = None
        self._ending: asyncio.Task[None] | None = None

    def start(self, app: ASGIApp, scope: Scope, request_body: bytes) -> None:
        """Run the application on a request whose body has been read."""
        silent = drops_silently(scope)
        requests: list[Message] = [{"type": "http.request", "body": request_body, "more_body": False}]

        async def receive() -> Message:
            if requests:
                return requests.pop()
            await self._abandoned.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if not self._abandoned.is_set():
                await self._take(message)
            elif not silent:
                raise OSError("client disconnected")

        async def run() -> None:
            await app(scope, receive, send)

        self._task = asyncio.create_task(run(), name="hyperspace-flight")
        self._task.add_done_callback(self._finished)

    @property
    def readers(self) -> int:
        """How many requests read this flight."""
        return len(self._readers)

    async def shared(self, size: int, work: Callable[[], T]) -> T:
        """The result of `work` on the whole answer (`size` bytes): the first reader's result serves all of them."""
        if self._shared is None:
            self._shared = asyncio.create_task(self.bodies.in_turn(size, work), name="hyperspace-shared-answer")
            self._shared.add_done_callback(_retrieve_exception)
        made: T = await asyncio.shield(self._shared)
        return made

    def join(self) -> Reader:
        """A reader of the whole log."""
        assert self._first == 0
        reader = Reader(self)
        self._readers.add(reader)
        return reader

    def leave(self, reader: Reader) -> None:
        """When the last reader leaves an unfinished flight, the application sees its client disconnect."""
        self._readers.discard(reader)
        self._moved.set()
        if self._readers or self.ended or self._abandoned.is_set():
            return
        self.close()
        self._abandoned.set()
        if self._task is not None and not self.complete:
            asyncio.get_running_loop().call_later(ABANDONED_GRACE_S, self._task.cancel)

    def read(self, reader: Reader) -> Piece | None:
        """The piece at the reader's position, if it has been sent."""
        at = reader.position - self._first
        if at >= len(self._log):
            return None
        piece = self._log[at]
        reader.position += 1
        reader.bytes_read += len(piece.body)
        self._moved.set()
        if self._table is None:
            self._drop_read()
        return piece

    def close(self) -> None:
        """Take no more readers, and keep only what those here have not read."""
        if self._table is not None:
            self._table.remove(self._key, self)
            self._table.bytes -= self._bytes - self._dropped_bytes
            self._table = None
            self._drop_read()

    async def _take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            content_type = header(message.get("headers", ()), b"content-type") or ""
            self.streams = self.status == 200 and content_type.startswith("text/event-stream")
            self._append(Piece(b"", start=message))
        elif message["type"] == "http.response.body":
            last = not message.get("more_body", False)
            await self._append_body(bytes(message.get("body", b"")), last)
            self.complete = self.complete or last
        self._wake_readers()
        if self.complete:
            self._end()
        await self._flow_control()

    async def _append_body(self, body: bytes, last: bool) -> None:
        if not self.streams:
            if self.collector is not None and self.status == 200 and len(self.body) <= RESPONSE_BYTES_MAX:
                self.body += body
            self._append(Piece(body))
            return
        *frames, self._partial = (self._partial + body).split(b"\n\n")
        for frame in frames:
            whole = frame + b"\n\n"
            self._append(Piece(whole, await self._kind(whole)))
        if self._partial and (last or len(self._partial) > FLIGHT_BYTES_MAX):
            rest, self._partial = self._partial, b""
            self._append(Piece(rest))
            await self._kind(rest)

    async def _kind(self, frame: bytes) -> FrameKind:
        """Shows a frame to the collector, which must not break the stream: without it nothing is stored."""
        if self.collector is None:
            return "other"
        try:
            return await self.bodies.in_turn(len(frame), partial(self.collector.feed, frame))
        except Exception:
            report_error("a collector of frames")
            self.collector = None
            return "other"

    def _append(self, piece: Piece) -> None:
        self._log.append(piece)
        self._bytes += len(piece.body)
        if self._table is not None:
            self._table.bytes += len(piece.body)
            if self._bytes > FLIGHT_BYTES_MAX or self._table.bytes > FLIGHTS_BYTES_MAX:
                self.close()

    def _drop_read(self) -> None:
        slowest = min((reader.position for reader in self._readers), default=self._first + len(self._log))
        while self._first < slowest:
            self._dropped_bytes += len(self._log.popleft().body)
            self._first += 1

    async def _flow_control(self) -> None:
        loop = asyncio.get_running_loop()
        while self._readers and not self.complete:
            behind = [self._bytes - reader.bytes_read for reader in self._readers]
            held_up = max(behind) > FLIGHT_BYTES_MAX and len(behind) > 1
            if min(behind) <= FLIGHT_WINDOW_BYTES and not held_up:
                return
            self._moved.clear()
            began_s = loop.time()
            try:
                async with asyncio.timeout(self._patience_s if held_up else None):
                    await self._moved.wait()
            except TimeoutError:
                self._cut_off_laggards()
            finally:
                if held_up:  # a reader that takes a little now and then gets no more of it
                    self._patience_s = max(self._patience_s - (loop.time() - began_s), 0.0)

    def _cut_off_laggards(self) -> None:
        for reader in list(self._readers):
            if self._bytes - reader.bytes_read > FLIGHT_BYTES_MAX:
                reader.cut_off = True
                reader.wake.set()
                self._readers.discard(reader)
        self._drop_read()

    def _finished(self, task: asyncio.Task[None]) -> None:
        self.ended = True
        self.error = None if task.cancelled() else task.exception()
        if self.error is not None and not self._readers:
            logger.error("a request failed after its clients had left", exc_info=self.error)
        self.close()
        self._wake_readers()
        self._end()

    def _end(self) -> None:
        callback, self.on_end = self.on_end, None
        if callback is not None:
            # Behind the readers in the loop's queue: they get their last frame before anything is stored.
            self._ending = asyncio.create_task(callback(), name="hyperspace-answer-ended")

    def _wake_readers(self) -> None:
        for reader in self._readers:
            reader.wake.set()


class FlightTable:
    """The flights that a request may join, by their shared key. Bounded in number and bytes."""

    def __init__(self, bodies: LargeBodies) -> None:
        self.bytes = 0
        self._bodies = bodies
        self._flights: dict[object, Flight] = {}

    def find(self, key: object) -> Flight | None:
        """A flight that is under way and still has its whole log."""
        return self._flights.get(key)

    def open(self, key: object, collector: Collector | None) -> Flight:
        """A flight that other requests may join, or a separate one without a key or if there are too many."""
        if key is None or len(self._flights) >= FLIGHTS_MAX or key in self._flights:
            return Flight(self._bodies, collector)
        flight = self._flights[key] = Flight(self._bodies, collector, self, key)
        return flight

    @property
    def readers(self) -> int:
        """How many requests share the flights that can be joined."""
        return sum(flight.readers for flight in self._flights.values())

    def remove(self, key: object, flight: Flight) -> None:
        """The flight takes no more readers."""
        if self._flights.get(key) is flight:
            del self._flights[key]


def _retrieve_exception(task: asyncio.Task[Any]) -> None:
    """An error of work that no reader waits for any more is not logged."""
    if not task.cancelled():
        task.exception()


def drops_silently(scope: Scope) -> bool:
    """How the server treats sends to a client that has gone: it drops them, or (from ASGI 2.4 on) raises OSError."""
    version = scope.get("asgi", {}).get("spec_version", "2.0")
    return tuple(int(part) for part in version.split(".")) < (2, 4)
