"""How liars lie about KV, beside what they do about responses (liars.py): their kind says how.

They know every manifest, say by gossip that they have the rows that they hear of, and are asked. They have the network
key like everybody else. Kinds that are not listed lie about responses alone, and have no KV; a stranger is never asked.
"""

import random
from collections.abc import Callable, Mapping
from typing import Literal

from ...core.events.prefix_reading import RowOffer
from ...core.events.prefix_writing import RowsStored
from ...core.events.vocabulary import NetworkEvent
from ...core.records.announcement import PREFIX_TOPIC, PrefixEntry, decode_announcement
from ...core.records.errors import ProtocolViolation
from ...core.records.ids import ManifestDigest, RowId, sha256
from ...core.records.limits import OBJECT_ROWS_MAX
from ...core.records.reason import Reason
from ..liars import Kind
from .kv_load import LAYOUT, ROW_BYTES
from .sim_objects import ALL_COLUMNS, SimObject

Lie = Literal[
    "has_nothing",  # offers rows of manifests that it hasn't
    "other_rows",  # offers rows under manifests that name others
    "garbage",  # true manifests, and chunks that aren't theirs
    "silent",  # offers everything and sends nothing
    "withholds",  # sends 20 chunks of a row, and never says so
    "false_tags",  # signs manifests of rows whose keys it doesn't know
    "forged",  # makes up manifests that an honest producer has not signed
    "garbled",  # bytes that are no message
]
LIES: Mapping[Kind, Lie] = {
    "boastful": "has_nothing",
    "replayed": "other_rows",
    "altered": "garbage",
    "relayer": "garbage",
    "crowd": "silent",
    "hinter": "silent",
    "expired": "withholds",
    "forged": "false_tags",
    "flatterer": "forged",
    "garbled": "garbled",
    "oversized": "garbled",
}
WITHHELD = 20  # chunks that are sent all the same
BOAST_EVERY_MS = 1_000
BOASTS = 32
HEARD_MAX = 500
NO_COMMITMENT = bytes(48)


class KvLiar:
    """`objects` are all that were ever made; what the liar makes up goes there too."""

    def __init__(
        self,
        lie: Lie,
        public_key: bytes,
        rng: random.Random,
        objects: dict[ManifestDigest, SimObject],
        tell: Callable[[NetworkEvent], None],
    ) -> None:
        self.lie: Lie = lie
        self._public_key = public_key
        self._rng = rng
        self._objects = objects
        self._tell = tell
        self._heard: dict[RowId, ManifestDigest] = {}
        self._own: dict[RowId, RowOffer] = {}

    @property
    def is_silent(self) -> bool:
        """Whether it keeps to itself what it doesn't send."""
        return self.lie in ("silent", "withholds")

    def overhear(self, topic: str, payload: bytes) -> None:
        """Gossip comes by: what others have is worth claiming."""
        if topic != PREFIX_TOPIC:
            return
        try:
            batch = decode_announcement(payload)
        except ProtocolViolation:
            return
        for entry in batch.entries:
            if isinstance(entry, PrefixEntry) and len(self._heard) < HEARD_MAX:
                self._heard[RowId(entry.row_id)] = ManifestDigest(entry.manifest)

    def boast(self) -> None:
        """Say that it serves some of them."""
        rows = self._rng.sample(list(self._heard), min(len(self._heard), BOASTS))
        if rows:
            self._tell(RowsStored(self._heard[rows[0]], LAYOUT.fingerprint, NO_COMMITMENT, tuple(rows), True))

    def offers(self, row_ids: tuple[RowId, ...]) -> tuple[RowOffer, ...] | Reason:
        """What it says that it has."""
        match self.lie:
            case "garbled":
                return Reason.PROTOCOL
            case "has_nothing":
                return tuple(RowOffer(i, ManifestDigest(sha256(b"none", i)), 0, ALL_COLUMNS) for i in row_ids)
            case "false_tags" | "forged":
                return self._made_up(row_ids)
            case "other_rows":
                some = [self._heard[i] for i in self._heard if self._heard[i] in self._objects]
                manifest = self._rng.choice(some) if some else ManifestDigest(bytes(32))
                return tuple(RowOffer(i, manifest, 0, ALL_COLUMNS) for i in row_ids)
            case "garbage" | "silent" | "withholds":
                known = ((i, self._objects.get(self._heard[i])) for i in row_ids if i in self._heard)
                return tuple(
                    RowOffer(i, stored.digest, stored.row_ids.index(i), ALL_COLUMNS)
                    for i, stored in known
                    if stored is not None and i in stored.row_ids
                )

    def shows(self, digest: ManifestDigest) -> SimObject | None:
        """The manifest that it sends."""
        return None if self.lie == "has_nothing" else self._objects.get(digest)

    def sends(self) -> tuple[int, bool]:
        """The columns that it sends of a row, and whether they are the row's."""
        match self.lie:
            case "silent":
                return 0, True
            case "withholds":
                return (1 << WITHHELD) - 1, True
            case "other_rows":
                return ALL_COLUMNS, True
            case _:
                return ALL_COLUMNS, False

    def _made_up(self, row_ids: tuple[RowId, ...]) -> tuple[RowOffer, ...]:
        """Manifests of exactly these rows."""
        new = tuple(i for i in row_ids if i not in self._own)
        others = [self._objects[digest].producer for digest in self._heard.values() if digest in self._objects]
        producer = others[0] if others and self.lie == "forged" else self._public_key
        for start in range(0, len(new), OBJECT_ROWS_MAX):
            rows = new[start : start + OBJECT_ROWS_MAX]
            digest = ManifestDigest(sha256(b"made up", self._public_key, *rows))
            self._objects[digest] = SimObject(
                digest,
                producer,
                LAYOUT.fingerprint,
                rows,
                (None,) * len(rows),
                ROW_BYTES,
                is_signed=self.lie != "forged",
                has_true_tags=False,
            )
            self._own |= {i: RowOffer(i, digest, row, ALL_COLUMNS) for row, i in enumerate(rows)}
        return tuple(self._own[i] for i in row_ids)
