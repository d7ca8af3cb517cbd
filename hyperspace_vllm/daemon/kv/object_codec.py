"""Turns rows into sealed, coded, digested chunks and back: the slow, pure work on an object's bytes.

Runs in threads: ChaCha20 (`cryptography` from 50 on), the erasure code and BLAKE3 all release the GIL. An object is
stored row-major: chunk c of row r at (r * 64 + c) * chunk_bytes. A row's last data chunks are zero beyond its sealed
length: padding is *not* sealed, so that every node pads the same way without knowing the key.
"""

import hmac
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import blake3
from nacl.signing import SigningKey

from ... import native
from ...core.records.errors import ProtocolViolation, Refused
from ...core.records.ids import ManifestDigest, NetworkId, RowId, RowKey, row_id
from ...core.records.limits import DATA_CHUNKS, DIGEST_BYTES, TOTAL_CHUNKS
from ...core.records.manifest import Manifest, RowEntry, decode_manifest
from ...core.records.sealing import NONCE_BYTES, xor_stream
from ...core.records.signing import NO_MEMBER_TAG

ROW_DIGESTS_BYTES = TOTAL_CHUNKS * DIGEST_BYTES


@dataclass(frozen=True, slots=True)
class ObjectRecord:
    """What makes an object's chunks verifiable: its manifest (decoded and as signed), digest table and KZG proof.

    `member` proves the producer's membership (signing.member_tag): the record may count by that, also after a restart.
    """

    digest: ManifestDigest
    raw: bytes
    manifest: Manifest
    digests: bytes
    proof: bytes
    member: bytes = NO_MEMBER_TAG

    def row_digests(self, row: int) -> bytes:
        """The 64 digests (2 KiB) of one row's chunks."""
        return self.digests[row * ROW_DIGESTS_BYTES : (row + 1) * ROW_DIGESTS_BYTES]

    def has_true_tags(self, row_keys: Mapping[RowId, RowKey]) -> bool:
        """Whether the producer knew the keys of those of its rows whose keys are given."""
        return all(
            hmac.compare_digest(entry.tag, self.manifest.tag_of(key, entry.length, self.row_digests(row)))
            for row, entry in enumerate(self.manifest.rows)
            if (key := row_keys.get(entry.row_id)) is not None
        )

    @property
    def object_bytes(self) -> int:
        """Size of all rows with all their chunks."""
        return len(self.manifest.rows) * TOTAL_CHUNKS * self.manifest.chunk_bytes


def read_record(raw: bytes, digests: bytes, proof: bytes, member: bytes = NO_MEMBER_TAG) -> ObjectRecord:
    """A record as received or stored; `ProtocolViolation` if its parts don't fit together. Nothing is verified yet."""
    manifest = decode_manifest(raw)
    if len(digests) != len(manifest.rows) * ROW_DIGESTS_BYTES or len(proof) != 48:
        raise ProtocolViolation(f"digest table: {len(digests)} bytes for {len(manifest.rows)} rows of 64 digests")
    return ObjectRecord(manifest.digest, raw, manifest, digests, proof, member)


def sign_record(
    key: SigningKey,
    network: NetworkId,
    fingerprint: bytes,
    chunk_bytes: int,
    nonce: bytes,
    rows: tuple[tuple[RowKey, int], ...],
    digests: bytes,
    commitment: bytes,
    proof: bytes,
    wall_ms: int,
) -> ObjectRecord:
    """The record of an object that this node computed; `rows` are (key, true length), `wall_ms` wall-clock."""
    producer = key.verify_key.encode()
    bare = Manifest(network, fingerprint, chunk_bytes, nonce, commitment, producer, wall_ms, ())
    tables = (digests[at : at + ROW_DIGESTS_BYTES] for at in range(0, len(digests), ROW_DIGESTS_BYTES))
    entries = tuple(
        RowEntry(row_id(network, row_key), length, bare.tag_of(row_key, length, table))
        for (row_key, length), table in zip(rows, tables, strict=True)
    )
    manifest = replace(bare, rows=entries).sign(key)
    return ObjectRecord(manifest.digest, manifest.encode(), manifest, digests, proof)


def sign_anew(record: ObjectRecord, key: SigningKey, wall_ms: int) -> ObjectRecord:
    """The same object under a manifest of another date, and so with another digest; `key` is its producer's."""
    manifest = replace(record.manifest, created_at_ms=wall_ms).sign(key)
    return replace(record, digest=manifest.digest, raw=manifest.encode(), manifest=manifest)


def new_nonce() -> bytes:
    """A random ChaCha20 nonce, one per object: rows have different keys."""
    return secrets.token_bytes(NONCE_BYTES)


def chunk_digest(chunk: bytes | memoryview) -> bytes:
    """BLAKE3, 32 bytes."""
    return blake3.blake3(chunk).digest()


def encode_row(row: memoryview, key: bytes, nonce: bytes, chunk_bytes: int, out: memoryview) -> bytes:
    """Seal and code `row` into `out` (64 * chunk_bytes *zero* bytes); returns the BLAKE3 digests of its 64 chunks."""
    data, parity = out[: DATA_CHUNKS * chunk_bytes], out[DATA_CHUNKS * chunk_bytes :]
    xor_stream(key, nonce, row, data[: len(row)])
    native.encode(data, parity, chunk_bytes)
    chunks = (out[start : start + chunk_bytes] for start in range(0, len(out), chunk_bytes))
    return b"".join(chunk_digest(chunk) for chunk in chunks)


def good_chunks(chunks: Sequence[tuple[int, memoryview]], digests: bytes) -> dict[int, memoryview]:
    """Those of the (column, bytes) whose BLAKE3 is in `digests`, the row's 64 digests."""
    return {column: chunk for column, chunk in chunks if chunk_digest(chunk) == _digest(digests, column)}


def open_row(
    chunks: Mapping[int, memoryview],
    digests: bytes,
    chunk_bytes: int,
    key: bytes,
    nonce: bytes,
    target: memoryview,
) -> None:
    """Decrypt a row into `target` (its true length) from 32 or more *verified* chunks, by column.

    Nothing is copied in between when all data chunks are there. `Refused("condemned")`: the chunks are what the
    producer committed to, but they are no codeword.
    """
    wanted = range(-(-len(target) // chunk_bytes))
    data = dict(chunks)
    missing = [column for column in wanted if column not in chunks]
    if missing:
        data |= _recover(chunks, missing, digests, chunk_bytes)
    for column in wanted:
        start = column * chunk_bytes
        place = target[start : start + chunk_bytes]
        xor_stream(key, nonce, data[column][: len(place)], place, start)


def _recover(
    chunks: Mapping[int, memoryview], missing: Sequence[int], digests: bytes, chunk_bytes: int
) -> dict[int, memoryview]:
    whole = memoryview(bytearray(DATA_CHUNKS * chunk_bytes))
    native.decode([chunks.get(column) for column in range(TOTAL_CHUNKS)], chunk_bytes, whole)
    recovered = [(c, whole[c * chunk_bytes : (c + 1) * chunk_bytes]) for c in missing]
    good = good_chunks(recovered, digests)
    if len(good) != len(missing):
        raise Refused("condemned", f"recovered chunks {sorted(set(missing) - set(good))}")
    return good


def _digest(digests: bytes, column: int) -> bytes:
    return digests[column * DIGEST_BYTES : (column + 1) * DIGEST_BYTES]
