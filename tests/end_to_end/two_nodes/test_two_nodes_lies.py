"""Two nodes over real sockets: what A loses costs nothing or a prompt miss, every lie is refused and charged."""

import dataclasses

import pytest
from nacl.signing import SigningKey

from hyperspace_vllm.core.records.ids import ManifestDigest, row_key, sha256
from hyperspace_vllm.core.records.layout import Layout, Part
from hyperspace_vllm.core.records.limits import TOTAL_CHUNKS
from hyperspace_vllm.core.records.manifest import digest_blob
from hyperspace_vllm.core.records.reason import Reason
from hyperspace_vllm.daemon.kv.object_codec import ObjectRecord, chunk_digest, sign_record
from tests.support.daemons.node_pair import (
    FAULT_S,
    KEYS,
    Pair,
    Tampered,
    flip,
    is_whole,
    keys_by_id,
    refused,
    signed_by,
)
from tests.support.nodes import NETWORK, keys

pytestmark = [pytest.mark.io, pytest.mark.asyncio(loop_scope="module")]


# --- losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("admits", [True, False])
@pytest.mark.parametrize("lost", [frozenset(range(32)), frozenset(range(32, 64)), frozenset(range(0, 64, 2))])
async def test_32_lost_chunks_cost_nothing(pair: Pair, lost: frozenset[int], admits: bool) -> None:
    a, b = await pair.start(Tampered)
    assert isinstance(a.store, Tampered)
    a.store.lost, a.store.admits = lost, admits
    assert is_whole(b, await b.look_up(KEYS))


@pytest.mark.parametrize("admits", [True, False])
async def test_33_lost_chunks_are_a_prompt_miss(pair: Pair, admits: bool) -> None:
    a, b = await pair.start(Tampered)
    assert isinstance(a.store, Tampered)
    a.store.lost, a.store.admits = frozenset(range(10, 43)), admits
    answer = await b.look_up(KEYS)
    assert answer.end_segment == 0
    assert answer.after_s < FAULT_S


# --- forgeries ----------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 100, -1])
async def test_a_flipped_bit_in_a_chunk_is_refused_and_charged(pair: Pair, position: int) -> None:
    a, b = await pair.start(Tampered)
    assert isinstance(a.store, Tampered)

    def change(column: int, chunk: bytearray) -> None:
        chunk[position] ^= 0x80

    a.store.on_chunk = change
    await refused(a, b, "bad_digest")


FIELDS = {
    "network": 0,
    "fingerprint": 32,
    "chunk bytes": 64,
    "chunk bytes, low": 67,
    "nonce": 68,
    "commitment": 80,
    "producer": 128,
    "created at": 160,
    "row count": 168,
    "row id": 169,
    "row length": 201,
    "row length, low": 208,
    "derived": 209,
    "origin": 210,
    "tag": 242,
    "signature": -64,
    "signature, end": -1,
}


@pytest.mark.parametrize("position", FIELDS.values(), ids=FIELDS)
async def test_a_flipped_byte_anywhere_in_a_manifest_is_refused_and_charged(pair: Pair, position: int) -> None:
    a, b = await pair.start(Tampered)
    assert isinstance(a.store, Tampered)
    a.store.on_record = lambda record: dataclasses.replace(record, raw=flip(record.raw, position))
    await refused(a, b, "forged", "malformed")


@pytest.mark.parametrize("position", FIELDS.values(), ids=FIELDS)
async def test_a_forged_manifest_offered_under_its_own_digest_is_refused(pair: Pair, position: int) -> None:
    a, b = await pair.start(Tampered)
    assert isinstance(a.store, Tampered)

    def forge(record: ObjectRecord) -> ObjectRecord:
        raw = flip(record.raw, position)
        return dataclasses.replace(record, raw=raw, digest=ManifestDigest(sha256(raw)))

    a.store.rewrite(forge)
    reasons = ("malformed", "wrong_network", "untrusted_producer", "bad_signature", "from_the_future")
    await refused(a, b, *reasons)


