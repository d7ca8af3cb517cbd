"""CacheProof: the signed statement on a response, with which any node can serve it and the receiver can check it.

    proof       = request hash 32 | response hash 32 | computed at u64 ms | model digest 32 | signer 32
                  | version length u16 | engine version | signature 64
    proof hash  = SHA-256(tag | request hash | response hash | computed at | model digest | signer
                  | SHA-256(engine version))
    integrity   = SHA-256(request hash | response hash | proof hash | computed at)
    signature   = Ed25519(tag | integrity)

All integers are big-endian. The request hash is the id that travels for the RequestKey, bound to the network; the
response hash is SHA-256 of the stored body, not of a rendering of it. Both inner hashes are recomputed, never sent.
"""

from collections.abc import Callable
from dataclasses import dataclass

from nacl.signing import SigningKey

from ..records.errors import ProtocolViolation, Refused
from ..records.ids import NetworkId, RequestKey, sha256, wire_id
from ..records.limits import CACHE_PROOF_BYTES_MAX, CLOCK_SKEW_MS, RESPONSE_TTL_MS
from ..records.signing import SIGNATURE_BYTES, sign, verify

_TAG = b"hyperspace/cache-proof/1"
_HEAD_BYTES = 32 + 32 + 8 + 32 + 32 + 2
ENGINE_VERSION_BYTES_MAX = 256
PROOF_BYTES_MAX = _HEAD_BYTES + ENGINE_VERSION_BYTES_MAX + SIGNATURE_BYTES

assert PROOF_BYTES_MAX <= CACHE_PROOF_BYTES_MAX


@dataclass(frozen=True, slots=True)
class CacheProof:
    """Statement by `signer` (Ed25519 public key): this model gave this response at `computed_at_ms`."""

    request_hash: bytes
    response_hash: bytes
    computed_at_ms: int
    model_digest: bytes
    signer: bytes
    engine_version: str
    signature: bytes

    @property
    def proof_hash(self) -> bytes:
        """SHA-256 over every field but the signature."""
        return _proof_hash(self)

    @property
    def integrity(self) -> bytes:
        """What is signed: SHA-256(request hash | response hash | proof hash | computed at)."""
        return integrity_of(self.request_hash, self.response_hash, self.proof_hash, self.computed_at_ms)

    def encode(self) -> bytes:
        """The one byte string of this proof."""
        version = self.engine_version.encode()
        return b"".join(
            (
                self.request_hash,
                self.response_hash,
                self.computed_at_ms.to_bytes(8, "big"),
                self.model_digest,
                self.signer,
                len(version).to_bytes(2, "big"),
                version,
                self.signature,
            )
        )


def request_hash(network: NetworkId, key: RequestKey) -> bytes:
    """The id that stands for `key` in proofs, on the wire, in the DHT and in gossip."""
    return wire_id(network, key)


def make_proof(
    signing_key: SigningKey,
    network: NetworkId,
    key: RequestKey,
    body: bytes,
    model_digest: bytes,
    engine_version: str,
    computed_at_ms: int,
) -> CacheProof:
    """Sign that `body` is this node's answer. A longer engine version than 256 bytes is cut."""
    assert len(model_digest) == 32
    version = engine_version.encode()[:ENGINE_VERSION_BYTES_MAX].decode(errors="ignore")
    signer = signing_key.verify_key.encode()
    unsigned = CacheProof(request_hash(network, key), sha256(body), computed_at_ms, model_digest, signer, version, b"")
    signature = sign(signing_key, _TAG, unsigned.integrity)
    return CacheProof(
        unsigned.request_hash,
        unsigned.response_hash,
        computed_at_ms,
        model_digest,
        signer,
        version,
        signature,
    )


def decode_proof(raw: bytes) -> CacheProof:
    """The proof in `raw`; `ProtocolViolation` names what is wrong. Nothing is believed yet."""
    if not _HEAD_BYTES + SIGNATURE_BYTES <= len(raw) <= PROOF_BYTES_MAX:
        raise ProtocolViolation(f"cache proof: {len(raw)} bytes, expected at most {PROOF_BYTES_MAX}")
    version_bytes = int.from_bytes(raw[_HEAD_BYTES - 2 : _HEAD_BYTES], "big")
    if len(raw) != _HEAD_BYTES + version_bytes + SIGNATURE_BYTES:
        raise ProtocolViolation(f"cache proof version length {version_bytes}: doesn't match {len(raw)} bytes")
    try:
        version = raw[_HEAD_BYTES : _HEAD_BYTES + version_bytes].decode()
    except UnicodeDecodeError as error:
        raise ProtocolViolation("cache proof engine version: expected UTF-8") from error
    return CacheProof(
        raw[:32],
        raw[32:64],
        int.from_bytes(raw[64:72], "big"),
        raw[72:104],
        raw[104:136],
        version,
        raw[-SIGNATURE_BYTES:],
    )


def check_proof(
    proof: CacheProof,
    expected_request_hash: bytes,
    body: bytes,
    model_digest: bytes,
    trusts: Callable[[bytes], bool],
    wall_ms: int,
) -> None:
    """Raise `Refused` unless a trusted signer states, not in the future nor over 24 h ago, that `body` answers this.

    The check does not ask the signer, so a proof verifies after its signer has left.
    """
    check_statement(proof, expected_request_hash, model_digest, trusts, wall_ms)
    check_body(proof, body)


def check_statement(
    proof: CacheProof,
    expected_request_hash: bytes,
    model_digest: bytes,
    trusts: Callable[[bytes], bool],
    wall_ms: int,
) -> None:
    """The part of `check_proof` that needs no body. `trusts(signer)` is called before the signature is checked."""
    if proof.request_hash != expected_request_hash:
        raise Refused("wrong_request")
    if proof.model_digest != model_digest:
        raise Refused("wrong_model")
    if proof.computed_at_ms > wall_ms + CLOCK_SKEW_MS:
        raise Refused("from_the_future", str(proof.computed_at_ms))
    if proof.computed_at_ms + RESPONSE_TTL_MS <= wall_ms:
        raise Refused("expired", str(proof.computed_at_ms))
    if not trusts(proof.signer):
        raise Refused("untrusted_signer", proof.signer.hex())
    check_signature(proof.signer, proof.integrity, proof.signature)


def check_signature(signer: bytes, integrity: bytes, signature: bytes) -> None:
    """Raise `Refused("bad_signature")` unless `signer` signed the proof of this integrity."""
    verify(signer, _TAG, integrity, signature)


def integrity_of(request_hash: bytes, response_hash: bytes, proof_hash: bytes, computed_at_ms: int) -> bytes:
    """What is signed, from the hashes alone: SHA-256(request hash | response hash | proof hash | computed at)."""
    return sha256(request_hash, response_hash, proof_hash, computed_at_ms.to_bytes(8, "big"))


def check_body(proof: CacheProof, body: bytes) -> None:
    """Raise `Refused` unless `body` is what the proof is about."""
    if proof.response_hash != sha256(body):
        raise Refused("wrong_response")


def _proof_hash(proof: CacheProof) -> bytes:
    return sha256(
        _TAG,
        proof.request_hash,
        proof.response_hash,
        proof.computed_at_ms.to_bytes(8, "big"),
        proof.model_digest,
        proof.signer,
        sha256(proof.engine_version.encode()),
    )
