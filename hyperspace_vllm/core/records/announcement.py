"""Signed batches on the two GossipSub topics: who can serve which responses, or which KV rows.

    batch    = body || signature
    body     = network id 32 | sender 32 | sequence u64 | sent at u64 ms | kind u8 | count u16 | entries
    response = request hash 32 | expires at u64 ms                                          (kind 1)
    prefix   = row id 32 | manifest digest 32 | commitment 48 | expires at u64 ms           (kind 2)

Integers are big-endian, the signature is Ed25519 over the tag and the body, and the sender's sequence only grows: what
comes twice, or again later, is dropped. Batches rather than single announcements, because py-libp2p's GossipSub passes
ten messages a second and peer at most (DESIGN §9).
"""

from dataclasses import dataclass
from typing import Literal

from nacl.signing import SigningKey

from .errors import ProtocolViolation, Refused
from .ids import NetworkId
from .limits import ANNOUNCEMENT_ENTRIES_MAX, CLOCK_SKEW_MS
from .signing import SIGNATURE_BYTES, sign, verify

RESPONSE_TOPIC = "hyperspace/cache/announcements"
PREFIX_TOPIC = "hyperspace/kv-prefix/announcements"

_TAG = b"hyperspace/announcement/1"
_HEAD_BYTES = 32 + 32 + 8 + 8 + 1 + 2
_KINDS: dict[int, Literal["response", "prefix"]] = {1: "response", 2: "prefix"}
_RESPONSE_BYTES = 32 + 8
_PREFIX_BYTES = 32 + 32 + 48 + 8
ANNOUNCEMENT_BYTES_MAX = _HEAD_BYTES + ANNOUNCEMENT_ENTRIES_MAX * _PREFIX_BYTES + SIGNATURE_BYTES


@dataclass(frozen=True, slots=True)
class ResponseEntry:
    """A response that the sender can serve until `expires_at_ms`."""

    request_hash: bytes
    expires_at_ms: int


@dataclass(frozen=True, slots=True)
class PrefixEntry:
    """A KV row that the sender can serve, under which manifest and KZG commitment."""

    row_id: bytes
    manifest: bytes
    commitment: bytes
    expires_at_ms: int


@dataclass(frozen=True, slots=True)
class Announcement:
    """A batch of one kind; `sender` is an Ed25519 public key."""

    network: NetworkId
    sender: bytes
    sequence: int
    sent_at_ms: int
    entries: tuple[ResponseEntry, ...] | tuple[PrefixEntry, ...]

    @property
    def topic(self) -> str:
        """Where it belongs."""
        return RESPONSE_TOPIC if isinstance(self.entries[0], ResponseEntry) else PREFIX_TOPIC


def encode_announcement(batch: Announcement, key: SigningKey) -> bytes:
    """The signed bytes of a batch of 1 to ANNOUNCEMENT_ENTRIES_MAX entries."""
    assert 0 < len(batch.entries) <= ANNOUNCEMENT_ENTRIES_MAX
    entries = b"".join(_encode_entry(entry) for entry in batch.entries)
    kind = 1 if isinstance(batch.entries[0], ResponseEntry) else 2
    body = b"".join(
        (
            batch.network,
            batch.sender,
            batch.sequence.to_bytes(8, "big"),
            batch.sent_at_ms.to_bytes(8, "big"),
            bytes([kind]),
            len(batch.entries).to_bytes(2, "big"),
            entries,
        )
    )
    return body + sign(key, _TAG, body)


def decode_announcement(raw: bytes) -> Announcement:
    """The batch in `raw`; `ProtocolViolation` names the field. Nothing is believed yet, `check_announcement` does."""
    if not _HEAD_BYTES + SIGNATURE_BYTES < len(raw) <= ANNOUNCEMENT_BYTES_MAX:
        raise ProtocolViolation(f"announcement: {len(raw)} bytes, expected at most {ANNOUNCEMENT_BYTES_MAX}")
    kind = _KINDS.get(raw[80])
    if kind is None:
        raise ProtocolViolation(f"announcement kind {raw[80]}: expected 1 or 2")
    count = int.from_bytes(raw[81:83], "big")
    size = _RESPONSE_BYTES if kind == "response" else _PREFIX_BYTES
    if not 0 < count <= ANNOUNCEMENT_ENTRIES_MAX or len(raw) != _HEAD_BYTES + count * size + SIGNATURE_BYTES:
        raise ProtocolViolation(f"announcement count {count}: doesn't match {len(raw)} bytes")
    pieces = [raw[at : at + size] for at in range(_HEAD_BYTES, len(raw) - SIGNATURE_BYTES, size)]
    entries: tuple[ResponseEntry, ...] | tuple[PrefixEntry, ...]
    if kind == "response":
        entries = tuple(ResponseEntry(piece[:32], int.from_bytes(piece[32:], "big")) for piece in pieces)
    else:
        entries = tuple(
            PrefixEntry(piece[:32], piece[32:64], piece[64:112], int.from_bytes(piece[112:], "big")) for piece in pieces
        )
    return Announcement(
        NetworkId(raw[:32]), raw[32:64], int.from_bytes(raw[64:72], "big"), int.from_bytes(raw[72:80], "big"), entries
    )


def check_announcement(raw: bytes, batch: Announcement, network: NetworkId, now_ms: int) -> None:
    """Raise `Refused` unless `batch`, decoded from `raw`, is of this network, of the last minute, and its sender's."""
    if batch.network != network:
        raise Refused("other_network")
    if abs(batch.sent_at_ms - now_ms) > CLOCK_SKEW_MS:
        raise Refused("stale" if batch.sent_at_ms < now_ms else "from_the_future")
    verify(batch.sender, _TAG, raw[:-SIGNATURE_BYTES], raw[-SIGNATURE_BYTES:])


def _encode_entry(entry: ResponseEntry | PrefixEntry) -> bytes:
    at = entry.expires_at_ms.to_bytes(8, "big")
    if isinstance(entry, ResponseEntry):
        return entry.request_hash + at
    return entry.row_id + entry.manifest + entry.commitment + at
