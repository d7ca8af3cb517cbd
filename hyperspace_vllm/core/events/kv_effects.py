"""What a node wants done: everything that `Node.handle` returns.

The daemon performs effects with real sockets, files and threads, the simulator against a virtual clock. Each docstring
names the events that answer it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..records.ids import ManifestDigest, PeerId, RowId, RowKey
from ..records.layout import Layout
from ..records.reason import Reason

# --- L2: reading a prefix -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FindRows:
    """Which of these rows does this node hold? Answered by RowsFound, at once."""

    lookup: int
    row_keys: tuple[RowKey, ...]


@dataclass(frozen=True, slots=True)
class LoadRow:
    """Lease a row of this node's own in the arena (from disk if need be). RowReady or RowFailed."""

    lookup: int
    row_key: RowKey


@dataclass(frozen=True, slots=True)
class ReleaseRows:
    """End the lookup's leases on these rows, and their fetching, unanswered. They may be asked for again."""

    lookup: int
    row_keys: tuple[RowKey, ...]


@dataclass(frozen=True, slots=True)
class FindProviders:
    """Ask every peer that may know who serves these rows. ProviderAnswered or ProviderFailed, one per peer.

    `timeout_ms` bounds each peer. `FindProviders` with no peers configured is answered by nothing: the driver tells
    the core how many peers it asks through `Node.peers`.
    """

    lookup: int
    row_ids: tuple[RowId, ...]
    peers: tuple[PeerId, ...]
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class FetchManifest:
    """Get and verify a manifest with its digest table, proof and tags. ManifestVerified or ManifestRefused.

    The driver keeps verified manifests, so a known one answers at once. `row_keys` are those of the lookup: the tags of
    their rows are checked every time, because what one lookup needs of a manifest another may not.
    """

    lookup: int
    peer: PeerId
    manifest: ManifestDigest
    row_keys: Mapping[RowId, RowKey]
    timeout_ms: int


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
class EndLookup:
    """Cancel whatever still runs for the lookup and end its leases. Not answered."""

    lookup: int


@dataclass(frozen=True, slots=True)
class AnswerPrefix:
    """Tell the client: segments [.., end_segment) are usable through these leased rows (0: none, with a reason).

    `rows` lists (segment, part, rank, row_key), all of them ready. The driver cancels what still runs for the lookup
    and ends the leases of its other rows.
    """

    lookup: int
    end_segment: int
    rows: tuple[tuple[int, int, int, RowKey], ...]
    source: Literal["none", "memory", "disk", "network"]
    reason: str  # hit | miss | deadline | stalled | too_slow | no_peers | failed | …; a metric label


@dataclass(frozen=True, slots=True)
class ChargePeer:
    """A peer broke the protocol or served garbage."""

    peer: PeerId
    reason: Reason


# --- L2: writing a prefix -----------------------------------------------------------------------


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

    `row_keys` are in the order of their segments and equally long. ObjectEncoded or ObjectFailed.
    """

    object_id: int
    layout: Layout
    row_keys: tuple[RowKey, ...]
    length: int
    shareable: bool


Effect = (
    FindRows
    | LoadRow
    | ReleaseRows
    | FindProviders
    | FetchManifest
    | FetchRow
    | EndLookup
    | AnswerPrefix
    | ChargePeer
    | KeepRow
    | UnpinRows
    | DropStaged
    | EncodeObject
)
