"""From a flight's log to one client."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.types import Message, Receive, Send

from .coalesce import LeaderFailed, Piece, Reader
from .http_headers import RawHeaders
from .own_ids import OwnIds, nameless
from .request_body import with_content_length
from .stored_answer import StoredAnswer
from .streams.replay import fingerprint_of, with_fingerprint

_ERROR_FRAMES = b'data: {"error"', b"event: error", b"event: response.failed"


class Relay:
    """Passes on a flight's messages. `strips_usage` removes a usage frame that the client did not ask for."""

    def __init__(self, reader: Reader, send: Send, status: bytes, strips_usage: bool) -> None:
        self.reader = reader
        self.started = False
        self._send = send
        self._status = status
        self._strips_usage = strips_usage
        self._finish: bytes | None = None
        self._ended = False

    async def lead(self, failed_status: bytes) -> StoredAnswer | None:
        """Pass everything on as it comes; `failed_status` replaces the Cache-Status of anything but a 200.

        A JSON answer from the cache is returned instead.
        """
        flight, start, parts = self.reader.flight, None, list[bytes]()
        while (piece := await self.reader.next()) is not None:
            if piece.start is not None and piece.start["status"] != 200:
                self._status = failed_status
            if not flight.from_cache or flight.streams:
                await self._give(piece)
            elif piece.start is not None:
                start = piece.start
            else:
                parts.append(piece.body)
        if start is not None and not self.reader.gone:
            return self._whole(start, parts)
        await self._end()
        return None

    async def follow(self, deadline_s: float, started_deadline_s: float, ids: OwnIds) -> StoredAnswer | None:
        """Pass on a good stream under this client's own ids, or return a good JSON answer.

        Nothing is sent before its first frame (a JSON body: all of it) is there: until then the request can be computed
        instead. `LeaderFailed` for an answer that may have failed because of the leader's request, or that stops for
        `deadline_s`; `started_deadline_s` once the client has part of it.
        """
        start: Piece | None = None
        parts: list[bytes] = []
        bodies = self.reader.flight.bodies
        while (piece := await self.reader.next(started_deadline_s if self.started else deadline_s)) is not None:
            if piece.start is not None:
                start = piece
                if piece.start["status"] != 200:
                    raise LeaderFailed
                continue
            if not self.reader.flight.streams:
                parts.append(piece.body)
                continue
            if start is not None:
                if piece.body.startswith(_ERROR_FRAMES):
                    raise LeaderFailed
                await self._give(start)
                start = None
            await self._give(replace(piece, body=await bodies.in_turn(len(piece.body), partial(ids.frame, piece.body))))
        if start is not None and not self.reader.gone:
            try:
                async with asyncio.timeout(deadline_s):
                    own = await self._own(parts, ids)
            except (TimeoutError, ValueError, RecursionError):
                raise LeaderFailed from None
            return None if self.reader.gone or start.start is None else self._whole(start.start, own)
        await self._end()
        return None

    async def _own(self, parts: list[bytes], ids: OwnIds) -> list[bytes]:
        """A JSON answer under `ids`: read once for all readers, however many there are, and all of them share it."""
        flight = self.reader.flight
        answer = await flight.shared(sum(map(len, parts)), lambda: nameless(b"".join(parts)))
        name = partial(ids.named, answer)
        return await flight.bodies.in_turn(len(answer.members), name) if answer.has_ids else name()

    def _whole(self, start: Message, parts: list[bytes]) -> StoredAnswer:
        sized = with_content_length({"headers": (), **start}, sum(map(len, parts)))
        return StoredAnswer(self._headers(sized), parts)

    def _headers(self, start: Mapping[str, Any]) -> RawHeaders:
        headers = list(start.get("headers", ()))
        return headers if self.reader.flight.from_cache else [*headers, (b"cache-status", self._status)]

    async def _give(self, piece: Piece) -> None:
        if piece.start is not None:
            self.started = True
            await self._send({**piece.start, "headers": self._headers(piece.start)})
            return
        if self._strips_usage and piece.kind == "usage":
            fingerprint = fingerprint_of(piece.body)
            if (finish := self._finish) is not None and fingerprint is not None:
                add = partial(with_fingerprint, finish, fingerprint)
                self._finish = await self.reader.flight.bodies.in_turn(len(finish), add)
            return
        await self._give_finish()
        if self._strips_usage and piece.kind == "finish":
            # Without usage the system fingerprint would be in this frame; it comes with the next one, at once.
            self._finish = piece.body
        else:
            # A server waits for the client before it takes what follows a long body, so JSON ends with its body.
            self._ended = not self.reader.flight.streams and self.reader.at_end
            await self._send({"type": "http.response.body", "body": piece.body, "more_body": not self._ended})

    async def _give_finish(self) -> None:
        finish, self._finish = self._finish, None
        if finish is not None:
            await self._send({"type": "http.response.body", "body": finish, "more_body": True})

    async def _end(self) -> None:
        if not self.reader.gone and not self._ended:
            await self._give_finish()
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})


@asynccontextmanager
async def leaving_on_disconnect(receive: Receive, reader: Reader) -> AsyncIterator[None]:
    """While inside, the client's disconnect makes `reader` leave; so does the end."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        reader.leave()

    watcher = asyncio.create_task(watch(), name="hyperspace-disconnect")
    try:
        yield
    finally:
        watcher.cancel()
        reader.leave()
