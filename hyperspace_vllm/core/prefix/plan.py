"""The rows that a prefix needs, how far the available ones reach, and which columns to ask of which peers."""

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Literal

from ..local.slab import pages_bytes
from ..records.ids import NetworkId, PeerId, RowId, RowKey, SegmentKey, row_id, row_key
from ..records.layout import Layout
from ..records.limits import LOOKUP_ROWS_MAX, TOTAL_CHUNKS


@dataclass(slots=True, eq=False)
class Row:
    """One row that a lookup may need. `tier` is its place, `state` its progress."""

    segment: int
    part: int
    rank: int
    key: RowKey
    id: RowId
    length: int
    tier: str = "none"  # none | memory | disk | network
    state: str = "idle"  # idle | moving | orphan | ready | lost
    announced: bool = False  # its manifest was asked for ahead of its turn


def rows_of(
    network: NetworkId, layout: Layout, segment_keys: Sequence[SegmentKey], start_token: int
) -> dict[RowKey, Row]:
    """Every row from `start_token` on, by segment; whole segments, at most LOOKUP_ROWS_MAX rows."""
    first = start_token // layout.segment_tokens
    segments_max = LOOKUP_ROWS_MAX // (len(layout.parts) * layout.ranks)
    rows: dict[RowKey, Row] = {}
    for segment in range(first, min(len(segment_keys), first + segments_max)):
        for number, part in enumerate(layout.parts):
            for rank in range(layout.ranks):
                key = row_key(segment_keys[segment], number, rank)
                rows[key] = Row(segment, number, rank, key, row_id(network, key), part.row_bytes)
    return rows


def segments_that_fit(layout: Layout, segments: int, room: int) -> tuple[int, int]:
    """How many of a prompt's first `segments` an arena of `room` bytes holds, and the bytes that all of them take."""

    def cost(segment: int, part: int) -> int:
        return layout.ranks * pages_bytes(layout.parts[part].row_bytes)

    fits = usable_end(layout, 0, segments, lambda segment, part: True, cost, room)
    return fits, sum(cost(*place) for place in needed(layout, 0, segments))


