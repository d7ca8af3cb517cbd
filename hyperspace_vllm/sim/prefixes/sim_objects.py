"""Objects without bytes: what a manifest says, what its rows really hold, and the columns that a host has of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from ...core.events.prefix_reading import RowOffer
from ...core.records.ids import ManifestDigest, RowId, RowKey
from ...core.records.limits import DATA_CHUNKS, DIGEST_BYTES, TOTAL_CHUNKS

ALL_COLUMNS = (1 << TOTAL_CHUNKS) - 1
MANIFEST_HEAD_BYTES = 512
MANIFEST_ROW_BYTES = 89 + TOTAL_CHUNKS * DIGEST_BYTES  # its entry, and its digests


@dataclass(frozen=True, slots=True, eq=False)
class SimObject:
    """One manifest. `holds` are the keys of the rows that were sealed, in the order of `row_ids`; None: garbage.

    `is_signed`: by `producer` (a public key). `has_true_tags`: its producer knew the keys of the rows that it names.
    """

    digest: ManifestDigest
    producer: bytes
    fingerprint: bytes
    row_ids: tuple[RowId, ...]
    holds: tuple[RowKey | None, ...]
    length: int
    shareable: bool = True
    is_signed: bool = True
    has_true_tags: bool = True

    @property
    def manifest_bytes(self) -> int:
        """What travels as its manifest."""
        return MANIFEST_HEAD_BYTES + len(self.row_ids) * MANIFEST_ROW_BYTES


class SimDisk:
    """The columns that one host holds. It survives a restart."""

    def __init__(self) -> None:
        self._columns: dict[ManifestDigest, dict[int, int]] = {}
        self._objects: dict[ManifestDigest, SimObject] = {}
        self._places: dict[RowId, dict[ManifestDigest, int]] = {}

    def put(self, stored: SimObject, row: int, columns: int) -> None:
        """Keep these columns of a row."""
        self._objects[stored.digest] = stored
        held = self._columns.setdefault(stored.digest, {})
        held[row] = held.get(row, 0) | columns
        self._places.setdefault(stored.row_ids[row], {})[stored.digest] = row

    def get(self, digest: ManifestDigest) -> SimObject | None:
        """The object, if any of it is here."""
        return self._objects.get(digest)

    def columns(self, digest: ManifestDigest, row: int) -> int:
        """Bit mask of the chunks held of a row."""
        return self._columns.get(digest, {}).get(row, 0)

    def find(self, wanted: RowId) -> tuple[SimObject, int] | None:
        """An object from which the row can be rebuilt, and the row's number in it."""
        for digest, row in self._places.get(wanted, {}).items():
            if self.columns(digest, row).bit_count() >= DATA_CHUNKS:
                return self._objects[digest], row
        return None

    def offers(self, row_ids: Sequence[RowId]) -> tuple[RowOffer, ...]:
        """What a peer may fetch of these rows: of each, the shareable object with the most columns."""
        offers = []
        for wanted in row_ids:
            places = [
                RowOffer(wanted, digest, row, self.columns(digest, row))
                for digest, row in self._places.get(wanted, {}).items()
                if self._objects[digest].shareable
            ]
            if places:
                offers.append(max(places, key=lambda offer: offer.columns.bit_count()))
        return tuple(offers)

    def shareable(self) -> list[tuple[SimObject, tuple[int, ...]]]:
        """What may leave the host, with the rows that can be rebuilt from here."""
        return [
            (self._objects[digest], tuple(r for r, c in held.items() if c.bit_count() >= DATA_CHUNKS))
            for digest, held in self._columns.items()
            if self._objects[digest].shareable
        ]
