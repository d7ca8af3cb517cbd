"""How peers behave: rules that they break, and what audits find of what they signed."""

from dataclasses import dataclass
from typing import Literal

from ..records.announcement import EvidenceEntry
from ..records.ids import PeerId
from ..records.reason import Reason


@dataclass(frozen=True, slots=True)
class PeerMisbehaved:
    """A peer sent what the protocol forbids; the reader has logged what."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class AnswerAudited:
    """This node's own audit of another node's answer: in `evidence`, how many tokens this node's model does not choose.

    `source` names the client that asked for the answer; no client has two.
    """

    evidence: EvidenceEntry
    source: bytes


@dataclass(frozen=True, slots=True)
class ChargePeer:
    """A peer broke the protocol or lied to this layer: for metrics and the log. Not answered."""

    peer: PeerId
    reason: Reason
    layer: Literal["l1", "l2"] = "l1"
