"""A CacheProof says who computed what when, and nothing else passes for one."""

import hashlib
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import SigningKey

from hyperspace_vllm.core.records.errors import ProtocolViolation, Refused
from hyperspace_vllm.core.records.ids import RequestKey, network_id
from hyperspace_vllm.core.records.limits import CLOCK_SKEW_MS, RESPONSE_TTL_MS
from hyperspace_vllm.core.response.cache_proof import (
    PROOF_BYTES_MAX,
    check_proof,
    decode_proof,
    make_proof,
    request_hash,
)
from tests.support.paths import VECTORS

VECTOR = json.loads((VECTORS / "cache_proof.json").read_text())
NETWORK = network_id("test")
KEY = RequestKey(bytes([7]) * 32)
MODEL = bytes([8]) * 32
SIGNER = SigningKey(bytes([9]) * 32)
TRUSTED = frozenset({SIGNER.verify_key.encode()}).__contains__
BODY = b'{"id":"cmpl-1"}'
NOW_MS = 1_800_000_000_000
PROOF = make_proof(SIGNER, NETWORK, KEY, BODY, MODEL, "vllm 0.32.0", NOW_MS)
HASH = request_hash(NETWORK, KEY)


def test_a_proof_verifies_after_a_trip_over_the_wire() -> None:
    check_proof(decode_proof(PROOF.encode()), HASH, BODY, MODEL, TRUSTED, NOW_MS)


STRANGER = SigningKey(bytes([1]) * 32)
REFUSALS = [
    ("wrong_request", {"expected_request_hash": request_hash(network_id("other"), KEY)}),
    ("wrong_model", {"model_digest": bytes(32)}),
    ("wrong_response", {"body": BODY + b" "}),
    ("untrusted_signer", {"trusts": frozenset({STRANGER.verify_key.encode()}).__contains__}),
    ("from_the_future", {"wall_ms": NOW_MS - CLOCK_SKEW_MS - 1}),
    ("expired", {"wall_ms": NOW_MS + RESPONSE_TTL_MS}),
    ("bad_signature", {"proof": replace(PROOF, computed_at_ms=NOW_MS + 1)}),
    ("bad_signature", {"proof": replace(PROOF, engine_version="vllm 0.33.0")}),
    ("bad_signature", {"proof": replace(PROOF, signature=bytes(64))}),
    (
        "bad_signature",
        {
            "proof": replace(PROOF, signer=STRANGER.verify_key.encode()),
            "trusts": frozenset({STRANGER.verify_key.encode()}).__contains__,
        },
    ),
]


@pytest.mark.parametrize(("reason", "change"), REFUSALS)
def test_a_refusal_names_its_reason(reason: str, change: dict[str, object]) -> None:
    arguments: dict[str, object] = {
        "proof": PROOF,
        "expected_request_hash": HASH,
        "body": BODY,
        "model_digest": MODEL,
        "trusts": TRUSTED,
        "wall_ms": NOW_MS,
    }
    with pytest.raises(Refused) as refused:
        check_proof(**(arguments | change))  # type: ignore[arg-type]
    assert refused.value.reason == reason


def test_a_proof_holds_for_a_skewed_clock_and_until_the_last_millisecond() -> None:
    for now_ms in (NOW_MS - CLOCK_SKEW_MS, NOW_MS + RESPONSE_TTL_MS - 1):
        check_proof(PROOF, HASH, BODY, MODEL, TRUSTED, now_ms)


def test_every_flipped_bit_is_refused() -> None:
    raw = PROOF.encode()
    for at in range(len(raw)):
        damaged = raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
        with pytest.raises((ProtocolViolation, Refused)):
            check_proof(decode_proof(damaged), HASH, BODY, MODEL, TRUSTED, NOW_MS)


@given(st.binary(max_size=PROOF_BYTES_MAX + 8))
def test_any_bytes_are_a_proof_or_a_violation(raw: bytes) -> None:
    try:
        proof = decode_proof(raw)
    except ProtocolViolation:
        return
    assert proof.encode() == raw


def test_a_long_engine_version_is_cut() -> None:
    proof = make_proof(SIGNER, NETWORK, KEY, BODY, MODEL, "é" * 200, NOW_MS)
    assert len(proof.encode()) <= PROOF_BYTES_MAX
    check_proof(decode_proof(proof.encode()), HASH, BODY, MODEL, TRUSTED, NOW_MS)


def test_proofs_match_the_published_vector() -> None:
    key, model = RequestKey(bytes.fromhex(VECTOR["request_key"])), bytes.fromhex(VECTOR["model_digest"])
    signing_key, body = SigningKey(bytes.fromhex(VECTOR["signing_seed"])), VECTOR["body"].encode()
    network, at_ms = network_id(VECTOR["network"]), VECTOR["computed_at_ms"]
    proof = make_proof(signing_key, network, key, body, model, VECTOR["engine_version"], at_ms)
    assert proof.encode().hex() == VECTOR["proof"]

    # The slow twin: docs/protocol.md, written out.
    def sha256(*parts: bytes) -> bytes:
        return hashlib.sha256(b"".join(parts)).digest()

    tag, at, version = b"hyperspace/cache-proof/1", at_ms.to_bytes(8, "big"), VECTOR["engine_version"].encode()
    request = sha256(b"id", network, key)
    signer = signing_key.verify_key.encode()
    proof_hash = sha256(tag, request, sha256(body), at, model, signer, sha256(version))
    integrity = sha256(request, sha256(body), proof_hash, at)
    assert proof_hash.hex() == VECTOR["proof_hash"]
    assert integrity.hex() == VECTOR["integrity"]
    signing_key.verify_key.verify(tag + integrity, proof.signature)
    length = len(version).to_bytes(2, "big")
    assert proof.encode() == request + sha256(body) + at + model + signer + length + version + proof.signature
