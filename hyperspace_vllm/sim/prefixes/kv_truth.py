"""What no node knows about KV: who can serve which row since when, and what excuses a lookup that did not get it."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from ...core.prefix.cost_model import fetch_budget_ms, search_budget_ms
from ...core.records.ids import RowId
from ..setting import Setting
from .kv_load import DEADLINE_MS, KZG_MS, OPEN_MS, ROW_BYTES, SEGMENT_PREFILL_MS
from .sim_bulk import HANDSHAKE_TRIPS, LINK_BYTES_PER_MS, SimBulk
from .sim_chunk_server import FIND_MS
from .sim_lookup import Excuse, SimLookup

SPREAD_MS = 2_000  # within which an announcement reaches the others
COST_MODEL = ("too_short", "not_worth")
SLACK_MS = 5  # jitter


class _Suspect(Protocol):
    @property
    def liar(self) -> object | None: ...


class KvSuspects(Protocol):
    """All hosts (Fleet)."""

    def host(self, number: int) -> _Suspect: ...


class KvTruth:
    """`lookups` are all that engines ever made of their nodes."""

    def __init__(self, setting: Setting, bulk: SimBulk, suspects: KvSuspects) -> None:
        self._agenda = setting.agenda
        self._network = setting.network
        self._bulk = bulk
        self._suspects = suspects
        self._announced: dict[RowId, dict[int, int]] = {}  # row -> honest host -> since when
        self.lookups: list[SimLookup] = []

    def announced(self, host: int, row_ids: Iterable[RowId]) -> None:
        """A host can serve these rows and says so."""
        if self._suspects.host(host).liar is None:
            for name in row_ids:
                self._announced.setdefault(name, {}).setdefault(host, self._agenda.now_ms)

    def died(self, host: int) -> None:
        """What it announced it has to announce again."""
        for hosts in self._announced.values():
            hosts.pop(host, None)

    def promised(self, asker: int, row_ids: Sequence[RowId]) -> tuple[tuple[int, ...], ...]:
        """Of each row, as long as there are any, the hosts that said so long enough ago and can be reached."""
        latest_ms = self._agenda.now_ms - SPREAD_MS
        network = self._network
        if max(network.since_ms(asker), network.split_changed_ms) > latest_ms:
            return ()
        found = []
        for name in row_ids:
            hosts = tuple(
                host
                for host, since_ms in self._announced.get(name, {}).items()
                if host != asker
                and max(since_ms, network.since_ms(host)) <= latest_ms
                and network.acts(host)
                and network.reaches(asker, host)
            )
            if not hosts:
                break
            found.append(hosts)
        return tuple(found)

    def excuse(self, lookup: SimLookup) -> Excuse:
        """Why a lookup that has just been answered did not get what peers had."""
        if lookup.is_fetched:
            return ""
        if lookup.reason in COST_MODEL or self._was_declined(lookup):
            return "prefill_quicker"
        if self._is_hindered(lookup):
            return "hindered"
        if not self._link_suffices(lookup):
            return "link_too_slow"
        return ""

    @staticmethod
    def _was_declined(lookup: SimLookup) -> bool:
        """Whether peers offered all of it and it was not asked for: with rows of the node's own that is a hit too."""
        return not lookup.asked and lookup.offered.issuperset(lookup.row_ids[lookup.local : lookup.promised_end])

    def _is_hindered(self, lookup: SimLookup) -> bool:
        if any(host < 0 or not self._was_there(lookup, host) for host in lookup.asked):
            return True
        missing = lookup.promised[max(lookup.loaded - lookup.local, 0) :]
        return any(not any(self._was_there(lookup, host) for host in hosts) for hosts in missing)

    def _was_there(self, lookup: SimLookup, host: int) -> bool:
        """Whether an honest host acted and could be reached all the while, and no segment between the two was lost."""
        network, asked_ms = self._network, lookup.asked_ms
        pair = min(lookup.host, host), max(lookup.host, host)
        return (
            self._suspects.host(host).liar is None
            and network.acts(host)
            and network.since_ms(host) <= asked_ms
            and network.reaches(lookup.host, host)
            and network.split_changed_ms <= asked_ms
            and self._bulk.disturbed_ms.get(pair, -1.0) < asked_ms
        )

    def _link_suffices(self, lookup: SimLookup) -> bool:
        """Whether the nearest peers could have sent it in time over links that nothing else uses."""
        saves_ms = len(lookup.promised) * SEGMENT_PREFILL_MS
        trips_ms = [
            min(self._network.trip_ms(lookup.host, host) for host in hosts) + FIND_MS + SLACK_MS
            for hosts in lookup.promised
        ]
        if max(trips_ms) > search_budget_ms((len(lookup.row_ids) - lookup.local) * SEGMENT_PREFILL_MS):
            return False
        transfer_ms = len(lookup.promised) * ROW_BYTES / LINK_BYTES_PER_MS
        takes_ms = (3 + HANDSHAKE_TRIPS) * max(trips_ms) + KZG_MS + transfer_ms + OPEN_MS
        return takes_ms <= min(fetch_budget_ms(saves_ms), DEADLINE_MS)
