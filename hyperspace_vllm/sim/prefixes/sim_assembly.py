"""Rows that arrive from peers at a simulated host: columns are collected and checked, and 32 of a manifest open one.

It does what the daemon's RowAssembly does: FetchRows of one row under one manifest share its chunks, under different
manifests they race, and progress is reported at most once a row in PROGRESS_MS.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from ...core.events.prefix_reading import ChunksVerified, FetchRow, HolderStalled, RowFailed, RowReady
from ...core.events.vocabulary import PrefixEvent
from ...core.peers.standing import Delivered
from ...core.prefix.cost_model import PROGRESS_MS
from ...core.records.ids import ManifestDigest, PeerId, RowKey
from ...core.records.limits import DATA_CHUNKS, MiB
from ...core.records.reason import Reason
from .kv_load import CHUNK_BYTES, OPEN_MS
from .sim_arena import SimArena
from .sim_bulk import Call
from .sim_objects import SimObject

FETCHING_BYTES_MAX = 256 * MiB  # as in the daemon


class ChunkCalls(Protocol):
    """How peers are asked (SimPeerCalls)."""

    def end_call(self, call: Call) -> None: ...
    def ask_chunks(
        self, effect: FetchRow, arrived: Callable[[int, bool], None], lacking: Callable[[Reason], None]
    ) -> Call: ...


class AssemblyHost(Protocol):
    """What the assembly uses of its host (SimPrefixes)."""

    @property
    def now_ms(self) -> int: ...
    def submit(self, event: PrefixEvent) -> None: ...
    def later(self, delay_ms: float, act: Callable[[], None]) -> None: ...
    def credit(self, fact: Delivered) -> None: ...
    def keep(self, stored: SimObject, row: int, columns: int) -> None: ...


@dataclass(slots=True, eq=False)
class _Row:
    """A row that is arriving; `all_good` as far as anybody can tell without checking digests."""

    began_ms: int
    reported_ms: int
    good: dict[ManifestDigest, int] = field(default_factory=dict)  # verified, as bit masks
    columns: dict[PeerId, int] = field(default_factory=dict)
    unreported: set[PeerId] = field(default_factory=set)
    calls: dict[Call, int] = field(default_factory=dict)  # with the bytes that were asked for
    over: bool = False
    opened: bool = False
    all_good: bool = True


class SimAssembly:
    """Performs FetchRow effects."""

    def __init__(self, host: AssemblyHost, calls: ChunkCalls, arena: SimArena) -> None:
        self._host = host
        self._peers = calls
        self._arena = arena
        self._rows: dict[int, dict[RowKey, _Row]] = {}
        self._fetching_bytes = 0

    def moving(self, lookup: int) -> int:
        """How many rows of a lookup are on their way."""
        return sum(not row.over for row in self._rows.get(lookup, {}).values())

    def calls(self, lookup: int) -> int:
        """How many FetchRows of a lookup are open."""
        return sum(len(row.calls) for row in self._rows.get(lookup, {}).values())

    def opened(self, lookup: int) -> frozenset[RowKey]:
        """Rows of a lookup that peers have sent."""
        return frozenset(key for key, row in self._rows.get(lookup, {}).items() if row.opened)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is on its way."""
        return not any(self._rows.values()) and not self._fetching_bytes

    def fetch(self, effect: FetchRow, stored: SimObject) -> None:
        """Start one FetchRow under its verified manifest."""
        rows = self._rows.setdefault(effect.lookup, {})
        row = rows.get(effect.row_key)
        if row is None:
            if not self._arena.allocate():
                self._host.submit(RowFailed(effect.lookup, effect.row_key, "arena_full"))
                return
            row = rows[effect.row_key] = _Row(self._host.now_ms, self._host.now_ms)
        if row.over:
            return
        asked_bytes = effect.columns.bit_count() * CHUNK_BYTES
        if self._fetching_bytes and self._fetching_bytes + asked_bytes > FETCHING_BYTES_MAX:
            self._host.submit(RowFailed(effect.lookup, effect.row_key, "busy"))
            return
        self._fetching_bytes += asked_bytes
        calls: list[Call] = []
        arrived = partial(self._arrived, effect, stored, row, calls)
        calls.append(self._peers.ask_chunks(effect, arrived, partial(self._lacking, effect, row, calls)))
        row.calls[calls[0]] = asked_bytes

    def end(self, lookup: int) -> None:
        """Cancel everything that runs for the lookup."""
        self.end_some(lookup, list(self._rows.get(lookup, ())))
        self._rows.pop(lookup, None)

    def end_some(self, lookup: int, keys: Iterable[RowKey]) -> None:
        """Cancel everything that runs for these rows of the lookup."""
        rows = self._rows.get(lookup, {})
        for row in [rows.pop(key) for key in keys if key in rows]:
            if not row.over:
                self._end_row(row)
                self._arena.free()

    def is_verified(self, is_good: bool) -> bool:
        """Whether chunks have the digests that their manifest says."""
        return is_good

    def _arrived(
        self, effect: FetchRow, stored: SimObject, row: _Row, calls: list[Call], columns: int, is_good: bool
    ) -> None:
        if row.over:
            return
        now_ms = self._host.now_ms
        if not self.is_verified(is_good):
            self._lacking(effect, row, calls, Reason.BAD_DIGEST)
            return
        row.all_good = row.all_good and is_good
        good = row.good[stored.digest] = row.good.get(stored.digest, 0) | columns
        mine = row.columns[effect.peer] = row.columns.get(effect.peer, 0) | columns
        row.unreported.add(effect.peer)
        if good.bit_count() >= DATA_CHUNKS:
            self._end_row(row)
            self._host.later(OPEN_MS, partial(self._opened, effect, stored, row, good))
        elif not effect.columns & ~mine:
            self._end_call(row, calls[0])
            self._report(effect, row)
        elif now_ms >= row.reported_ms + PROGRESS_MS:
            self._report(effect, row)

    def _lacking(self, effect: FetchRow, row: _Row, calls: list[Call], reason: Reason) -> None:
        """The FetchRow ends without all its columns."""
        if not row.over:
            self._end_call(row, calls[0])
            self._report(effect, row)
            self._host.submit(HolderStalled(effect.lookup, effect.row_key, effect.peer, reason))

    def _report(self, effect: FetchRow, row: _Row) -> None:
        if effect.peer in row.unreported:
            row.unreported.remove(effect.peer)
            row.reported_ms = self._host.now_ms
            self._host.submit(ChunksVerified(effect.lookup, effect.row_key, effect.peer, row.columns[effect.peer]))

    def _opened(self, effect: FetchRow, stored: SimObject, row: _Row, columns: int) -> None:
        if self._rows.get(effect.lookup, {}).get(effect.row_key) is not row:
            self._arena.free()  # cancelled meanwhile
            return
        took_ms = self._host.now_ms - row.began_ms
        for peer, sent in row.columns.items():
            self._host.credit(Delivered(peer, sent.bit_count() * CHUNK_BYTES, took_ms))
        row.opened = True
        self._arena.keep(effect.row_key, stored.holds[effect.row] if row.all_good else None)
        self._arena.lease(effect.row_key, effect.lookup)
        self._host.keep(stored, effect.row, columns)
        self._host.submit(RowReady(effect.lookup, effect.row_key))

    def _end_row(self, row: _Row) -> None:
        row.over = True
        for call in list(row.calls):
            self._end_call(row, call)

    def _end_call(self, row: _Row, call: Call) -> None:
        self._fetching_bytes -= row.calls.pop(call, 0)
        self._peers.end_call(call)
