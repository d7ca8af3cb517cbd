"""How often a semantic hit is right: human-labelled pairs of questions, by mode and threshold.

    raw        the cosine of the questions as asked
    canonical  the larger one of that and the cosine of the compared forms (equal canonical ones count as 1)
    balanced   canonical, then eligibility and the guards of `balanced`
    strict     the same with the guards of `strict`

A pair is served when its similarity reaches the threshold and no guard refuses; with guards, the threshold is higher
where only one question has extra words (similarity_needed). `precision` and `recall` are of the pairs labelled same;
`false_per_1000` are the pairs served although labelled different, per thousand pairs; `ms_p50` is the median time to
embed one question, compare it with one other and run the guards, on one thread. The guards were tuned on the first half
of the pairs: the figures of the second half are shown separately.

    python -m bench.semantic --pairs FILE [--json] [--check] [--limit N]

FILE has lines of {"a": question, "b": question, "same": bool}, gzipped or not.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench import machine
from hyperspace_vllm.core.response.similar.canonical import canonical_question, compared_question
from hyperspace_vllm.core.response.similar.guards import Mode, eligible, refusal
from hyperspace_vllm.core.response.similar.question import read_question
from hyperspace_vllm.core.response.similar.semantic import COSINE_MIN, similarity, similarity_needed
from hyperspace_vllm.daemon.responses.embedding import DEFAULT_MODEL, Embedder, load_embedder

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Vectors = dict[str, NDArray[np.float32]]

MODES = ("raw", "canonical", "balanced", "strict")
GUARDED: dict[str, Mode] = {"balanced": "balanced", "strict": "strict"}
THRESHOLDS = (0.85, COSINE_MIN, 0.95)
CURVE = tuple(threshold / 100 for threshold in range(80, 100))
TIMED = 200  # pairs, for `ms_p50`
BUILD = machine.ROOT / "build"


@dataclass(frozen=True)
class Pair:
    a: str
    b: str
    same: bool


@dataclass(frozen=True)
class Scored:
    """A pair's similarity in one mode, minus what it needs beyond the threshold; 0 where a guard refuses it."""

    score: float
    same: bool


@dataclass(frozen=True)
class Row:
    mode: str
    threshold: float
    precision: float
    recall: float
    f1: float
    false_per_1000: float
    ms_p50: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="the first so many pairs only")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--json", action="store_true", help="print {rows, second_half} and nothing else on stdout")
    parser.add_argument("--check", action="store_true", help="exit 1 if a required figure is missed")
    parser.add_argument("--plot", type=Path, default=BUILD / "semantic.png")
    args = parser.parse_args()

    pairs = read_pairs(args.pairs)[: args.limit]
    embedder = load_embedder(args.model)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        cache = BUILD / f"semantic-{file_digest(args.pairs, args.model)}.npz"
        vectors = embedded(pairs, embedder, cache, progress)
        scores = {mode: [scored(pair, mode, vectors) for pair in pairs] for mode in MODES}
        ms = {mode: median_ms(pairs, mode, embedder, vectors, progress) for mode in MODES}
    rows = measure(scores, ms, slice(None))
    second_half = measure(scores, ms, slice(len(pairs) // 2, None))
    plot(scores, args.plot)
    if args.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "second_half": [asdict(row) for row in second_half]}))
    else:
        print_tables(pairs, rows, second_half, args)
    found = verdicts(rows)
    for good, line in found:
        print(("ok      " if good else "MISSED  ") + line, file=sys.stderr if args.json else sys.stdout)
    return 1 if args.check and not all(good for good, _ in found) else 0


# ---- Measuring.


def read_pairs(path: Path) -> list[Pair]:
    lines = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    records = [json.loads(line) for line in lines.splitlines() if line.strip()]
    return [Pair(record["a"], record["b"], record["same"]) for record in records]


def file_digest(path: Path, model: str) -> str:
    return hashlib.sha256(model.encode() + b"\0" + path.read_bytes()).hexdigest()[:16]


def embedded(pairs: Sequence[Pair], embedder: Embedder, cache: Path, progress: Progress) -> Vectors:
    """Vectors of all questions and their compared forms, from the cache where it has them."""
    asked = {text for pair in pairs for text in (pair.a, pair.b)}
    texts = {hashlib.sha256(text.encode()).hexdigest(): text for text in asked | set(map(compared_question, asked))}
    known: Vectors = {}
    if cache.exists():
        with np.load(cache) as stored:
            known = dict(zip(stored["digests"].tolist(), stored["vectors"], strict=True))
    missing = [digest for digest in texts if digest not in known]
    for digest in progress.track(missing, description="embedding"):
        known[digest] = embedder.embed([texts[digest]])[0]
    if missing:
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(cache, digests=np.array(list(known)), vectors=np.array(list(known.values())))
    return {text: known[digest] for digest, text in texts.items()}


