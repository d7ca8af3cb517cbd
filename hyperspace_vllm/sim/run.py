"""One run of a scenario, and its figures."""

from dataclasses import dataclass

from .fleet import Fleet
from .prefixes.kv_figures import KvFigures
from .scenarios import RUN_MS, SCENARIOS, build
from .signatures import remembered_verdicts


@dataclass(frozen=True, slots=True)
class Result:
    """The figures of a run. `requests` counts those whose response a reachable honest node had; `hit_rate` is the share
    of them that the network answered in time, `p95_ms` the time of these from the request to the verified bytes,
    `deadline_misses` the lookups that ran into their deadline. The same seed has the same `trace_digest` on any
    machine.
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
    kv: KvFigures | None = None  # None: without L2


def run(scenario: str, nodes: int, seed: int, with_liars: bool = True, with_kv: bool = True) -> Result:
    """Run a scenario, or the same one without its liars, or without L2."""
    with remembered_verdicts():
        fleet = build(SCENARIOS[scenario], nodes, seed, with_liars, with_kv)
        fleet.agenda.run(RUN_MS)
    fleet.checker.check_requests()
    fleet.checker.check_convictions()
    if fleet.kv is not None:
        prefixes = [host.prefixes for host in fleet.honest if host.prefixes is not None]
        fleet.kv.check_end(prefixes, SCENARIOS[scenario].is_calm)
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
        tuple(fleet.checker.violations + (fleet.kv.checker.violations if fleet.kv is not None else [])),
        fleet.trace.digest,
        fleet.kv.figures() if fleet.kv is not None else None,
    )
