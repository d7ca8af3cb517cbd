"""The registry: one document per owner, kept by a worker."""

from dataclasses import dataclass, field

from ..records.registry_delta import RegistryDelta


@dataclass(frozen=True, slots=True)
class WriteRegistry:
    """Change this node's own document: add (id, expires at), remove ids. Answered by OwnDeltaWritten or DeltasRefused.

    `compact`: begin a new epoch with a shallow snapshot that holds just the entries after this change.
    """

    added: tuple[tuple[bytes, int], ...]
    removed: tuple[bytes, ...]
    compact: bool


@dataclass(frozen=True, slots=True)
class OwnDeltaWritten:
    """Answers WriteRegistry: signed, and already part of this node's own document."""

    delta: RegistryDelta
    raw: bytes


@dataclass(frozen=True, slots=True)
class ImportDeltas:
    """Import checked deltas of one owner, in order. Answered by DeltasImported or DeltasRefused."""

    owner: bytes
    epoch: int
    payloads: tuple[bytes, ...]
    starts_with_snapshot: bool
    sequence: int  # of the last one


@dataclass(frozen=True, slots=True)
class DeltasImported:
    """Answers ImportDeltas: the owner's document has it all; its entries (id, expires at) now, and what went."""

    owner: bytes
    epoch: int
    sequence: int
    added: tuple[tuple[bytes, int], ...]
    removed: tuple[bytes, ...]
    cleared: bool  # a snapshot: `added` is everything there is
    took_ms: int = field(default=0, compare=False)  # of the worker's CPU time


@dataclass(frozen=True, slots=True)
class DeltasRefused:
    """Answers ImportDeltas: the owner wrote no valid document, or one that the worker did not survive (`lost`).

    `worker` says nothing of the owner: the document that the deltas continue is missing, or the worker is.
    Answers WriteRegistry with this node as the owner.
    """

    owner: bytes
    reason: str  # malformed | too_large | lost | worker
    took_ms: int = field(default=0, compare=False)  # of the worker's CPU time


@dataclass(frozen=True, slots=True)
class ForgetOwner:
    """Drop an owner's document: it expired, misbehaved, or made room for others. Not answered."""

    owner: bytes
