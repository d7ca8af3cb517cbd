"""Requests between peers: what this node asks, and what it is asked."""

from dataclasses import dataclass

from ..records.ids import PeerId
from ..records.peer_wire import PeerAnswer, PeerRequest
from ..records.reason import Reason


@dataclass(frozen=True, slots=True)
class Send:
    """Ask `peer` something, on the stream of `protocol_of(message)`. Answered by Answered or RequestFailed."""

    request: int
    peer: PeerId
    message: PeerRequest
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class Answered:
    """Answers Send: what `peer` said, decoded and within bounds; nothing in it is believed yet."""

    request: int
    peer: PeerId
    message: PeerAnswer


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """Answers Send: no answer came, or a malformed one."""

    request: int
    peer: PeerId
    reason: Reason  # timeout | unreachable | protocol | busy


@dataclass(frozen=True, slots=True)
class RequestReceived:
    """`peer` asks something; answer with Reply or ServeResponse under this `token`."""

    token: int
    peer: PeerId
    message: PeerRequest


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer RequestReceived. Not answered."""

    token: int
    message: PeerAnswer


@dataclass(frozen=True, slots=True)
class ServeResponse:
    """Answer RequestReceived(Query) with Hit, sealed, if the response is here and may leave this node; else Miss.

    Not answered.
    """

    token: int
    request_hash: bytes
    popularity: int
