"""Claims: of the API servers on a host, one at a time computes a request."""

from .message_fields import U32, Bytes32, LocalMessage


class ClaimRequest(LocalMessage, tag="claim_request", frozen=True):
    """An API server is about to compute a request: unless another is at it already, the lease is its own.

    `waits`: it would rather wait for that other one's answer. Then RequestClaimed answers at once; if it isn't granted,
    ClaimEnded follows. `claim` is unique among the session's unfinished ones and its lookups.
    """

    claim: U32
    request_key: Bytes32
    waits: bool


class RequestClaimed(LocalMessage, tag="request_claimed", frozen=True):
    """Whether the lease is granted; if not, its holder's end will be told."""

    claim: U32
    granted: bool


class RequestDone(LocalMessage, tag="request_done", frozen=True):
    """The holder of the lease has ended; if it has an answer, a StoreResponse came before this."""

    request_key: Bytes32


class ClaimEnded(LocalMessage, tag="request_over", frozen=True):
    """The holder has ended: its answer is in the database in a moment, or never."""

    claim: U32
