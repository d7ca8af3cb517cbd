"""A response between two nodes: what an honest peer serves opens, whatever anybody else makes of it is refused."""

import hmac
import json
from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.bindings import crypto_aead_chacha20poly1305_ietf_encrypt
from nacl.signing import SigningKey

from hyperspace_vllm.core.records.errors import ProtocolViolation, Refused
from hyperspace_vllm.core.records.ids import RequestKey, network_id
from hyperspace_vllm.core.records.limits import CLOCK_SKEW_MS, RESPONSE_BYTES_MAX, RESPONSE_TTL_MS
from hyperspace_vllm.core.records.peer_wire import Hit, decode_answer, encode
from hyperspace_vllm.core.records.reason import Reason
from hyperspace_vllm.core.records.sealing import open_response, seal_key, seal_response
from hyperspace_vllm.core.records.signing import NO_MEMBER_TAG, member_tag
from hyperspace_vllm.core.response.cache_proof import make_proof
from hyperspace_vllm.core.response.sealed_hit import Opened, make_hit, open_hit
from tests.support.paths import VECTORS

NETWORK = network_id("test")
KEY, OTHER_KEY = RequestKey(bytes([7]) * 32), RequestKey(bytes([6]) * 32)
MODEL = bytes([8]) * 32
COMPUTER, STRANGER = SigningKey(bytes([9]) * 32), SigningKey(bytes([1]) * 32)
BODY = b'{"id":"cmpl-1"}'
NOW_MS = 1_800_000_000_000
PROOF = make_proof(COMPUTER, NETWORK, KEY, BODY, MODEL, "vllm 0.32.0", NOW_MS)
NONCE = bytes(range(12))
HIT = make_hit(KEY, NETWORK, NONCE, BODY, PROOF.encode(), NO_MEMBER_TAG, 16)


def trusts_computer(signer: bytes) -> bool:
    return signer == COMPUTER.verify_key.encode()


def nobody_meets(signer: bytes, tag: bytes) -> None:
    pass


def opened(
    hit: Hit,
    key: RequestKey = KEY,
    model: bytes = MODEL,
    trusts: Callable[[bytes], bool] = trusts_computer,
    meet: Callable[[bytes, bytes], object] = nobody_meets,
    now_ms: int = NOW_MS,
) -> Opened:
    return open_hit(hit, key, NETWORK, model, trusts, meet, now_ms)


def refusal(*args: object, **changes: object) -> str:
    with pytest.raises(Refused) as refused:
        opened(*args, **changes)  # type: ignore[arg-type]
    return refused.value.reason


def test_what_an_honest_peer_serves_opens_after_a_trip_over_the_wire() -> None:
    hit = decode_answer(encode(HIT))
    assert isinstance(hit, Hit)
    assert opened(hit) == Opened(BODY, PROOF, PROOF.encode(), NOW_MS + RESPONSE_TTL_MS)


def test_serving_it_on_keeps_the_proof_and_the_end_of_its_life() -> None:
    first = opened(HIT, now_ms=NOW_MS + 1000)
    again = make_hit(KEY, NETWORK, bytes(12), first.body, first.raw_proof, NO_MEMBER_TAG, 0)
    assert opened(again, now_ms=NOW_MS + RESPONSE_TTL_MS - 1) == first
    assert refusal(again, now_ms=NOW_MS + RESPONSE_TTL_MS) == "expired"


def test_an_answer_to_another_request_is_refused_under_either_key() -> None:
    """Replayed as it is, or sealed anew by a peer that knows both prompts."""
    assert refusal(HIT, key=OTHER_KEY) == "wrong_request"
    resealed = make_hit(OTHER_KEY, NETWORK, NONCE, BODY, PROOF.encode(), NO_MEMBER_TAG, 0)
    assert refusal(resealed, key=OTHER_KEY) == "wrong_request"


