"""L1: responses that this node can serve."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ResponseStored:
    """This node can serve a response now. `computed`: by its own engine; False: fetched from a peer."""

    request_hash: bytes
    expires_at_ms: int
    computed: bool


@dataclass(frozen=True, slots=True)
class ResponsesGone:
    """Evicted or expired: this node can no longer serve them."""

    request_hashes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class ResponsesUsed:
    """Hits of this node's own clients."""

    request_hashes: tuple[bytes, ...]
