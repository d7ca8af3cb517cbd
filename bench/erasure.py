"""The erasure code's speed compared with memcpy, XOR, ISA-L, zfec, PyECLib and galois, in one process.

Medians of interleaved rounds: each round runs every contender once, so that other load on the machine affects all of
them. GB/s are of source data: 32 chunks of the nominal size, whatever an operation writes.

    encode      32 parity chunks from 32 data chunks
    encode_one  one of them
    decode_16   16 data chunks from 16 others and 16 parity chunks
    decode_32   all data chunks from parity alone
    decode_0    32 present data chunks, into another buffer

    python -m bench.erasure [--json] [--check] [--isa avx2] [--sizes 64,1024] [--rounds 7]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import anchors, machine
from bench.anchors import ISAL_COLUMN, OPERATIONS, ROOT, Buffers, Galois, Isal, Run, Work
from hyperspace_vllm import native

SIZES_KIB = (64, 256, 1024, 4096)
ROUNDS = 7
SAMPLE_S = 0.01  # a sample repeats its operation for this long
SLOW_S = 0.2  # an operation that takes longer is run in 3 rounds only: its ratio is far from any limit
THREADS = (1, 2)
SMALL = 64 * 1024
# A row this small is in the caches again at the next call, as far as its pages' addresses allow: depending on those
# alone, two threads are 1.5 or 1.9 times as fast as one. So it is measured at several addresses.
PLACES_OF_SMALL = 5

Key = tuple[str, int, str]  # operation, threads, implementation


@dataclass(frozen=True)
class Row:
    """One median: `gbps` is 10^9 bytes of source data a second."""

    op: str
    chunk_bytes: int
    threads: int
    impl: str
    gbps: float


@dataclass(frozen=True)
class Limit:
    """`op` on `threads` must be `least` times as fast as `base_impl` on one thread, at the sizes that `at` accepts."""

    op: str
    threads: int
    base_impl: str
    least: float
    at: Callable[[int], bool]


def everywhere(_: int) -> bool:
    return True


LIMITS = (
    Limit("encode", 1, "isal_2kib", 5.0, lambda size: size == SMALL),
    Limit("encode", 1, "isal_2kib", 4.0, everywhere),
    Limit("decode_32", 1, "isal_2kib", 3.5, everywhere),
    Limit("decode_16", 1, "isal_2kib", 1.2, lambda size: size == SMALL),
    Limit("decode_16", 1, "isal_2kib", 1.5, lambda size: size != SMALL),
    Limit("decode_0", 1, "memcpy", 0.8, everywhere),
    Limit("encode", 2, "hyperspace", 1.7, lambda size: size == SMALL),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print {rows: [...]} and nothing else on stdout")
    parser.add_argument("--check", action="store_true", help="exit 1 if a required ratio is missed")
    parser.add_argument("--isa", choices=native.isas(), help="force ours, and ISA-L's AVX2 with avx2")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES_KIB)), help="chunk sizes in KiB")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--plot", type=Path, default=ROOT / "build" / "erasure.png")
    args = parser.parse_args()

    rows: list[Row] = []
    for kib in map(int, args.sizes.split(",")):
        print(f"{kib} KiB chunks …", file=sys.stderr)
        rows += measure_size(kib * 1024, args.isa, args.rounds)
    if args.json:
        print(json.dumps({"rows": [asdict(row) for row in rows]}, indent=1))
    else:
        print_table(rows, args.isa)
        print(plot(rows, args.plot))
    missed = [line for good, line in verdicts(rows) if not good]
    for good, line in verdicts(rows):
        print(("ok      " if good else "MISSED  ") + line, file=sys.stderr if args.json else sys.stdout)
    return 1 if args.check and missed else 0


# ---- Measuring.


def measure_size(chunk_bytes: int, isa: str | None, rounds: int) -> list[Row]:
    """Every operation by every library that has it; buffers of one size at a time."""
    samples: dict[Key, list[float]] = defaultdict(list)
    for _ in range(PLACES_OF_SMALL if chunk_bytes <= SMALL else 1):
        buffers = Buffers(chunk_bytes)
        for operation in OPERATIONS:
            for key, seconds in interleaved(contenders(Work(operation, buffers, isa)), rounds).items():
                samples[key] += seconds
            # ISA-L's code word has replaced ours.
            native.encode(buffers.data, buffers.parity, buffers.stride)
    rows = []
    for (op, threads, impl), seconds in samples.items():
        size = min(chunk_bytes, anchors.GALOIS_COLUMNS) if impl == "galois" else chunk_bytes
        gbps = native.DATA_CHUNKS * size / statistics.median(seconds) / 1e9
        rows.append(Row(op, chunk_bytes, threads, impl, round(gbps, 4)))
    return rows


def contenders(work: Work) -> dict[Key, Run]:
    """The contenders available here. Ours first: ISA-L's preparation overwrites the parity that ours needs."""
    runs: dict[Key, Run | None] = {
        (work.operation, threads, "hyperspace"): anchors.hyperspace(work, threads) for threads in THREADS
    }

    def add(impl: str, make: Callable[[], Run | None]) -> None:
        try:
            runs[work.operation, 1, impl] = make()
        except ImportError as error:
            if impl not in _reported:
                print(f"{impl}: {error}", file=sys.stderr)
                _reported.add(impl)

    add("memcpy", lambda: anchors.memcpy(work))
    add("galois", lambda: Galois().code(work))
    add("zfec", lambda: anchors.zfec(work))
    add("pyeclib", lambda: anchors.pyeclib(work))
    add("isal_2kib", lambda: Isal().code(work, ISAL_COLUMN))
    add("isal_plain", lambda: Isal().code(work, None))
    add("xor", lambda: Isal().xor(work))
    return {key: run for key, run in runs.items() if run is not None}


