"""One prefix lookup, from PrefixWanted to its one AnswerPrefix and, once released, EndLookup.

    local ── RowsFound ──▶ searching ── enough offers, or the search budget is over ──▶ getting ──▶ answered
      └────── everything is here, or no peer may be asked ───────────────────────────────▲

*Getting* aims at an end segment and gets every row that it needs, from the arena, the disk and peers. Unavailable rows
lower the aim, and so does an arena without room for more; a stall or an exhausted budget lowers it to rows that need no
peer (*retreat*). If nothing fits, the lookup releases everything and waits a moment for room.
"""

from typing import Literal

from ..events.conduct import ChargePeer
from ..events.node_state import Tick
from ..events.prefix_reading import (
    AnswerPrefix,
    ChunksVerified,
    FindRowHolders,
    FindRows,
    HolderStalled,
    ManifestRefused,
    ManifestVerified,
    PrefixWanted,
    ProviderAnswered,
    ProviderFailed,
    ReleaseRows,
    RowFailed,
    RowReady,
    RowsFound,
)
from ..events.vocabulary import PrefixEffect
from ..records.ids import NetworkId, PeerId, RowKey
from ..records.limits import FETCH_STALL_MS, FETCH_UNKNOWN_MS
from ..records.reason import Reason
from .cost_model import (
    SEARCH_MS_MAX,
    RateEstimator,
    fetch_budget_ms,
    least_rate,
    saved_ms,
    search_budget_ms,
    worth_fetching,
)
from .plan import PrefixRows, Row, slowest_tier
from .provider_search import ProviderSearch
from .room import AGAIN_MS, ArenaRoom
from .row_window import RowWindow
from .transfers import GONE_REASONS, Transfers

FetchMode = Literal["auto", "always", "never"]
LookupEvent = (
    RowsFound
    | ProviderAnswered
    | ProviderFailed
    | ManifestVerified
    | ManifestRefused
    | ChunksVerified
    | HolderStalled
    | RowReady
    | RowFailed
)

LOAD_GRACE_MS = 50  # for this node's own rows, when a fetch was abandoned and they would still be useful
ANSWER_MARGIN_MS = 50  # answer before the client gives up: its clock runs too


