"""Registry deltas: an owner's signed changes to its own loro document, which any peer may pass on.

    delta   = head || payload || signature
    head    = network id 32 | owner 32 | epoch u64 | sequence u64 | kind u8 | expires at u64 ms | payload length u32
    kind    = 0 snapshot (sequence 0 of its epoch) | 1 update

An owner's document is the snapshot of its highest epoch and the updates 1, 2, 3, … that follow it without a gap. A new
epoch begins with the owner's shallow snapshot and replaces everything before it, so the log of an owner stays bounded.
"""

from dataclasses import dataclass
from typing import Literal

from nacl.signing import SigningKey

from .errors import ProtocolViolation, Refused
from .ids import NetworkId
from .limits import CLOCK_SKEW_MS, REGISTRY_DELTA_BYTES_MAX, REGISTRY_TTL_MS
from .signing import SIGNATURE_BYTES, sign, verify

_TAG = b"hyperspace/registry-delta/1"
_HEAD_BYTES = 32 + 32 + 8 + 8 + 1 + 8 + 4
DELTA_OVERHEAD_BYTES = _HEAD_BYTES + SIGNATURE_BYTES  # besides the payload


@dataclass(frozen=True, slots=True)
class RegistryDelta:
    """One signed piece of an owner's document; `payload` is the loro export."""

    network: NetworkId
    owner: bytes
    epoch: int
    sequence: int
    kind: Literal["snapshot", "update"]
    expires_at_ms: int
    payload: bytes


def encode_delta(delta: RegistryDelta, key: SigningKey) -> bytes:
    """The signed bytes."""
    body = b"".join(
        (
            delta.network,
            delta.owner,
            delta.epoch.to_bytes(8, "big"),
            delta.sequence.to_bytes(8, "big"),
            bytes([delta.kind == "update"]),
            delta.expires_at_ms.to_bytes(8, "big"),
            len(delta.payload).to_bytes(4, "big"),
            delta.payload,
        )
    )
    assert len(body) + SIGNATURE_BYTES <= REGISTRY_DELTA_BYTES_MAX
    return body + sign(key, _TAG, body)


def decode_delta(raw: bytes) -> RegistryDelta:
    """The delta in `raw`; `ProtocolViolation` names the field. Nothing is verified yet."""
    if not _HEAD_BYTES + SIGNATURE_BYTES <= len(raw) <= REGISTRY_DELTA_BYTES_MAX:
        raise ProtocolViolation(f"registry delta: {len(raw)} bytes, expected at most {REGISTRY_DELTA_BYTES_MAX}")
    size = int.from_bytes(raw[_HEAD_BYTES - 4 : _HEAD_BYTES], "big")
    if size != len(raw) - _HEAD_BYTES - SIGNATURE_BYTES or raw[80] > 1:
        raise ProtocolViolation(f"registry delta payload length {size}: doesn't match {len(raw)} bytes")
    sequence = int.from_bytes(raw[72:80], "big")
    if (sequence == 0) != (raw[80] == 0):
        raise ProtocolViolation(f"registry delta sequence {sequence}: only a snapshot has sequence 0")
    return RegistryDelta(
        NetworkId(raw[:32]),
        raw[32:64],
        int.from_bytes(raw[64:72], "big"),
        sequence,
        "update" if raw[80] else "snapshot",
        int.from_bytes(raw[81:89], "big"),
        raw[_HEAD_BYTES:-SIGNATURE_BYTES],
    )


def check_delta(raw: bytes, delta: RegistryDelta, network: NetworkId, wall_ms: int) -> None:
    """Raise `Refused` unless `delta`, decoded from `raw`, is of this network, not expired, and signed by its owner."""
    if delta.network != network:
        raise Refused("other_network")
    if delta.expires_at_ms <= wall_ms:
        raise Refused("expired")
    if delta.expires_at_ms > wall_ms + REGISTRY_TTL_MS + CLOCK_SKEW_MS:
        raise Refused("from_the_future")
    verify(delta.owner, _TAG, raw[:-SIGNATURE_BYTES], raw[-SIGNATURE_BYTES:])