def test_a_seal_of_another_body_proof_nonce_or_network_does_not_open() -> None:
    later = make_proof(COMPUTER, NETWORK, KEY, BODY, MODEL, "vllm 0.32.0", NOW_MS - 1)
    elsewhere = seal_response(KEY, network_id("other"), NONCE, BODY, PROOF.encode())
    for hit in (
        replaced(HIT, proof=later.encode()),
        replaced(HIT, nonce=bytes(12)),
        replaced(HIT, sealed=elsewhere),
        replaced(HIT, sealed=b""),
        replaced(HIT, sealed=bytes(len(HIT.sealed))),
    ):
        assert refusal(hit) == "bad_seal"


def test_another_body_under_a_true_proof_is_refused() -> None:
    assert refusal(make_hit(KEY, NETWORK, NONCE, BODY + b" ", PROOF.encode(), NO_MEMBER_TAG, 0)) == "wrong_response"


@pytest.mark.parametrize(
    "forged",
    [
        replace(PROOF, signature=bytes(64)),
        replace(PROOF, computed_at_ms=NOW_MS + 1),
        replace(PROOF, engine_version="vllm 0.33.0"),
        replace(PROOF, signer=STRANGER.verify_key.encode()),
        replace(PROOF, signer=b"\xff" * 32),
    ],
)
def test_a_forged_proof_is_refused(forged: object) -> None:
    raw = forged.encode()  # type: ignore[attr-defined]
    hit = make_hit(KEY, NETWORK, NONCE, BODY, raw, NO_MEMBER_TAG, 0)
    assert refusal(hit, trusts=lambda signer: True) == "bad_signature"


@pytest.mark.parametrize(
    ("age_ms", "reason"),
    [
        (-CLOCK_SKEW_MS - 1, "from_the_future"),
        (RESPONSE_TTL_MS, "expired"),
        (RESPONSE_TTL_MS + 2 * CLOCK_SKEW_MS - 1, "expired"),
        (RESPONSE_TTL_MS + 2 * CLOCK_SKEW_MS, "long_expired"),
        (1 << 62, "long_expired"),
    ],
)
def test_what_is_too_old_or_too_new_is_refused(age_ms: int, reason: str) -> None:
    assert refusal(HIT, now_ms=NOW_MS + age_ms) == reason


def test_a_proof_holds_within_the_skew_and_to_its_last_millisecond() -> None:
    for now_ms in (NOW_MS - CLOCK_SKEW_MS, NOW_MS + RESPONSE_TTL_MS - 1):
        assert opened(HIT, now_ms=now_ms).expires_at_ms == NOW_MS + RESPONSE_TTL_MS


def test_another_model_is_refused() -> None:
    assert refusal(HIT, model=bytes(32)) == "wrong_model"


def test_an_oversized_body_is_refused_before_it_is_opened() -> None:
    largest, too_large = bytes(RESPONSE_BYTES_MAX), bytes(RESPONSE_BYTES_MAX + 1)
    proof = make_proof(COMPUTER, NETWORK, KEY, largest, MODEL, "v", NOW_MS)
    assert opened(make_hit(KEY, NETWORK, NONCE, largest, proof.encode(), NO_MEMBER_TAG, 0)).body == largest
    proof = make_proof(COMPUTER, NETWORK, KEY, too_large, MODEL, "v", NOW_MS)
    hit = make_hit(KEY, NETWORK, NONCE, too_large, proof.encode(), NO_MEMBER_TAG, 0)
    assert refusal(hit) == "too_large"
    with pytest.raises(ProtocolViolation):
        decode_answer(encode(hit))


def test_no_proof_is_a_violation() -> None:
    for raw in (b"", PROOF.encode()[:-1], PROOF.encode() + b"\0", bytes(201)):
        with pytest.raises(ProtocolViolation):
            opened(replaced(HIT, proof=raw))


def test_only_who_is_trusted_counts() -> None:
    assert refusal(HIT, trusts=lambda signer: False) == "untrusted_signer"


