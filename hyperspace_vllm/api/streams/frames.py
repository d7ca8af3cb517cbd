"""The streams of each endpoint that has one: collected as they pass, and made from a stored body."""

from collections.abc import Iterator
from typing import Any, Protocol

from ...core.response.admission import NotStored
from ...core.response.request_fields import Endpoint
from .collect import CompletionCollector, FrameKind
from .messages_stream import MessagesCollector, messages_frames
from .replay import completion_frames
from .responses_stream import ResponsesCollector, responses_frames


class Collector(Protocol):
    """Collects the frames of one answer."""

    def feed(self, frame: bytes) -> FrameKind:
        """Take in one frame and say which kind it is."""

    @property
    def size(self) -> int:
        """About how many bytes `result` has to write."""

    def result(self) -> bytes | NotStored:
        """The JSON body that vLLM would have sent to the same request without `stream`."""


def collector(endpoint: Endpoint) -> Collector:
    """The collector for a streamed answer of `endpoint`."""
    match endpoint:
        case "messages":
            return MessagesCollector()
        case "responses":
            return ResponsesCollector()
        case _:
            return CompletionCollector(endpoint)


def frames(endpoint: Endpoint, body: dict[str, Any], include_usage: bool) -> Iterator[bytes]:
    """The stream of a stored body; raises LookupError, TypeError or ValueError for one of another version's shape.

    `include_usage`: with a usage frame at the end, where the endpoint leaves that to the request.
    """
    match endpoint:
        case "messages":
            return messages_frames(body)
        case "responses":
            return responses_frames(body)
        case _:
            return completion_frames(endpoint, body, include_usage)
