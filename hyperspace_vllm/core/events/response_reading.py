"""L1: responses that clients of this node want and other nodes may have."""

from dataclasses import dataclass

from ..records.ids import PeerId
from ..records.reason import Reason


@dataclass(frozen=True, slots=True)
class ResponseWanted:
    """A request that this node could not answer. `lookup` is unique in this node's life.

    HintResponse comes as soon as it is known whether a peer is worth waiting for, AnswerResponse when the lookup ends.
    `shared`: the fleet's shared store can be read now.
    """

    lookup: int
    request_hash: bytes
    deadline_ms: int  # a duration
    told: tuple[PeerId, ...] = ()  # providers that the shell knows of by itself (a Redis registry)
    shared: bool = False


@dataclass(frozen=True, slots=True)
class ReadShared:
    """Read the fleet's shared store (Redis), open and verify. Answered by SharedRead."""

    lookup: int
    request_hash: bytes
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class SharedRead:
    """Answers ReadShared: `hit`, or why there is none (`redis_away` if the store did not answer).

    `told`: providers that the shell knows of by itself.
    """

    lookup: int
    reason: str
    told: tuple[PeerId, ...] = ()


@dataclass(frozen=True, slots=True)
class HintResponse:
    """Tell the client at once whether there is a hint: then it waits for AnswerResponse, else it races the engine.

    Not answered.
    """

    lookup: int
    hinted: bool


@dataclass(frozen=True, slots=True)
class FetchResponse:
    """Connect if need be, query, open and verify. Answered by ResponseFetched or ResponseRefused.

    `address` is where to dial a peer that is not connected; '' when its address is unknown.
    """

    lookup: int
    peer: PeerId
    address: str
    request_hash: bytes
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class ResponseFetched:
    """Answers FetchResponse: opened, and its CacheProof verified."""

    lookup: int
    peer: PeerId
    size: int
    expires_at_ms: int
    popularity: int  # as the provider claims, in 1/16 requests


@dataclass(frozen=True, slots=True)
class ResponseRefused:
    """Answers FetchResponse: there is no answer, or an invalid one."""

    lookup: int
    peer: PeerId
    reason: Reason


@dataclass(frozen=True, slots=True)
class ResponseReleased:
    """The client no longer waits for the lookup. What it still fetches may be stored."""

    lookup: int


@dataclass(frozen=True, slots=True)
class AnswerResponse:
    """The lookup is over. With the reason `hit`, what the peer's fetch brought is the answer: store it too.

    A hit without a peer is of the shared store. Cancels what still runs for the lookup. Not answered; ResponseStored
    reports what is stored.
    """

    lookup: int
    peer: PeerId | None
    source: str  # hint | dht | redis | none
    reason: str  # hit | not_found | deadline | no_peers | refused reasons …; a metric label
