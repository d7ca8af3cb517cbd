"""KV rows between the engine and its node: layouts, staged rows, names of segments, prefix lookups."""

from typing import Annotated, Literal

from msgspec import Meta

from ..records.layout import Layout
from ..records.limits import LOOKUP_ROWS_MAX, PROMPT_SEGMENTS_MAX, ROW_BYTES_MAX, VRAM_SEGMENTS_MAX
from .message_fields import U16, U32, U63, Bytes16, Bytes32, LocalMessage, Name, Scope
from .slab import LoadedRow, Slab

NO_ENGINE = bytes(16)


class RegisterLayout(LocalMessage, tag="layout", frozen=True):
    """From schedulers and workers, before anything that depends on it.

    `engine` is 16 random bytes that a scheduler draws and hands its workers with each step's work: the node joins rows
    to names by it, because names of clients and ids of requests may be equal in two engines. A worker that has not
    heard from its scheduler yet sends NO_ENGINE.
    """

    layout: Layout
    engine: Bytes16


class WantStaging(LocalMessage, tag="want_staging", frozen=True):
    """A worker asks for `count` staging slabs of `row_bytes`.

    Answered by StagingGranted with as many as fit; the others are granted when there is room, until it asks again.
    """

    row_bytes: Annotated[int, Meta(ge=1, le=ROW_BYTES_MAX)]
    count: Annotated[int, Meta(ge=1, le=1024)]


class StagingGranted(LocalMessage, tag="staging_granted", frozen=True):
    """Slabs that only this session may write until it stages or returns them."""

    row_bytes: U63
    slabs: Annotated[tuple[Slab, ...], Meta(max_length=1024)]


class RowStaged(LocalMessage, tag="row_staged", frozen=True):
    """A worker filled a granted slab with one row; it becomes the node's. `request_id` as in SegmentNamed."""

    request_id: Name
    segment: U32
    part: U32
    rank: U32
    slab: Slab


class StagingUnused(LocalMessage, tag="staging_unused", frozen=True):
    """A worker returns a granted slab unwritten."""

    slab: Slab


class SegmentNamed(LocalMessage, tag="segment_named", frozen=True):
    """The scheduler names a staged segment, once its last token is known. `scope` limits who may fetch it.

    `request_id` is the scheduler's own, never used twice by one engine.
    """

    request_id: Name
    segment: U32
    segment_key: Bytes32
    scope: Scope


class RequestEnded(LocalMessage, tag="request_ended", frozen=True):
    """The scheduler will name no more segments of the request and reads no more of its loaded rows."""

    request_id: Name


class LookupPrefix(LocalMessage, tag="lookup_prefix", frozen=True):
    """Find, fetch, verify and lease the rows of the longest usable prefix.

    `segment_keys[i]` is the key of segment i, from 0, as many as whole segments fit into prompt - 1 tokens;
    `start_token` tokens are in the engine already; `prefill_ms` estimates computing the rest (0: unknown).
    The answer (PrefixAnswer) comes within `deadline_ms`; the client stops waiting by its own clock too.
    """

    lookup: U32
    request_id: Name
    segment_keys: Annotated[tuple[Bytes32, ...], Meta(min_length=1, max_length=PROMPT_SEGMENTS_MAX)]
    start_token: U32
    prefill_ms: U32
    deadline_ms: U32
    scope: Scope


class PrefixAnswer(LocalMessage, tag="prefix_answer", frozen=True):
    """`end_segment` segments of the prompt are usable (0: none, `reason` says why); all `rows` are verified.

    `source` names where the slowest row came from; `verified_by` the checks that it passed.
    """

    lookup: U32
    end_segment: U32
    rows: Annotated[tuple[LoadedRow, ...], Meta(max_length=LOOKUP_ROWS_MAX)]
    source: Literal["none", "memory", "disk", "network"]
    verified_by: Name
    reason: Name


class ReleaseLookup(LocalMessage, tag="release_lookup", frozen=True):
    """Cancels a lookup that is under way, or ends the lease on the rows of its answer."""

    lookup: U32


class PrefixesInMemory(LocalMessage, tag="prefixes_in_memory", frozen=True):
    """From a scheduler, at most once a second: its load, and the change of the segments in its engine's KV cache.

    `load_permille`: requests that run or wait, in thousandths of those that can run at once. `gone` applies before
    `come`; neither names a segment that must not leave the node. A session begins with nothing in memory.
    """

    load_permille: U16
    come: Annotated[tuple[Bytes32, ...], Meta(max_length=VRAM_SEGMENTS_MAX)]
    gone: Annotated[tuple[Bytes32, ...], Meta(max_length=VRAM_SEGMENTS_MAX)]
