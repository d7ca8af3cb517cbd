"""L2 in simulated networks: prefixes reach the engines that want them, and the checkers would notice if not."""

from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import pytest

from hyperspace_vllm.cli import main
from hyperspace_vllm.core.events.conduct import ChargePeer
from hyperspace_vllm.core.events.prefix_reading import AnswerPrefix, EndLookup, ProviderAnswered
from hyperspace_vllm.core.events.prefix_writing import UnpinRows
from hyperspace_vllm.core.events.vocabulary import Effect, Event
from hyperspace_vllm.core.node.node import Node
from hyperspace_vllm.core.prefix.prefix_part import PrefixPart
from hyperspace_vllm.core.prefix.row_window import RowWindow
from hyperspace_vllm.core.prefix.transfers import Transfers
from hyperspace_vllm.core.records.reason import Reason
from hyperspace_vllm.sim.fleet import Fleet
from hyperspace_vllm.sim.liars import Kind
from hyperspace_vllm.sim.prefixes.kv_liars import LIES
from hyperspace_vllm.sim.prefixes.kv_load import ROW_BYTES, SEGMENT_PREFILL_MS
from hyperspace_vllm.sim.prefixes.sim_assembly import SimAssembly
from hyperspace_vllm.sim.prefixes.sim_bulk import LINK_BYTES_PER_MS
from hyperspace_vllm.sim.prefixes.sim_lookup import SimLookup
from hyperspace_vllm.sim.prefixes.sim_prefixes import SimPrefixes
from hyperspace_vllm.sim.run import run
from hyperspace_vllm.sim.signatures import remembered_verdicts

CONVERSATION = 0
SEGMENTS = 14
MET_MS = 8_000  # by now all hosts know each other
COMPUTED_MS = MET_MS + SEGMENTS * SEGMENT_PREFILL_MS + 5_000  # and the prompt that one has computed
ANSWERED_MS = COMPUTED_MS + 5_000


def prefixes_of(fleet: Fleet, number: int) -> SimPrefixes:
    prefixes = fleet.hosts[number].prefixes
    assert prefixes is not None
    return prefixes


def ask(fleet: Fleet, number: int) -> None:
    assert fleet.kv is not None
    prefixes_of(fleet, number).engine.ask(fleet.kv.conversations.keys(CONVERSATION))


def asked(size: int, seed: int = 1, liars: dict[int, Kind] | None = None, askers: tuple[int, ...] = (2,)) -> Fleet:
    """Host 0 has computed a prompt and said so, and the others ask for it, one after another."""
    with patch("hyperspace_vllm.sim.fleet.LOSS", 0.0):
        fleet = Fleet(size, seed, liars or {})
    for host in fleet.hosts:
        fleet.agenda.after(10 * host.number, host.boot)
    fleet.agenda.after(MET_MS, partial(ask, fleet, 0))
    for place, number in enumerate(askers):
        fleet.agenda.after(COMPUTED_MS + 1_000 * place, partial(ask, fleet, number))
    return fleet


def end_of(fleet: Fleet, until_ms: int = ANSWERED_MS) -> list[SimLookup]:
    """The lookups of those that asked host 0 for its prompt, once everything has come to its end."""
    with remembered_verdicts():
        fleet.agenda.run(until_ms)
        fleet.agenda.run(until_ms + 12_000)
    assert fleet.kv is not None
    for host in fleet.honest:
        fleet.kv.checker.check_rest(prefixes_of(fleet, host.number))
    return fleet.kv.truth.lookups[1:]


def violations_of(fleet: Fleet) -> str:
    assert fleet.kv is not None
    return "\n".join(fleet.kv.checker.violations)


