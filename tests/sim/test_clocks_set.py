"""Nodes whose wall clocks are set, in either direction, while they run: their timers go on, and dates count again."""

from functools import partial

import pytest

from hyperspace_vllm.core.node.network_part import NetworkPart
from hyperspace_vllm.core.peers.membership import HEARTBEAT_MS, PING_MS
from hyperspace_vllm.core.records.limits import CLOCK_SKEW_MS, PEER_RECORD_TTL_MS, REGISTRY_TTL_MS
from hyperspace_vllm.sim.fleet import Fleet
from hyperspace_vllm.sim.host import SimHost
from hyperspace_vllm.sim.scenarios import RUN_MS, SCENARIOS, build
from hyperspace_vllm.sim.signatures import remembered_verdicts

NODES = 10
SECOND_MS, HOUR_MS = 1_000, 3_600_000
AGAIN_MS = HEARTBEAT_MS + PING_MS  # within which a node dates its record and its document anew


def set_by(host: SimHost, ms: int) -> None:
    """Somebody sets a host's wall clock."""
    host.skew_ms += ms


def network_of(host: SimHost) -> NetworkPart:
    assert host.core.network is not None
    return host.core.network


def watch(fleet: Fleet, host: SimHost, waits_ms: list[int]) -> None:
    """Note every second how long a host waits for its next timer."""
    due_ms = host.core.next_deadline_ms()
    assert due_ms is not None
    waits_ms.append(due_ms - host.now.mono_ms)
    fleet.agenda.after(SECOND_MS, partial(watch, fleet, host, waits_ms))


@pytest.mark.parametrize("seed", [1, 2])
def test_clocks_that_are_set_within_what_may_differ_cost_nothing(seed: int) -> None:
    with remembered_verdicts():
        fleet = build(SCENARIOS["cold_start"], NODES, seed, with_kv=False)
        for index, host in enumerate(fleet.hosts):
            for at_ms, by_ms in ((15_000, -25_000), (25_000, 50_000), (35_000, -50_000), (45_000, 25_000)):
                fleet.agenda.after(at_ms + 100 * index, partial(set_by, host, by_ms))
        fleet.agenda.run(RUN_MS)
    fleet.checker.check_requests()
    assert fleet.checker.violations == []


@pytest.mark.parametrize("by_ms", [-HOUR_MS, HOUR_MS, -30 * 24 * HOUR_MS, 30 * 24 * HOUR_MS])
def test_a_node_whose_clock_is_far_off_for_a_while_keeps_its_timers_and_is_whole_once_it_is_right(by_ms: int) -> None:
    waits_ms: list[int] = []
    with remembered_verdicts():
        fleet = build(SCENARIOS["cold_start"], NODES, 1, with_kv=False)
        host, others = fleet.hosts[3], [fleet.hosts[number] for number in range(NODES) if number != 3]
        fleet.agenda.run(20_000)
        watch(fleet, host, waits_ms)
        sequence = network_of(host).members.own.sequence
        set_by(host, by_ms)
        fleet.agenda.run(20_000 + AGAIN_MS)
        assert network_of(host).members.own.sequence > sequence
        assert 0 <= network_of(host).members.own.expires_at_ms - host.wall_ms <= PEER_RECORD_TTL_MS
        own = network_of(host).registry._own.log
        assert own is not None
        assert 0 < own.expires_at_ms - host.wall_ms <= REGISTRY_TTL_MS + CLOCK_SKEW_MS
        fleet.agenda.run(35_000)
        set_by(host, -by_ms)
        fleet.agenda.run(RUN_MS)
    fleet.checker.check_requests()
    assert all(0 <= wait_ms <= HEARTBEAT_MS for wait_ms in waits_ms)
    assert len(waits_ms) == (RUN_MS - 20_000) // SECOND_MS + 1
    # What others date is refused by a clock that is far off, so this node misses meanwhile; nothing else goes wrong.
    assert all("node 3:" in violation and "have it" in violation for violation in fleet.checker.violations)
    late = [request for request in fleet.requests if request.host == 3 and 45_000 <= request.asked_ms <= 55_000]
    assert any(request.hit for request in late if request.providers)
    known = [host.peer in {record.peer for record in network_of(other).members.usable(other.now)} for other in others]
    assert all(known)
