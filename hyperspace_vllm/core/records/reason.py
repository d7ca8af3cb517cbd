"""Reasons why a peer did not deliver or is charged, each with its severity: the only such table.

A reason's value is its metric label. The code where a failure happens decides whether it is reported: a timeout is no
failure of a peer that had no time to answer.
"""

from enum import Enum, StrEnum

from .errors import Refused


class Severity(Enum):
    """The weight of a failure. A lie is counted separately: no number of deliveries makes up for it."""

    NONE = 0.0  # this node's own failure, or one that honest peers have too: outdated hints, different lists
    BUSY = 0.25
    FAILURE = 1.0
    RUDE = 10.0  # it broke the protocol: a bug is as likely as malice
    LIE = float("inf")  # it takes intent, or a broken disk, which is no more trustworthy


class Reason(StrEnum):
    """The name of a failure, with its severity."""

    severity: Severity

    def __new__(cls, label: str, severity: Severity = Severity.NONE) -> "Reason":
        """A member; `Reason("busy")` finds it."""
        member = str.__new__(cls, label)
        member._value_ = label
        member.severity = severity
        return member

    # failures that honest peers have too
    MISS = "miss", Severity.NONE
    NOT_HERE = "not_here", Severity.NONE
    EVICTED = "evicted", Severity.NONE
    STRANGER = "stranger", Severity.NONE
    UNTRUSTED_SIGNER = "untrusted_signer", Severity.NONE
    UNTRUSTED_PRODUCER = "untrusted_producer", Severity.NONE
    CONDEMNED = "condemned", Severity.NONE  # the producer's fault: a holder passes the chunks on without reading them
    WRONG_NETWORK = "wrong_network", Severity.NONE
    BUSY = "busy", Severity.BUSY

    # this node's own failures
    BUG = "bug", Severity.NONE
    COMPUTE_BUSY = "compute_busy", Severity.NONE
    WORKER = "worker", Severity.NONE
    KZG_BUSY = "kzg_busy", Severity.NONE
    KZG_WORKER = "kzg_worker", Severity.NONE

    # the peer did not answer, or its answer has expired
    TIMEOUT = "timeout", Severity.FAILURE
    UNREACHABLE = "unreachable", Severity.FAILURE
    STALLED = "stalled", Severity.FAILURE
    TOO_SLOW = "too_slow", Severity.FAILURE
    IO_ERROR = "io_error", Severity.FAILURE
    EXPIRED = "expired", Severity.FAILURE  # clocks differ
    FROM_THE_FUTURE = "from_the_future", Severity.FAILURE

    PROTOCOL = "protocol", Severity.RUDE
    MALFORMED = "malformed", Severity.RUDE

    # an honest peer checks what it serves and relays, as this node does
    BAD_DIGEST = "bad_digest", Severity.LIE
    BAD_PROOF = "bad_proof", Severity.LIE
    BAD_SEAL = "bad_seal", Severity.LIE
    BAD_SIGNATURE = "bad_signature", Severity.LIE
    BAD_TAG = "bad_tag", Severity.LIE  # of the manifest's producer, not of its holder
    FALSE_OFFER = "false_offer", Severity.LIE
    FALSE_RESPONSE = "false_response", Severity.LIE  # found by an audit: of the signer, not of the peer that served it
    FORGED = "forged", Severity.LIE
    INVALID_GOSSIP = "invalid_gossip", Severity.LIE
    LONG_EXPIRED = "long_expired", Severity.LIE
    OTHER_NETWORK = "other_network", Severity.LIE
    TOO_LARGE = "too_large", Severity.LIE
    WRONG_MODEL = "wrong_model", Severity.LIE
    WRONG_REQUEST = "wrong_request", Severity.LIE
    WRONG_RESPONSE = "wrong_response", Severity.LIE
    REGISTRY_BAD_SIGNATURE = "registry_bad_signature", Severity.LIE
    REGISTRY_EQUIVOCATION = "registry_equivocation", Severity.LIE
    REGISTRY_MALFORMED = "registry_malformed", Severity.LIE
    REGISTRY_OTHER_NETWORK = "registry_other_network", Severity.LIE
    REGISTRY_TOO_LARGE = "registry_too_large", Severity.LIE

    @classmethod
    def of(cls, refused: Refused) -> "Reason":
        """The reason why a peer's answer or record was refused; ValueError if it is not about a peer."""
        return cls(refused.reason)

    @property
    def is_lie(self) -> bool:
        """Whether honest peers never cause it."""
        return self.severity is Severity.LIE

    @property
    def is_guilty(self) -> bool:
        """Whether the peer is charged: it lied, or broke the protocol."""
        return self.severity in (Severity.LIE, Severity.RUDE)
