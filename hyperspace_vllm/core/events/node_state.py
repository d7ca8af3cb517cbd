"""What concerns the node as a whole: the passing of time, its network, and what its engines serve."""

from dataclasses import dataclass

from ..records.ids import PeerId


@dataclass(frozen=True, slots=True)
class ServedChanged:
    """What the engines of this host serve now, all of it, for this node's PeerRecord (the fields are the record's)."""

    models: tuple[bytes, ...]
    fingerprints: tuple[bytes, ...]
    load_permille: int
    vram_digest: bytes


@dataclass(frozen=True, slots=True)
class NetworkJoined:
    """This node can be reached by libp2p at `address`, and serves KV at `endpoint` ('': it serves none), from now on.

    `remembered` are peers that it knew when it last ran (peer, host:port of libp2p); that earns them no trust.
    """

    address: str
    endpoint: str
    remembered: tuple[tuple[PeerId, str], ...] = ()


@dataclass(frozen=True, slots=True)
class NetworkLeft:
    """This node can no longer be reached by libp2p; no event of its network follows."""


@dataclass(frozen=True, slots=True)
class Tick:
    """The deadline that `next_deadline_ms` named has come."""
