"""Anthropic's Messages: from the events of a stream to the JSON body, and back, as vLLM 0.32 shapes both.

https://docs.anthropic.com/en/api/messages-streaming. Fails closed as `collect` does: an unknown event, block or field
makes the stream not storable.
"""

from collections.abc import Iterator
from typing import Any

import msgspec

from ...core.records.limits import RESPONSE_BYTES_MAX
from ...core.response.admission import NotStored
from .collect import FrameKind

Json = dict[str, Any]

_TEXT_CHARS_PER_EVENT = 4096
_STREAMED = {  # kind of block -> (kind of its deltas, where they hold their piece, where the block holds the whole)
    "text": ("text_delta", "text", "text"),
    "thinking": ("thinking_delta", "thinking", "thinking"),
    "tool_use": ("input_json_delta", "partial_json", "input"),
}
_BLOCK_FIELDS = frozenset(("type", "text", "thinking", "id", "name", "input"))


class _Unstorable(Exception):
    pass


class MessagesCollector:
    """Takes events in the order in which they are sent; per request."""

    def __init__(self) -> None:
        self._message: Json | None = None
        self._blocks: list[Json] = []
        self._pieces: list[list[str]] = []
        self._open: int | None = None
        self._end: Json | None = None
        self._bytes = 0
        self._failure: str | None = None
        self._done = False

    def feed(self, frame: bytes) -> FrameKind:
        """Take in one `event: …` frame; the kind of all of them is "other"."""
        self._bytes += len(frame)
        if self._failure is None:
            try:
                if self._bytes > 2 * RESPONSE_BYTES_MAX:  # an event's envelope is as long as a word's text
                    raise _Unstorable("too_large")
                self._take(_event(frame))
            except _Unstorable as reason:
                self._failure = str(reason)
                self._blocks.clear()
                self._pieces.clear()
        return "other"

    @property
    def size(self) -> int:
        """Characters of all blocks."""
        return sum(len(piece) for pieces in self._pieces for piece in pieces)

    def result(self) -> bytes | NotStored:
        """The JSON body, if the stream ended with message_stop and all of it was understood."""
        if self._failure is not None:
            return NotStored(self._failure)
        if not self._done or self._message is None or self._end is None:
            return NotStored("unfinished")
        try:
            content = [_whole(*each) for each in zip(self._blocks, self._pieces, strict=True)]
        except _Unstorable as reason:
            return NotStored(str(reason))
        # In vLLM's order, without nulls; an empty answer has one empty text.
        body = {
            "id": self._message["id"],
            "type": "message",
            "role": "assistant",
            "content": content or [{"type": "text", "text": ""}],
            "model": self._message["model"],
            **{name: self._end[name] for name in ("stop_reason", "stop_sequence") if self._end[name] is not None},
            "usage": self._end["usage"],
        }
        return msgspec.json.encode(body)

    def _take(self, event: Json) -> None:
        match event:
            case {"type": "ping"}:
                pass
            case {"type": "message_start", "message": {"id": str(), "model": str(), "content": []} as message}:
                if self._message is not None:
                    raise _Unstorable("inconsistent")
                self._message = message
            case {"type": "content_block_start", "index": int(index), "content_block": {"type": str(kind)} as block}:
                if kind not in _STREAMED or block.keys() - _BLOCK_FIELDS:
                    raise _Unstorable("unknown_field")
                if self._message is None or self._open is not None or index != len(self._blocks):
                    raise _Unstorable("inconsistent")
                self._open = index
                self._blocks.append(block)
                self._pieces.append([])
            case {"type": "content_block_delta", "index": int(index), "delta": dict(delta)}:
                self._extend(index, delta)
            case {"type": "content_block_stop", "index": int(index)}:
                if index != self._open:
                    raise _Unstorable("inconsistent")
                self._open = None
            case {"type": "message_delta", "delta": dict(delta), "usage": dict(usage)}:
                if delta.keys() - {"stop_reason", "stop_sequence"} or self._open is not None:
                    raise _Unstorable("unknown_field")
                named = {name: delta.get(name) for name in ("stop_reason", "stop_sequence")}
                self._end = {**named, "usage": {name: n for name, n in usage.items() if n is not None}}
            case {"type": "message_stop"}:
                self._done = True
            case {"type": "error"}:
                raise _Unstorable("error")
            case _:
                raise _Unstorable("unknown_field")

    def _extend(self, index: int, delta: Json) -> None:
        if index != self._open:
            raise _Unstorable("inconsistent")
        block = self._blocks[index]
        kind, piece, _ = _STREAMED[block["type"]]
        match delta:
            case {"type": "signature_delta", "signature": str(signature)} if block["type"] == "thinking":
                block["signature"] = signature
            case {"type": str(name)} if name == kind and isinstance(delta.get(piece), str):
                self._pieces[index].append(delta[piece])
            case _:
                raise _Unstorable("unknown_field")


