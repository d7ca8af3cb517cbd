"""`make demo`: two real vLLM servers, each with its own node, answer questions about long documents.

Every request shows which server and layer served it. Exits 1 when the expected layer did not serve, or a text differs.
"""

import argparse
import base64
import json
import os
import platform
import shutil
import sqlite3
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.documents import document, prompt
from bench.machine import ROOT, dtype
from bench.servers import MODELS, Completion, Server, found_network, free_port
from hyperspace_vllm.core.records.ids import RequestKey, network_id, public_key_of
from hyperspace_vllm.core.response.cache_proof import check_proof, decode_proof, request_hash
from hyperspace_vllm.response_db import database_path, unpacked

FULL, L1, L1_NETWORK, L2 = "full inference", "L1 local", "L1 network", "L2 network"
QUESTIONS = {
    "LICENSE": (
        "May I sell a modified version of this software?",
        "What must I keep when I redistribute it?",
    ),
    "docs/design.md": ("What happens when the cache fails?", "Which three layers does the cache have?"),
}
ANSWER_TOKENS = 24


@dataclass
class Row:
    """One line of the table and of build/demo.json; `layer` is the observed one, `expected` the one it should be."""

    name: str
    server: str
    layer: str
    ttft_ms: float
    total_ms: float
    prompt_tokens: int
    cached_tokens: int
    verified: str
    expected: str
    text: str