def test_a_member_tag_is_heard_of_before_trust_is_asked() -> None:
    """A signer that left before this node joined counts as a member when a member vouches for it."""
    secret, signer = bytes([3]) * 32, COMPUTER.verify_key.encode()
    met: set[bytes] = set()

    def meet(public_key: bytes, tag: bytes) -> None:
        if tag == member_tag(secret, public_key):
            met.add(public_key)

    for tag in (NO_MEMBER_TAG, member_tag(secret, STRANGER.verify_key.encode())):
        assert refusal(replaced(HIT, member=tag), trusts=met.__contains__, meet=meet) == "untrusted_signer"
    vouched = replaced(HIT, member=member_tag(secret, signer))
    assert opened(vouched, trusts=met.__contains__, meet=meet).body == BODY
    assert met == {signer}


def test_nobody_is_met_for_the_sake_of_an_answer_that_cannot_hold() -> None:
    def meet(signer: bytes, tag: bytes) -> None:
        raise AssertionError

    assert refusal(HIT, key=OTHER_KEY, meet=meet) == "wrong_request"
    assert refusal(HIT, now_ms=NOW_MS + RESPONSE_TTL_MS, meet=meet) == "expired"


def test_the_seal_is_opened_last() -> None:
    """Opening 8 MiB costs a hundred times what all other checks do."""
    broken = replaced(HIT, sealed=bytes(64))
    assert refusal(broken, trusts=lambda signer: False) == "untrusted_signer"
    forged = replaced(broken, proof=replace(PROOF, signature=bytes(64)).encode())
    assert refusal(forged) == "bad_signature"


def test_what_honest_peers_can_differ_in_is_no_lie() -> None:
    assert not any(Reason(label).is_guilty for label in ("untrusted_signer", "expired", "from_the_future"))


@settings(deadline=None)
@given(at=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_no_flipped_bit_gives_another_response(at: int, bit: int) -> None:
    raw = bytearray(encode(HIT))
    raw[at % len(raw)] ^= 1 << bit
    try:
        hit = decode_answer(bytes(raw))
        assert not isinstance(hit, Hit) or opened(hit).body == BODY
    except (ProtocolViolation, Refused):
        pass


def test_sealed_responses_match_the_published_vectors() -> None:
    vectors = json.loads((VECTORS / "sealed_response.json").read_text())
    assert len(vectors) >= 3
    for vector in vectors:
        network, key = network_id(vector["network"]), RequestKey(bytes.fromhex(vector["request_key"]))
        body, proof = bytes.fromhex(vector["body"]), bytes.fromhex(vector["proof"])
        nonce, member = bytes.fromhex(vector["nonce"]), bytes.fromhex(vector["member"])
        hit = make_hit(key, network, nonce, body, proof, member, vector["popularity"])
        assert seal_key(key, network).hex() == vector["seal_key"]
        assert hit.sealed.hex() == vector["sealed"]
        frame = encode(hit)
        assert (len(frame).to_bytes(4, "big") + frame).hex() == vector["frame"]
        assert open_response(key, network, nonce, hit.sealed, proof) == body
        signer = bytes.fromhex(vector["signer"])
        assert member_tag(bytes.fromhex(vector["network_key"]), signer) == member

        # The twin: docs/protocol.md, written out, with libsodium's cipher.
        extracted = hmac.digest(bytes(32), key, "sha256")
        derived = hmac.digest(extracted, b"seal" + network + b"\x01", "sha256")
        assert derived == seal_key(key, network)
        assert crypto_aead_chacha20poly1305_ietf_encrypt(body, proof, nonce, derived) == hit.sealed

        result = open_hit(
            hit, key, network, bytes.fromhex(vector["model_digest"]), signer.__eq__, nobody_meets, vector["now_ms"]
        )
        assert result.body == body
        assert result.expires_at_ms == vector["expires_at_ms"]


def replaced(hit: Hit, **changes: object) -> Hit:
    return msgspec.structs.replace(hit, **changes)
