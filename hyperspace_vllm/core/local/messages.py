"""Messages between a client in an engine process and the node of its host, over the ipc:// socket.

msgpack, decoded by msgspec straight into these types: a wrong type, a missing field or a size beyond its bound is a
`ProtocolViolation`. Times on this socket are durations (`*_ms`), never clock readings: the two processes share a
machine, not a clock of the same epoch. Moments of the wall clock (`*_at_ms`) are those that a CacheProof states.
"""

import msgspec

from ..records.codec import decode_frame
from ..records.limits import LOCAL_MESSAGE_BYTES_MAX
from .claim_messages import ClaimEnded, ClaimRequest, RequestClaimed, RequestDone
from .kv_messages import (
    LookupPrefix,
    PrefixAnswer,
    PrefixesInMemory,
    RegisterLayout,
    ReleaseLookup,
    RequestEnded,
    RowStaged,
    SegmentNamed,
    StagingGranted,
    StagingUnused,
    WantStaging,
)
from .response_cache_messages import (
    FindResponse,
    PurgeResponses,
    ReleaseResponse,
    ResponseAudited,
    ResponseFound,
    ResponseHint,
    ResponseNotFound,
    ResponseToTry,
    StoreResponse,
    TouchResponses,
)
from .session_messages import GetStatus, Goodbye, Heartbeat, HeartbeatAck, Hello, LeaseLost, Rejected, Status, Welcome
from .similar_messages import FindSimilar, RememberQuestion, SimilarChecked, SimilarFound, SimilarNotFound

ClientMessage = (
    Hello
    | Heartbeat
    | Goodbye
    | RegisterLayout
    | WantStaging
    | RowStaged
    | StagingUnused
    | SegmentNamed
    | RequestEnded
    | LookupPrefix
    | ReleaseLookup
    | PrefixesInMemory
    | StoreResponse
    | TouchResponses
    | PurgeResponses
    | ResponseAudited
    | ClaimRequest
    | RequestDone
    | FindSimilar
    | SimilarChecked
    | RememberQuestion
    | FindResponse
    | ReleaseResponse
    | GetStatus
)

NodeMessage = (
    Welcome
    | HeartbeatAck
    | LeaseLost
    | StagingGranted
    | PrefixAnswer
    | RequestClaimed
    | ClaimEnded
    | SimilarFound
    | SimilarNotFound
    | ResponseHint
    | ResponseToTry
    | ResponseFound
    | ResponseNotFound
    | Status
    | Rejected
)

_encoder = msgspec.msgpack.Encoder()
_client_decoder: msgspec.msgpack.Decoder[ClientMessage] = msgspec.msgpack.Decoder(ClientMessage)
_node_decoder: msgspec.msgpack.Decoder[NodeMessage] = msgspec.msgpack.Decoder(NodeMessage)


def encode(message: ClientMessage | NodeMessage) -> bytes:
    """One frame on the local socket."""
    return _encoder.encode(message)


def decode_client_message(frame: bytes | memoryview) -> ClientMessage:
    """What a client sent; `ProtocolViolation` names the field that is wrong."""
    return decode_frame(_client_decoder, frame, LOCAL_MESSAGE_BYTES_MAX, "local message")


def decode_node_message(frame: bytes | memoryview) -> NodeMessage:
    """What the node sent; `ProtocolViolation` names the field that is wrong."""
    return decode_frame(_node_decoder, frame, LOCAL_MESSAGE_BYTES_MAX, "node message")
