"""What a node knows from its configuration."""

from dataclasses import dataclass

from ..prefix.fetch import FetchMode
from ..records.ids import NetworkId, PeerId


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """Peers are those of the configuration: `bootstrap` by host:port of libp2p, `kv_peers` to be asked for KV.

    `joins` False: this node never joins a network. `shares` False: no response leaves this node. `registry` False: a
    Redis registry replaces the node's own.
    """

    network: NetworkId
    network_key: bytes | None = None
    bootstrap: tuple[tuple[PeerId, str], ...] = ()
    kv_peers: tuple[PeerId, ...] = ()
    fetch: FetchMode = "auto"
    capacity_bytes: int = 0
    joins: bool = True
    shares: bool = True
    registry: bool = True
