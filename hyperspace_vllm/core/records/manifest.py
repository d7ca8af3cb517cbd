"""The signed manifest of an object, and the digest table that its KZG commitment covers.

    manifest = body || signature            digest = SHA-256(manifest)
    body     = network id 32 | fingerprint 32 | chunk bytes u32 | nonce 12 | commitment 48
               | producer 32 | created at u64 ms | row count u8 | rows
    row      = row id 32 | length u64 | derived u8 | the manifest it derives from 32 | tag 16

All integers are big-endian. The signature is Ed25519 over the tag and the body. Fixed widths make the encoding
canonical: there is exactly one byte string per manifest, and `decode` accepts nothing else.

A row's tag (sealing.row_tag) binds its digests, and so its chunks, to its key: a row id is seen by every peer that is
asked for it, so without the tag a peer could sign rows of a prompt that it doesn't know. It is made over

    network id 32 | fingerprint 32 | chunk bytes u32 | nonce 12 | producer 32 | row id 32 | length u64 | 64 digests
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from .errors import ProtocolViolation, Refused
from .ids import ManifestDigest, NetworkId, RowId, RowKey, row_id, sha256
from .limits import (
    CHUNK_ALIGN_BYTES,
    CHUNK_BYTES_MAX,
    CLOCK_SKEW_MS,
    DATA_CHUNKS,
    DIGEST_BYTES,
    MANIFEST_BYTES_MAX,
    OBJECT_ROWS_MAX,
    ROW_BYTES_MAX,
    TOTAL_CHUNKS,
)
from .sealing import ROW_TAG_BYTES, row_tag

_TAG = b"hyperspace/manifest/2"
_HEAD_BYTES = 32 + 32 + 4 + 12 + 48 + 32 + 8 + 1
_ROW_BYTES = 32 + 8 + 1 + 32 + ROW_TAG_BYTES
_SIGNATURE_BYTES = 64

assert _HEAD_BYTES + OBJECT_ROWS_MAX * _ROW_BYTES + _SIGNATURE_BYTES <= MANIFEST_BYTES_MAX


@dataclass(frozen=True, slots=True)
class RowEntry:
    """One row: its wire id, true length in bytes, tag, and the manifest it was derived from (None: computed)."""

    row_id: RowId
    length: int
    tag: bytes
    derived_from: ManifestDigest | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """Statement by `producer`: these rows, coded into chunks of `chunk_bytes`, have the digests committed to."""

    network: NetworkId
    fingerprint: bytes
    chunk_bytes: int
    nonce: bytes
    commitment: bytes
    producer: bytes
    created_at_ms: int
    rows: tuple[RowEntry, ...]
    signature: bytes = field(default=b"", repr=False)

    def sign(self, key: SigningKey) -> "Manifest":
        """The same manifest with its producer's signature."""
        assert key.verify_key.encode() == self.producer
        signature = key.sign(_TAG + self._body()).signature
        return Manifest(**{**{n: getattr(self, n) for n in _BODY_FIELDS}, "signature": signature})

    def encode(self) -> bytes:
        """Canonical bytes, signature last."""
        assert len(self.signature) == _SIGNATURE_BYTES
        return self._body() + self.signature

    @property
    def digest(self) -> ManifestDigest:
        """SHA-256 of the encoded manifest: what messages about its chunks name."""
        return ManifestDigest(sha256(self.encode()))

    def tag_of(self, row_key: RowKey, length: int, digests: bytes) -> bytes:
        """The tag of a row of this manifest: `length` is its true length, `digests` those of its 64 chunks."""
        statement = [
            self.network,
            self.fingerprint,
            self.chunk_bytes.to_bytes(4, "big"),
            self.nonce,
            self.producer,
            row_id(self.network, row_key),
            length.to_bytes(8, "big"),
            digests,
        ]
        return row_tag(row_key, self.network, b"".join(statement))

    def _body(self) -> bytes:
        head = [
            self.network,
            self.fingerprint,
            self.chunk_bytes.to_bytes(4, "big"),
            self.nonce,
            self.commitment,
            self.producer,
            self.created_at_ms.to_bytes(8, "big"),
            len(self.rows).to_bytes(1, "big"),
        ]
        rows = [
            row.row_id
            + row.length.to_bytes(8, "big")
            + bytes([row.derived_from is not None])
            + (row.derived_from or bytes(32))
            + row.tag
            for row in self.rows
        ]
        return b"".join(head + rows)


_BODY_FIELDS = tuple(n for n in Manifest.__dataclass_fields__ if n != "signature")


