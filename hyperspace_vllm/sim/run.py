"""One run of a scenario, and its figures."""

from dataclasses import dataclass

from .fleet import Fleet
from .scenarios import RUN_MS, SCENARIOS, build
from .signatures import remembered_verdicts


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a run. `requests` counts those that an honest node which could be reached had the response to;
    `hit_rate` is the share of them that the network answered in time, `p95_ms` what these took from the question to the
    verified bytes, `deadline_misses` those whose lookup ran into its deadline. The same seed has the same
    `trace_digest`, on any machine.
    """

    scenario: str
    nodes: int
    seed: int
    requests: int
    hit_rate: float
    p95_ms: int
    deadline_misses: int
    violations: tuple[str, ...]
    trace_digest: str


def run(scenario: str, nodes: int, seed: int, with_liars: bool = True) -> Result:
    """Let a scenario happen, or the same without those who lie in it."""
    with remembered_verdicts():
        fleet = build(SCENARIOS[scenario], nodes, seed, with_liars)
        fleet.agenda.run(RUN_MS)
    fleet.checker.check_requests()
    fleet.checker.check_convictions()
    return _result(fleet, scenario)


def _result(fleet: Fleet, scenario: str) -> Result:
    answerable = [request for request in fleet.requests if request.providers and request.answered_ms >= 0]
    took_ms = sorted(r.answered_ms - r.asked_ms for r in answerable if r.hit and r.waiting)
    return Result(
        scenario,
        len(fleet.hosts),
        fleet.seed,
        len(answerable),
        round(len(took_ms) / len(answerable), 4) if answerable else 0.0,
        took_ms[-(-len(took_ms) * 95 // 100) - 1] if took_ms else 0,
        sum(request.reason == "deadline" for request in answerable),
        tuple(fleet.checker.violations),
        fleet.trace.digest,
    )
