"""The ids of one client's answer, put into an answer that was stored or is computed for another client.

See core/response/answer_ids.py.
"""

import secrets
from dataclasses import dataclass
from typing import Any

import msgspec

from ..core.response.answer_ids import answer_id, rename_event, with_ids, without_ids
from ..core.response.request_fields import Endpoint

_FRESH_DIGITS = 16  # as vLLM's random_uuid
_MARKS = b'"id":"', b'"signature":"'  # of ids inside; in a string the quotes are escaped


@dataclass(frozen=True, slots=True)
class Nameless:
    """The JSON of an answer without its id and its first brace; `has_ids`: there are others inside."""

    members: bytes
    has_ids: bool


def nameless(answer: bytes | bytearray) -> Nameless:
    """An answer that vLLM gave to another client, as `OwnIds.named` takes it; ValueError if it isn't a JSON object."""
    body = msgspec.json.encode(without_ids(msgspec.json.decode(answer, type=dict[str, Any])))
    return Nameless(body[1:], _has_ids(body))


class OwnIds:
    """`answer` is the id of the whole answer; ids inside are drawn on demand, the same for the same old id."""

    def __init__(self, endpoint: Endpoint, named: str | None) -> None:
        self.answer = answer_id(endpoint, named, secrets.token_hex(_FRESH_DIGITS // 2))
        self._drawn: dict[str, str] = {}

    def body(self, stored: bytes) -> bytes:
        """The JSON answer of a stored one; raises as `decoded` does."""
        return b"".join(self.named(Nameless(stored[1:], _has_ids(stored))))

    def named(self, answer: Nameless) -> list[bytes]:
        """The same in parts, the last of which all clients share unless there are ids inside."""
        if answer.has_ids or answer.members == b"}":
            return [msgspec.json.encode(self.decoded(b"{" + answer.members))]
        return [b'{"id":' + msgspec.json.encode(self.answer) + b",", answer.members]

    def decoded(self, answer: bytes) -> dict[str, Any]:
        """The same as an object; ValueError if it isn't JSON."""
        return with_ids(msgspec.json.decode(answer, type=dict[str, Any]), self.answer, self._fresh)

    def frame(self, frame: bytes) -> bytes:
        """A frame of a stream that vLLM sends to another client, as it is sent to this one."""
        head, data, payload = frame.partition(b"data:")
        try:
            event = msgspec.json.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return frame  # [DONE], or a comment
        if not isinstance(event, dict):
            return frame
        rename_event(event, self.answer, self._fresh)
        return head + data + b" " + msgspec.json.encode(event) + b"\n\n"

    def _fresh(self, old: str, digits: int) -> str:
        return self._drawn.setdefault(old, secrets.token_hex(16))[:digits]


def _has_ids(stored: bytes) -> bool:
    return any(mark in stored for mark in _MARKS)
