"""The DHT: searches for providers, and entries of this node."""

from dataclasses import dataclass

from ..records.ids import PeerId


@dataclass(frozen=True, slots=True)
class SearchDht:
    """Search the DHT for /cache/<request hash>. Answered by ProvidersFound."""

    lookup: int
    request_hash: bytes
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class ProvidersFound:
    """Answers SearchDht with hints, none of them believed. `cost_ms` is the CPU time that the search took."""

    lookup: int
    peers: tuple[PeerId, ...]
    cost_ms: float


@dataclass(frozen=True, slots=True)
class Provide:
    """Add this node to a key's providers in the DHT: '/cache/<hex>' or '/kv-prefix/<model in hex>/<hex>'.

    Answered by NotProvided where that fails.
    """

    key: str


@dataclass(frozen=True, slots=True)
class NotProvided:
    """Answers a Provide that failed: no peer stored the record in time."""

    key: str