def scored(pair: Pair, mode: str, vectors: Vectors) -> Scored:
    if mode == "raw":
        return Scored(float(vectors[pair.a] @ vectors[pair.b]), pair.same)
    if canonical_question(pair.a) == canonical_question(pair.b):
        return Scored(1.0, pair.same)
    score = similarity(*(vectors[text] for asked in (pair.a, pair.b) for text in (asked, compared_question(asked))))
    # Below every threshold the guards needn't run.
    if mode not in GUARDED or score < CURVE[0]:
        return Scored(score, pair.same)
    if is_refused(pair, GUARDED[mode]):
        return Scored(0.0, pair.same)
    more = similarity_needed(read_question(pair.a), read_question(pair.b), 0.0)
    return Scored(score - more, pair.same)


def is_refused(pair: Pair, mode: Mode) -> bool:
    return any((eligible(pair.a), eligible(pair.b), refusal(pair.a, pair.b, mode)))


def median_ms(pairs: Sequence[Pair], mode: str, embedder: Embedder, vectors: Vectors, progress: Progress) -> float:
    """Milliseconds for one question against one stored one, with all guards."""
    samples = []
    for pair in progress.track(pairs[:TIMED], description=f"timing {mode}"):
        start = time.perf_counter()
        texts = [pair.a] if mode == "raw" else [pair.a, compared_question(pair.a)]
        asked = embedder.embed(texts)
        float(asked[-1] @ vectors[pair.b])
        if mode in GUARDED:
            is_refused(pair, GUARDED[mode])
            similarity_needed(read_question(pair.a), read_question(pair.b))
        samples.append(time.perf_counter() - start)
    return round(statistics.median(samples) * 1000, 2)


def measure(scores: dict[str, list[Scored]], ms: dict[str, float], part: slice) -> list[Row]:
    return [row_of(mode, threshold, scores[mode][part], ms[mode]) for mode in MODES for threshold in THRESHOLDS]


def row_of(mode: str, threshold: float, scored_pairs: Sequence[Scored], ms_p50: float) -> Row:
    served = [each.same for each in scored_pairs if each.score >= threshold]
    right, same = sum(served), sum(each.same for each in scored_pairs)
    precision = right / len(served) if served else 1.0
    recall = right / same if same else 0.0
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    wrong = 1000 * (len(served) - right) / len(scored_pairs)
    return Row(mode, threshold, round(precision, 4), round(recall, 4), round(f1, 4), round(wrong, 2), ms_p50)


# ---- Reporting.


def verdicts(rows: list[Row]) -> list[tuple[bool, str]]:
    at = {row.mode: row for row in rows if row.threshold == COSINE_MIN}
    strict, balanced = at["strict"], at["balanced"]
    return [
        (strict.false_per_1000 <= 4, f"strict serves {strict.false_per_1000} false of 1,000, at most 4"),
        (strict.precision >= 0.92, f"strict has precision {strict.precision}, at least 0.92"),
        (balanced.precision >= 0.90, f"balanced has precision {balanced.precision}, at least 0.90"),
        (balanced.recall >= 0.28, f"balanced has recall {balanced.recall}, at least 0.28"),
    ]


def print_tables(pairs: list[Pair], rows: list[Row], second_half: list[Row], args: argparse.Namespace) -> None:
    console = Console()
    console.print(machine.describe(), highlight=False)
    console.print(f"{args.model}; {len(pairs)} pairs, {sum(pair.same for pair in pairs)} labelled same")
    for title, part in (("all pairs", rows), ("second half, whose pairs the guards were not tuned on", second_half)):
        table = Table(title=title)
        for name in asdict(part[0]):
            table.add_column(name, justify="left" if name == "mode" else "right", no_wrap=True, min_width=len(name))
        for row in part:
            table.add_row(*(str(value) for value in asdict(row).values()))
        console.print(table)
    console.print(f"Plot: {args.plot}", highlight=False)


def plot(scores: dict[str, list[Scored]], path: Path) -> None:
    """Precision over recall by mode, along thresholds from 0.80 to 0.99; those of the rows are marked."""
    try:
        import matplotlib
    except ImportError as error:
        print(f"no plot: {error}", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(8, 5))
    for mode in MODES:
        rows = [row_of(mode, threshold, scores[mode], 0) for threshold in CURVE]
        (line,) = panel.plot([row.recall for row in rows], [row.precision for row in rows], label=mode)
        for row in rows:
            if row.threshold in THRESHOLDS:
                panel.plot(row.recall, row.precision, "o", color=line.get_color())
                panel.annotate(f"{row.threshold}", (row.recall, row.precision), fontsize=7)
    panel.set(xlabel="recall", ylabel="precision", title="Pairs served, by mode and threshold")
    panel.grid(alpha=0.3)
    panel.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
