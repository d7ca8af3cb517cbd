"""L2: prefixes that engines of this node want. Every event of a lookup carries its `lookup` number."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..records.ids import ManifestDigest, PeerId, RowId, RowKey, SegmentKey
from ..records.layout import Layout
from ..records.reason import Reason


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
class FindRows:
    """Which of these rows does this node hold? Answered by RowsFound, at once."""

    lookup: int
    row_keys: tuple[RowKey, ...]


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
class LoadRow:
    """Lease a row of this node's own in the arena (from disk if need be). Answered by RowReady or RowFailed."""

    lookup: int
    row_key: RowKey


@dataclass(frozen=True, slots=True)
class FindRowHolders:
    """Ask each of these peers which of the rows it serves. Answered by ProviderAnswered or ProviderFailed, one a peer.

    `timeout_ms` bounds each peer.
    """

    lookup: int
    row_ids: tuple[RowId, ...]
    peers: tuple[PeerId, ...]
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class RowOffer:
    """One peer serves one row: row number `row` of `manifest`, `columns` a bit mask of its 64 chunks."""

    row_id: RowId
    manifest: ManifestDigest
    row: int
    columns: int


@dataclass(frozen=True, slots=True)
class ProviderAnswered:
    """One peer answered FindRowHolders (offers may be empty); `rtt_ms` is how long it took."""

    lookup: int
    peer: PeerId
    offers: tuple[RowOffer, ...]
    rtt_ms: int


@dataclass(frozen=True, slots=True)
class ProviderFailed:
    """One peer did not answer FindRowHolders in time, or answered garbage."""

    lookup: int
    peer: PeerId
    reason: Reason


@dataclass(frozen=True, slots=True)
class FetchManifest:
    """Get and verify a manifest with its digest table, proof and tags. Answered by ManifestVerified or ManifestRefused.

    The driver keeps verified manifests, so a known one answers at once. `row_keys` are those of the lookup: the tags of
    their rows are checked every time, because what one lookup needs of a manifest another may not.
    """

    lookup: int
    peer: PeerId
    manifest: ManifestDigest
    row_keys: Mapping[RowId, RowKey]
    timeout_ms: int


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
class FetchRow:
    """Get `columns` (bit mask) of one row from one peer, verify each by digest, and open the row into the arena.

    Several may run for one row (hedging): under one manifest they share the row's chunks, under different manifests
    they race. ChunksVerified as they come; when any 32 of one manifest have verified, the driver reconstructs and
    answers RowReady (or RowFailed) and ends the row's others by itself, unanswered. A FetchRow that ends without all
    its columns is answered by HolderStalled.
    After RowFailed(condemned) nothing of the row runs on: a FetchRow under another manifest starts afresh.
    """

    lookup: int
    peer: PeerId
    manifest: ManifestDigest
    row: int
    row_key: RowKey
    length: int
    columns: int
    timeout_ms: int


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


@dataclass(frozen=True, slots=True)
class ReleaseRows:
    """End the lookup's leases on these rows, and their fetching. They may be asked for again. Not answered."""

    lookup: int
    row_keys: tuple[RowKey, ...]


@dataclass(frozen=True, slots=True)
class AnswerPrefix:
    """Tell the client: segments [.., end_segment) are usable through these leased rows (0: none, with a reason).

    `rows` lists (segment, part, rank, row_key), all of them ready. The driver cancels what still runs for the lookup
    and ends the leases of its other rows. Not answered.
    """

    lookup: int
    end_segment: int
    rows: tuple[tuple[int, int, int, RowKey], ...]
    source: Literal["none", "memory", "disk", "network"]
    reason: str  # hit | miss | deadline | stalled | too_slow | no_peers | failed | …; a metric label


@dataclass(frozen=True, slots=True)
class PrefixReleased:
    """The client no longer wants the lookup or its rows."""

    lookup: int


@dataclass(frozen=True, slots=True)
class EndLookup:
    """Cancel whatever still runs for the lookup and end its leases. Not answered."""

    lookup: int
