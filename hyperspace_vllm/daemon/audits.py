"""What API servers found out about other nodes' responses: false ones leave the database, their signers are blamed."""

from collections.abc import Callable
from typing import Protocol

from ..core.node.network_events import FalseAnswer
from ..core.records.errors import ProtocolViolation, Refused
from ..core.records.ids import NetworkId, RequestKey
from ..core.records.local import ResponseAudited
from ..core.response.cache_proof import CacheProof, check_signature, decode_proof, request_hash
from ..core.response.evidence import evidence_of, verdict
from .metrics import Metrics


class Droppable(Protocol):
    """Where responses lie (ResponseStore)."""

    def drop(self, raw_proof: bytes, all_of_signer: bool) -> bool:
        """Delete what holds this very proof, or everything of its signer; never blocks."""


class Audits:
    """`blame` hears of signers to be suspected or convicted, never of this node itself."""

    def __init__(
        self,
        network: NetworkId,
        own_key: bytes,
        store: Droppable | None,
        blame: Callable[[FalseAnswer], None],
        metrics: Metrics,
    ) -> None:
        self._network = network
        self._own_key = own_key
        self._store = store
        self._blame = blame
        self._metrics = metrics

    def heard(self, audit: ResponseAudited) -> None:
        """Act on an audit; `ProtocolViolation` if nobody can have made it so."""
        proof = self._proof_of(audit)
        own = proof.signer == self._own_key  # of an earlier engine, and now back from a peer: no lie
        result = "dropped" if own and audit.far else verdict(audit.far)
        self._metrics.audits_total.labels(result).inc()
        if result == "passed":
            return
        if self._store is not None:
            self._store.drop(audit.proof, all_of_signer=result == "lie")
        if not own:
            self._blame(FalseAnswer(evidence_of(proof, audit.tokens, audit.far)))

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
