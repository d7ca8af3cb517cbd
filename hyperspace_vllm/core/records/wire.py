"""Messages between nodes on the bulk transport (ZeroMQ, CURVE both ways).

A request is one frame. A reply is one frame, plus the chunk's bytes in a second frame for `Chunk`. Row ids, manifest
digests and columns travel; keys never do. Decoded by msgspec straight into these types, bounds included.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from .codec import decode_frame
from .limits import (
    CHUNK_BYTES_MAX,
    DIGEST_TABLE_BYTES_MAX,
    LOOKUP_ROWS_MAX,
    MANIFEST_BYTES_MAX,
    OBJECT_ROWS_MAX,
    PEER_CONTROL_BYTES_MAX,
    TOTAL_CHUNKS,
)
from .signing import NO_MEMBER_TAG

PEER_PROTOCOL = 1

Bytes32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
RequestId = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
RowIndex = Annotated[int, Meta(ge=0, lt=OBJECT_ROWS_MAX)]
Column = Annotated[int, Meta(ge=0, lt=TOTAL_CHUNKS)]


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="t"):
    pass


class Have(_Message, tag="have?", frozen=True):
    """Asks which of these rows the peer can serve, and under which manifests."""

    request: RequestId
    row_ids: Annotated[tuple[Bytes32, ...], Meta(min_length=1, max_length=LOOKUP_ROWS_MAX)]


class GetManifest(_Message, tag="manifest?", frozen=True):
    """Asks for the manifest with this digest, its digest table and KZG proof."""

    request: RequestId
    manifest: Bytes32


class GetChunks(_Message, tag="chunks?", frozen=True):
    """Asks for these columns of one row of an object, each in its own reply, in the order asked."""

    request: RequestId
    manifest: Bytes32
    row: RowIndex
    columns: Annotated[tuple[Column, ...], Meta(min_length=1, max_length=TOTAL_CHUNKS)]


class Cancel(_Message, tag="cancel", frozen=True):
    """Ends the reply to `request`; not answered."""

    request: RequestId


PeerRequest = Have | GetManifest | GetChunks | Cancel


class Offer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Row number `row` of `manifest` is the row asked for at position `index`; `columns` is a 64-bit mask."""

    index: Annotated[int, Meta(ge=0, lt=LOOKUP_ROWS_MAX)]
    manifest: Bytes32
    row: RowIndex
    columns: Annotated[bytes, Meta(min_length=8, max_length=8)]


class HaveReply(_Message, tag="have", frozen=True):
    """Offers for the rows that this peer can serve (at most one per row)."""

    request: RequestId
    offers: Annotated[tuple[Offer, ...], Meta(max_length=LOOKUP_ROWS_MAX)]


class ManifestReply(_Message, tag="manifest", frozen=True):
    """Everything that makes chunks verifiable; unverified itself.

    `member` proves the producer's membership (signing.member_tag; zeros: not a member); it may have left long ago.
    """

    request: RequestId
    manifest: Annotated[bytes, Meta(max_length=MANIFEST_BYTES_MAX)]
    digests: Annotated[bytes, Meta(max_length=DIGEST_TABLE_BYTES_MAX)]
    proof: Annotated[bytes, Meta(min_length=48, max_length=48)]
    member: Bytes32 = NO_MEMBER_TAG


class Chunk(_Message, tag="chunk", frozen=True):
    """Precedes a frame of `size` bytes: chunk `column` of the row asked for."""

    request: RequestId
    column: Column
    size: Annotated[int, Meta(ge=1, le=CHUNK_BYTES_MAX)]


class NotHere(_Message, tag="not_here", frozen=True):
    """The requested data (for chunks: these columns of it) cannot be served; `reason` says why."""

    request: RequestId
    reason: Literal["unknown", "busy", "io_error", "refused"]
    columns: Annotated[tuple[Column, ...], Meta(max_length=TOTAL_CHUNKS)] = ()


PeerReply = HaveReply | ManifestReply | Chunk | NotHere

_encoder = msgspec.msgpack.Encoder()
_request_decoder: msgspec.msgpack.Decoder[PeerRequest] = msgspec.msgpack.Decoder(PeerRequest)
_reply_decoder: msgspec.msgpack.Decoder[PeerReply] = msgspec.msgpack.Decoder(PeerReply)


def encode(message: PeerRequest | PeerReply) -> bytes:
    """The first (often only) frame of a message."""
    return _encoder.encode(message)


def decode_request(frame: bytes | memoryview) -> PeerRequest:
    """A peer's request; `ProtocolViolation` names the wrong field."""
    return decode_frame(_request_decoder, frame, PEER_CONTROL_BYTES_MAX, "peer message")


def decode_reply(frame: bytes | memoryview) -> PeerReply:
    """A peer's reply; `ProtocolViolation` names the wrong field."""
    return decode_frame(_reply_decoder, frame, PEER_CONTROL_BYTES_MAX, "peer message")
