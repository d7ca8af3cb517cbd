"""What an audit of another node's answer means, and the evidence of a lie that other nodes hear (announcement kind 3).

An audit has this node's engine score prompt and answer. Of a greedy answer that the model gave, no token is far from
the arg-max; a single one may be, because text that is tokenised again isn't always cut as it was generated.
"""

from ..peers.trust import Verdict
from ..records.announcement import EvidenceEntry
from ..records.errors import Refused
from ..records.limits import CLOCK_SKEW_MS, RESPONSE_TTL_MS
from .cache_proof import CacheProof, check_signature, integrity_of

FAR_LIE_MIN = 2


def verdict(far: int) -> Verdict:
    """By how many tokens were far from the arg-max: `dropped` takes the entry away and leaves a suspicion."""
    if far >= FAR_LIE_MIN:
        return "lie"
    return "dropped" if far else "passed"


def evidence_of(proof: CacheProof, tokens: int, far: int) -> EvidenceEntry:
    """As much of `proof` as its signature covers, and what the audit counted."""
    hashes = proof.signer, proof.request_hash, proof.response_hash, proof.proof_hash
    return EvidenceEntry(*hashes, proof.computed_at_ms, proof.signature, tokens, far)


def check_evidence(entry: EvidenceEntry, wall_ms: int) -> None:
    """Raise `Refused` unless it tells of a lie in a statement that the accused signed, and that others may have yet."""
    if verdict(entry.far) != "lie" or entry.far > entry.tokens:
        raise Refused("no_lie", f"{entry.far} of {entry.tokens}")
    if entry.computed_at_ms > wall_ms + CLOCK_SKEW_MS:
        raise Refused("from_the_future")
    if entry.computed_at_ms + RESPONSE_TTL_MS <= wall_ms:
        raise Refused("expired")
    integrity = integrity_of(entry.request_hash, entry.response_hash, entry.proof_hash, entry.computed_at_ms)
    check_signature(entry.signer, integrity, entry.signature)
