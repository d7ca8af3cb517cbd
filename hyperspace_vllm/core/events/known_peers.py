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
    """The peers that this node knows and may use (alive as far as it knows, trusted or not), for status.

    `addresses` are those (host:port of libp2p) that may be dialled, to be remembered for the next run. Not answered.
    """

    usable: tuple[PeerRecord, ...]
    addresses: tuple[tuple[PeerId, str], ...] = ()


@dataclass(frozen=True, slots=True)
class KvPeersChanged:
    """Serve KV to the `admitted` peers alone, and ask for KV at these endpoints alone. Not answered.

    Configured peers are served and asked whatever this says.
    """

    admitted: tuple[PeerId, ...]
    endpoints: tuple[KvEndpoint, ...]
