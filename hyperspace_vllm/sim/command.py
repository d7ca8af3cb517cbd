"""`hyperspace sim`: run scenarios, show how far it is, and print the figures."""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from .run import Result, run
from .scenarios import SCENARIOS

if TYPE_CHECKING:
    from rich.table import Table

SHOW_PROGRESS_AFTER_S = 2.0
VIOLATIONS_SHOWN = 20


def simulate(options: argparse.Namespace) -> int:
    """Run the requested scenarios; 1 if a rule was broken, 2 if there is no such scenario."""
    if options.scenario not in (*SCENARIOS, "all"):
        known = "\n".join(f"  {scenario.name:<16} {scenario.text}" for scenario in SCENARIOS.values())
        print(f"hyperspace: no scenario {options.scenario!r}; there are\n{known}\n  all", file=sys.stderr)
        return 2
    scenarios = list(SCENARIOS) if options.scenario == "all" else [options.scenario]
    jobs = [
        (scenario, options.nodes, seed, True, not options.no_kv)
        for seed in range(options.seed, options.seed + options.seeds)
        for scenario in scenarios
    ]
    results: list[Result] = []
    for result in _with_progress(_results(jobs, options.workers), len(jobs)):
        results.append(result)
        if options.output is not None:
            _write(options.output, sorted(results, key=lambda each: (scenarios.index(each.scenario), each.seed)))
    results.sort(key=lambda each: (scenarios.index(each.scenario), each.seed))
    if options.json:
        for result in results:
            print(json.dumps(asdict(result)))
    else:
        _print_table(results)
    return int(any(result.violations for result in results))


def _results(jobs: list[tuple[str, int, int, bool, bool]], workers: int) -> Iterator[Result]:
    if len(jobs) == 1 or workers == 1:
        yield from (run(*job) for job in jobs)
        return
    with ProcessPoolExecutor(min(workers, len(jobs))) as pool:
        for done in as_completed([pool.submit(run, *job) for job in jobs]):
            yield done.result()


def _with_progress(results: Iterator[Result], total: int) -> Iterator[Result]:
    """Pass results on; a bar appears on stderr's terminal once it takes a while."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = progress.add_task("runs", total=total)
    began_s = time.monotonic()
    try:
        for result in results:
            progress.advance(task)
            if not progress.live.is_started and time.monotonic() - began_s > SHOW_PROGRESS_AFTER_S:
                progress.start()
            yield result
    finally:
        progress.stop()


def _print_table(results: list[Result]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{results[0].nodes} nodes")
    for column in ("scenario", "seeds", "requests", "hit rate", "p95 ms", "deadline misses", "violations", "digest"):
        table.add_column(column, justify="left" if column in ("scenario", "digest") else "right")
    for scenario in dict.fromkeys(result.scenario for result in results):
        runs = [result for result in results if result.scenario == scenario]
        requests = sum(result.requests for result in runs)
        hits = sum(result.hit_rate * result.requests for result in runs)
        table.add_row(
            scenario,
            str(len(runs)),
            f"{requests:,}",
            f"{hits / max(requests, 1):.2%}",
            str(sorted(result.p95_ms for result in runs)[len(runs) // 2]),
            str(sum(result.deadline_misses for result in runs)),
            str(sum(len(result.violations) for result in runs)),
            runs[0].trace_digest[:16] if len(runs) == 1 else "",
        )
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table)
    if any(result.kv is not None for result in results):
        console.print(_kv_table(results))
    violations = [f"{result.scenario}: {violation}" for result in results for violation in result.violations]
    for violation in violations[:VIOLATIONS_SHOWN]:
        print(violation, file=sys.stderr)
    if len(violations) > VIOLATIONS_SHOWN:
        print(f"... and {len(violations) - VIOLATIONS_SHOWN} more", file=sys.stderr)


def _kv_table(results: list[Result]) -> "Table":
    """What L2 did. The share is of the prefixes that peers had, as far as nothing excuses a miss."""
    from rich.table import Table

    table = Table(title="KV prefixes")
    columns = "scenario", "looked up", "peers had", "fetched", "excused", "share", "tokens", "p50 ms", "p95 ms", "moved"
    for column in columns:
        table.add_column(column, justify="left" if column == "scenario" else "right")
    for scenario in dict.fromkeys(result.scenario for result in results):
        runs = [result.kv for result in results if result.scenario == scenario and result.kv is not None]
        had, fetched = sum(run.offered for run in runs), sum(run.fetched for run in runs)
        excused = sum(run.prefill_quicker + run.link_too_slow + run.hindered for run in runs)
        wanted, loaded = sum(run.tokens_wanted for run in runs), sum(run.tokens_loaded for run in runs)
        table.add_row(
            scenario,
            f"{sum(run.lookups for run in runs):,}",
            f"{had:,}",
            f"{fetched:,}",
            str(excused),
            f"{fetched / max(had - excused, 1):.1%}",
            f"{loaded / max(wanted, 1):.1%}",
            str(sorted(run.p50_ms for run in runs)[len(runs) // 2]),
            str(sorted(run.p95_ms for run in runs)[len(runs) // 2]),
            f"{sorted(run.bytes_moved for run in runs)[len(runs) // 2]:.2f}",
        )
    return table


def _write(path: Path, results: list[Result]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(".part")
    staged.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    staged.replace(path)
