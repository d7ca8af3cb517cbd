"""The peers that this node knows and may use."""

from dataclasses import dataclass

from ..records.ids import PeerId
from ..records.peer_record import PeerRecord


@dataclass(frozen=True, slots=True)
class KvEndpoint:
    """Where a peer says that it serves KV (host:port). `own`: it was met at that host; otherwise a dial has to show."""

    peer: PeerId
    address: str
    own: bool


@dataclass(frozen=True, slots=True)
class PeersChanged:
    """The peers that this node knows and may use (alive as far as it knows, trusted or not), for L2 and status.

    `endpoints` are those of them that may be dialled for KV. Not answered.
    """

    usable: tuple[PeerRecord, ...]
    endpoints: tuple[KvEndpoint, ...] = ()
