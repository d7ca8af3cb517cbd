"""Turns rows staged by workers into objects on disk: name, keep, group, encode.

A row is staged before its segment has a name (the last token may lag a step) or after (workers and scheduler use
different sockets), so both orders work. A named row is kept in the memory tier at once, until it is stored or skipped:
an arena smaller than a prompt would otherwise lose its beginning before it is encoded. A segment whose rows are all
here joins the groups of its request, one per part and rank, and a group becomes an object when it is full, its request
is over, or no row came for a moment. Everything is bounded; rows that exceed a bound stay in memory only, and are
counted.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ..events.node_state import Tick
from ..events.prefix_writing import (
    ClientGone,
    DropStaged,
    EncodeObject,
    KeepRow,
    ObjectEncoded,
    ObjectFailed,
    RequestOver,
    RowArrived,
    SegmentKeyKnown,
    UnpinRows,
)
from ..events.vocabulary import PrefixEffect
from ..records.ids import RowKey, SegmentKey, row_key
from ..records.layout import Layout
from ..records.limits import LOOKUP_ROWS_MAX, OBJECT_ROWS_MAX

STAGED_ROWS_MAX = 1024  # staged and unnamed, per client: as many as one grant of staging slabs
SEGMENTS_MAX = 8192  # unfinished, per client: two of the longest prompts
UNNAMED_MS = 30_000  # a name, or another rank's row, lags a few steps; rows that wait longer are dropped
OVER_GRACE_MS = 1_000  # rows of an ended request may still be on their way from its workers
IDLE_MS = 100
ENCODES_MAX = 2  # outstanding: one in the compute pool, and the next one
ENCODE_QUEUE_MAX = 64
ENCODE_TIMEOUT_MS = 120_000  # 32 rows of 128 MiB at 40 MB/s; then the next object takes its place
KNOWN_ROWS_MAX = 8 * LOOKUP_ROWS_MAX

PublishEvent = RowArrived | SegmentKeyKnown | RequestOver | ClientGone | ObjectEncoded | ObjectFailed | Tick


@dataclass(slots=True)
class _Segment:
    """One segment of one request. `staged` rows wait for the name, `here` are kept or known."""

    first_ms: int
    layout: Layout
    key: SegmentKey | None = None
    shareable: bool = False
    staged: dict[tuple[int, int], int] = field(default_factory=dict)
    here: set[tuple[int, int]] = field(default_factory=set)
    fresh: set[tuple[int, int]] = field(default_factory=set)


@dataclass(slots=True)
class _Group:
    """Rows of one part and rank that will share an object, by segment."""

    layout: Layout
    length: int
    shareable: bool
    rows: dict[int, RowKey] = field(default_factory=dict)
    last_ms: int = 0


@dataclass(slots=True)
class _Request:
    segments: dict[int, _Segment] = field(default_factory=dict)
    groups: dict[tuple[int, int, bool, Layout], _Group] = field(default_factory=dict)
    over_at_ms: int | None = None


class Publisher:
    """All writing of prefixes in one node. `skipped` counts the rows that were not encoded, by reason."""

    def __init__(self) -> None:
        self.skipped: Counter[str] = Counter()
        self._requests: OrderedDict[tuple[str, str], _Request] = OrderedDict()
        self._segments: Counter[str] = Counter()  # unfinished, by client
        self._staged: Counter[str] = Counter()
        self._known: OrderedDict[RowKey, bool] = OrderedDict()  # row -> whether as shareable
        self._queue: deque[EncodeObject] = deque()
        self._encoding: dict[int, tuple[EncodeObject, int]] = {}
        self._next_object = 1
        self._sweep_at_ms: int | None = None  # no deadline of any request or encoding is earlier
        self._effects: list[PrefixEffect] = []

    def handle(self, event: PublishEvent, now_ms: int) -> list[PrefixEffect]:
        """The effects of `event`."""
        match event:
            case RowArrived():
                self._row_arrived(event, now_ms)
            case SegmentKeyKnown():
                self._named(event, now_ms)
            case RequestOver():
                self._over(event.client, event.request_id, now_ms)
            case ClientGone():
                for client, request_id in [k for k in self._requests if k[0] == event.client]:
                    self._end(client, request_id, "client_gone")
            case ObjectEncoded():
                if (encoded := self._encoding.pop(event.object_id, None)) is not None:
                    self._effects.append(UnpinRows(encoded[0].row_keys))
            case ObjectFailed():
                self._give_up(self._encoding.pop(event.object_id, None), event.reason)
            case Tick():
                pass
        if self._sweep_at_ms is not None and now_ms >= self._sweep_at_ms:
            self._sweep(now_ms)
        self._start_encoding(now_ms)
        effects, self._effects = self._effects, []
        return effects

    def forget(self, rows: Iterable[RowKey]) -> None:
        """Forget rows that this node does not have: they count as new when they are staged again."""
        for row in rows:
            self._known.pop(row, None)

    @property
    def waiting_rows(self) -> int:
        """Rows that were staged and are not yet stored, skipped or dropped."""
        coding = [*self._queue, *(encode for encode, _ in self._encoding.values())]
        grouped = (group.rows for request in self._requests.values() for group in request.groups.values())
        return sum(self._staged.values()) + sum(map(len, grouped)) + sum(len(encode.row_keys) for encode in coding)

    def next_deadline_ms(self) -> int | None:
        """When to call with Tick, if nothing else happens before."""
        return self._sweep_at_ms

    # --- events ---------------------------------------------------------------------------------

    def _row_arrived(self, event: RowArrived, now_ms: int) -> None:
        layout, place = event.layout, (event.part, event.rank)
        fits = event.part < len(layout.parts) and event.rank < layout.ranks
        if not fits or event.length != layout.parts[event.part].row_bytes:
            self._drop(event.staged, "mismatch")
            return
        request = self._request(event.client, event.request_id, now_ms)
        segment = request.segments.get(event.segment)
        if segment is None:
            if request.over_at_ms is not None:
                self._drop(event.staged, "unnamed")
                return
            segment = self._add_segment(event.client, request, event.segment, layout, now_ms)
        if place in segment.staged or place in segment.here or layout != segment.layout:
            self._drop(event.staged, "duplicate")
            return
        segment.staged[place] = event.staged
        self._staged[event.client] += 1
        if segment.key is not None:
            self._join(event.client, request, event.segment, now_ms)
        elif self._staged[event.client] > STAGED_ROWS_MAX:
            self._drop_oldest(event.client, lambda oldest: bool(oldest.staged))

    def _named(self, event: SegmentKeyKnown, now_ms: int) -> None:
        request = self._request(event.client, event.request_id, now_ms)
        segment = request.segments.get(event.segment)
        if segment is None:
            segment = self._add_segment(event.client, request, event.segment, event.layout, now_ms)
        if segment.key is None and segment.layout == event.layout:
            segment.key, segment.shareable = event.segment_key, event.shareable
            self._join(event.client, request, event.segment, now_ms)

    def _over(self, client: str, request_id: str, now_ms: int) -> None:
        request = self._requests.get((client, request_id))
        if request is None:
            return
        for number in [n for n, segment in request.segments.items() if segment.key is None]:
            self._remove_segment(client, request, number, "unnamed")
        request.over_at_ms = now_ms
        self._sweep_by(now_ms + OVER_GRACE_MS)
        if not request.segments:
            self._flush(request, list(request.groups))

    def _end(self, client: str, request_id: str, reason: str) -> None:
        request = self._requests.pop((client, request_id))
        for number in list(request.segments):
            self._remove_segment(client, request, number, reason)
        self._flush(request, list(request.groups))

    # --- joining --------------------------------------------------------------------------------

    def _join(self, client: str, request: _Request, number: int, now_ms: int) -> None:
        """Keep the staged rows of a named segment; when all its rows are here, group them."""
        segment = request.segments[number]
        assert segment.key is not None
        for place, staged in segment.staged.items():
            key = row_key(segment.key, *place)
            # A row that was kept as private counts as new when it may be shared.
            if key in self._known and self._known[key] >= segment.shareable:
                self._drop(staged, "known")
            else:
                self._effects.append(KeepRow(staged, key))
                self._remember(key, segment.shareable)
                segment.fresh.add(place)
            segment.here.add(place)
        self._staged[client] -= len(segment.staged)
        segment.staged.clear()
        if len(segment.here) == len(segment.layout.parts) * segment.layout.ranks:
            self._group(request, number, segment, now_ms)
            del request.segments[number]
            self._segments[client] -= 1

    def _group(self, request: _Request, number: int, segment: _Segment, now_ms: int) -> None:
        assert segment.key is not None
        for part, rank in sorted(segment.fresh):
            at = (part, rank, segment.shareable, segment.layout)
            group = request.groups.get(at)
            if group is None:
                length = segment.layout.parts[part].row_bytes
                group = request.groups[at] = _Group(segment.layout, length, segment.shareable)
            group.rows[number] = row_key(segment.key, part, rank)
            group.last_ms = now_ms
            if len(group.rows) == OBJECT_ROWS_MAX:
                self._flush(request, [at])

    # --- encoding -------------------------------------------------------------------------------

    def _flush(self, request: _Request, groups: list[tuple[int, int, bool, Layout]]) -> None:
        """Turn groups into queued objects; a full queue loses its oldest."""
        for at in groups:
            group = request.groups.pop(at)
            rows = tuple(group.rows[number] for number in sorted(group.rows))
            self._queue.append(EncodeObject(self._next_object, group.layout, rows, group.length, group.shareable))
            self._next_object += 1
            if len(self._queue) > ENCODE_QUEUE_MAX:
                self._give_up((self._queue.popleft(), 0), "encode_queue_full")

    def _give_up(self, encoding: tuple[EncodeObject, int] | None, reason: str) -> None:
        if encoding is not None:
            self._skip(encoding[0].row_keys, reason)

    def _start_encoding(self, now_ms: int) -> None:
        while self._queue and len(self._encoding) < ENCODES_MAX:
            encode = self._queue.popleft()
            self._encoding[encode.object_id] = (encode, now_ms + ENCODE_TIMEOUT_MS)
            self._sweep_by(now_ms + ENCODE_TIMEOUT_MS)
            self._effects.append(encode)

    # --- time -----------------------------------------------------------------------------------

    def _sweep(self, now_ms: int) -> None:
        """Do everything that is due, and compute what is due next."""
        self._sweep_at_ms = None
        for (client, request_id), request in list(self._requests.items()):
            if request.over_at_ms is not None and now_ms >= request.over_at_ms + OVER_GRACE_MS:
                self._end(client, request_id, "unnamed")
                continue
            self._sweep_request(client, request, now_ms)
            if request.over_at_ms is None and not request.segments and not request.groups:
                del self._requests[client, request_id]
        for object_id in [o for o, (_, at_ms) in self._encoding.items() if now_ms >= at_ms]:
            self._give_up(self._encoding.pop(object_id), "encode_timeout")
        for _, at_ms in self._encoding.values():
            self._sweep_by(at_ms)

    def _sweep_request(self, client: str, request: _Request, now_ms: int) -> None:
        self._flush(request, [at for at, g in request.groups.items() if now_ms >= g.last_ms + IDLE_MS])
        unfinished = request.segments.items()
        waiting = [(number, s.first_ms + UNNAMED_MS) for number, s in unfinished if s.staged or s.fresh]
        for number, due_ms in waiting:
            if now_ms >= due_ms:
                self._remove_segment(client, request, number, "unnamed")
            else:
                self._sweep_by(due_ms)
        for group in request.groups.values():
            self._sweep_by(group.last_ms + IDLE_MS)
        if request.over_at_ms is not None:
            self._sweep_by(request.over_at_ms + OVER_GRACE_MS)

    def _sweep_by(self, at_ms: int) -> None:
        self._sweep_at_ms = at_ms if self._sweep_at_ms is None else min(self._sweep_at_ms, at_ms)

    # --- leaves ---------------------------------------------------------------------------------

    def _request(self, client: str, request_id: str, now_ms: int) -> _Request:
        self._sweep_by(now_ms + IDLE_MS)
        return self._requests.setdefault((client, request_id), _Request())

    def _add_segment(self, client: str, request: _Request, number: int, layout: Layout, now_ms: int) -> _Segment:
        self._segments[client] += 1
        if self._segments[client] > SEGMENTS_MAX:
            self._drop_oldest(client, lambda segment: True)
        segment = request.segments[number] = _Segment(now_ms, layout)
        return segment

    def _drop_oldest(self, client: str, which: Callable[[_Segment], bool]) -> None:
        """Drop the first segment that `which` accepts, of the client's earliest request that has one."""
        for (owner, _), request in self._requests.items():
            if owner == client:
                oldest = next((n for n, segment in request.segments.items() if which(segment)), None)
                if oldest is not None:
                    self._remove_segment(client, request, oldest, "full")
                    return

    def _remove_segment(self, client: str, request: _Request, number: int, reason: str) -> None:
        """Forget an unfinished segment: staged rows are dropped, kept ones stay in memory and are not encoded."""
        segment = request.segments.pop(number)
        self._segments[client] -= 1
        self._staged[client] -= len(segment.staged)
        for staged in segment.staged.values():
            self._drop(staged, reason)
        if segment.fresh and segment.key is not None:
            self._skip(tuple(row_key(segment.key, *place) for place in sorted(segment.fresh)), "incomplete")

    def _skip(self, rows: tuple[RowKey, ...], reason: str) -> None:
        """Release kept rows that won't be encoded."""
        self.skipped[reason] += len(rows)
        self.forget(rows)
        self._effects.append(UnpinRows(rows))

    def _drop(self, staged: int, reason: str) -> None:
        self._effects.append(DropStaged(staged, reason))

    def _remember(self, key: RowKey, shareable: bool) -> None:
        self._known[key] = shareable
        self._known.move_to_end(key)
        if len(self._known) > KNOWN_ROWS_MAX:
            self._known.popitem(last=False)
