"""Networks of 20 nodes on a virtual clock, 50 seeds over the scenarios; and that the checkers would notice.

A failure names its scenario and seed: `make sim SCENARIO=s SEED=n` replays it.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest

from hyperspace_vllm.cli import main
from hyperspace_vllm.core.events.conduct import ChargePeer
from hyperspace_vllm.core.events.known_peers import PeersChanged
from hyperspace_vllm.core.events.peer_requests import Reply
from hyperspace_vllm.core.events.response_reading import AnswerResponse
from hyperspace_vllm.core.events.vocabulary import NetworkEffect, NetworkEvent
from hyperspace_vllm.core.node.network_part import NetworkPart
from hyperspace_vllm.core.peers.findings import Findings
from hyperspace_vllm.core.peers.gossip_gate import BURST_S, message_cost
from hyperspace_vllm.core.peers.reputation import THRESHOLD
from hyperspace_vllm.core.peers.trust import Trust
from hyperspace_vllm.core.records.ids import NetworkId, RequestKey, peer_id
from hyperspace_vllm.core.records.limits import GOSSIP_OF_AUTHOR_PER_S, RESPONSE_TTL_MS
from hyperspace_vllm.core.records.now import Now
from hyperspace_vllm.core.records.peer_wire import Hit
from hyperspace_vllm.core.records.reason import Reason
from hyperspace_vllm.core.records.sealing import open_response
from hyperspace_vllm.core.response.cache_proof import decode_proof
from hyperspace_vllm.core.response.providers import Providers
from hyperspace_vllm.core.response.sealed_hit import Opened
from hyperspace_vllm.sim import sim_fetches
from hyperspace_vllm.sim.agenda import Agenda
from hyperspace_vllm.sim.fleet import Fleet
from hyperspace_vllm.sim.run import Result, run
from hyperspace_vllm.sim.scenarios import RUN_MS, SCENARIOS, build
from hyperspace_vllm.sim.signatures import remembered_verdicts
from hyperspace_vllm.sim.sim_network import BREAK_MS, SimNetwork
from hyperspace_vllm.sim.sim_responses import Response, Shelf

NODES = 20
ATTACKS = ("inventors", "gossip_flood", "slot_holders")
OPEN_NODES, OPEN_SEEDS = 6, (1, 2)
OPEN_ATTACKS = ("relayers", "hinters", "framer")
NAMES = [name for name in SCENARIOS if name not in (*ATTACKS, "open", *OPEN_ATTACKS)]
RUNS = [
    pytest.param(NAMES[seed % len(NAMES)], seed, marks=[pytest.mark.slow] if seed >= 6 else []) for seed in range(50)
]
HIT_RATE_MIN = 0.93  # of one run; the mean is far above


@pytest.mark.parametrize(("scenario", "seed"), RUNS)
def test_every_request_is_answered_rightly_and_in_time(scenario: str, seed: int) -> None:
    result = run(scenario, NODES, seed)
    assert result.violations == ()
    assert result.kv is not None
    assert result.kv.share >= 0.9
    assert result.requests > 100
    assert result.hit_rate >= HIT_RATE_MIN
    assert result.p95_ms < 300


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_seed_replays_its_run_to_the_last_byte_whatever_the_hash_seed(scenario: str) -> None:
    command = [
        sys.executable,
        "-m",
        "hyperspace_vllm.cli",
        "sim",
        "--scenario",
        scenario,
        "--nodes",
        "8",
        "--seed",
        "7",
    ]
    runs = [
        subprocess.run(
            [*command, "--json"],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=False,
        )
        for seed in ("1", "2")
    ]
    results = [json.loads(each.stdout) for each in runs]
    assert results[0] == results[1]
    assert len(results[0]["trace_digest"]) == 64
    assert set(results[0]) == {
        "scenario",
        "nodes",
        "seed",
        "requests",
        "hit_rate",
        "p95_ms",
        "deadline_misses",
        "violations",
        "trace_digest",
        "kv",
    }


def test_another_seed_is_another_run() -> None:
    assert run("cold_start", 5, 1, with_kv=False).trace_digest != run("cold_start", 5, 2, with_kv=False).trace_digest


@pytest.mark.parametrize("scenario", ATTACKS)
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_attack_costs_the_honest_two_in_a_hundred_hits_at_most(scenario: str, seed: int) -> None:
    attacked = run(scenario, 10, seed, with_kv=False)
    alone = run(scenario, 10, seed, with_liars=False, with_kv=False)
    assert attacked.violations == alone.violations == ()
    assert attacked.requests > 50
    assert attacked.hit_rate >= alone.hit_rate - 0.02


def test_what_honest_nodes_announce_reaches_the_others_through_a_flood_and_the_flood_does_not() -> None:
    def flooded(with_liars: bool) -> tuple[float, Fleet]:
        with remembered_verdicts():
            fleet = build(SCENARIOS["gossip_flood"], 10, 1, with_liars, with_kv=False)
            fleet.agenda.run(RUN_MS)
        published = sum(fleet.gossip.published[host.number] for host in fleet.honest)
        assert published > 50
        return sum(fleet.gossip.reached[host.number] for host in fleet.honest) / published, fleet

    attacked, fleet = flooded(with_liars=True)
    alone, _ = flooded(with_liars=False)
    assert attacked >= 0.95 * alone
    (flooder,) = (host.number for host in fleet.hosts if host.liar is not None)
    allowed = GOSSIP_OF_AUTHOR_PER_S * (RUN_MS / 1000 + BURST_S) / message_cost(0)
    others = len(fleet.honest)
    assert fleet.gossip.reached[flooder] <= allowed * others < fleet.gossip.published[flooder] * others / 1.5


@pytest.mark.parametrize("attack", OPEN_ATTACKS)
def test_an_attack_in_an_open_network_costs_the_honest_no_hits_and_convicts_none_of_them(attack: str) -> None:
    attacked = [run(attack, OPEN_NODES, seed, with_kv=False) for seed in OPEN_SEEDS]
    peace = "open" if attack == "framer" else attack
    alone = [run(peace, OPEN_NODES, seed, with_liars=False, with_kv=False) for seed in OPEN_SEEDS]
    assert [each.violations for each in (*attacked, *alone)] == [()] * 2 * len(OPEN_SEEDS)
    assert _hit_rate(attacked) >= _hit_rate(alone) - 0.02


def _hit_rate(results: list[Result]) -> float:
    return sum(each.hit_rate * each.requests for each in results) / sum(each.requests for each in results)


def test_a_node_that_believes_whoever_serves_well_is_caught_serving_what_relayers_sign(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def trusts(self: Trust, public_key: bytes, now: Now) -> bool:
        return self.trusts_kv(public_key, now) or self.standings.service(peer_id(public_key), now) >= THRESHOLD

    monkeypatch.setattr(Trust, "trusts", trusts)
    assert "served a wrong response: b'forged'" in "\n".join(run("relayers", OPEN_NODES, 1, with_kv=False).violations)


def test_a_node_that_waits_for_everybody_is_caught_waiting_for_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trust, "may_be_waited_for", lambda *_: True)
    assert "waited for peers that have never delivered" in "\n".join(
        run("hinters", OPEN_NODES, 1, with_kv=False).violations
    )


def test_a_node_that_convicts_for_one_finding_is_caught_convicting_honest_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Findings, "found", lambda *_: True)
    assert "convicted the honest node" in "\n".join(run("framer", OPEN_NODES, 1, with_kv=False).violations)


# --- the checkers notice -------------------------------------------------------------------------


def violations_of(scenario: str = "cold_start", seed: int = 1) -> str:
    return "\n".join(run(scenario, 10, seed, with_kv=False).violations)


def without_checks(
    hit: Hit, key: RequestKey, network: NetworkId, model: bytes, trusts: object, meet: object, now_ms: int
) -> Opened:
    """Believe whatever opens."""
    body = open_response(key, network, hit.nonce, hit.sealed, hit.proof)
    return Opened(body, decode_proof(hit.proof), hit.proof, now_ms + RESPONSE_TTL_MS)


def test_a_node_that_believes_everybody_is_caught_serving_wrong_responses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sim_fetches, "open_hit", without_checks)
    found = "\n".join(violations_of("liars_20pct", seed) for seed in range(4))
    assert "served a wrong response: b'forged'" in found
    assert "seed " in found


def test_a_node_that_forgets_to_look_at_the_clock_is_caught_serving_expired_responses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def get(self: Shelf, wanted: bytes, now_ms: int) -> Response | None:
        return self._responses.get(wanted)

    monkeypatch.setattr(Shelf, "get", get)
    monkeypatch.setattr(Shelf, "expire", lambda self, now_ms: ())
    assert "served a response that expired" in violations_of("flash_crowd")


Change = Callable[[NetworkEvent, list[NetworkEffect]], list[NetworkEffect]]


def changed(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """Let every core do something other than it decided."""
    handle = NetworkPart.handle
    monkeypatch.setattr(NetworkPart, "handle", lambda self, event, now_ms: change(event, handle(self, event, now_ms)))


def test_a_core_that_leaves_lookups_unanswered_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    changed(monkeypatch, lambda _, effects: [e for e in effects if not isinstance(e, AnswerResponse)])
    assert "never answered" in violations_of()


def test_a_core_that_answers_twice_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    changed(monkeypatch, lambda _, effects: [e for e in effects for _ in range(1 + isinstance(e, AnswerResponse))])
    assert "answered twice" in violations_of()


def test_a_core_that_leaves_a_peer_without_an_answer_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    changed(monkeypatch, lambda _, effects: [e for e in effects if not isinstance(e, Reply)])
    assert "of a peer left without an answer" in violations_of()


def test_a_core_that_blames_honest_peers_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    changed(
        monkeypatch,
        lambda event, effects: [
            *effects,
            *([ChargePeer(event.relay, Reason.BAD_SEAL)] if hasattr(event, "relay") else []),
        ],
    )
    assert "charged the honest node" in violations_of()


def test_a_core_that_does_everything_at_once_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    changed(monkeypatch, lambda _, effects: effects + [e for e in effects if isinstance(e, PeersChanged)] * 100)
    assert "effects of one" in violations_of()


def test_a_core_that_waits_too_long_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperspace_vllm.sim.fleet.Fleet.allowed_ms", lambda self, request: 20)
    assert "after its deadline" in violations_of()


def test_a_core_that_hoards_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperspace_vllm.sim.checkers.TABLE_MAX", 5)
    assert "entries" in violations_of()


def test_a_core_that_never_listens_to_announcements_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Providers, "best_first", lambda self, told, now_ms: [])
    assert "no hint" in violations_of() or "unhinted: not_found" in violations_of()


# --- the network under it -----------------------------------------------------------------------


class Heard:
    """A host that notes when what happened to it."""

    def __init__(self, agenda: Agenda) -> None:
        self.agenda = agenda
        self.events: list[tuple[str, int]] = []

    def note(self, what: str) -> None:
        self.events.append((what, self.agenda.now_ms))

    def opened(self, peer: int) -> None:
        self.note(f"opened {peer}")

    def closed(self, peer: int) -> None:
        self.note(f"closed {peer}")

    @property
    def names(self) -> list[str]:
        return [what for what, _ in self.events]


def two_connected(loss: float = 0.0) -> tuple[Agenda, SimNetwork, Heard, Heard]:
    agenda = Agenda()
    network = SimNetwork(agenda, random.Random(1), 2, loss)
    hosts = Heard(agenda), Heard(agenda)
    for number, host in enumerate(hosts):
        network.add(host)
        network.boot(number)
    network.dial(0, 1, 3_000, lambda failed: None)
    agenda.run(3_000)
    assert network.connected(0, 1)
    return agenda, network, *hosts


def test_a_lost_segment_comes_late_and_holds_up_what_follows() -> None:
    agenda, network, _, b = two_connected(loss=0.4)
    for number in range(200):
        network.send(0, 1, 100, partial(b.note, str(number)))
    agenda.run(20_000)
    arrived = [at - 3_000 for what, at in b.events if what.isdigit()]
    assert network.connected(0, 1) is (len(arrived) == 200)
    assert max(arrived) > 200


def test_what_was_sent_into_a_short_partition_arrives_after_it() -> None:
    agenda, network, a, b = two_connected()
    network.split([0, 1])
    network.send(0, 1, 100, partial(b.note, "hello"))
    agenda.run(3_000 + BREAK_MS - 1_000)
    assert "hello" not in b.names
    network.split([0, 0])
    agenda.run(30_000)
    assert b.names[-1] == "hello"
    assert "closed 1" not in a.names


def test_a_long_partition_breaks_connections_on_both_sides() -> None:
    agenda, network, a, b = two_connected()
    network.split([0, 1])
    network.send(0, 1, 100, partial(b.note, "hello"))
    agenda.run(60_000)
    assert a.names[-1] == "closed 1"
    assert b.names[-1] == "closed 0"
    failures: list[str | None] = []
    network.dial(0, 1, 3_000, failures.append)
    agenda.run(70_000)
    assert failures == ["timeout"]


def test_a_frozen_host_acts_on_everything_when_it_is_thawed() -> None:
    agenda, network, _, b = two_connected()
    network.freeze(1)
    network.send(0, 1, 100, partial(b.note, "hello"))
    network.on(1, 50, partial(b.note, "timer"))
    failures: list[str | None] = []
    network.dial(0, 1, 1_000, failures.append)
    agenda.run(20_000)
    assert b.names == ["opened 0"]
    assert failures == ["timeout"]
    network.thaw(1)
    assert sorted(b.names[1:]) == ["hello", "timer"]


def test_a_crash_resets_connections_and_a_power_cut_leaves_them_half_open() -> None:
    for politely, closed_by_ms in ((True, 4_000), (False, 3_000 + BREAK_MS + 2_000)):
        agenda, network, a, b = two_connected()
        network.kill(1, politely)
        network.send(0, 1, 100, partial(b.note, "hello"))
        agenda.run(3_500)
        assert ("closed 1" in a.names) is politely
        agenda.run(closed_by_ms)
        assert a.names[-1] == "closed 1"
        assert "hello" not in b.names


# --- the command --------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_says_which_scenarios_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sim", "--scenario", "cold_start", "--nodes", "5", "--seeds", "2", "--workers", "1"]) == 0
    assert "cold_start" in capsys.readouterr().out
    assert main(["sim", "--scenario", "sunny_day"]) == 2
    told = capsys.readouterr().err
    assert all(name in told for name in SCENARIOS)


def test_the_command_fails_when_something_was_violated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Result("cold_start", 5, 3, 10, 1.0, 20, 0, ("seed 3, 5 ms, node 1: something",), "0" * 64)
    monkeypatch.setattr("hyperspace_vllm.sim.command.run", lambda *job: bad)
    assert main(["sim", "--scenario", "cold_start", "--workers", "1"]) == 1
    assert "cold_start: seed 3, 5 ms, node 1: something" in capsys.readouterr().err