_reported: set[str] = set()


def interleaved(runs: dict[Key, Run], rounds: int) -> dict[Key, list[float]]:
    """Seconds of one call of each contender in every round; each round runs all of them in turn."""
    repeats: dict[Key, int] = {}
    samples: dict[Key, list[float]] = defaultdict(list)
    for key, run in runs.items():
        run()
        repeats[key] = max(1, round(SAMPLE_S / timed(run, 1)))
    for number in range(rounds):
        for key, run in runs.items():
            if number >= 3 and samples[key][-1] > SLOW_S:
                continue
            samples[key].append(timed(run, repeats[key]) / repeats[key])
    return samples


def timed(run: Run, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return time.perf_counter() - start


# ---- Reporting.


def by_key(rows: list[Row]) -> dict[tuple[str, int, int, str], float]:
    return {(row.op, row.chunk_bytes, row.threads, row.impl): row.gbps for row in rows}


def verdicts(rows: list[Row]) -> list[tuple[bool, str]]:
    """Each limit at each measured size; an unavailable ratio counts as missed."""
    speeds, found = by_key(rows), []
    for limit in LIMITS:
        for size in sorted({row.chunk_bytes for row in rows}):
            if not limit.at(size):
                continue
            ours = speeds[limit.op, size, limit.threads, "hyperspace"]
            base = speeds.get((limit.op, size, 1, limit.base_impl))
            ratio = ours / base if base else 0.0
            of = f"{limit.op} on {limit.threads}" if limit.threads > 1 else limit.op
            line = f"{of:12} {size // 1024:5} KiB: {ratio:5.2f} x {limit.base_impl}, at least {limit.least}"
            found.append((ratio >= limit.least, line))
    return found


def print_table(rows: list[Row], isa: str | None) -> None:
    print(machine.describe())
    print(
        f"instruction set {isa or native.isa()}; GB/s of source data, and how many times as fast we are on one thread\n"
    )
    speeds = by_key(rows)
    sizes = sorted({row.chunk_bytes for row in rows})
    print(" " * 24 + "".join(f"{size // 1024:>12} KiB" for size in sizes))
    for operation in OPERATIONS:
        for threads, impl in sorted({(row.threads, row.impl) for row in rows if row.op == operation}):
            cells = []
            for size in sizes:
                speed, ours = speeds[operation, size, threads, impl], speeds[operation, size, 1, "hyperspace"]
                cells.append(f"{speed:8.2f} {ours / speed:6.1f}x")
            print(f"{operation:11}{impl:11}{threads:2} " + "".join(cells))
        print()


def plot(rows: list[Row], path: Path) -> str:
    """Bars of every library by size, one panel per operation; in the terminal where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return bars(rows)
    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = sorted({row.chunk_bytes for row in rows})
    figure, panels = pyplot.subplots(1, len(OPERATIONS), figsize=(22, 4.5), sharey=True)
    for panel, operation in zip(panels, OPERATIONS, strict=True):
        kinds = sorted({(row.threads, row.impl) for row in rows if row.op == operation})
        for place, (threads, impl) in enumerate(kinds):
            speeds = [
                next(r.gbps for r in rows if (r.op, r.chunk_bytes, r.threads, r.impl) == (operation, s, threads, impl))
                for s in sizes
            ]
            width = 0.85 / len(kinds)
            label = f"{impl}, {threads} threads" if threads > 1 else impl
            panel.bar([i + place * width for i in range(len(sizes))], speeds, width, label=label)
        panel.set(title=operation, yscale="log", xlabel="chunk, KiB")
        panel.set_xticks([i + 0.4 for i in range(len(sizes))], [str(size // 1024) for size in sizes])
        panel.legend(fontsize=7)
    panels[0].set_ylabel("GB/s of source data")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return f"Plot: {path}"


def bars(rows: list[Row], width: int = 60) -> str:
    """The same for a terminal: the smallest size only."""
    size = min(row.chunk_bytes for row in rows)
    shown = [row for row in rows if row.chunk_bytes == size]
    fastest = max(row.gbps for row in shown)
    return "\n".join(
        f"{r.op:11}{r.impl:11}{r.threads:2} {'█' * round(width * r.gbps / fastest):{width}} {r.gbps:8.2f}"
        for r in shown
    )


if __name__ == "__main__":
    sys.exit(main())
