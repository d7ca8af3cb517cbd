"""What peers offer to one lookup: manifests, and under each the columns of rows.

Offers of one row under one manifest are a *source*: their columns add up. Different manifests seal differently, so
other sources are alternatives.
"""

from dataclasses import dataclass, field

from ..events.prefix_reading import ManifestVerified, ProviderAnswered
from ..records.ids import ManifestDigest, PeerId, RowId
from ..records.limits import DATA_CHUNKS
from ..records.manifest import chunk_bytes_for
from .plan import Row


@dataclass(slots=True)
class OfferedManifest:
    """Which peers offer rows of a manifest, which are being asked for it, and its contents once verified."""

    holders: dict[PeerId, None] = field(default_factory=dict)  # an ordered set
    asking: set[PeerId] = field(default_factory=set)
    tried: set[PeerId] = field(default_factory=set)
    asked_at_ms: int = 0
    contents: ManifestVerified | None = None
    slow: bool = False  # asked of every peer that offers it, and late
    dead: bool = False


@dataclass(slots=True)
class RowSource:
    """Row number `row` of a manifest. `wanted` once it was chosen; `dead` when its manifest contradicts it."""

    manifest: ManifestDigest
    row: int
    holders: dict[PeerId, int] = field(default_factory=dict)  # columns that each may still be asked for
    asked: dict[PeerId, int] = field(default_factory=dict)  # columns in flight, never 0
    verified: int = 0
    wanted: bool = False
    dead: bool = False

    def is_in(self, contents: ManifestVerified, row: Row, fingerprint: bytes) -> bool:
        """Whether the manifest has the row where it was offered."""
        return (
            contents.fingerprint == fingerprint
            and self.row < len(contents.row_ids)
            and contents.row_ids[self.row] == row.id
            and contents.row_lengths[self.row] == row.length
            and contents.chunk_bytes == chunk_bytes_for(row.length)  # else a small row takes a large one's memory
        )

    def under_way(self) -> int:
        """Columns that have verified or may still come."""
        columns = self.verified
        for asked in self.asked.values():
            columns |= asked
        return columns

    def verify(self, peer: PeerId, columns: int) -> None:
        """Record verified columns from `peer`."""
        self.verified |= columns
        left = self.asked.pop(peer, 0) & ~columns
        if left:
            self.asked[peer] = left


class Offers:
    """Every source of a lookup. `banned` peers don't count, except for what they have delivered."""

    def __init__(self) -> None:
        self.manifests: dict[ManifestDigest, OfferedManifest] = {}
        self.banned: set[PeerId] = set()
        self._sources: dict[RowId, list[RowSource]] = {}

    def add(self, event: ProviderAnswered, rows: dict[RowId, Row]) -> None:
        """Record what a peer offers of `rows`, one offer per row; offers of other rows are ignored."""
        offered: set[RowId] = set()
        for offer in event.offers:
            if offer.row_id not in rows or offer.row_id in offered or not offer.columns:
                continue
            offered.add(offer.row_id)
            self.manifests.setdefault(offer.manifest, OfferedManifest()).holders[event.peer] = None
            sources = self._sources.setdefault(offer.row_id, [])
            same = (s for s in sources if (s.manifest, s.row) == (offer.manifest, offer.row))
            source = next(same, None)
            if source is None:
                source = RowSource(offer.manifest, offer.row)
                sources.append(source)
            source.holders[event.peer] = offer.columns

    def clear(self) -> None:
        """Forget all offers."""
        self.manifests.clear()
        self._sources.clear()

    def of(self, row: Row) -> list[RowSource]:
        """The sources of a row."""
        return self._sources.get(row.id, [])

    def wanted(self, row: Row) -> list[RowSource]:
        """The sources of a row that were chosen."""
        return [source for source in self.of(row) if source.wanted]

    def by_peer(self, row: Row, peer: PeerId) -> RowSource | None:
        """The source that a peer offers of a row."""
        return next((source for source in self.of(row) if peer in source.holders), None)

    def holders(self, source: RowSource) -> list[tuple[PeerId, int]]:
        """The peers that may be asked, with their columns."""
        return [(peer, held) for peer, held in source.holders.items() if held and peer not in self.banned]

    def alive(self, source: RowSource) -> bool:
        """Whether 32 columns are here, in flight or available."""
        if source.dead or self.manifests[source.manifest].dead:
            return False
        columns = source.under_way()
        for _, held in self.holders(source):
            columns |= held
        return columns.bit_count() >= DATA_CHUNKS
