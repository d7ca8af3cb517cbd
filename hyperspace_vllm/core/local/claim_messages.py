"""Claims: only one API server of a host computes a request at a time."""

from .message_fields import U32, Bytes32, LocalMessage


class ClaimRequest(LocalMessage, tag="claim_request", frozen=True):
    """An API server is about to compute a request: it gets the lease unless another API server computes it already.

    `waits`: then it waits for the other server's answer. RequestClaimed answers at once; if the lease is not granted,
    ClaimEnded follows. `claim` is unique among the session's unfinished claims and lookups.
    """

    claim: U32
    request_key: Bytes32
    waits: bool


class RequestClaimed(LocalMessage, tag="request_claimed", frozen=True):
    """Whether the lease is granted; if not, ClaimEnded follows when its holder ends."""

    claim: U32
    granted: bool


class RequestDone(LocalMessage, tag="request_done", frozen=True):
    """The holder of the lease has ended; if it has an answer, a StoreResponse came before this."""

    request_key: Bytes32


class ClaimEnded(LocalMessage, tag="request_over", frozen=True):
    """The holder has ended: the database has its answer in a moment, or there is none."""

    claim: U32
