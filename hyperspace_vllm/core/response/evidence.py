"""The verdict of an audit of another node's answer, and the evidence of a lie for other nodes (announcement kind 3).

In an audit this node's engine scores prompt and answer. In a greedy answer of the model no token is far from the
arg-max, except perhaps one, because tokenising the text again does not always give the generated tokens.
"""

from ..peers.trust import Verdict
from ..records.announcement import EvidenceEntry
from ..records.errors import Refused
from ..records.limits import CLOCK_SKEW_MS, RESPONSE_TTL_MS
from .cache_proof import CacheProof, check_signature, integrity_of

FAR_LIE_MIN = 2


def verdict(far: int) -> Verdict:
    """The verdict on an answer with this number of far tokens: `dropped` deletes the entry and leaves a suspicion."""
    if far >= FAR_LIE_MIN:
        return "lie"
    return "dropped" if far else "passed"


def evidence_of(proof: CacheProof, tokens: int, far: int) -> EvidenceEntry:
    """The part of `proof` that its signature covers, and the audit's counts."""
    hashes = proof.signer, proof.request_hash, proof.response_hash, proof.proof_hash
    return EvidenceEntry(*hashes, proof.computed_at_ms, proof.signature, tokens, far)


def check_evidence(entry: EvidenceEntry, wall_ms: int) -> None:
    """Raise `Refused` unless it is about a lie in a statement that the accused signed and that has not expired."""
    if verdict(entry.far) != "lie" or entry.far > entry.tokens:
        raise Refused("no_lie", f"{entry.far} of {entry.tokens}")
    if entry.computed_at_ms > wall_ms + CLOCK_SKEW_MS:
        raise Refused("from_the_future")
    if entry.computed_at_ms + RESPONSE_TTL_MS <= wall_ms:
        raise Refused("expired")
    integrity = integrity_of(entry.request_hash, entry.response_hash, entry.proof_hash, entry.computed_at_ms)
    check_signature(entry.signer, integrity, entry.signature)
