"""L2: rows that engines of this node have computed, until they are stored and other nodes may have them."""

from dataclasses import dataclass

from ..records.ids import ManifestDigest, RowKey, SegmentKey
from ..records.layout import Layout


@dataclass(frozen=True, slots=True)
class RowArrived:
    """A worker staged one row. `staged` is the node's number for the slab; (client, request_id) scopes the rest.

    `client` is an engine, by the token that no other start of an engine has (local.RegisterLayout).
    """

    client: str
    request_id: str
    segment: int
    part: int
    rank: int
    staged: int
    length: int
    layout: Layout


@dataclass(frozen=True, slots=True)
class SegmentKeyKnown:
    """The scheduler named a segment."""

    client: str
    request_id: str
    segment: int
    segment_key: SegmentKey
    layout: Layout
    shareable: bool  # False: it stays in this node and no peer is offered it


@dataclass(frozen=True, slots=True)
class RequestOver:
    """No more segments of this request will be named; rows of unnamed segments are dropped."""

    client: str
    request_id: str


@dataclass(frozen=True, slots=True)
class ClientGone:
    """The engine's last session ended: forget its requests."""

    client: str


@dataclass(frozen=True, slots=True)
class KeepRow:
    """The staged slab holds this row: index it in the memory tier and keep it there until UnpinRows. Not answered."""

    staged: int
    row_key: RowKey


@dataclass(frozen=True, slots=True)
class UnpinRows:
    """These kept rows are stored, or never will be: they may be evicted. Not answered."""

    row_keys: tuple[RowKey, ...]


@dataclass(frozen=True, slots=True)
class DropStaged:
    """Free a staged slab. Not answered. `reason` is a metric label."""

    staged: int
    reason: str  # known | unnamed | client_gone | full


@dataclass(frozen=True, slots=True)
class EncodeObject:
    """Seal, erasure-code, digest, commit, sign and store up to 32 kept rows of one part and rank.

    `row_keys` are in the order of their segments and equally long. Answered by ObjectEncoded or ObjectFailed.
    """

    object_id: int
    layout: Layout
    row_keys: tuple[RowKey, ...]
    length: int
    shareable: bool


@dataclass(frozen=True, slots=True)
class ObjectEncoded:
    """Answers EncodeObject: sealed, coded, committed, signed and stored."""

    object_id: int
    manifest: ManifestDigest


@dataclass(frozen=True, slots=True)
class ObjectFailed:
    """Answers EncodeObject: it could not be stored (disk full, quota, a row was evicted first)."""

    object_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class RowsStored:
    """This node can serve an object's rows now; `shareable`: to other nodes too."""

    manifest: bytes
    fingerprint: bytes
    commitment: bytes
    row_ids: tuple[bytes, ...]
    shareable: bool
