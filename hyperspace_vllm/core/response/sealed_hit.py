"""A response on its way between two nodes: the server seals it into a Hit, the requester opens and checks it.

A Hit is not trusted because of its sender. Only a node that knows the RequestKey can have sealed it, and only the
CacheProof's signer can have stated that this is the answer; the sender may be a relay that can read neither.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ..records.errors import Refused
from ..records.ids import NetworkId, RequestKey
from ..records.limits import CLOCK_SKEW_MS, RESPONSE_TTL_MS
from ..records.peer_wire import SEALED_BYTES_MAX, Hit
from ..records.sealing import open_response, seal_response
from .cache_proof import CacheProof, check_body, check_statement, decode_proof, request_hash

# Two clocks in a network differ by less than one skew, and an answer travels for less than the second one.
_LONG_EXPIRED_MS = RESPONSE_TTL_MS + 2 * CLOCK_SKEW_MS


@dataclass(frozen=True, slots=True)
class Opened:
    """A verified response. `raw_proof` is the proof to serve on; the copy expires with its original."""

    body: bytes
    proof: CacheProof
    raw_proof: bytes
    expires_at_ms: int


def make_hit(
    key: RequestKey, network: NetworkId, nonce: bytes, body: bytes, proof: bytes, member: bytes, popularity: int
) -> Hit:
    """The Hit that a node serves: `body` sealed under `key`, with the encoded CacheProof that it received or made.

    `nonce` is 12 new random bytes, `member` the tag that proves the membership of the proof's signer, or zeros.
    """
    return Hit(nonce, seal_response(key, network, nonce, body, proof), proof, member, popularity)


def open_hit(
    hit: Hit,
    key: RequestKey,
    network: NetworkId,
    model_digest: bytes,
    trusts: Callable[[bytes], bool],
    meet: Callable[[bytes, bytes], object],
    wall_ms: int,
) -> Opened:
    """The response in `hit`, or `Refused` or `ProtocolViolation`; cheap checks come first, the body last.

    `meet(signer, tag)` is called with the member tag of the proof's signer, before `trusts(signer)`.
    """
    return unseal_hit(hit, key, network, judge_hit(hit, key, network, model_digest, trusts, meet, wall_ms))


def judge_hit(
    hit: Hit,
    key: RequestKey,
    network: NetworkId,
    model_digest: bytes,
    trusts: Callable[[bytes], bool],
    meet: Callable[[bytes, bytes], object],
    wall_ms: int,
) -> CacheProof:
    """The first half of `open_hit`, without the body: 0.1 ms, in the thread that `trusts` and `meet` belong to."""

    if len(hit.sealed) > SEALED_BYTES_MAX:
        raise Refused("too_large", str(len(hit.sealed)))
    proof = decode_proof(hit.proof)
    if proof.computed_at_ms + _LONG_EXPIRED_MS <= wall_ms:
        raise Refused("long_expired", str(proof.computed_at_ms))

    def trusts_once_met(signer: bytes) -> bool:
        meet(signer, hit.member)
        return trusts(signer)

    check_statement(proof, request_hash(network, key), model_digest, trusts_once_met, wall_ms)
    return proof


def unseal_hit(hit: Hit, key: RequestKey, network: NetworkId, proof: CacheProof) -> Opened:
    """The second half of `open_hit`, for any thread: 1 ms for a MiB."""
    body = open_response(key, network, hit.nonce, hit.sealed, hit.proof)
    check_body(proof, body)
    return Opened(body, proof, hit.proof, proof.computed_at_ms + RESPONSE_TTL_MS)
