"""Owners by id: the union of all registry documents, as far as they are imported."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..records.ids import PeerId
from ..records.rank import Acquaintance
from .registry_log import DeltaLog


@dataclass(slots=True, eq=False)
class Owner:
    """What is known of one owner and its document."""

    key: bytes
    peer: PeerId
    log: DeltaLog
    taken_at_ms: int  # when the epoch began here
    acquaintance: Acquaintance  # when it was last known
    imported: int | None = None  # sequence up to which `entries` has the log; None: nothing of this epoch
    entries: dict[bytes, int] = field(default_factory=dict)
    ignored: bool = False  # until the next epoch
    crowded_out: bool = False  # ignored for want of room, until the next sweep
    failures: int = 0
    losses: int = 0  # of the worker, by its document, in a row
    equivocated: bool = False  # in this epoch


@dataclass(frozen=True, slots=True)
class RegistryStats:
    """Sizes, for status and metrics."""

    owners: int
    entries: int
    own_entries: int
    log_bytes: int
    ignored_owners: int


class RegistryIndex:
    """Owners by id; `entries` counts those of all owners."""

    def __init__(self) -> None:
        self.entries = 0
        self._providers: dict[bytes, tuple[Owner, ...]] = {}

    def owners_of(self, id: bytes) -> tuple[Owner, ...]:
        """The owners whose documents have the id."""
        return self._providers.get(id, ())

    def add(self, owner: Owner, added: Iterable[tuple[bytes, int]]) -> None:
        """The owner's document has these (id, expires at)."""
        for id, expires_at_ms in added:
            if id not in owner.entries:
                self.entries += 1
                self._providers[id] = (*self._providers.get(id, ()), owner)
            owner.entries[id] = expires_at_ms

    def remove(self, owner: Owner, ids: Iterable[bytes]) -> None:
        """The owner's document no longer has these."""
        for id in ids:
            if owner.entries.pop(id, None) is None:
                continue
            self.entries -= 1
            others = tuple(other for other in self._providers[id] if other is not owner)
            if others:
                self._providers[id] = others
            else:
                del self._providers[id]
