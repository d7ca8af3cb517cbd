"""Transfers of one lookup's rows from peers: which peer is asked for which columns, and which peers are asked no more.

A row is asked of the source (offers.py) that should deliver it first: 32 columns, data columns preferred. When it is
late, other holders are asked, then another manifest, then further columns (hedging); failed requests are replaced at
once.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ..events.conduct import ChargePeer
from ..events.prefix_reading import (
    ChunksVerified,
    FetchRow,
    HolderStalled,
    ManifestRefused,
    ManifestVerified,
    ProviderAnswered,
)
from ..events.vocabulary import PrefixEffect
from ..records.ids import ManifestDigest, PeerId, RowId, RowKey
from ..records.layout import Layout
from ..records.limits import DATA_CHUNKS, FETCH_BYTES_PER_MS_MIN
from ..records.reason import Reason
from .cost_model import HEDGE_MS_MAX, HEDGE_MS_MIN, MANIFEST_HEDGE_MS, RateEstimator, hedge_delay_ms
from .deliveries import Deliveries
from .manifest_requests import ManifestRequests
from .offers import Offers, RowSource
from .plan import Row, assign_columns

GONE_REASONS = frozenset({Reason.TIMEOUT, Reason.UNREACHABLE})  # no proof of bad faith, but this lookup asks no more

_DATA = (1 << DATA_CHUNKS) - 1


@dataclass(slots=True)
class _Transfer:
    """A row in flight. `hedge_at_ms` None: every peer that may have it has been asked."""

    row: Row
    hedge_at_ms: int | None


class Transfers:
    """All fetching of one lookup. Effects go to `emit`; rows that no peer can complete are added to `lost`."""

    def __init__(
        self,
        lookup: int,
        layout: Layout,
        row_keys: Mapping[RowId, RowKey],
        peers: tuple[PeerId, ...],
        rates: RateEstimator,
        emit: Callable[[PrefixEffect], None],
    ) -> None:
        self.lookup = lookup
        self.layout = layout
        self.peers = peers
        self.emit = emit
        self.lost: list[Row] = []
        self.progress_ms = 0  # the verified bytes are enough progress until then
        self.timeout_at_ms = 0
        self.least_rate: float = FETCH_BYTES_PER_MS_MIN  # a lower rate is no progress
        self._offers = Offers()
        self._deliveries = Deliveries(rates)
        self._manifests = ManifestRequests(lookup, row_keys, self._offers, self._deliveries, emit)
        self._moving: dict[RowId, _Transfer] = {}
        self._unsettled = False  # a source may have lost the columns it was waiting for

    # --- offers ---------------------------------------------------------------------------------

    def add_offers(self, event: ProviderAnswered, rows: dict[RowId, Row]) -> None:
        """Record what a peer offers of `rows`, once per peer."""
        if event.peer in self.peers and event.peer not in self._deliveries.rtt_ms:
            self._deliveries.rtt_ms[event.peer] = event.rtt_ms
            self._offers.add(event, rows)

    def fetchable(self, row: Row) -> bool:
        """Whether the known holders of one manifest together have 32 columns of the row."""
        return any(map(self._offers.alive, self._offers.of(row)))

    def estimate_ms(self, rows: Iterable[Row], now_ms: int) -> int:
        """Time until `rows` are here when each comes from the peer that would deliver it first."""
        sizes = ((row.length, [peer for source in self._offers.of(row) for peer in source.holders]) for row in rows)
        return self._deliveries.estimate_ms(sizes, now_ms)

    # --- rows -----------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether an answer from a peer is outstanding."""
        return bool(self._moving or self._manifests)

    @property
    def moving_rows(self) -> int:
        """Rows in flight, to bound them."""
        return len(self._moving)

    @property
    def moving_bytes(self) -> int:
        """Bytes of the rows in flight, to bound them."""
        return sum(transfer.row.length for transfer in self._moving.values())

    def begin(self, row: Row, room: bool, now_ms: int) -> bool:
        """Ask for the row if there is `room`, before that for its manifest. False: not asked yet, or lost."""
        self._want_best(row, room, now_ms)
        self._settle(now_ms)
        return row.id in self._moving

    def finish(self, row: Row, now_ms: int) -> None:
        """The row is ready: no peer needs to be asked any more."""
        if self._moving.pop(row.id, None) is None:
            return
        self.progress_ms = now_ms
        for source in self._offers.of(row):
            missing = DATA_CHUNKS - source.verified.bit_count()
            for peer, columns in source.asked.items():
                # The last columns come without an event of their own: the peer that was asked for them delivered them.
                if 0 < missing <= (columns & ~source.verified).bit_count():
                    self._deliveries.delivered(peer, missing * row.length // DATA_CHUNKS, now_ms)
                    break

    def drop(self, row: Row) -> None:
        """The row isn't wanted for now, and no columns of it were kept."""
        self._moving.pop(row.id, None)
        for source in self._offers.of(row):
            source.asked.clear()
            source.verified = 0

    def stop(self, now_ms: int) -> dict[PeerId, int]:
        """End all fetching and update the rates; returns how long ago each peer that has not delivered everything was
        first asked, if that is FETCH_STALL_MS or more."""

        late = {peer for t in self._moving.values() for s in self._offers.of(t.row) for peer in s.asked}
        late |= self._manifests.peers
        self._deliveries.end(late, now_ms)
        self._moving.clear()
        self._manifests.clear()
        self._offers.clear()
        return self._deliveries.waited_ms((peer for peer in self.peers if peer in late), now_ms)

    # --- reports of peers and of the driver -----------------------------------------------------

    def manifest_verified(self, event: ManifestVerified, now_ms: int) -> None:
        """Use the manifest for its rows; peers that offered other rows under it are charged when those are asked."""
        manifest = self._manifests.take(event.manifest)
        if manifest is None:
            return
        manifest.contents = event
        manifest.slow = False
        manifest.asking.clear()
        self.progress_ms = now_ms
        self._unsettled = True
        self._settle(now_ms)

    def manifest_refused(self, event: ManifestRefused, now_ms: int) -> None:
        """Ask the next peer that offers the same manifest, or give the manifest up."""
        if not self._manifests.refused(event.manifest, event.peer):
            return
        self.judge(event.producer or event.peer, event.reason)
        if not self._offers.manifests[event.manifest].asking:
            self._ask_manifest(event.manifest, now_ms)
        self._unsettled = True
        self._settle(now_ms)

    def chunks_verified(self, event: ChunksVerified, row: Row, now_ms: int) -> None:
        """Take verified columns of a row."""
        transfer = self._moving.get(row.id)
        source = self._offers.by_peer(row, event.peer)
        if transfer is None or source is None:
            return
        new = event.columns & ~source.verified
        if not new:
            return
        source.verify(event.peer, new)
        size = new.bit_count() * row.length // DATA_CHUNKS
        self._deliveries.delivered(event.peer, size, now_ms)
        self.progress_ms = min(self.progress_ms + int(size / self.least_rate), now_ms)
        transfer.hedge_at_ms = now_ms + self._hedge_delay_ms(row, now_ms)

    def holder_stalled(self, event: HolderStalled, row: Row, now_ms: int) -> None:
        """A peer does not deliver what it was asked for: ask for other columns, other peers, or another manifest."""
        source = self._offers.by_peer(row, event.peer)
        if source is None:
            return
        source.holders[event.peer] &= ~source.asked.pop(event.peer, 0)
        if event.reason is Reason.BUSY:
            source.holders[event.peer] = 0
        self.judge(event.peer, event.reason)
        self._unsettled = True
        self._settle(now_ms)

    def condemned(self, row: Row, now_ms: int) -> None:
        """The row's chunks are no codeword: nothing that its manifest covers is usable."""
        sources = [source for source in self._offers.wanted(row) if self._offers.alive(source)]
        if row.id not in self._moving or not sources:
            return
        used = max(sources, key=lambda source: source.verified.bit_count())
        self._offers.manifests[used.manifest].dead = True
        for source in sources:  # the driver has ended those that raced with it, and dropped their chunks
            source.asked.clear()
            source.verified = 0
        self._unsettled = True
        self._settle(now_ms)

    def judge(self, peer: PeerId, reason: Reason) -> None:
        """A peer failed for `reason`: charge it if that proves bad faith, and do not ask it again if it is gone."""
        if reason.is_guilty:
            self._charge(peer, reason)
        elif reason in GONE_REASONS:
            self._ban(peer)

    # --- time -----------------------------------------------------------------------------------

    def hedge(self, now_ms: int) -> None:
        """Ask further for every row and manifest that has been waiting too long."""
        for digest in self._manifests.late(now_ms):
            self._ask_manifest(digest, now_ms)
        for transfer in list(self._moving.values()):
            if transfer.hedge_at_ms is not None and now_ms >= transfer.hedge_at_ms:
                self._hedge_row(transfer, now_ms)
        self._settle(now_ms)

    def forgive(self, late_ms: int) -> None:
        """This node itself did not run for `late_ms`: no peer is at fault, and hedging would not help."""
        self.progress_ms += late_ms
        self._manifests.forgive(late_ms)
        for transfer in self._moving.values():
            if transfer.hedge_at_ms is not None:
                transfer.hedge_at_ms += late_ms

    def next_deadline_ms(self) -> int | None:
        """When to call `hedge` if nothing happens before.

        A row that is late while others arrive can wait for their events: it has no timer of its own.
        """
        times = self._manifests.hedge_times_ms()
        rows = [t.hedge_at_ms for t in self._moving.values() if t.hedge_at_ms is not None]
        if rows:
            times.append(max(min(rows), self.progress_ms + HEDGE_MS_MIN))
        return min(times, default=None)

    # --- leaves ---------------------------------------------------------------------------------

    def _want_best(self, row: Row, room: bool, now_ms: int) -> None:
        """Make sure that the row has a source which can complete it, and that it is asked; otherwise it is lost."""
        if not any(
            self._offers.alive(s) and not self._offers.manifests[s.manifest].slow for s in self._offers.wanted(row)
        ):
            source = self._best_source(row, now_ms)
            if source is not None:
                source.wanted = True
            elif not any(self._offers.alive(s) for s in self._offers.wanted(row)):
                self._moving.pop(row.id, None)
                self.lost.append(row)
                return
        self._ask_wanted(row, room, now_ms)

    def _ask_wanted(self, row: Row, room: bool, now_ms: int) -> None:
        for source in self._offers.wanted(row):
            contents = self._offers.manifests[source.manifest].contents
            if contents is None:
                if self._manifests.may_ask(source.manifest):
                    self._ask_manifest(source.manifest, now_ms)
            elif self._offers.alive(source) and self._matches(source, row, contents):
                if row.id not in self._moving:
                    if not room:
                        return
                    self._move(source, row, now_ms)
                self._top_up(source, row, now_ms)
        if not any(self._offers.alive(source) for source in self._offers.wanted(row)):
            self._want_best(row, room, now_ms)  # ends: every turn has used up a source

    def _move(self, source: RowSource, row: Row, now_ms: int) -> None:
        """Start the row under this source; sources that were wanted only because it was late no longer are."""
        if not self._moving:
            self.progress_ms = now_ms
        self._moving[row.id] = _Transfer(row, now_ms + self._hedge_delay_ms(row, now_ms))
        for other in self._offers.wanted(row):
            other.wanted = other is source

    def _top_up(self, source: RowSource, row: Row, now_ms: int) -> None:
        """Ask until 32 columns are verified or in flight."""
        exclude = source.under_way()
        count = DATA_CHUNKS - exclude.bit_count()
        if count <= 0:
            return
        for peer, columns in assign_columns(count, exclude, self._holders(source, row, now_ms)).items():
            self._fetch(source, row, peer, columns, now_ms)

    def _fetch(self, source: RowSource, row: Row, peer: PeerId, columns: int, now_ms: int) -> None:
        source.asked[peer] = source.asked.get(peer, 0) | columns
        self._deliveries.asked(peer, columns.bit_count() * row.length // DATA_CHUNKS, now_ms)
        timeout_ms = max(self.timeout_at_ms - now_ms, 1)
        self.emit(FetchRow(self.lookup, peer, source.manifest, source.row, row.key, row.length, columns, timeout_ms))

    def _hedge_row(self, transfer: _Transfer, now_ms: int) -> None:
        row = transfer.row
        if any(source.verified.bit_count() >= DATA_CHUNKS for source in self._offers.wanted(row)):
            transfer.hedge_at_ms = None  # the driver is reconstructing it
            return
        stuck = now_ms - self.progress_ms >= HEDGE_MS_MAX
        if self._ask_other_holder(row, now_ms) or self._ask_other_source(row, now_ms):
            transfer.hedge_at_ms = now_ms + self._hedge_delay_ms(row, now_ms)
        elif not stuck:
            # The only holder is busy with this node's other rows, or slow: more columns would only slow it down.
            transfer.hedge_at_ms = self.progress_ms + HEDGE_MS_MAX
        elif self._ask_further_columns(row, now_ms):
            transfer.hedge_at_ms = now_ms + self._hedge_delay_ms(row, now_ms)
        else:
            transfer.hedge_at_ms = None

    def _ask_other_holder(self, row: Row, now_ms: int) -> bool:
        """Ask a peer that wasn't asked yet, also for columns in flight: it may have no others."""
        for source in self._offers.wanted(row):
            others = [h for h in self._holders(source, row, now_ms) if h[0] not in source.asked]
            if self._ask_missing(source, row, others, now_ms, again=True):
                return True
        return False

    def _ask_other_source(self, row: Row, now_ms: int) -> bool:
        source = self._best_source(row, now_ms)
        if source is None:
            return False
        source.wanted = True
        self._ask_wanted(row, True, now_ms)
        return True

    def _ask_further_columns(self, row: Row, now_ms: int) -> bool:
        """Ask the same holders for twice what is missing: they withhold some columns, perhaps half of these too."""
        return any(
            self._ask_missing(source, row, self._holders(source, row, now_ms), now_ms, times=2)
            for source in self._offers.wanted(row)
        )

    def _ask_missing(
        self,
        source: RowSource,
        row: Row,
        holders: list[tuple[PeerId, int]],
        now_ms: int,
        times: int = 1,
        again: bool = False,
    ) -> bool:
        """Ask `holders` for as many columns as the row lacks, as if those in flight never arrived."""
        if self._offers.manifests[source.manifest].contents is None or not self._offers.alive(source):
            return False
        count = times * (DATA_CHUNKS - source.verified.bit_count())
        assigned = assign_columns(count, source.under_way(), holders)
        count -= sum(columns.bit_count() for columns in assigned.values())
        if again and count:
            fresh = sum(assigned.values())  # disjoint masks
            for peer, columns in assign_columns(count, source.verified | fresh, holders).items():
                assigned[peer] = assigned.get(peer, 0) | columns
        for peer, columns in assigned.items():
            self._fetch(source, row, peer, columns, now_ms)
        return bool(assigned)

    def _ask_manifest(self, digest: ManifestDigest, now_ms: int) -> None:
        was_busy = self.busy
        if self._manifests.ask(digest, self.timeout_at_ms, now_ms) and not was_busy:
            self.progress_ms = now_ms

    def _matches(self, source: RowSource, row: Row, contents: ManifestVerified) -> bool:
        """Whether the manifest has this row where the offers said; if not, charge the offering peers."""
        if source.verified or source.asked:
            return True
        is_true = source.is_in(contents, row, self.layout.fingerprint)
        if not is_true:
            source.dead = True
            for peer in source.holders:
                self._charge(peer, Reason.FALSE_OFFER)
        return is_true

    def _charge(self, peer: PeerId, reason: Reason) -> None:
        if peer not in self._offers.banned:
            self.emit(ChargePeer(peer, reason, "l2"))
            self._ban(peer)

    def _ban(self, peer: PeerId) -> None:
        """Do not use the peer again in this lookup; columns from it that still verify count."""
        self._offers.banned.add(peer)
        self._unsettled = True
        self._manifests.ban(peer)
        for transfer in self._moving.values():
            for source in self._offers.of(transfer.row):
                source.asked.pop(peer, None)

    def _settle(self, now_ms: int) -> None:
        """After a gain or loss: every row in flight has its columns asked of a peer, or is lost."""
        while self._unsettled:  # ends: each turn that unsettles again has banned a peer
            self._unsettled = False
            for transfer in list(self._moving.values()):
                self._want_best(transfer.row, True, now_ms)

    def _best_source(self, row: Row, now_ms: int) -> RowSource | None:
        """The source not yet wanted that would complete the row first; with all data columns if possible."""

        def cost(source: RowSource) -> tuple[bool, int]:
            holders = self._holders(source, row, now_ms)
            columns = 0
            for _, held in holders:
                columns |= held
            manifest = self._offers.manifests[source.manifest]
            settled = manifest.contents is not None or bool(manifest.asking)
            peer = holders[0][0]
            wait_ms = self._deliveries.cost_ms(peer, self._queued_bytes(peer) + row.length, now_ms)
            if not settled:
                wait_ms += self._deliveries.rtt_ms[peer] + MANIFEST_HEDGE_MS // 2
            return columns & _DATA != _DATA, wait_ms

        idle = [s for s in self._offers.of(row) if not s.wanted and self._offers.alive(s)]
        return min(idle, key=cost, default=None)

    def _holders(self, source: RowSource, row: Row, now_ms: int) -> list[tuple[PeerId, int]]:
        """The peers that may be asked under the source, soonest first."""

        def cost(holder: tuple[PeerId, int]) -> int:
            return self._deliveries.cost_ms(holder[0], self._queued_bytes(holder[0]) + row.length, now_ms)

        return sorted(self._offers.holders(source), key=cost)

    def _queued_bytes(self, peer: PeerId) -> int:
        return sum(
            t.row.length * source.asked[peer].bit_count() // DATA_CHUNKS
            for t in self._moving.values()
            for source in self._offers.of(t.row)
            if peer in source.asked
        )

    def _hedge_delay_ms(self, row: Row, now_ms: int) -> int:
        peers = [peer for source in self._offers.of(row) for peer in source.asked] or list(self._deliveries.rtt_ms)
        return hedge_delay_ms(max(self._deliveries.cost_ms(peer, row.length, now_ms) for peer in peers))
