"""PeerRecord: a node's signed statement about itself, which any peer may pass on.

    record    = body || signature
    body      = network id 32 | public key 32 | sequence u64 | expires at u64 ms | member tag 32
                | capacity u64 bytes | load u16 per mille | address | endpoint
                | count u8, model digests 32 each | count u8, KV fingerprints 32 each
                | length u16, digest of the prefixes in VRAM (core/records/vram_digest.py; may be empty)
    address   = length u8 | host:port of the libp2p listener (TCP)
    endpoint  = length u8 | host:port of the bulk transport (ZeroMQ), or nothing

All integers are big-endian; the signature is Ed25519 over the tag and the body. The CURVE key of the bulk transport
follows from the public key (identity.curve_public_of), so it needs no field.
"""

from dataclasses import dataclass, field, replace

from nacl.signing import SigningKey

from .errors import ProtocolViolation, Refused
from .ids import NetworkId, PeerId, peer_id
from .limits import CLOCK_SKEW_MS, PEER_RECORD_BYTES_MAX, PEER_RECORD_TTL_MS
from .signing import MEMBER_TAG_BYTES, NO_MEMBER_TAG, SIGNATURE_BYTES, sign, verify

_TAG = b"hyperspace/peer-record/1"
ADDRESS_BYTES_MAX = 255
DIGESTS_MAX = 16
VRAM_DIGEST_BYTES_MAX = 4096


@dataclass(frozen=True, slots=True)
class PeerRecord:
    """Statement by the node with `public_key`: its addresses and what it serves. The highest sequence counts."""

    network: NetworkId
    public_key: bytes
    sequence: int
    expires_at_ms: int
    address: str
    endpoint: str = ""
    member_tag: bytes = NO_MEMBER_TAG
    capacity_bytes: int = 0
    load_permille: int = 0
    models: tuple[bytes, ...] = ()
    fingerprints: tuple[bytes, ...] = ()
    vram_digest: bytes = b""
    signature: bytes = field(default=b"", repr=False)

    @property
    def peer(self) -> PeerId:
        """The peer id of the record's node."""
        return peer_id(self.public_key)

    def sign(self, key: SigningKey) -> "PeerRecord":
        """The same record with its author's signature."""
        assert key.verify_key.encode() == self.public_key
        return replace(self, signature=sign(key, _TAG, self._body()))

    def encode(self) -> bytes:
        """Canonical bytes, signature last."""
        assert len(self.signature) == SIGNATURE_BYTES
        return self._body() + self.signature

    def _body(self) -> bytes:
        return b"".join(
            (
                self.network,
                self.public_key,
                self.sequence.to_bytes(8, "big"),
                self.expires_at_ms.to_bytes(8, "big"),
                self.member_tag,
                self.capacity_bytes.to_bytes(8, "big"),
                self.load_permille.to_bytes(2, "big"),
                _sized(self.address.encode(), 1),
                _sized(self.endpoint.encode(), 1),
                bytes([len(self.models)]) + b"".join(self.models),
                bytes([len(self.fingerprints)]) + b"".join(self.fingerprints),
                _sized(self.vram_digest, 2),
            )
        )


def decode_peer_record(raw: bytes) -> PeerRecord:
    """The record in `raw`; `ProtocolViolation` names the wrong field. Nothing is verified yet."""
    if len(raw) > PEER_RECORD_BYTES_MAX:
        raise ProtocolViolation(f"peer record: {len(raw)} bytes, at most {PEER_RECORD_BYTES_MAX}")
    reader = _Reader(raw)
    record = PeerRecord(
        network=NetworkId(reader.take(32, "network")),
        public_key=reader.take(32, "public key"),
        sequence=reader.number(8, "sequence"),
        expires_at_ms=reader.number(8, "expires at"),
        member_tag=reader.take(MEMBER_TAG_BYTES, "member tag"),
        capacity_bytes=reader.number(8, "capacity"),
        load_permille=reader.number(2, "load"),
        address=reader.text("address"),
        endpoint=reader.text("endpoint"),
        models=reader.digests("models"),
        fingerprints=reader.digests("fingerprints"),
        vram_digest=reader.take(reader.number(2, "VRAM digest length"), "VRAM digest"),
        signature=reader.take(SIGNATURE_BYTES, "signature"),
    )
    if reader.left or len(record.vram_digest) > VRAM_DIGEST_BYTES_MAX:
        raise ProtocolViolation(f"peer record: {reader.left} bytes too many")
    return record


def check_peer_record(record: PeerRecord, network: NetworkId, wall_ms: int) -> None:
    """Raise `Refused` unless it is of this network, current, and signed by the node that it describes."""
    if record.network != network:
        raise Refused("other_network")
    if record.expires_at_ms <= wall_ms:
        raise Refused("expired")
    if record.expires_at_ms > wall_ms + PEER_RECORD_TTL_MS + CLOCK_SKEW_MS:
        raise Refused("from_the_future")
    verify(record.public_key, _TAG, record._body(), record.signature)


def _sized(value: bytes, width: int) -> bytes:
    return len(value).to_bytes(width, "big") + value


class _Reader:
    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._raw) - self._at

    def take(self, size: int, name: str) -> bytes:
        if self.left < size:
            raise ProtocolViolation(f"peer record {name}: expected {size} bytes, {self.left} are left")
        self._at += size
        return self._raw[self._at - size : self._at]

    def number(self, size: int, name: str) -> int:
        return int.from_bytes(self.take(size, name), "big")

    def text(self, name: str) -> str:
        raw = self.take(self.number(1, name), name)
        if not raw.isascii():
            raise ProtocolViolation(f"peer record {name}: expected ASCII")
        return raw.decode("ascii")

    def digests(self, name: str) -> tuple[bytes, ...]:
        count = self.number(1, name)
        if count > DIGESTS_MAX:
            raise ProtocolViolation(f"peer record {name}: {count}, at most {DIGESTS_MAX}")
        return tuple(self.take(32, name) for _ in range(count))