def test_a_prefix_that_one_host_computed_is_fetched_by_another_in_the_time_that_its_link_takes() -> None:
    fleet = asked(3)
    (lookup,) = end_of(fleet)
    assert (lookup.promised_end, lookup.loaded, lookup.from_peers, lookup.reason) == (
        SEGMENTS,
        SEGMENTS,
        SEGMENTS,
        "hit",
    )
    takes_ms = lookup.answered_ms - lookup.asked_ms
    assert SEGMENTS * ROW_BYTES / LINK_BYTES_PER_MS < takes_ms < SEGMENTS * SEGMENT_PREFILL_MS / 4
    assert violations_of(fleet) == ""


def test_hosts_that_ask_one_host_at_once_share_its_link() -> None:
    fleet = asked(4, askers=())
    for number in (1, 2, 3):
        fleet.agenda.after(COMPUTED_MS, partial(ask, fleet, number))
    lookups = end_of(fleet)
    assert [lookup.loaded for lookup in lookups] == [SEGMENTS] * 3
    quickest_ms = min(lookup.answered_ms - lookup.asked_ms for lookup in lookups)
    assert quickest_ms > 2 * SEGMENTS * ROW_BYTES / LINK_BYTES_PER_MS
    assert violations_of(fleet) == ""


def test_a_host_that_fetched_a_prefix_serves_it_when_its_producer_is_gone() -> None:
    fleet = asked(4, askers=(1, 2, 3))
    fleet.agenda.after(COMPUTED_MS + 900, partial(fleet.hosts[0].die, True, False))
    lookups = end_of(fleet)
    assert [lookup.loaded for lookup in lookups] == [SEGMENTS] * 3
    assert violations_of(fleet) == ""


def test_a_host_serves_what_is_on_its_disk_after_a_restart() -> None:
    fleet = asked(3, askers=())
    fleet.agenda.after(COMPUTED_MS, partial(fleet.hosts[0].die, True, True))
    fleet.agenda.after(COMPUTED_MS + 1_000, fleet.hosts[0].boot)
    fleet.agenda.after(COMPUTED_MS + 6_000, partial(ask, fleet, 2))
    (lookup,) = end_of(fleet, COMPUTED_MS + 10_000)
    assert lookup.loaded == SEGMENTS


@pytest.mark.parametrize("trouble", ["frozen", "dead", "power cut", "cut off"])
def test_what_stops_a_holder_costs_a_bounded_wait_and_is_excused(trouble: str) -> None:
    fleet = asked(3)
    stops: dict[str, Callable[[], None]] = {
        "frozen": partial(fleet.network.freeze, 0),
        "dead": partial(fleet.hosts[0].die, True, True),
        "power cut": partial(fleet.hosts[0].die, False, True),
        "cut off": partial(fleet.network.split, [1, 0, 0]),
    }
    fleet.agenda.after(COMPUTED_MS + 250, stops[trouble])
    (lookup,) = end_of(fleet)
    assert 0 < lookup.promised_end - lookup.loaded < SEGMENTS
    assert lookup.excuse == "hindered"
    assert lookup.answered_ms - lookup.asked_ms < 900
    assert violations_of(fleet) == ""


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("boastful", None),
        ("replayed", Reason.FALSE_OFFER),
        ("altered", Reason.BAD_DIGEST),
        ("crowd", None),
        ("expired", None),
        ("forged", Reason.BAD_TAG),
        ("flatterer", Reason.BAD_SIGNATURE),
        ("oversized", Reason.PROTOCOL),
    ],
)
def test_engines_get_their_prefix_whatever_a_liar_says_of_it(kind: Kind, reason: Reason | None) -> None:
    assert kind in LIES
    fleet = asked(6, liars={1: kind}, askers=(2, 3, 4, 5))
    lookups = end_of(fleet, ANSWERED_MS + 3_000)
    assert fleet.kv is not None
    assert violations_of(fleet) == ""
    assert sum(lookup.loaded == SEGMENTS for lookup in lookups) >= 3
    charged = {(accused, why) for _, accused, why in fleet.kv.checker.charges}
    assert charged - {(1, Reason.STALLED), (1, Reason.TOO_SLOW)} == ({(1, reason)} if reason is not None else set())


