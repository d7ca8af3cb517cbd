"""Manifest, digest blob, sealing and KZG against vectors/manifest.json, and what a manifest must not survive.

To write the vectors anew after a format change: `python -m tests.core.records.test_commitment`.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from typing import Any

import blake3
import ckzg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import SigningKey

from hyperspace_vllm.core.records.errors import ProtocolViolation, Refused
from hyperspace_vllm.core.records.ids import ManifestDigest, RowId, RowKey, network_id, row_id, sha256
from hyperspace_vllm.core.records.limits import CLOCK_SKEW_MS, DATA_CHUNKS, OBJECT_ROWS_MAX, TOTAL_CHUNKS
from hyperspace_vllm.core.records.manifest import (
    Manifest,
    RowEntry,
    check_manifest,
    chunk_bytes_for,
    decode_manifest,
    digest_blob,
)
from hyperspace_vllm.core.records.sealing import seal_key, xor_stream
from hyperspace_vllm.daemon.kv.object_codec import (
    ObjectRecord,
    encode_row,
    good_chunks,
    open_row,
    read_record,
    sign_record,
)
from hyperspace_vllm.daemon.workers.kzg_worker import TRUSTED_SETUP_SHA256
from tests.support.paths import VECTORS

NETWORK = network_id("vectors")
KEY = SigningKey(bytes(range(32)))
SETUP_FILE = files("hyperspace_vllm") / "data" / "trusted_setup.txt"
NOW_MS = 1_767_225_600_000
LENGTH = 20_000  # a row: 26 chunks of 768, a part of one, padding


def make_vectors() -> dict[str, object]:
    """A two-row object from nothing but the constants above; `content` of row r is the SHA-256 counter stream of r."""
    setup = ckzg.load_trusted_setup(str(SETUP_FILE), 0)
    keys = [RowKey(sha256(bytes([row]))) for row in range(2)]
    contents = [b"".join(sha256(bytes([row]), i.to_bytes(4, "big")) for i in range(LENGTH // 32)) for row in range(2)]
    chunk_bytes, nonce, digests, chunks = chunk_bytes_for(LENGTH), bytes(range(12)), b"", []
    for key, content in zip(keys, contents, strict=True):
        area = memoryview(bytearray(TOTAL_CHUNKS * chunk_bytes))
        digests += encode_row(memoryview(content), seal_key(key, NETWORK), nonce, chunk_bytes, area)
        chunks.append(bytes(area))
    blob = digest_blob(digests, 2)
    commitment = ckzg.blob_to_kzg_commitment(blob, setup)
    proof = ckzg.compute_blob_kzg_proof(blob, commitment, setup)
    named = tuple((key, LENGTH) for key in keys)
    record = sign_record(KEY, NETWORK, sha256(b"fp"), chunk_bytes, nonce, named, digests, commitment, proof, NOW_MS)
    rows = (record.manifest.rows[0], replace(record.manifest.rows[1], derived_from=ManifestDigest(sha256(b"origin"))))
    manifest = replace(record.manifest, rows=rows).sign(KEY)
    return {
        "about": "A two-row object: keys, sealing, chunks (SHA-256 of each row's 64), digests, KZG, tags, manifest",
        "network_name": "vectors",
        "row_keys": [key.hex() for key in keys],
        "row_content_sha256": [hashlib.sha256(content).hexdigest() for content in contents],
        "row_length": LENGTH,
        "seal_keys": [seal_key(key, NETWORK).hex() for key in keys],
        "nonce": nonce.hex(),
        "chunk_bytes": chunk_bytes,
        "row_chunks_sha256": [hashlib.sha256(row).hexdigest() for row in chunks],
        "digest_table": digests.hex(),
        "digest_blob_sha256": hashlib.sha256(blob).hexdigest(),
        "commitment": commitment.hex(),
        "proof": proof.hex(),
        "row_tags": [row.tag.hex() for row in rows],
        "signing_seed": bytes(KEY).hex(),
        "created_at_ms": NOW_MS,
        "manifest": manifest.encode().hex(),
        "manifest_digest": manifest.digest.hex(),
    }


def vector(name: str) -> bytes:
    value = json.loads((VECTORS / "manifest.json").read_text())[name]
    assert isinstance(value, str)
    return bytes.fromhex(value)


def signed(**changes: object) -> Manifest:
    return replace(decode_manifest(vector("manifest")), **changes).sign(KEY)  # type: ignore[arg-type]


TRUSTED = frozenset({KEY.verify_key.encode()})


def test_the_format_is_what_the_vectors_say() -> None:
    assert make_vectors() == json.loads((VECTORS / "manifest.json").read_text())


def test_the_trusted_setup_is_the_ceremonys() -> None:
    assert hashlib.sha256(SETUP_FILE.read_bytes()).hexdigest() == TRUSTED_SETUP_SHA256


def test_sealing_is_plain_chacha20_with_the_offset_in_the_counter() -> None:
    key, nonce = bytes(range(32)), vector("nonce")
    whole, part = bytearray(1000), bytearray(1000 - 128)
    xor_stream(key, nonce, memoryview(bytes(1000)), memoryview(whole))
    xor_stream(key, nonce, memoryview(bytes(1000 - 128)), memoryview(part), 128)
    assert whole[128:] == part


def test_a_record_is_read_back_as_it_was_signed() -> None:
    record = read_record(vector("manifest"), vector("digest_table"), vector("proof"))
    check_manifest(record.manifest, NETWORK, TRUSTED.__contains__, NOW_MS)
    assert record.digest == vector("manifest_digest")
    assert record.manifest.encode() == record.raw
    assert record.manifest.rows[1].derived_from == sha256(b"origin")
    assert [row.tag.hex() for row in record.manifest.rows] == json.loads((VECTORS / "manifest.json").read_text())[
        "row_tags"
    ]


def record_and_keys() -> tuple[ObjectRecord, dict[RowId, RowKey]]:
    text = json.loads((VECTORS / "manifest.json").read_text())["row_keys"]
    keys = [RowKey(bytes.fromhex(key)) for key in text]
    record = read_record(vector("manifest"), vector("digest_table"), vector("proof"))
    return record, {row_id(NETWORK, key): key for key in keys}


def with_manifest(record: ObjectRecord, manifest: Manifest) -> ObjectRecord:
    return read_record(manifest.sign(KEY).encode(), record.digests, record.proof)


def test_tags_hold_for_the_rows_whose_keys_are_known_and_others_are_not_checked() -> None:
    record, keys = record_and_keys()
    (_, first), (second_id, _) = keys.items()
    assert record.has_true_tags(keys)
    assert record.has_true_tags({})
    other = replace(record.manifest.rows[0], row_id=RowId(bytes(32)), tag=bytes(16))
    foreign = with_manifest(record, replace(record.manifest, rows=(other, record.manifest.rows[1])))
    assert foreign.has_true_tags(keys)
    assert not record.has_true_tags({second_id: first})


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("bit", range(0, 128, 7))
def test_a_flipped_bit_in_a_tag_is_found_although_the_producer_signed_it(row: int, bit: int) -> None:
    record, keys = record_and_keys()
    rows = list(record.manifest.rows)
    tag = (int.from_bytes(rows[row].tag, "big") ^ 1 << bit).to_bytes(16, "big")
    rows[row] = replace(rows[row], tag=tag)
    assert not with_manifest(record, replace(record.manifest, rows=tuple(rows))).has_true_tags(keys)


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": bytes(32)},
        {"chunk_bytes": 1280},
        {"nonce": bytes(12)},
        {"network": network_id("other")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_tag_is_of_everything_that_decides_what_the_row_opens_to(change: dict[str, Any]) -> None:
    record, keys = record_and_keys()
    assert not with_manifest(record, replace(record.manifest, **change)).has_true_tags(keys)


def test_a_tag_is_of_its_producer_its_length_and_its_digests() -> None:
    record, keys = record_and_keys()
    thief = SigningKey(bytes(32))
    stolen = replace(record.manifest, producer=thief.verify_key.encode()).sign(thief)
    assert not read_record(stolen.encode(), record.digests, record.proof).has_true_tags(keys)
    shorter = tuple(replace(row, length=row.length - 1) for row in record.manifest.rows)
    assert not with_manifest(record, replace(record.manifest, rows=shorter)).has_true_tags(keys)
    for at in (0, 2047, 2048, 4095):
        digests = bytearray(record.digests)
        digests[at] ^= 1
        assert not read_record(record.raw, bytes(digests), record.proof).has_true_tags(keys)


def test_a_manifest_of_the_first_version_does_not_decode() -> None:
    """It had no tags; its rows had other ids, so no honest peer offers one to this version."""
    raw = vector("manifest")
    head, rows, signature = raw[:169], (raw[169:258], raw[258:347]), raw[347:]
    assert b"".join((head, *rows, signature)) == raw
    with pytest.raises(ProtocolViolation):
        decode_manifest(b"".join((head, *(row[:73] for row in rows), signature)))


def test_every_flipped_bit_of_a_manifest_is_refused() -> None:
    raw = vector("manifest")
    for position in range(len(raw)):
        for bit in (1, 0x80):
            changed = raw[:position] + bytes([raw[position] ^ bit]) + raw[position + 1 :]
            with pytest.raises((ProtocolViolation, Refused)):
                check_manifest(decode_manifest(changed), NETWORK, TRUSTED.__contains__, NOW_MS)


@given(st.binary(max_size=4096))
def test_no_bytes_crash_the_decoder(raw: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        decode_manifest(raw)


@given(st.integers(0, 3000), st.binary(min_size=1, max_size=40))
def test_what_decodes_encodes_to_the_same_bytes(position: int, patch: bytes) -> None:
    raw = vector("manifest")
    position %= len(raw)
    raw = (raw[:position] + patch + raw[position + len(patch) :])[: len(raw)]
    try:
        manifest = decode_manifest(raw)
    except ProtocolViolation:
        return
    assert manifest.encode() == raw


@pytest.mark.parametrize(
    ("make", "trusted", "reason"),
    [
        (lambda: signed(network=network_id("other")), TRUSTED, "wrong_network"),
        (lambda: signed(), frozenset({bytes(32)}), "untrusted_producer"),
        (lambda: signed(created_at_ms=NOW_MS + CLOCK_SKEW_MS + 1), TRUSTED, "from_the_future"),
        (lambda: replace(signed(), chunk_bytes=256), TRUSTED, "bad_signature"),
    ],
)
def test_a_manifest_that_does_not_count_is_refused_by_name(
    make: Callable[[], Manifest], trusted: frozenset[bytes], reason: str
) -> None:
    with pytest.raises(Refused, match=reason):
        check_manifest(make(), NETWORK, trusted.__contains__, NOW_MS)


@pytest.mark.parametrize("length", [0, DATA_CHUNKS * 768 + 1, 1 << 63, (1 << 64) - 1])
def test_absurd_row_lengths_do_not_decode_even_if_signed(length: int) -> None:
    raw = signed(rows=(RowEntry(RowId(bytes(32)), length, bytes(16)),)).encode()
    with pytest.raises(ProtocolViolation, match="row length"):
        decode_manifest(raw)


@pytest.mark.parametrize("rows", range(1, OBJECT_ROWS_MAX + 1))
def test_every_digest_has_its_own_place_in_the_blob(rows: int) -> None:
    table = b"".join(blake3.blake3(i.to_bytes(4, "big")).digest() for i in range(rows * TOTAL_CHUNKS))
    blob = digest_blob(table, rows)
    for row in range(rows):
        for column in (0, 31, 63):
            digest = table[(row * TOTAL_CHUNKS + column) * 32 :][:32]
            element = (column * 64 + 2 * row) * 32
            assert blob[element : element + 64] == bytes(16) + digest[:16] + bytes(16) + digest[16:]
    assert sum(map(bool, blob)) == sum(map(bool, table))


@pytest.mark.parametrize("row_bytes", [1, 255, 8192, 8193, 786_432, 3_932_160, 128 * 1024 * 1024])
def test_chunks_are_an_odd_multiple_of_256_that_holds_the_row(row_bytes: int) -> None:
    chunk_bytes = chunk_bytes_for(row_bytes)
    assert chunk_bytes % 512 == 256
    assert DATA_CHUNKS * chunk_bytes >= row_bytes
    assert chunk_bytes == 256 or DATA_CHUNKS * (chunk_bytes - 512) < row_bytes


@given(st.sets(st.integers(0, 63), min_size=32, max_size=40), st.integers(1, DATA_CHUNKS * 256))
def test_any_32_chunks_open_the_row(columns: set[int], length: int) -> None:
    row, key, nonce = bytes(i * 7 % 251 for i in range(length)), bytes(32), bytes(12)
    area = memoryview(bytearray(TOTAL_CHUNKS * 256))
    digests = encode_row(memoryview(row), key, nonce, 256, area)
    chunks = good_chunks([(c, area[c * 256 : (c + 1) * 256]) for c in columns], digests)
    target = bytearray(length)
    open_row(chunks, digests, 256, key, nonce, memoryview(target))
    assert target == row


if __name__ == "__main__":
    (VECTORS / "manifest.json").write_text(json.dumps(make_vectors(), indent=1) + "\n")
