"""From a stored response to the ASGI messages that answer a request with it."""

import base64
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import msgspec
from starlette.types import Message

from ..core.local.response_cache_messages import ResponseFound
from ..core.records.errors import ProtocolViolation
from ..core.records.ids import sha256
from ..core.records.limits import REPLAY_BYTES_MAX, SENDING_BYTES_MAX
from ..core.response.admission import Admitted, admit
from ..core.response.cache_proof import decode_proof
from ..core.response.request_fields import Endpoint
from ..response_db import StoredResponse
from .http_headers import RawHeaders, hit_headers, quoted
from .own_ids import OwnIds
from .streams.frames import frames

_MESSAGE_BYTES = 65_536
_EVENT_STREAM = (b"content-type", b"text/event-stream; charset=utf-8")  # as Starlette writes it


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """A response as its request wanted it: `headers` of a 200, and the body in parts, which answers may share."""

    headers: RawHeaders
    parts: list[bytes]

    @property
    def size(self) -> int:
        """Bytes of the body."""
        return sum(map(len, self.parts))

    def with_status(self, status: bytes) -> "StoredAnswer":
        """The same with another Cache-Status."""
        others = [(name, value) for name, value in self.headers if name != b"cache-status"]
        return replace(self, headers=[*others, (b"cache-status", status)])

    def messages(self, sending: "Sending") -> Iterator[Message]:
        """The answer for a client, in pieces: uvicorn waits for the client before each of them, but not after the last.

        A piece is a copy: what uvicorn has not sent yet must not keep a whole part in memory.
        """
        return self._messages(sending, _pieces(self.parts))

    def whole(self, sending: "Sending") -> Iterator[Message]:
        """The answer for a flight, a part in each message: its clients get the parts, not copies of them."""
        return self._messages(sending, self.parts)

    def _messages(self, sending: "Sending", bodies: Iterable[bytes]) -> Iterator[Message]:
        with sending.holding(self.parts):
            yield {"type": "http.response.start", "status": 200, "headers": self.headers}
            left = self.size
            for body in bodies:
                left -= len(body)
                yield {"type": "http.response.body", "body": body, "more_body": left > 0}


class Sending:
    """The memory of the cache's answers while clients read them: SENDING_BYTES_MAX in all.

    A part that several answers share counts once. Answers that add one piece at most are not held to it: vLLM's own
    connections have buffers of that size.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._senders: Counter[int] = Counter()  # of each part, by its identity

    def has_room(self, answer: StoredAnswer) -> bool:
        """Whether there is room for one more."""
        added = sum(len(part) for part in answer.parts if id(part) not in self._senders)
        return added <= _MESSAGE_BYTES or self.bytes + added <= SENDING_BYTES_MAX

    @contextmanager
    def holding(self, parts: Sequence[bytes]) -> Iterator[None]:
        """While an answer is sent."""
        for part in parts:
            self.bytes += 0 if self._senders[id(part)] else len(part)
            self._senders[id(part)] += 1
        try:
            yield
        finally:
            for part in parts:
                self._senders[id(part)] -= 1
                if not self._senders[id(part)]:
                    del self._senders[id(part)]
                    self.bytes -= len(part)


@dataclass(frozen=True, slots=True)
class Wanted:
    """How a request wants to be answered; `usage`: its stream has a usage frame at the end.

    `repeated` are fields of the request that the answer repeats (Responses), and that were not stored.
    """

    endpoint: Endpoint
    streams: bool
    usage: bool
    repeated: Mapping[str, object]
    ids: OwnIds


def render(entry: StoredResponse, wanted: Wanted, age_s: int, ttl_s: int, detail: str) -> StoredAnswer | None:
    """The answer from an entry; None when its body has another version's shape, or its stream would be too long."""
    headers = hit_headers(age_s, ttl_s, base64.b64encode(entry.proof), detail)
    try:
        if not wanted.streams:
            ids, repeated = wanted.ids, wanted.repeated
            body = msgspec.json.encode({**ids.decoded(entry.body), **repeated}) if repeated else ids.body(entry.body)
            return StoredAnswer(headers + json_headers(body), [body])
        answer = {**wanted.ids.decoded(entry.body), **wanted.repeated}
        parts = _grouped(frames(wanted.endpoint, answer, wanted.usage))
    except (msgspec.MsgspecError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return None
    return StoredAnswer([*headers, _EVENT_STREAM], parts)


def entry_of(
    found: ResponseFound, endpoint: Endpoint, request: dict[str, object], now_ms: int, ttl_ms: int
) -> StoredResponse | None:
    """The network's response as an entry, if it is what its proof states, fresh, and an answer to such a request.

    It expires `ttl_ms` after it was computed, which may be in the past.

    The node has checked the proof; but a trusted peer could have signed any body.
    """
    try:
        intact = decode_proof(found.proof).response_hash == sha256(found.body)
    except ProtocolViolation:
        return None
    if not intact or found.expires_at_ms <= now_ms or admit(endpoint, request, found.body) != Admitted(found.body):
        return None
    expires_at_ms = min(found.expires_at_ms, found.computed_at_ms + ttl_ms)
    return StoredResponse(found.body, found.proof, found.computed_at_ms, expires_at_ms)


def origin_header(found: ResponseFound) -> tuple[bytes, bytes]:
    """The header with the node that computed the answer, how its provider was found, and which checks it passed."""
    fields = ("computed-by", found.computed_by), ("source", found.source), ("verified-by", found.verified_by)
    return b"hyperspace-origin", "; ".join(f"{name}={quoted(value)}" for name, value in fields).encode()


def json_headers(body: bytes) -> RawHeaders:
    """Of a JSON body."""
    return [(b"content-length", str(len(body)).encode()), (b"content-type", b"application/json")]


def _pieces(parts: Sequence[bytes]) -> Iterator[bytes]:
    """The body in pieces of _MESSAGE_BYTES; one if that is enough."""
    if sum(map(len, parts)) <= _MESSAGE_BYTES:
        yield b"".join(parts)
        return
    for part in parts:
        for at in range(0, len(part), _MESSAGE_BYTES):
            yield part[at : at + _MESSAGE_BYTES]


def _grouped(parts: Iterable[bytes]) -> list[bytes]:
    """The frames, in as few messages as their size allows."""
    groups = [bytearray()]
    size = 0
    for part in parts:
        size += len(part)
        if size > REPLAY_BYTES_MAX:
            raise ValueError(f"a stream of more than {REPLAY_BYTES_MAX} bytes")
        if len(groups[-1]) + len(part) > _MESSAGE_BYTES and groups[-1]:
            groups.append(bytearray())
        groups[-1] += part
    return [bytes(group) for group in groups]
