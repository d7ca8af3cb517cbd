"""The ids of one client's answer, put into what was stored or is computed for another (core/response/answer_ids.py)."""

import secrets
from typing import Any

import msgspec

from ..core.response.answer_ids import answer_id, rename_event, with_ids
from ..core.response.request_fields import Endpoint

_FRESH_DIGITS = 16  # as vLLM's random_uuid
_MARKS = b'"id":"', b'"signature":"'  # of ids inside; in a string the quotes are escaped


class OwnIds:
    """`answer` is the id of the whole; others are drawn as they are met, the same for the same old one."""

    def __init__(self, endpoint: Endpoint, named: str | None) -> None:
        self.answer = answer_id(endpoint, named, secrets.token_hex(_FRESH_DIGITS // 2))
        self._drawn: dict[str, str] = {}

    def body(self, stored: bytes) -> bytes:
        """The JSON answer of a stored one; raises as `decoded` does."""
        if any(mark in stored for mark in _MARKS):
            return msgspec.json.encode(self.decoded(stored))
        return b'{"id":' + msgspec.json.encode(self.answer) + b"," + stored[1:]

    def decoded(self, answer: bytes) -> dict[str, Any]:
        """The same as an object, and of an answer that vLLM gave to another client; ValueError if it isn't JSON."""
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