class Demo:
    """Runs the requests in order and records the results."""

    def __init__(self, console: Console, a: Server, b: Server, chat: bool, words: int) -> None:
        self.console, self.a, self.b, self.chat, self.words = console, a, b, chat, words
        self.rows: list[Row] = []
        self.problems: list[str] = []

    def run(self) -> None:
        """All requests on every document, the table redrawn after each."""
        with Live(self.table(), console=self.console, refresh_per_second=4) as live:
            for name, (first, second) in QUESTIONS.items():
                text = document(name, self.words)
                ask_first, ask_second = (prompt(text, q, chat=self.chat) for q in (first, second))
                self._ask(f"{name}: first question", self.a, ask_first, FULL, live)
                self._wait_published()
                self._ask(f"{name}: same question", self.a, ask_first, L1, live)
                warm = self._ask(f"{name}: second question", self.b, ask_second, L2, live)
                self._compare(name, ask_second, warm)
                self._ask(f"{name}: A's question", self.b, ask_first, L1_NETWORK, live)

    def _ask(self, name: str, server: Server, text: str, expected: str, live: Live) -> Completion:
        loaded_before = network_hits(server)
        answer = server.complete(text, max_tokens=ANSWER_TOKENS, logprobs=2)
        layer, verified = served_by(server, answer, loaded_before, (self.a, self.b))
        self.rows.append(
            Row(
                name, server.name, layer, round(answer.ttft_ms, 1), round(answer.total_ms, 1), answer.prompt_tokens,
                {L2: answer.cached_tokens, FULL: 0}.get(layer, answer.prompt_tokens), verified,
                expected, answer.text,
            )
        )  # fmt: skip
        if layer != expected:
            node = server.node_status()
            last = node["p2p"] if expected == L1_NETWORK else node["last_lookup"]
            self.problems.append(f"{name} on {server.name}: expected {expected}, was {layer}; last lookup {last}")
        live.update(self.table())
        return answer

    def _wait_published(self, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if node_idle(self.a):
                return
            time.sleep(0.2)
        self.problems.append("A's node was still coding the prefix after 60 s")

    def _compare(self, name: str, text: str, warm: Completion) -> None:
        # A unique salt makes every cache miss: B computes the whole prompt itself.
        cold = self.b.complete(
            text, max_tokens=ANSWER_TOKENS, logprobs=2, cache_salt=f"reference {time.time_ns()}",
            headers={"Cache-Control": "no-store"},
        )  # fmt: skip
        if cold.text == warm.text:
            return
        at = next(i for i, (x, y) in enumerate(zip(cold.tokens, warm.tokens, strict=False)) if x != y)
        best, second = sorted(cold.logprobs[at].values(), reverse=True)[:2]
        self.problems.append(
            f"{name}: B's text differs from B's own with caching off at token {at} "
            f"({warm.tokens[at]!r} for {cold.tokens[at]!r}; logit gap {best - second:.4f})"
        )

    def table(self) -> Table:
        """The live table."""
        table = Table(title="compute once, cache everywhere, serve verified", title_justify="left")
        for column in ("request", "on", "served by"):
            table.add_column(column, no_wrap=True)
        for column in ("TTFT ms", "total ms", "prompt", "from cache"):
            table.add_column(column, justify="right")
        table.add_column("verified by", no_wrap=True)
        for row in self.rows:
            colour = (
                {FULL: "yellow", L1: "green", L1_NETWORK: "green", L2: "cyan"}[row.layer]
                if row.layer == row.expected
                else "red"
            )
            table.add_row(
                row.name, row.server, f"[{colour}]{row.layer}[/]", f"{row.ttft_ms:,.1f}", f"{row.total_ms:,.1f}",
                str(row.prompt_tokens), str(row.cached_tokens), row.verified,
            )  # fmt: skip
        return table


def network_hits(server: Server) -> float:
    """Prefixes that the engine has loaded from the network so far."""
    return server.metric("hyperspace_l2_lookups_total", 'result="hit"', 'reason="network"')


def served_by(server: Server, answer: Completion, loaded_before: float, servers: tuple[Server, ...]) -> tuple[str, str]:
    """(layer, how it was verified), from the answer's headers and the server's own counters."""
    status = answer.headers.get("cache-status", "").split("; ")
    if "hit" in status:
        return L1_NETWORK if "detail=peer" in status else L1, check_response(server, answer, servers)
    if network_hits(server) > loaded_before and answer.cached_tokens:
        last = server.node_status()["last_lookup"]
        assert isinstance(last, dict)
        return L2, str(last["verified_by"])
    return FULL, ""


def check_response(server: Server, answer: Completion, servers: tuple[Server, ...]) -> str:
    """Check a hit's CacheProof as a third party would: by the stored answer and its signer."""
    encoded = answer.headers.get("x-hyperspace-proof")
    if encoded is None:
        return "not signed yet"
    raw = base64.b64decode(encoded)
    proof = decode_proof(raw)
    key, body = stored_under(server, raw)
    status = server.node_status()
    asked = request_hash(network_id(str(status["network"])), RequestKey(key))
    signers = {public_key_of(str(each.node_status()["peer_id"])): each.name for each in servers}
    check_proof(proof, asked, body, proof.model_digest, signers.__contains__, time.time_ns() // 1_000_000)
    return f"CacheProof, computed by {signers[proof.signer]}"


def stored_under(server: Server, proof: bytes, timeout_s: float = 10) -> tuple[bytes, bytes]:
    """(request key, body) of the entry with this proof; a fetched entry is stored a moment after it was served."""
    deadline = time.monotonic() + timeout_s
    with closing(sqlite3.connect(f"file:{database_path(server.data_dir)}?mode=ro", uri=True)) as database:
        query = "SELECT request_key, body FROM entries JOIN bodies USING (id) WHERE proof = ?"
        while (row := database.execute(query, (proof,)).fetchone()) is None:
            assert time.monotonic() < deadline, f"{server.name} has not stored what it served"
            time.sleep(0.05)
    key, stored = row
    body = unpacked(stored)
    assert body is not None, f"{server.name} has stored a damaged answer"
    return key, body


def wait_discovered(console: Console, servers: list[Server], others: int, timeout_s: float = 60) -> None:
    """Wait until each server's node has found that many; every node knows the first one's address at most."""
    with console.status("the nodes find each other"):
        deadline = time.monotonic() + timeout_s
        while any(len(server.node_status()["peers"]) < others for server in servers):  # type: ignore[arg-type]
            if time.monotonic() > deadline:
                raise TimeoutError(f"not discovered within {timeout_s:.0f} s: {servers[0].node_status()['p2p']}")
            time.sleep(0.1)


def node_idle(server: Server) -> bool:
    """Whether the server's node has coded and stored everything it was given."""
    publish = server.node_status()["publish"]
    assert isinstance(publish, dict)
    return bool(publish["objects"] > 0 and publish["waiting_rows"] == 0)


def start(console: Console, servers: list[Server]) -> None:
    """Wait for all servers, with a spinner each."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        waits = [(progress.add_task(f"vllm serve on {s.name}", total=None), s.wait_ready()) for s in servers]
        for task, wait in waits:
            for _ in wait:
                progress.refresh()
            progress.remove_task(task)


def warm_up(console: Console, servers: list[Server], text: str) -> None:
    """Keep the lazy initialisation of an engine's first long prompt, by any server, out of the figures."""

    def one(server: Server) -> None:
        server.complete(f"Warm up {server.name}. {text}", max_tokens=2, logprobs=2)

    with console.status("warming up: one prompt each that no one will ask again"), ThreadPoolExecutor() as pool:
        list(pool.map(one, servers))


def environment(model: Path) -> dict[str, object]:
    """Where the figures were measured."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "model": model.name,
        "dtype": dtype("generate"),
        "vllm": version("vllm"),
        "hyperspace": version("hyperspace-vllm"),
        "commit": commit.stdout.strip(),
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }


def summary(console: Console, rows: list[Row]) -> None:
    """Cold against cached, in one line each."""

    def mean_ms(layer: str) -> float:
        times = [row.ttft_ms for row in rows if row.layer == layer]
        return statistics.mean(times) if times else 0.0

    for layer in (L1, L1_NETWORK, L2):
        if mean_ms(layer):
            console.print(f"{layer}: first token {mean_ms(FULL) / mean_ms(layer):,.0f} times as soon as {FULL}")


def main() -> int:
    """Run the demo; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("gemma", "tiny"), default="gemma")
    parser.add_argument("--json", action="store_true", help="print build/demo.json instead of the table")
    options = parser.parse_args()
    console = Console(stderr=options.json, width=None if sys.stdout.isatty() else 130)
    model, build = MODELS[options.model], ROOT / "build"
    work = build / "demo"
    shutil.rmtree(work, ignore_errors=True)
    directories = [work / "a", work / "b"]
    for directory in directories:
        directory.mkdir(parents=True, mode=0o700)
    environments = found_network(directories, free_port())
    settings = {"HYPERSPACE_ARENA_BYTES": str(512 << 20), "HYPERSPACE_DISK_BYTES": str(2 << 30)}
    if options.model == "tiny":  # it prefills so fast that on a busy machine not fetching would be right
        settings["HYPERSPACE_FETCH"] = "always"
    if (os.cpu_count() or 1) < 4:  # by default vLLM puts both servers on the first core
        environments = [{**e, "VLLM_CPU_OMP_THREADS_BIND": str(core)} for core, e in enumerate(environments)]
    console.print(f"{model.name} in {dtype('generate')}, which the set-up saw work on this machine")
    servers = [
        Server(name, model, directory, environment={**settings, **extra})
        for name, directory, extra in zip("AB", directories, environments, strict=True)
    ]
    # The tiny model's tokens are bytes, so fewer words make an equally long prompt.
    words = 1250 if options.model == "gemma" else 400
    try:
        start(console, servers)
        wait_discovered(console, servers, len(servers) - 1)
        warm_up(console, servers, document("docs/protocol.md", words))
        demo = Demo(console, servers[0], servers[1], options.model == "gemma", words)
        demo.run()
    finally:
        for server in servers:
            server.stop()
    report = {
        "requests": [{k: v for k, v in asdict(row).items() if k != "expected"} for row in demo.rows],
        "environment": environment(model),
        "problems": demo.problems,
    }
    (build / "demo.json").write_text(json.dumps(report, indent=2) + "\n")
    console.line()  # without a terminal, rich ends a live table without a newline
    summary(console, demo.rows)
    for problem in demo.problems:
        console.print(f"[red]{problem}[/]")
    console.print(f"logs and stores: {work.relative_to(ROOT)}; figures: build/demo.json")
    if options.json:
        print(json.dumps(report, indent=2))
    return 1 if demo.problems else 0


if __name__ == "__main__":
    sys.exit(main())