@pytest.mark.parametrize("position", [0, 16, 31, 32 * 64 * 32 // 2, -1])
async def test_a_flipped_bit_in_the_digest_table_is_refused_and_charged(pair: Pair, position: int) -> None:
    a, b = await pair.start(Tampered)
    assert isinstance(a.store, Tampered)
    a.store.on_record = lambda r: dataclasses.replace(r, digests=flip(r.digests, position % len(r.digests)))
    await refused(a, b, "bad_proof")


@pytest.mark.parametrize("position", [0, 1, 24, 47])
async def test_a_flipped_bit_in_the_proof_is_refused_and_charged(pair: Pair, position: int) -> None:
    a, b = await pair.start(Tampered)
    assert isinstance(a.store, Tampered)
    a.store.on_record = lambda record: dataclasses.replace(record, proof=flip(record.proof, position))
    await refused(a, b, "bad_proof")


async def test_a_table_of_another_size_is_refused_and_charged(pair: Pair) -> None:
    a, b = await pair.start(Tampered)
    assert isinstance(a.store, Tampered)
    a.store.on_record = lambda record: dataclasses.replace(record, digests=record.digests[:-32])
    await refused(a, b, "malformed")


@pytest.mark.parametrize("length", [1 << 63, 1 << 40, 0])
async def test_a_manifest_that_claims_an_absurd_length_reserves_nothing(pair: Pair, length: int) -> None:
    a, b = await pair.start(Tampered)
    assert isinstance(a.store, Tampered)

    def claim(record: ObjectRecord) -> ObjectRecord:
        rows = tuple(dataclasses.replace(row, length=length) for row in record.manifest.rows)
        return signed_by(dataclasses.replace(record.manifest, rows=rows), a.identity.signing_key, record)

    a.store.rewrite(claim)
    await refused(a, b, "malformed")
    assert b.arena.free_bytes == b.arena.capacity_bytes


async def test_a_row_of_another_length_or_name_than_asked_for_is_refused(pair: Pair) -> None:
    a, b = await pair.start(Tampered)
    assert isinstance(a.store, Tampered)

    def shorten(record: ObjectRecord) -> ObjectRecord:
        manifest, row_keys = record.manifest, keys_by_id()
        rows = []
        for number, row in enumerate(manifest.rows):
            tag = manifest.tag_of(row_keys[row.row_id], row.length - 1, record.row_digests(number))
            rows.append(dataclasses.replace(row, length=row.length - 1, tag=tag))
        return signed_by(dataclasses.replace(manifest, rows=tuple(rows)), a.identity.signing_key, record)

    a.store.rewrite(shorten)
    answer = await b.look_up(KEYS)
    assert answer.end_segment == 0
    assert b.transport.charges[a.identity.peer_id, Reason.FALSE_OFFER]


async def test_a_flipped_bit_in_a_signed_tag_is_refused_and_its_producer_charged(pair: Pair) -> None:
    a, b = await pair.start(Tampered)
    assert isinstance(a.store, Tampered)

    def mistag(record: ObjectRecord) -> ObjectRecord:
        first, *others = record.manifest.rows
        rows = (dataclasses.replace(first, tag=flip(first.tag, 15)), *others)
        return signed_by(dataclasses.replace(record.manifest, rows=rows), a.identity.signing_key, record)

    a.store.rewrite(mistag)
    answer = await b.look_up(KEYS)
    assert answer.end_segment == 0
    assert b.transport.charges[a.identity.peer_id, Reason.BAD_TAG]
    assert not b.metrics.bytes_total.labels("fetched")._value.get(), "no chunk was asked for"


async def test_a_producer_that_is_not_trusted_counts_for_nothing(pair: Pair) -> None:
    a, b = await pair.start(Tampered)
    assert isinstance(a.store, Tampered)
    stranger = SigningKey(bytes(31) + b"s")

    def claim(record: ObjectRecord) -> ObjectRecord:
        manifest = dataclasses.replace(record.manifest, producer=stranger.verify_key.encode())
        return signed_by(manifest, stranger, record)

    a.store.rewrite(claim)
    answer = await b.look_up(KEYS)
    assert answer.end_segment == 0
    assert answer.after_s < FAULT_S
    assert b.failures()["untrusted_producer"]


async def test_chunks_that_are_no_codeword_condemn_their_object(pair: Pair) -> None:
    a, b = await pair.start(Tampered)
    assert isinstance(a.store, Tampered)
    # A itself signs a non-codeword: every chunk verifies, but the row can't be rebuilt from them.
    layout, name = Layout(bytes(32), 256, (Part(0, 60_000),), 1), keys("bad", 1)
    chunk_bytes, row = 2304, row_key(name[0], 0, 0)
    chunks = [bytes([column]) * chunk_bytes for column in range(TOTAL_CHUNKS)]
    digests = b"".join(chunk_digest(chunk) for chunk in chunks)
    commitment, proof = await pair.pool.commit(digest_blob(digests, 1))
    record = sign_record(
        a.identity.signing_key,
        NETWORK,
        bytes(32),
        chunk_bytes,
        bytes(12),
        ((row, 60_000),),
        digests,
        commitment,
        proof,
        0,
    )
    a.store.put_columns(record, 0, {column: memoryview(chunk) for column, chunk in enumerate(chunks)})
    a.store.lost = frozenset({3})
    answer = await b.look_up(name, layout)
    assert answer.end_segment == 0
    assert b.failures()["condemned"]
    assert b.store.record(record.digest) is None
    assert (await b.look_up(name, layout)).end_segment == 0