def chunk_bytes_for(row_bytes: int) -> int:
    """Chunk size for a row: the smallest odd multiple of 256 bytes such that 32 chunks hold it."""
    units = -(-row_bytes // (DATA_CHUNKS * CHUNK_ALIGN_BYTES))
    return (units | 1) * CHUNK_ALIGN_BYTES


def decode_manifest(raw: bytes) -> Manifest:
    """The manifest in `raw`; `ProtocolViolation` names the field that is out of bounds. Nothing is verified yet."""
    if not _HEAD_BYTES + _ROW_BYTES + _SIGNATURE_BYTES <= len(raw) <= MANIFEST_BYTES_MAX:
        raise ProtocolViolation(f"manifest: {len(raw)} bytes, expected at most {MANIFEST_BYTES_MAX}")
    at = 0

    def take(size: int) -> bytes:
        nonlocal at
        at += size
        return raw[at - size : at]

    network, fingerprint, chunk_bytes = NetworkId(take(32)), take(32), int.from_bytes(take(4), "big")
    nonce, commitment, producer = take(12), take(48), take(32)
    created_at_ms, count = int.from_bytes(take(8), "big"), take(1)[0]
    if not 1 <= count <= OBJECT_ROWS_MAX or len(raw) != _HEAD_BYTES + count * _ROW_BYTES + _SIGNATURE_BYTES:
        raise ProtocolViolation(f"manifest row count {count}: doesn't match its {len(raw)} bytes")
    if not CHUNK_ALIGN_BYTES <= chunk_bytes <= CHUNK_BYTES_MAX or chunk_bytes % (2 * CHUNK_ALIGN_BYTES) == 0:
        raise ProtocolViolation(f"manifest chunk_bytes {chunk_bytes}: expected an odd multiple of 256")
    rows = []
    for _ in range(count):
        row, length = RowId(take(32)), int.from_bytes(take(8), "big")
        derived, origin, tag = take(1)[0], ManifestDigest(take(32)), take(ROW_TAG_BYTES)
        if not 1 <= length <= min(ROW_BYTES_MAX, DATA_CHUNKS * chunk_bytes):
            raise ProtocolViolation(f"manifest row length {length}: more than its 32 chunks of {chunk_bytes}")
        if derived > 1 or (not derived and any(origin)):
            raise ProtocolViolation("manifest row derived flag: expected 0 with a zero origin, or 1")
        rows.append(RowEntry(row, length, tag, origin if derived else None))
    return Manifest(
        network, fingerprint, chunk_bytes, nonce, commitment, producer, created_at_ms, tuple(rows), take(64)
    )


def check_manifest(manifest: Manifest, network: NetworkId, trusts: Callable[[bytes], bool], wall_ms: int) -> None:
    """Raise `Refused` unless a producer that `trusts` accepts signed it, in this network and not in the future.

    The digests are checked later.
    """
    if manifest.network != network:
        raise Refused("wrong_network")
    if not trusts(manifest.producer):
        raise Refused("untrusted_producer", manifest.producer.hex())
    if manifest.created_at_ms > wall_ms + CLOCK_SKEW_MS:
        raise Refused("from_the_future", str(manifest.created_at_ms))
    try:
        VerifyKey(manifest.producer).verify(_TAG + manifest._body(), manifest.signature)
    except BadSignatureError as error:
        raise Refused("bad_signature") from error


def digest_blob(digests: bytes, rows: int) -> bytes:
    """The EIP-7594 blob (4096 field elements, 128 KiB) that the commitment covers.

    `digests` is the digest table: `rows` x 64 BLAKE3 digests of 32 bytes, row-major. Column i fills cell i: element
    2r is the first half of chunk i of row r, element 2r + 1 the second, each a 16-byte big-endian number (so always
    below the BLS modulus). Rows beyond `rows` are zero, which is why the table travels without them.
    """
    if not 1 <= rows <= OBJECT_ROWS_MAX or len(digests) != rows * TOTAL_CHUNKS * DIGEST_BYTES:
        raise ProtocolViolation(f"digest table: {len(digests)} bytes for {rows} rows of 64 digests")
    cells = bytearray(TOTAL_CHUNKS * 64 * 32)
    for row in range(rows):
        for column in range(TOTAL_CHUNKS):
            source = (row * TOTAL_CHUNKS + column) * DIGEST_BYTES
            element = (column * 64 + 2 * row) * 32
            cells[element + 16 : element + 32] = digests[source : source + 16]
            cells[element + 48 : element + 64] = digests[source + 16 : source + 32]
    return bytes(cells)
