"""Messages on libp2p streams. A request is one frame, its answer one frame; a stream carries any number of pairs.

    frame = length u32 big-endian || msgpack map with the message's name under "t"

`/hyperspace/cache/1.0.0` carries Query → Hit | Miss, `/hyperspace/peers/1.0.0` the rest. Decoded by msgspec straight
into these types, bounds included; unknown fields are refused.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, assert_never

import msgspec
from msgspec import Meta

from .codec import decode_frame
from .limits import (
    CACHE_PROOF_BYTES_MAX,
    PEER_RECORD_BYTES_MAX,
    PEX_RECORDS_MAX,
    REGISTRY_DELTA_BYTES_MAX,
    REGISTRY_OWNERS_MAX,
    REGISTRY_REPLY_BYTES_MAX,
    RESPONSE_BYTES_MAX,
    STREAM_FRAME_BYTES_MAX,
)

CACHE_PROTOCOL = "/hyperspace/cache/1.0.0"
PEERS_PROTOCOL = "/hyperspace/peers/1.0.0"

Bytes32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
U63 = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Record = Annotated[bytes, Meta(max_length=PEER_RECORD_BYTES_MAX)]
Delta = Annotated[bytes, Meta(max_length=REGISTRY_DELTA_BYTES_MAX)]
SEALED_BYTES_MAX = RESPONSE_BYTES_MAX + 16  # ChaCha20-Poly1305's tag
KNOWN_BYTES = 16  # per known record in WantPeers
DELTAS_MAX = 4096  # of one answer
SMALL_ANSWER_BYTES_MAX = 64  # names and lengths: a Pong, a Refusal, what an answer holds besides records and deltas
_LENGTH_BYTES = 5  # of a byte string in msgpack
_HEAD_BYTES_MAX = 80  # of a RegistryHead


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="t"):
    pass


# --- /hyperspace/cache/1.0.0 --------------------------------------------------------------------


class Query(_Message, tag="query", frozen=True):
    """Asks for the response with this request hash (the id that travels for the RequestKey)."""

    id: Bytes32


class Hit(_Message, tag="hit", frozen=True):
    """The response: `sealed` opens with the key that only the RequestKey gives (sealing.py), `proof` is a CacheProof.

    `member` proves the membership of the proof's signer (signing.member_tag; zeros: not a member); `popularity` is a
    hint of the number of requests for it, in 1/16 requests, decayed.
    """

    nonce: Annotated[bytes, Meta(min_length=12, max_length=12)]
    sealed: Annotated[bytes, Meta(max_length=SEALED_BYTES_MAX)]
    proof: Annotated[bytes, Meta(max_length=CACHE_PROOF_BYTES_MAX)]
    member: Bytes32
    popularity: Annotated[int, Meta(ge=0, le=(1 << 32) - 1)] = 0


class Miss(_Message, tag="miss", frozen=True):
    """The response is not here, or not available to this peer now."""

    reason: Literal["unknown", "busy"]


# --- /hyperspace/peers/1.0.0 --------------------------------------------------------------------


class Greet(_Message, tag="greet", frozen=True):
    """The sender's own PeerRecord, on connecting and whenever it changed; answered by Greeting."""

    record: Record


class Greeting(_Message, tag="greeting", frozen=True):
    """The answerer's own PeerRecord."""

    record: Record


class Ping(_Message, tag="ping", frozen=True):
    """Asks whether the peer is there; answered by Pong."""


class Pong(_Message, tag="pong", frozen=True):
    """The answer to Ping."""


class WantPeers(_Message, tag="peers?", frozen=True):
    """Peer exchange: asks for records that the sender doesn't have.

    `known` is 16 bytes a record: first 8 of its author's public key, sequence u64 big-endian.
    """

    known: Annotated[bytes, Meta(max_length=KNOWN_BYTES * 1024)]


class Peers(_Message, tag="peers", frozen=True):
    """PeerRecords, each signed by the node that it describes."""

    records: Annotated[tuple[Record, ...], Meta(max_length=PEX_RECORDS_MAX)]


