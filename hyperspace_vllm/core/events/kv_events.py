"""What happens to a node: everything that `Node.handle` takes.

Payload bytes never appear here; the core sees keys, ids, sizes and verdicts. Every event of a lookup carries its
`lookup` number; events for a lookup that has ended are ignored. Every effect that starts work is answered by exactly
one of the events named in its docstring (effects.py), unless it is cancelled.
"""

from dataclasses import dataclass

from ..records.ids import ManifestDigest, PeerId, RowId, RowKey, SegmentKey
from ..records.layout import Layout
from ..records.reason import Reason

# --- L2: reading a prefix -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PrefixWanted:
    """A scheduler asks for a prefix (see local.LookupPrefix). `lookup` is unique in this node's life."""

    lookup: int
    layout: Layout
    segment_keys: tuple[SegmentKey, ...]
    start_token: int
    prefill_ms: int  # estimate for the tokens from start_token to the last segment's end; 0: unknown
    deadline_ms: int  # a duration
    may_ask_peers: bool  # False for private scopes: such a lookup leaves nothing outside the node


@dataclass(frozen=True, slots=True)
class PrefixReleased:
    """The client no longer wants the lookup or its rows."""

    lookup: int


@dataclass(frozen=True, slots=True)
class RowsFound:
    """Answers FindRows: which of the rows this node holds, by tier, and how much room there is for others.

    `leased` rows are in memory and stay there whatever this lookup does; the others share `room_bytes` of the arena.
    """

    lookup: int
    in_memory: frozenset[RowKey]
    on_disk: frozenset[RowKey]
    leased: frozenset[RowKey]
    room_bytes: int


@dataclass(frozen=True, slots=True)
class RowOffer:
    """One peer serves one row: row number `row` of `manifest`, `columns` a bit mask of its 64 chunks."""

    row_id: RowId
    manifest: ManifestDigest
    row: int
    columns: int


@dataclass(frozen=True, slots=True)
class ProviderAnswered:
    """One peer answered FindProviders (offers may be empty); `rtt_ms` is how long it took."""

    lookup: int
    peer: PeerId
    offers: tuple[RowOffer, ...]
    rtt_ms: int


@dataclass(frozen=True, slots=True)
class ProviderFailed:
    """One peer did not answer FindProviders in time, or answered garbage."""

    lookup: int
    peer: PeerId
    reason: Reason


@dataclass(frozen=True, slots=True)
class ManifestVerified:
    """Answers FetchManifest: decoded, signed by a trusted producer, digest table under the KZG commitment, tags."""

    lookup: int
    peer: PeerId
    manifest: ManifestDigest
    fingerprint: bytes
    row_ids: tuple[RowId, ...]
    row_lengths: tuple[int, ...]
    chunk_bytes: int


@dataclass(frozen=True, slots=True)
class ManifestRefused:
    """Answers FetchManifest: missing, late, malformed, untrusted, forged, or not of these rows.

    `producer` is set where the reason tells against the manifest's producer and not against the peer that has it.
    """

    lookup: int
    peer: PeerId
    manifest: ManifestDigest
    reason: Reason
    producer: PeerId | None = None


@dataclass(frozen=True, slots=True)
class ChunksVerified:
    """Progress of FetchRow: `columns` (bit mask) of the row have verified so far from this peer.

    One when a FetchRow has all that it asked for but the row still lacks some; otherwise at most one a row in every
    FETCH_STALL_MS / 4 in which it gained columns, so that a large row on a slow link doesn't look stalled while a
    quick one costs its RowReady alone.
    """

    lookup: int
    row_key: RowKey
    peer: PeerId
    columns: int


@dataclass(frozen=True, slots=True)
class HolderStalled:
    """A FetchRow from `peer` ended without all its columns: dead, late, garbage, or it lacks them.

    What verified before counts on: a ChunksVerified with it precedes this where columns came since the last one.
    """

    lookup: int
    row_key: RowKey
    peer: PeerId
    reason: Reason


@dataclass(frozen=True, slots=True)
class RowReady:
    """The row is verified, opened and leased in the arena for the lookup (from disk, memory or the network)."""

    lookup: int
    row_key: RowKey


@dataclass(frozen=True, slots=True)
class RowFailed:
    """The row can't be had: LoadRow failed, no arena space, or a reconstruction disagreed with its digests."""

    lookup: int
    row_key: RowKey
    reason: str  # arena_full | io_error | evicted | condemned


# --- L2: writing a prefix -----------------------------------------------------------------------


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
    shareable: bool  # False: keep it in this node, offer it to nobody


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
class Tick:
    """Nothing happened; the deadline that `next_deadline_ms` named has come."""


Event = (
    PrefixWanted
    | PrefixReleased
    | RowsFound
    | ProviderAnswered
    | ProviderFailed
    | ManifestVerified
    | ManifestRefused
    | ChunksVerified
    | HolderStalled
    | RowReady
    | RowFailed
    | RowArrived
    | SegmentKeyKnown
    | RequestOver
    | ClientGone
    | ObjectEncoded
    | ObjectFailed
    | Tick
)
