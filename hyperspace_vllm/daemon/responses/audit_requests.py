"""API servers' audits of other nodes' responses: false ones are deleted, and all responses of convicted signers."""

from collections.abc import Callable
from typing import Protocol

from ...core.events.conduct import AnswerAudited
from ...core.local.response_cache_messages import ResponseAudited
from ...core.records.errors import ProtocolViolation, Refused
from ...core.records.ids import NetworkId, RequestKey
from ...core.response.cache_proof import CacheProof, check_signature, decode_proof, request_hash
from ...core.response.evidence import evidence_of, verdict
from ..metrics import Metrics


class Droppable(Protocol):
    """The store of responses (ResponseStore)."""

    def drop(self, raw_proof: bytes, all_of_signer: bool) -> bool:
        """Delete the entry with this proof, or all entries of its signer; never blocks."""


class AuditRequests:
    """`audited` is called with the audits of other signers, and returns whether one is convicted."""

    def __init__(
        self,
        network: NetworkId,
        own_key: bytes,
        store: Droppable | None,
        audited: Callable[[AnswerAudited], bool],
        metrics: Metrics,
    ) -> None:
        self._network = network
        self._own_key = own_key
        self._store = store
        self._audited = audited
        self._metrics = metrics

    def heard(self, audit: ResponseAudited) -> None:
        """Act on an audit; `ProtocolViolation` if its fields contradict each other."""
        proof = self._proof_of(audit)
        own = proof.signer == self._own_key  # of an earlier engine, and now back from a peer: no lie
        result = "dropped" if own and audit.far else verdict(audit.far)
        self._metrics.audits_total.labels(result).inc()
        convicted = False
        if not own:
            convicted = self._audited(AnswerAudited(evidence_of(proof, audit.tokens, audit.far), audit.source))
        if self._store is not None and result != "passed":
            self._store.drop(audit.proof, all_of_signer=convicted)

    def _proof_of(self, audit: ResponseAudited) -> CacheProof:
        proof = decode_proof(audit.proof)
        if audit.far > audit.tokens:
            raise ProtocolViolation(f"audit far {audit.far}: of {audit.tokens} tokens")
        if proof.request_hash != request_hash(self._network, RequestKey(audit.request_key)):
            raise ProtocolViolation("audit proof: of another request")
        try:
            check_signature(proof.signer, proof.integrity, proof.signature)
        except Refused as refused:
            raise ProtocolViolation(f"audit proof: {refused.reason}") from refused
        return proof