class RegistryHead(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much of an owner's document the sender has: up to `sequence` of `epoch`."""

    owner: Bytes32
    epoch: U63
    sequence: U63


class WantDeltas(_Message, tag="deltas?", frozen=True):
    """What the sender has of each owner's document; asks for the rest. Unlisted owners are unknown to it."""

    heads: Annotated[tuple[RegistryHead, ...], Meta(max_length=REGISTRY_OWNERS_MAX)]


class Deltas(_Message, tag="deltas", frozen=True):
    """Signed registry deltas, each owner's in order and without gaps; `heads` is what the sender has."""

    deltas: Annotated[tuple[Delta, ...], Meta(max_length=DELTAS_MAX)]
    heads: Annotated[tuple[RegistryHead, ...], Meta(max_length=REGISTRY_OWNERS_MAX)]
    more: bool = False


class Refusal(_Message, tag="refused", frozen=True):
    """The request was not answered: `protocol` (it broke a rule), `busy`, or `stranger` (greet first)."""

    reason: Literal["protocol", "busy", "stranger"]


PeerRequest = Query | Greet | Ping | WantPeers | WantDeltas
PeerAnswer = Hit | Miss | Greeting | Pong | Peers | Deltas | Refusal

_encoder = msgspec.msgpack.Encoder()
_request_decoder: msgspec.msgpack.Decoder[PeerRequest] = msgspec.msgpack.Decoder(PeerRequest)
_answer_decoder: msgspec.msgpack.Decoder[PeerAnswer] = msgspec.msgpack.Decoder(PeerAnswer)

assert REGISTRY_REPLY_BYTES_MAX < STREAM_FRAME_BYTES_MAX


@dataclass(frozen=True, slots=True)
class Expected:
    """The largest size of an answer, and the largest number of records, each with a signature to check."""

    bytes_max: int
    records_max: int = 0


ANYTHING = Expected(STREAM_FRAME_BYTES_MAX)
_EXPECTED_PONG = Expected(SMALL_ANSWER_BYTES_MAX)
_EXPECTED_GREETING = Expected(SMALL_ANSWER_BYTES_MAX + PEER_RECORD_BYTES_MAX)
_EXPECTED_PEERS = Expected(
    SMALL_ANSWER_BYTES_MAX + PEX_RECORDS_MAX * (PEER_RECORD_BYTES_MAX + _LENGTH_BYTES), PEX_RECORDS_MAX
)
_EXPECTED_DELTAS = Expected(
    SMALL_ANSWER_BYTES_MAX
    + REGISTRY_REPLY_BYTES_MAX
    + DELTAS_MAX * _LENGTH_BYTES
    + REGISTRY_OWNERS_MAX * _HEAD_BYTES_MAX
)


def expected_answer(request: PeerRequest) -> Expected:
    """The largest honest answer to `request`; a longer one is not read."""
    match request:
        case Query():
            return ANYTHING
        case Greet():
            return _EXPECTED_GREETING
        case Ping():
            return _EXPECTED_PONG
        case WantPeers():
            return _EXPECTED_PEERS
        case WantDeltas():
            return _EXPECTED_DELTAS
        case _:
            assert_never(request)


def protocol_of(request: PeerRequest) -> str:
    """The libp2p protocol of a request."""
    return CACHE_PROTOCOL if isinstance(request, Query) else PEERS_PROTOCOL


def encode(message: PeerRequest | PeerAnswer) -> bytes:
    """The msgpack of one frame, without its length."""
    return _encoder.encode(message)


def decode_request(frame: bytes | memoryview) -> PeerRequest:
    """A peer's request; `ProtocolViolation` names the wrong field."""
    return decode_frame(_request_decoder, frame, STREAM_FRAME_BYTES_MAX, "stream request")


def decode_answer(frame: bytes | memoryview) -> PeerAnswer:
    """A peer's answer; `ProtocolViolation` names the wrong field."""
    return decode_frame(_answer_decoder, frame, STREAM_FRAME_BYTES_MAX, "stream answer")