def leading_rows(
    network: NetworkId, layout: Layout, segment_keys: Sequence[SegmentKey], start_token: int
) -> Iterator[RowId]:
    """One row of each segment, the last one first: a peer that has it probably has the rows before it.

    Rows of a full-attention part, where there is one: of a window, fetchers keep only the tail.
    """
    part = next((number for number, part in enumerate(layout.parts) if not part.window_tokens), 0)
    for segment in reversed(segment_keys[start_token // layout.segment_tokens :]):
        yield row_id(network, row_key(segment, part, 0))


def usable_end(
    layout: Layout,
    start_token: int,
    end_max: int,
    present: Callable[[int, int], bool],
    cost: Callable[[int, int], int] = lambda segment, part: 0,
    room: int = 0,
) -> int:
    """The most segments, up to `end_max`, after which the engine can continue; 0: none beyond `start_token`.

    `present(segment, part)` says whether all ranks' rows are there, `cost(segment, part)` what they take of `room`.
    Full attention needs every segment from `start_token` on, a sliding window only its tail, so a longer prefix may be
    usable where a shorter isn't.
    """
    first = start_token // layout.segment_tokens
    run_start = [first] * len(layout.parts)  # per part, where the run of present rows that ends at `end` starts
    costs = [[0] for _ in layout.parts]  # per part, of the segments [first, first + i)
    best = 0
    for end in range(first + 1, end_max + 1):
        for part, spec in enumerate(layout.parts):
            if not present(end - 1, part):
                if not spec.window_tokens:
                    return best
                run_start[part] = end
            costs[part].append(costs[part][-1] + cost(end - 1, part))
        firsts = [layout.first_segment(part, start_token, end) for part in range(len(layout.parts))]
        whole = all(start <= needed for start, needed in zip(run_start, firsts, strict=True))
        if whole and sum(c[-1] - c[needed - first] for c, needed in zip(costs, firsts, strict=True)) <= room:
            best = end
    return best


def needed(layout: Layout, start_token: int, end: int) -> Iterator[tuple[int, int]]:
    """(segment, part) of every row needed to continue after `end` segments, by segment."""
    firsts = [layout.first_segment(part, start_token, end) for part in range(len(layout.parts))]
    for segment in range(min(firsts, default=end), end):
        for part, first in enumerate(firsts):
            if segment >= first:
                yield segment, part


class PrefixRows:
    """Every row that one lookup may need, by key, by id and by place."""

    def __init__(
        self, network: NetworkId, layout: Layout, segment_keys: Sequence[SegmentKey], start_token: int
    ) -> None:
        self._layout, self._start_token = layout, start_token
        self.by_key = rows_of(network, layout, segment_keys, start_token)
        self.by_id = {row.id: row for row in self.by_key.values()}
        self.keys = {row.id: row.key for row in self.by_key.values()}
        self._by_place: dict[tuple[int, int], list[Row]] = {}
        for row in self.by_key.values():
            self._by_place.setdefault((row.segment, row.part), []).append(row)
        self.end_max = max((row.segment + 1 for row in self.by_key.values()), default=0)

    def found(self, in_memory: Set[RowKey], on_disk: Set[RowKey]) -> None:
        """This node has these rows, and no others."""
        for key, row in self.by_key.items():
            if key in in_memory or key in on_disk:
                row.tier = "memory" if key in in_memory else "disk"
            elif row.tier != "network":
                row.tier = "none"

    def offered(self, by_peers: Callable[[Row], bool]) -> None:
        """Of the rows that this node lacks, peers offer these, and no others."""
        for row in self.by_key.values():
            if row.tier in ("none", "network"):
                row.tier = "network" if by_peers(row) else "none"

    def absent(self, local_end: int) -> dict[RowId, Row]:
        """The rows, by id, that this node lacks and that a prefix of more than `local_end` segments needs."""
        layout = self._layout
        firsts = [layout.first_segment(part, self._start_token, local_end + 1) for part in range(len(layout.parts))]
        return {
            i: row
            for i, row in self.by_id.items()
            if row.tier in ("none", "network") and row.segment >= firsts[row.part]
        }

    def needed(self, end: int) -> list[Row]:
        """The rows to continue after `end` segments, by segment; none for 0."""
        places = needed(self._layout, self._start_token, end) if end else ()
        return [row for place in places for row in self._by_place[place]]

    def usable(self, has: Callable[[Row], bool], cost: Callable[[Row], int] = lambda row: 0, room: int = 0) -> int:
        """The most segments after which the engine can continue with the rows that `has` and `room` admit."""
        return usable_end(
            self._layout,
            self._start_token,
            self.end_max,
            lambda segment, part: all(map(has, self._by_place[segment, part])),
            lambda segment, part: sum(map(cost, self._by_place[segment, part])),
            room,
        )


def slowest_tier(rows: Iterable[Row]) -> Literal["none", "memory", "disk", "network"]:
    """Where the slowest of the rows comes from; "none" without rows."""
    tiers = {row.tier for row in rows}
    slowest: Literal["none", "memory", "disk", "network"] = "none"
    for tier in ("memory", "disk", "network"):
        if tier in tiers:
            slowest = tier
    return slowest


def assign_columns(count: int, exclude: int, holders: Sequence[tuple[PeerId, int]]) -> dict[PeerId, int]:
    """Masks of the `count` lowest columns outside `exclude` that `holders` have, each from the first that has it.

    Low columns are data: with 0..31 there is nothing to decode. Fewer than `count` if `holders` have no more.
    """
    assigned: dict[PeerId, int] = {}
    for column in range(TOTAL_CHUNKS):
        bit = 1 << column
        if count == 0 or exclude & bit:
            continue
        holder = next((peer for peer, columns in holders if columns & bit), None)
        if holder is not None:
            assigned[holder] = assigned.get(holder, 0) | bit
            count -= 1
    return assigned