def test_a_run_reports_what_l2_did_and_fetches_nine_in_ten_prefixes_that_peers_had() -> None:
    result = run("cold_start", 8, 1)
    assert result.violations == ()
    assert result.kv is not None
    assert result.kv.offered > 20
    assert result.kv.share >= 0.9
    assert result.kv.fetched >= 0.8 * result.kv.offered
    assert result.kv.tokens_loaded > 0.6 * result.kv.tokens_wanted
    assert 0 < result.kv.p50_ms <= result.kv.p95_ms < 1_000
    assert 1.0 <= result.kv.bytes_moved < 1.2


def test_l2_is_off_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sim", "--scenario", "cold_start", "--nodes", "4", "--workers", "1", "--no-kv", "--json"]) == 0
    assert '"kv": null' in capsys.readouterr().out
    assert main(["sim", "--scenario", "cold_start", "--nodes", "4", "--workers", "1"]) == 0
    assert "KV prefixes" in capsys.readouterr().out


# --- the checkers notice -------------------------------------------------------------------------


def changed(monkeypatch: pytest.MonkeyPatch, change: Callable[[Event, list[Effect]], list[Effect]]) -> None:
    """Let every core do something other than it decided."""
    handle = Node.handle
    monkeypatch.setattr(Node, "handle", lambda self, event, now: change(event, handle(self, event, now)))


def found(size: int = 4, kind: Kind | None = None) -> str:
    """What the checkers say of a few lookups."""
    askers = tuple(range(2, size))
    fleet = asked(size, liars={1: kind} if kind is not None else {}, askers=askers)
    end_of(fleet)
    return violations_of(fleet)


def test_a_core_that_takes_every_offer_for_true_is_caught_serving_another_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Transfers, "_matches", lambda *_: True)
    assert "served another row as row" in found(size=6, kind="replayed")


def test_a_host_that_checks_no_digests_is_caught_serving_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimAssembly, "is_verified", lambda *_: True)
    assert "served garbage as row" in found(kind="altered")


def test_a_core_that_blames_honest_holders_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def blame(event: Event, effects: list[Effect]) -> list[Effect]:
        blamed = [ChargePeer(event.peer, Reason.BAD_DIGEST)] if isinstance(event, ProviderAnswered) else []
        return [*effects, *blamed]

    changed(monkeypatch, blame)
    assert "charged the honest node 0 for its KV: bad_digest" in found()


@pytest.mark.parametrize("kept", [EndLookup, UnpinRows])
def test_a_core_that_never_ends_leases_is_caught(monkeypatch: pytest.MonkeyPatch, kept: type[Effect]) -> None:
    changed(monkeypatch, lambda _, effects: [effect for effect in effects if not isinstance(effect, kept)])
    assert "leases are left over" in found()


def test_a_host_that_forgets_slabs_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimAssembly, "end_some", lambda self, lookup, keys: self._rows.get(lookup, {}).clear())
    fleet = asked(3)
    fleet.agenda.after(COMPUTED_MS + 250, partial(fleet.network.freeze, 0))
    end_of(fleet)
    assert "slabs are left over" in violations_of(fleet)


def test_a_core_that_answers_twice_or_never_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as twice:
        changed(twice, lambda _, effects: [e for e in effects for _ in range(1 + isinstance(e, AnswerPrefix))])
        assert "answered twice" in found()
    changed(monkeypatch, lambda _, effects: [effect for effect in effects if not isinstance(effect, AnswerPrefix)])
    assert "unanswered" in found()


def test_a_core_that_asks_for_everything_at_once_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowWindow, "_has_room", lambda *_: True)
    assert "rows in flight" in found()


def test_a_core_that_asks_everybody_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperspace_vllm.core.prefix.prefix_part.ASKED_MAX", 100)
    assert "asks 10 peers" in found(size=11)


def test_a_core_that_asks_nobody_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefixPart, "_whom_to_ask", lambda *_: ())
    assert "engines got 0 of" in "\n".join(run("cold_start", 8, 1).violations)