def messages_frames(body: Json) -> Iterator[bytes]:
    """The stream of a stored message, from message_start to message_stop."""
    usage = body["usage"]
    # The usage at the start of the stream, before the first generated token, was not stored.
    start = {name: n for name, n in usage.items() if name != "output_tokens"} | {"output_tokens": 0}
    message = {
        "id": body["id"],
        "type": "message",
        "role": "assistant",
        "content": [],
        "model": body["model"],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": start,
    }
    yield _frame({"type": "message_start", "message": message})
    for index, block in enumerate(body["content"]):
        if block == {"type": "text", "text": ""}:
            continue
        yield from _block_frames(index, block)
    end = {"stop_reason": body.get("stop_reason"), "stop_sequence": body.get("stop_sequence")}
    yield _frame({"type": "message_delta", "delta": end, "usage": usage})
    yield _frame({"type": "message_stop"})


def _block_frames(index: int, block: Json) -> Iterator[bytes]:
    kind, piece, whole = _STREAMED[block["type"]]
    opening = {name: block[name] for name in ("type", "id", "name") if name in block} | {
        whole: "" if whole != "input" else {}
    }
    yield _frame({"index": index, "type": "content_block_start", "content_block": opening})
    text = block[whole] if whole != "input" else msgspec.json.encode(block[whole]).decode()
    for at in range(0, len(text), _TEXT_CHARS_PER_EVENT):
        delta = {"type": kind, piece: text[at : at + _TEXT_CHARS_PER_EVENT]}
        yield _frame({"index": index, "type": "content_block_delta", "delta": delta})
    if "signature" in block:
        delta = {"type": "signature_delta", "signature": block["signature"]}
        yield _frame({"index": index, "type": "content_block_delta", "delta": delta})
    yield _frame({"index": index, "type": "content_block_stop"})


def _frame(event: Json) -> bytes:
    kind: str = event["type"]
    return b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode(event) + b"\n\n"


def _event(frame: bytes) -> Json:
    """The data of one frame; the name of its event must be its type."""
    name, _, data = frame.strip().partition(b"\n")
    if frame.startswith(b":"):
        return {"type": "ping"}
    if not name.startswith(b"event:") or not data.startswith(b"data:"):
        raise _Unstorable("garbled")
    try:
        event = msgspec.json.decode(data[5:])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise _Unstorable("garbled") from None
    if not isinstance(event, dict) or event.get("type") != name[6:].strip().decode("latin-1"):
        raise _Unstorable("garbled")
    return event


def _whole(block: Json, pieces: list[str]) -> Json:
    """A block with all of its streamed pieces."""
    if block["type"] != "tool_use":
        whole = _STREAMED[block["type"]][2]
        return {"type": block["type"], whole: "".join([block.get(whole) or "", *pieces]), **_signed(block)}
    try:
        arguments = msgspec.json.decode("".join(pieces) or "{}")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise _Unstorable("inconsistent") from None
    return {"type": "tool_use", "id": block["id"], "name": block["name"], "input": arguments}


def _signed(block: Json) -> Json:
    return {"signature": block["signature"]} if "signature" in block else {}
