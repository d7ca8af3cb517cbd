"""What must hold of L2 in every run, also with faults of the network and lies of hosts.

Safety: no engine gets a row that isn't the one its key names, nor garbage; what a lookup asks for stays within bounds;
no honest node is charged with a lie. At the end every lookup has been answered in time, and nothing is leased, staged
or on its way. Liveness: where nothing goes wrong, SHARE_MIN of the prefixes that a live peer had are fetched, of those
that nothing excuses (kv_truth.py); and the excuses are few.
"""

from collections.abc import Mapping
from typing import Protocol

from ...core.events.prefix_reading import AnswerPrefix, FetchRow, FindRowHolders
from ...core.prefix.prefix_part import ASKED_MAX
from ...core.prefix.row_window import MOVING_BYTES_MAX, MOVING_ROWS_MIN
from ...core.records.ids import PeerId
from ...core.records.limits import KV_LINKS_MAX
from ...core.records.reason import Reason
from ..setting import Setting
from .kv_figures import KvFigures
from .kv_load import DEADLINE_MS, ROW_BYTES
from .sim_arena import SimArena
from .sim_assembly import SimAssembly
from .sim_bulk import SimBulk
from .sim_lookup import SimLookup

LATE_MS = 1  # virtual milliseconds are whole
CALLS_OF_ROW_MAX = 8  # FetchRows of one row that are open at once: the first, and the hedges
ROWS_MAX = max(MOVING_BYTES_MAX // ROW_BYTES, MOVING_ROWS_MIN)  # of a lookup, in flight
SHARE_MIN = 0.9
EXCUSED_MAX = 0.25
OFFERED_MIN = 20  # fewer say nothing
SETTLED_MS = 11_000  # after which a host that acts has ended what it had begun


class _Engine(Protocol):
    @property
    def is_idle(self) -> bool: ...


class CheckedPrefixes(Protocol):
    """The L2 of one host (SimPrefixes)."""

    @property
    def number(self) -> int: ...
    @property
    def arena(self) -> SimArena: ...
    @property
    def assembly(self) -> SimAssembly: ...
    @property
    def engine(self) -> _Engine: ...
    @property
    def staged(self) -> Mapping[int, str]: ...


class _Suspect(Protocol):
    @property
    def liar(self) -> object | None: ...


class CheckedPeers(Protocol):
    """All hosts (Fleet)."""

    def host(self, number: int) -> _Suspect: ...
    def number_of(self, peer: str) -> int: ...


class KvChecker:
    """Hears of everything; `violations` is what was wrong, in words. `charges` are those of honest hosts:
    (who charges, who is charged, why).
    """

    def __init__(self, setting: Setting, peers: CheckedPeers, bulk: SimBulk) -> None:
        self._setting = setting
        self._peers = peers
        self._bulk = bulk
        self._asked: dict[tuple[int, int, int], frozenset[PeerId]] = {}  # (host, life, lookup) -> for offers
        self.violations: list[str] = []
        self.charges: list[tuple[int, int, Reason]] = []

    @property
    def found_slow(self) -> int:
        """How often an honest host found another too slow."""
        slow = [accused for _, accused, reason in self.charges if not reason.is_guilty]
        return sum(self._peers.host(accused).liar is None for accused in slow)

    def violated(self, host: int, what: str) -> None:
        """Note what was wrong, where and when, and how to see it again."""
        self.violations.append(f"seed {self._setting.seed}, {self._setting.agenda.now_ms} ms, node {host}: {what}")

    # --- safety ---------------------------------------------------------------------------------

    def on_find(self, host: CheckedPrefixes, effect: FindRowHolders) -> None:
        """Peers are asked for offers."""
        if len(effect.peers) > ASKED_MAX:
            self.violated(host.number, f"prefix {effect.lookup}: asks {len(effect.peers)} peers")
        self._asked[self._key(host, effect.lookup)] = frozenset(effect.peers)

    def on_fetch(self, host: CheckedPrefixes, effect: FetchRow) -> None:
        """A peer is asked for chunks."""
        if effect.peer not in self._asked.get(self._key(host, effect.lookup), ()):
            self.violated(host.number, f"prefix {effect.lookup}: fetches from a peer that it did not ask for offers")
        rows, calls = host.assembly.moving(effect.lookup), host.assembly.calls(effect.lookup)
        if rows > ROWS_MAX or calls > CALLS_OF_ROW_MAX * rows:
            self.violated(host.number, f"prefix {effect.lookup}: {rows} rows in flight, of {calls} fetches")
        if self._bulk.links(host.number) > KV_LINKS_MAX:
            self.violated(host.number, f"{self._bulk.links(host.number)} links")

    def on_answer(self, host: CheckedPrefixes, effect: AnswerPrefix, lookup: SimLookup | None) -> None:
        """An engine gets the rows of an answer."""
        if lookup is None:
            self.violated(host.number, f"prefix {effect.lookup} answered twice")
            return
        for segment, _, _, key in effect.rows:
            if not host.arena.is_leased(key):
                self.violated(host.number, f"prefix {effect.lookup}: served a row that isn't leased")
            elif (holds := host.arena.holds(key)) is None:
                self.violated(host.number, f"prefix {effect.lookup}: served garbage as row {segment}")
            elif holds != key:
                self.violated(host.number, f"prefix {effect.lookup}: served another row as row {segment}")
        late_ms = self._setting.agenda.now_ms - lookup.asked_ms - DEADLINE_MS
        if late_ms > LATE_MS and self._setting.network.since_ms(host.number) <= lookup.asked_ms:
            self.violated(host.number, f"prefix {effect.lookup} answered {late_ms} ms after its deadline")

    def on_charge(self, host: CheckedPrefixes, peer: PeerId, reason: Reason) -> None:
        """A core blames a peer. Being slow is no lie: congested and frozen hosts are."""
        accused = self._peers.number_of(peer)
        if self._peers.host(host.number).liar is not None or accused < 0:
            return
        self.charges.append((host.number, accused, reason))
        if reason.is_guilty and self._peers.host(accused).liar is None:
            self.violated(host.number, f"charged the honest node {accused} for its KV: {reason}")

    # --- at the end -----------------------------------------------------------------------------

    def check_rest(self, host: CheckedPrefixes) -> None:
        """Nothing of what a host had begun is left over, unless it died or was frozen a moment ago."""
        network, now_ms = self._setting.network, self._setting.agenda.now_ms
        if not network.acts(host.number) or network.since_ms(host.number) > now_ms - SETTLED_MS:
            return
        if not host.engine.is_idle:
            self.violated(host.number, "prefixes are unanswered, or were never released")
        if host.arena.leases:
            self.violated(host.number, f"{host.arena.leases} leases are left over")
        if host.arena.filling or host.staged:
            self.violated(host.number, f"{host.arena.filling} slabs are left over, {len(host.staged)} of them staged")
        if not host.assembly.is_idle:
            self.violated(host.number, "rows are fetched for no lookup")

    def check_share(self, figures: KvFigures) -> None:
        """In a run without faults and liars, what peers had was fetched."""
        excused = figures.prefill_quicker + figures.link_too_slow + figures.hindered
        if figures.offered >= OFFERED_MIN and (figures.share < SHARE_MIN or excused > EXCUSED_MAX * figures.offered):
            told = f"{figures.fetched} of {figures.offered} prefixes that peers had, {excused} excused"
            self.violations.append(f"seed {self._setting.seed}: engines got {told}")

    def _key(self, host: CheckedPrefixes, lookup: int) -> tuple[int, int, int]:
        return host.number, self._setting.network.life(host.number), lookup