class PrefixLookup:
    """The machine of one lookup. `start`, then `handle` until `answered`; it never reads the clock."""

    def __init__(
        self,
        wanted: PrefixWanted,
        network: NetworkId,
        peers: tuple[PeerId, ...],
        mode: FetchMode,
        rates: RateEstimator,
        now_ms: int,
    ) -> None:
        self.lookup = wanted.lookup
        self.layout = wanted.layout
        self.answered = False
        self.waited_ms: dict[PeerId, int] = {}  # in vain, for each of these peers at once
        self._wanted = wanted
        self._mode = mode
        self._peers = peers if wanted.may_ask_peers and mode != "never" else ()
        self._rows = PrefixRows(network, wanted.layout, wanted.segment_keys, wanted.start_token)
        self._room = ArenaRoom()
        self._phase: Literal["local", "searching", "getting", "waiting"] = "local"
        self._started_ms = now_ms
        margin_ms = min(ANSWER_MARGIN_MS, wanted.deadline_ms // 10)
        self._deadline_ms = now_ms + wanted.deadline_ms - margin_ms
        self._phase_ends_ms: int | None = None  # the search's or the fetch's budget, or a retreat's grace
        self._search = ProviderSearch(self._peers, now_ms)
        self._local_end = 0
        self._end = 0
        self._missing: set[Row] = set()
        self._cause = ""  # what went wrong
        self._not_fetched = ""  # why no peer's rows were wanted; not a failure
        self._fetching = False
        self._due_ms: int | None = None
        self._forgiven_ms = 0
        self._effects: list[PrefixEffect] = []
        emit = self._effects.append
        self._transfers = Transfers(wanted.lookup, wanted.layout, self._rows.keys, self._peers, rates, emit)
        self._transfers.timeout_at_ms = self._deadline_ms
        self._window = RowWindow(wanted.lookup, wanted.layout, self._transfers, emit)

    @property
    def silent(self) -> dict[PeerId, None]:
        """The peers that were asked and did not say what they have, an ordered set."""
        return self._search.silent

    def start(self, now_ms: int) -> list[PrefixEffect]:
        """The first effects."""
        if self._rows.by_key:
            self._effects.append(FindRows(self.lookup, tuple(self._rows.by_key)))
        else:
            self._answer(0, "nothing_beyond", now_ms)
        return self._take_effects()

    def handle(self, event: LookupEvent | Tick, now_ms: int) -> list[PrefixEffect]:
        """The effects of `event`; none once answered."""
        if self.answered:
            return []
        self._forgive_own_delay(now_ms)
        if now_ms >= self._deadline_ms:
            self._note(event, now_ms)
            if not self.answered:
                self._answer_ready("deadline", now_ms)
            return self._take_effects()
        self._note(event, now_ms)
        self._advance(now_ms)
        self._due_ms = self.next_deadline_ms()
        return self._take_effects()

    def next_deadline_ms(self) -> int | None:
        """When to call with Tick, if nothing else happens before."""
        if self.answered:
            return None
        if self._phase == "waiting":
            return min(self._deadline_ms, self._room.look_at_ms or self._deadline_ms)
        times = [self._deadline_ms]
        if self._window.orphans:
            times.append(self._search.ends_ms)
        if self._phase_ends_ms is not None:
            times.append(self._phase_ends_ms)
        if self._fetching and self._transfers.busy:
            times.append(self._transfers.progress_ms + FETCH_STALL_MS)
            hedge_at_ms = self._transfers.next_deadline_ms()
            if hedge_at_ms is not None:
                times.append(hedge_at_ms)
        return min(times)

    def absent(self, event: RowsFound) -> set[RowKey]:
        """The rows that the lookup asked for and this node doesn't have."""
        return self._rows.by_key.keys() - event.in_memory - event.on_disk

    # --- events ---------------------------------------------------------------------------------

    def _note(self, event: LookupEvent | Tick, now_ms: int) -> None:
        match event:
            case RowsFound():
                if self._phase in ("local", "waiting"):
                    self._rows_found(event, now_ms)
            case ProviderAnswered():
                self._search.answered(event.peer)
                if self._phase == "searching" or self._fetching:
                    self._transfers.add_offers(event, self._rows.absent(self._local_end))
            case ProviderFailed():
                if event.peer in self._search.outstanding and event.reason in GONE_REASONS:
                    self.waited_ms |= self._search.waited_ms([event.peer], now_ms)
                self._search.answered(event.peer)
                self._transfers.judge(event.peer, event.reason)
            case Tick():
                pass
            case _:
                if self._phase in ("getting", "waiting"):
                    self._note_transfer(event, now_ms)

    def _note_transfer(
        self,
        event: ManifestVerified | ManifestRefused | ChunksVerified | HolderStalled | RowReady | RowFailed,
        now_ms: int,
    ) -> None:
        transfers = self._transfers
        match event:
            case ManifestVerified():
                transfers.manifest_verified(event, now_ms)
            case ManifestRefused():
                transfers.manifest_refused(event, now_ms)
            case RowReady():
                self._row_ready(self._rows.by_key.get(event.row_key), now_ms)
            case _:
                row = self._rows.by_key.get(event.row_key)
                if row is None or row.state != "moving":
                    return
                match event:
                    case ChunksVerified():
                        transfers.chunks_verified(event, row, now_ms)
                    case HolderStalled():
                        transfers.holder_stalled(event, row, now_ms)
                    case RowFailed():
                        self._row_failed(row, event.reason, now_ms)

    def _rows_found(self, event: RowsFound, now_ms: int) -> None:
        self._room.found(event)
        self._rows.found(event.in_memory, event.on_disk)
        if self._phase == "waiting":
            self._phase = "getting"
            self._transfers.forgive(AGAIN_MS)
            self._aim_again(now_ms)
            return
        self._local_end = self._fitting()
        if self._rows.usable(_is_to_be_had) < self._rows.end_max:
            self._ask_peers(now_ms)
        else:
            self._get_local("", now_ms)

    def _row_ready(self, row: Row | None, now_ms: int) -> None:
        if row is not None and row.state == "idle":
            self._release([row])  # it was in flight when the aim was lowered
        if row is None or row.state in ("ready", "idle"):
            return
        self._window.arrived(row)
        self._missing.discard(row)
        if self._fetching:
            self._transfers.finish(row, now_ms)

    def _row_failed(self, row: Row, reason: str, now_ms: int) -> None:
        if reason == "arena_full":
            self._lower_aim(row, now_ms)
        elif row.tier != "network":
            self._window.not_loaded(row)
            self._lose([row], reason, now_ms)
        elif reason == "condemned":
            self._transfers.condemned(row, now_ms)
        else:
            row.state = "lost"
            self._retreat(reason, now_ms)

    # --- searching ------------------------------------------------------------------------------

    def _ask_peers(self, now_ms: int) -> None:
        """Ask all peers for the missing rows, unless a fetch cannot save time."""
        if not self._peers:
            reason = "no_peers" if self._wanted.may_ask_peers and self._mode != "never" else "local_only"
            self._get_local(reason, now_ms)
            return
        budget_ms = SEARCH_MS_MAX
        if self._mode == "auto":
            budget_ms = search_budget_ms(self._saves_ms(self._local_end, self._rows.end_max))
        if budget_ms == 0:
            self._get_local("too_short", now_ms)
            return
        self._phase = "searching"
        self._phase_ends_ms = min(now_ms + budget_ms, self._deadline_ms)
        self._search.begin(now_ms, self._phase_ends_ms)
        wanted = tuple(self._rows.absent(self._local_end))
        self._effects.append(FindRowHolders(self.lookup, wanted, self._peers, self._phase_ends_ms - now_ms))

    def _choose(self, now_ms: int) -> None:
        """The search is over: aim at the longest prefix that the offers complete, if fetching it pays."""
        self._rows.offered(self._transfers.fetchable)
        usable, end = self._rows.usable(_is_to_be_had), self._fitting()
        offered = usable > self._rows.usable(lambda row: row.tier in ("memory", "disk"))
        if end <= self._local_end and (end or not offered):
            not_found = "search_timeout" if self._search.outstanding else "not_found"
            self._get_local("arena_full" if offered else not_found, now_ms)
            return
        remote = [row for row in self._rows.needed(end) if row.tier == "network"]
        saves_ms = self._saves_ms(self._local_end, end or usable)
        spent_ms = now_ms - self._started_ms
        if self._mode == "auto" and not worth_fetching(
            spent_ms + self._transfers.estimate_ms(remote, now_ms), saves_ms
        ):
            self._get_local("not_worth", now_ms)
            return
        self._phase = "getting"
        self._fetching = True
        self._phase_ends_ms = None
        if self._mode == "auto":
            self._phase_ends_ms = self._started_ms + (fetch_budget_ms(saves_ms) if saves_ms else FETCH_UNKNOWN_MS)
        left_ms = self._phase_ends_ms - now_ms if self._phase_ends_ms else None
        self._transfers.least_rate = least_rate(sum(row.length for row in remote), left_ms)
        self._transfers.timeout_at_ms = min(self._deadline_ms, self._phase_ends_ms or self._deadline_ms)
        self._aim_again(now_ms)

    # --- getting --------------------------------------------------------------------------------

    def _get_local(self, not_fetched: str, now_ms: int) -> None:
        """Use the rows that this node has."""
        self._not_fetched = not_fetched
        self._phase = "getting"
        self._phase_ends_ms = None
        self._rows.offered(lambda row: False)
        saves_ms = self._saves_ms(0, self._rows.usable(_is_to_be_had))
        if self._mode == "auto" and saves_ms:
            self._phase_ends_ms = self._started_ms + max(fetch_budget_ms(saves_ms), LOAD_GRACE_MS)
        self._aim_again(now_ms)

    def _aim_again(self, now_ms: int) -> None:
        """Aim at the longest available prefix for which there is room."""
        usable = self._rows.usable(_is_to_be_had)
        self._end = self._fitting()
        if self._end < usable:
            self._cause = "arena_full"
        rows = self._rows.needed(self._end)
        self._missing = {row for row in rows if row.state != "ready"}
        self._window.queue(rows)
        if self._end == 0:
            self._wait_or_give_up(usable, now_ms)

    def _wait_or_give_up(self, usable: int, now_ms: int) -> None:
        if usable and self._room.wait(now_ms, self._phase_ends_ms or self._deadline_ms):
            self._phase = "waiting"
            self._release_unneeded()
        else:
            self._answer(0, self._cause or self._not_fetched or "miss", now_ms)

    def _lower_aim(self, row: Row, now_ms: int) -> None:
        """The arena has no gap for the row: leases and fragmentation leave less room than was counted."""
        self._window.drop(row)
        self._room.shrink(row for row in self._rows.needed(self._end) if row.state in ("moving", "ready"))
        self._aim_again(now_ms)
        self._release_unneeded()

    def _release_unneeded(self) -> None:
        needed = set(self._rows.needed(self._end))
        held = [row for row in self._rows.by_key.values() if row.state in ("moving", "ready") and row not in needed]
        for row in held:
            self._window.drop(row)
        self._release(held)

    def _release(self, rows: list[Row]) -> None:
        if rows:
            self._effects.append(ReleaseRows(self.lookup, tuple(row.key for row in rows)))

    def _lose(self, rows: list[Row], cause: str, now_ms: int) -> None:
        """Rows are unavailable: aim at the longest prefix without them."""
        for row in rows:
            row.state = "lost"
        self._cause = cause
        self._aim_again(now_ms)

    def _retreat(self, cause: str, now_ms: int) -> None:
        """Stop fetching; use the rows that are ready or that this node can load within LOAD_GRACE_MS."""
        late_ms = self._transfers.stop(now_ms)
        self.waited_ms |= late_ms
        if cause in ("stalled", "too_slow"):
            self._effects += [ChargePeer(peer, Reason(cause), "l2") for peer in late_ms]
        self._fetching = False
        self._window.orphans.clear()
        self._phase_ends_ms = min(now_ms + LOAD_GRACE_MS, self._deadline_ms)
        remote = [r for r in self._rows.by_key.values() if r.tier in ("none", "network") and r.state != "ready"]
        self._lose(remote, cause, now_ms)

    def _advance(self, now_ms: int) -> None:
        """Decide what to do next from the time and the state."""
        if self._phase == "searching":
            over = self._phase_ends_ms is not None and now_ms >= self._phase_ends_ms
            if over:
                self.waited_ms |= self._search.waited_ms(sorted(self._search.outstanding), now_ms)
            if over or not self._search.outstanding or self._found_everything():
                self._choose(now_ms)
        if self._phase == "waiting" and self._room.look_at_ms is not None and now_ms >= self._room.look_at_ms:
            self._room.look_at_ms = None
            self._effects.append(FindRows(self.lookup, tuple(self._rows.by_key)))
        if self._phase == "getting" and not self.answered:
            self._check_limits(now_ms)
            self._get_more(now_ms)

    def _forgive_own_delay(self, now_ms: int) -> None:
        """A late tick means that this node did not get the CPU; peers' answers may be waiting behind it.

        At most FETCH_STALL_MS per lookup in all, so that even then a stall ends within twice that.
        """
        if self._fetching and self._due_ms is not None and now_ms > self._due_ms:
            late_ms = min(now_ms - self._due_ms, FETCH_STALL_MS - self._forgiven_ms)
            self._forgiven_ms += late_ms
            self._transfers.forgive(late_ms)

    def _check_limits(self, now_ms: int) -> None:
        if not self._missing:
            return
        if self._phase_ends_ms is not None and now_ms >= self._phase_ends_ms:
            if self._fetching:
                self._retreat("too_slow", now_ms)
            else:
                self._answer_ready(self._cause or "too_slow", now_ms)
        elif self._fetching and self._transfers.busy:
            if now_ms - self._transfers.progress_ms >= FETCH_STALL_MS:
                self._retreat("stalled", now_ms)
            else:
                self._transfers.hedge(now_ms)

    def _get_more(self, now_ms: int) -> None:
        while not self.answered:  # ends: every turn but the last loses a row
            self._window.fill(now_ms)
            if not self._window.orphans or self._search.may_bring_more(now_ms):
                break
            self._lose(self._window.take_orphans(), "failed", now_ms)
        if not self.answered and not self._missing:
            self._answer(self._end, self._cause or "hit", now_ms)

    # --- answering ------------------------------------------------------------------------------

    def _answer_ready(self, cause: str, now_ms: int) -> None:
        self._answer(self._rows.usable(lambda row: row.state == "ready"), cause, now_ms)

    def _answer(self, end: int, reason: str, now_ms: int) -> None:
        assert not self.answered
        late_ms = self._transfers.stop(now_ms)
        if reason == "deadline":
            self.waited_ms |= late_ms
        rows = self._rows.needed(end)
        places = tuple((row.segment, row.part, row.rank, row.key) for row in rows)
        self._effects.append(AnswerPrefix(self.lookup, end, places, slowest_tier(rows), reason))
        self.answered = True

    # --- leaves ---------------------------------------------------------------------------------

    def _fitting(self) -> int:
        return self._rows.usable(_is_to_be_had, self._room.cost, self._room.bytes)

    def _found_everything(self) -> bool:
        found = self._rows.usable(lambda row: row.tier != "none" or self._transfers.fetchable(row))
        return found == self._rows.end_max

    def _saves_ms(self, from_end: int, to_end: int) -> int:
        """Prefill that segments [from_end, to_end) save; 0: unknown."""
        tokens_each, start = self.layout.segment_tokens, self._wanted.start_token
        saved = max(to_end * tokens_each - max(start, from_end * tokens_each), 0)
        return saved_ms(self._wanted.prefill_ms, saved, len(self._wanted.segment_keys) * tokens_each - start)

    def _take_effects(self) -> list[PrefixEffect]:
        effects = list(self._effects)
        self._effects.clear()
        return effects


def _is_to_be_had(row: Row) -> bool:
    return row.tier != "none" and row.state != "lost"
