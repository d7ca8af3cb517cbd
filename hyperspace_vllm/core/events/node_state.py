"""What concerns the node as a whole: the passing of time, and what its engines serve."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServedChanged:
    """What the engines of this host serve now, all of it, for this node's PeerRecord (the fields are the record's)."""

    models: tuple[bytes, ...]
    fingerprints: tuple[bytes, ...]
    load_permille: int
    vram_digest: bytes


@dataclass(frozen=True, slots=True)
class Tick:
    """The deadline that `next_deadline_ms` named has come."""
