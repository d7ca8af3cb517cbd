"""OpenAI's Responses: from the events of a stream to the JSON body, and back, as vLLM 0.32 shapes both.

The last event of a stream holds the whole body. https://platform.openai.com/docs/api-reference/responses-streaming
"""

from collections.abc import Iterator
from itertools import count
from typing import Any

import msgspec

from ...core.records.limits import RESPONSE_BYTES_MAX
from ...core.response.admission import NotStored
from .collect import FrameKind

Json = dict[str, Any]

_TEXT_CHARS_PER_EVENT = 4096
_OPENINGS: dict[str, Json] = {
    "message": {"content": [], "status": "in_progress"},
    "reasoning": {"content": None, "status": "in_progress"},
    "function_call": {"arguments": "", "status": "in_progress"},
    "custom_tool_call": {"input": ""},
}
_KNOWN_AT_THE_END = ("usage", "incomplete_details", "input_messages", "output_messages")
_FAILURES = (b"event: error", b"event: response.failed")


class ResponsesCollector:
    """Takes events in the order in which they are sent; per request."""

    def __init__(self) -> None:
        self._body: bytes | None = None
        self._failure: str | None = None

    def feed(self, frame: bytes) -> FrameKind:
        """Take in one `event: …` frame; the kind of all of them is "other"."""
        if self._body is not None or frame.startswith(_FAILURES):
            self._failure = "error"
        elif frame.startswith(b"event: response.completed\n"):
            self._take(frame)
        return "other"

    @property
    def size(self) -> int:
        """Bytes of the body."""
        return len(self._body or b"")

    def result(self) -> bytes | NotStored:
        """The JSON body, if the stream ended with response.completed."""
        if self._failure is not None:
            return NotStored(self._failure)
        return NotStored("unfinished") if self._body is None else self._body

    def _take(self, frame: bytes) -> None:
        _, _, data = frame.strip().partition(b"\n")
        if len(data) > RESPONSE_BYTES_MAX:
            self._failure = "too_large"
            return
        try:
            event = msgspec.json.decode(data.removeprefix(b"data:"))
            self._body = msgspec.json.encode({**event["response"]})
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, LookupError, TypeError):
            self._failure = "garbled"


def responses_frames(body: Json) -> Iterator[bytes]:
    """The stream of a stored response, from response.created to response.completed.

    `ValueError` for output that is not replayed: that of tools which the server itself ran.

    """
    numbers = count()

    def frame(kind: str, **fields: Any) -> bytes:
        event = {"type": kind, "sequence_number": next(numbers), **fields}
        return b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode(event) + b"\n\n"

    unknown_yet = {name: None for name in _KNOWN_AT_THE_END if name in body}
    begun = {**body, **unknown_yet, "status": "in_progress", "output": []}
    yield frame("response.created", response=begun)
    yield frame("response.in_progress", response=begun)
    for index, item in enumerate(body["output"]):
        for kind, fields in _item_events(item):
            yield frame(kind, output_index=index, **fields)
    yield frame("response.completed", response=body)


def _item_events(item: Json) -> Iterator[tuple[str, Json]]:
    if item["type"] not in _OPENINGS:
        raise ValueError(f"output item {item['type']!r}")
    opening = _OPENINGS[item["type"]]
    yield "response.output_item.added", {"item": {**item, **opening}}
    match item:
        case {"type": "message" | "reasoning"}:
            for at, part in enumerate(item.get("content") or ()):
                for kind, fields in _part_events(part):
                    yield kind, {"item_id": item["id"], "content_index": at, **fields}
        case {"type": "function_call", "arguments": str(arguments)}:
            for delta in _cut(arguments):
                yield "response.function_call_arguments.delta", {"item_id": item["id"], "delta": delta}
            done = {"item_id": item["id"], "arguments": arguments, "name": item["name"]}
            yield "response.function_call_arguments.done", done
        case {"type": "custom_tool_call", "input": str(text)}:
            for delta in _cut(text):
                yield "response.custom_tool_call_input.delta", {"item_id": item["id"], "delta": delta}
            yield "response.custom_tool_call_input.done", {"item_id": item["id"], "input": text}
    yield "response.output_item.done", {"item": item}


def _part_events(part: Json) -> Iterator[tuple[str, Json]]:
    text = part["text"]
    if part["type"] == "reasoning_text":
        yield "response.content_part.added", {"part": {**part, "text": ""}}
        for delta in _cut(text):
            yield "response.reasoning_text.delta", {"delta": delta}
        yield "response.reasoning_text.done", {"text": text}
    elif part["type"] == "output_text":
        yield "response.content_part.added", {"part": {**part, "text": "", "annotations": [], "logprobs": []}}
        logprobs = [
            {name: entry[name] for name in ("token", "logprob", "top_logprobs")} for entry in part["logprobs"] or ()
        ]
        pieces = _cut(text)
        for at, delta in enumerate(pieces):
            with_it = logprobs[len(logprobs) * at // len(pieces) : len(logprobs) * (at + 1) // len(pieces)]
            yield "response.output_text.delta", {"delta": delta, "logprobs": with_it}
        yield "response.output_text.done", {"text": text, "logprobs": []}
    else:
        raise ValueError(f"content part {part['type']!r}")
    yield "response.content_part.done", {"part": part}


def _cut(text: str) -> list[str]:
    return [text[at : at + _TEXT_CHARS_PER_EVENT] for at in range(0, len(text), _TEXT_CHARS_PER_EVENT)]
