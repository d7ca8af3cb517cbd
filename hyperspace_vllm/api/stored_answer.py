"""From a stored response to the ASGI messages that answer a request with it."""

import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from ..core.records.errors import ProtocolViolation
from ..core.records.ids import sha256
from ..core.records.local import ResponseFound
from ..core.response.admission import Admitted, admit
from ..core.response.cache_proof import decode_proof
from ..core.response.request_fields import Endpoint
from ..response_db import StoredResponse
from .coalesce import Message
from .http_headers import RawHeaders, hit_headers, quoted
from .streams import frames

_MESSAGE_BYTES = 65_536
_EVENT_STREAM = (b"content-type", b"text/event-stream; charset=utf-8")  # as Starlette writes it


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """A response as its request wanted it: `headers` of a 200, and the body in the parts to send."""

    headers: RawHeaders
    parts: list[bytes]

    def with_status(self, status: bytes) -> "StoredAnswer":
        """The same with another Cache-Status."""
        others = [(name, value) for name, value in self.headers if name != b"cache-status"]
        return StoredAnswer([*others, (b"cache-status", status)], self.parts)

    def messages(self) -> Iterable[Message]:
        """The whole answer, from its start to its last part."""
        yield {"type": "http.response.start", "status": 200, "headers": self.headers}
        for at, part in enumerate(self.parts):
            yield {"type": "http.response.body", "body": part, "more_body": at + 1 < len(self.parts)}


@dataclass(frozen=True, slots=True)
class Wanted:
    """How a request wants to be answered; `usage`: its stream has a usage frame at the end.

    `repeated` are fields of the request that the answer repeats (Responses), and that were not stored.
    """

    endpoint: Endpoint
    streams: bool
    usage: bool
    repeated: Mapping[str, object]


def render(entry: StoredResponse, wanted: Wanted, age_s: int, ttl_s: int, detail: str) -> StoredAnswer | None:
    """The answer from an entry, or None when its body has another version's shape."""
    headers = hit_headers(age_s, ttl_s, base64.b64encode(entry.proof), detail)
    if not (wanted.streams or wanted.repeated):
        return StoredAnswer(headers + json_headers(entry.body), [entry.body])
    try:
        stored = {**msgspec.json.decode(entry.body), **wanted.repeated}
        if not wanted.streams:
            body = msgspec.json.encode(stored)
            return StoredAnswer(headers + json_headers(body), [body])
        parts = _grouped(frames(wanted.endpoint, stored, wanted.usage))
    except (msgspec.MsgspecError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return None
    return StoredAnswer([*headers, _EVENT_STREAM], parts)


def entry_of(
    found: ResponseFound, endpoint: Endpoint, request: dict[str, object], now_ms: int
) -> StoredResponse | None:
    """What the network found, if it is what its proof speaks of, fresh, and an answer to such a request.

    The node has checked the proof; a peer that may sign could still have signed anything.
    """
    try:
        intact = decode_proof(found.proof).response_hash == sha256(found.body)
    except ProtocolViolation:
        return None
    if not intact or found.expires_at_ms <= now_ms or admit(endpoint, request, found.body) != Admitted(found.body):
        return None
    return StoredResponse(found.body, found.proof, found.computed_at_ms, found.expires_at_ms)


def origin_header(found: ResponseFound) -> tuple[bytes, bytes]:
    """Says who computed an answer from the network, how its provider was found, and what was checked."""
    fields = ("computed-by", found.computed_by), ("source", found.source), ("verified-by", found.verified_by)
    return b"hyperspace-origin", "; ".join(f"{name}={quoted(value)}" for name, value in fields).encode()


def json_headers(body: bytes) -> RawHeaders:
    """Of a JSON body."""
    return [(b"content-length", str(len(body)).encode()), (b"content-type", b"application/json")]


def _grouped(parts: Iterable[bytes]) -> list[bytes]:
    """The frames in as few messages as their size allows."""
    groups = [bytearray()]
    for part in parts:
        if len(groups[-1]) + len(part) > _MESSAGE_BYTES and groups[-1]:
            groups.append(bytearray())
        groups[-1] += part
    return [bytes(group) for group in groups]
