"""Time to first token: cold, from the network, from the response cache; and what a miss costs.

Three servers on loopback: A and B with the connector, P without. Engines compute on core 0; A's and B's nodes run at
nice 10 on core 1. Arms are interleaved in one run, and A's node is drained between requests.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from .demo import environment, network_hits, node_idle, start, warm_up
from .documents import document, prompt
from .servers import MODELS, ROOT, Server, free_port, introduce

QUESTION, OTHER_QUESTION = "What may I do with this software?", "Who may use the trademarks?"
HITS = 200
BOOTSTRAP_ROUNDS = 10_000


def bootstrap_interval(ratios: list[float], seed: int = 1) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of the median (Efron 1979)."""
    rng = random.Random(seed)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(BOOTSTRAP_ROUNDS))
    return medians[int(0.025 * BOOTSTRAP_ROUNDS)], medians[int(0.975 * BOOTSTRAP_ROUNDS)]


def server_timing_ms(headers: dict[str, str]) -> float:
    """The response cache's own time on a hit, from `Server-Timing: hyperspace;dur=…` (milliseconds)."""
    return float(headers["server-timing"].split("hyperspace;dur=")[1].split(",")[0])


def copies_per_stored_byte(producer: Server) -> float:
    """Copies of a KV byte from vLLM's blocks to the producer's disk: the gather, and sealing into the file."""
    status = producer.node_status()["metrics"]
    assert isinstance(status, list)
    node = {m["labels"]["direction"]: m["value"] for m in status if m["name"] == "hyperspace_bytes_total"}
    gathered = producer.metric("hyperspace_l2_bytes_total", 'direction="saved"')
    return (gathered + float(node["copied"])) / float(node["stored"])


def drain(server: Server, timeout_s: float = 60) -> None:
    """Wait until the server's node has nothing left to code."""
    deadline = time.monotonic() + timeout_s
    while not node_idle(server):
        if time.monotonic() > deadline:
            raise RuntimeError(f"node of {server.name} still busy after {timeout_s:.0f} s")
        time.sleep(0.1)


def give_core(server: Server, core: int) -> None:
    """Pin the server's node to one core, where there is more than one."""
    if (os.cpu_count() or 1) > core:
        pid = json.loads((server.data_dir / "node.json").read_text())["pid"]
        for task in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), {core})


def measure(a: Server, b: Server, plain: Server, texts: list[str], chat: bool, console: Console) -> dict[str, object]:
    """All figures; times are medians in milliseconds."""
    on: list[float] = []
    off: list[float] = []
    network: list[float] = []
    tokens: list[int] = []
    with Progress(console=console, transient=True) as progress:
        for number, text in enumerate(progress.track(texts, description="cold on / off, then network")):
            question = prompt(text, QUESTION, chat=chat)
            for server in (a, plain) if number % 2 else (plain, a):
                answer = server.complete(question, max_tokens=2)
                (on if server is a else off).append(answer.ttft_ms)
            tokens.append(answer.prompt_tokens)
            drain(a)
            before = network_hits(b)
            answer = b.complete(prompt(text, OTHER_QUESTION, chat=chat), max_tokens=2)
            if network_hits(b) > before:
                network.append(answer.ttft_ms)
            drain(b)
    last = prompt(texts[-1], QUESTION, chat=chat)
    hits = [server_timing_ms(a.complete(last, max_tokens=2).headers) for _ in range(HITS)]
    ratios = [x / y - 1 for x, y in zip(on, off, strict=True)]
    return {
        "prompt_tokens": int(statistics.median(tokens)),
        "prompts": len(texts),
        "cold_ttft_ms": round(statistics.median(on), 1),
        "plain_ttft_ms": round(statistics.median(off), 1),
        "l2_network_ttft_ms": round(statistics.median(network), 1) if network else None,
        "l2_network_hits": len(network),
        "l1_hit_p50_ms": round(statistics.median(hits), 3),
        "miss_overhead_ratio": round(statistics.median(ratios), 4),
        "miss_overhead_interval": [round(x, 4) for x in bootstrap_interval(ratios)],
        "copies_per_stored_byte": round(copies_per_stored_byte(a), 2),
    }


def main() -> int:
    """Run the bench; exit 1 when a figure misses its bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("gemma", "tiny"), default="gemma")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    console = Console(stderr=True)
    work = ROOT / "build" / "ttft"
    shutil.rmtree(work, ignore_errors=True)
    directories = [work / name for name in "abp"]
    for directory in directories:
        directory.mkdir(parents=True, mode=0o700)
    environments = [*introduce(directories[:2], [free_port(), free_port()]), {}]
    settings = {"HYPERSPACE_ARENA_BYTES": str(512 << 20), "VLLM_CPU_OMP_THREADS_BIND": "0"}
    servers = [
        Server(name, MODELS[options.model], directory, connector=name != "P", environment={**settings, **extra})
        for name, directory, extra in zip("ABP", directories, environments, strict=True)
    ]
    body = document("LICENSE", 950 if options.model == "gemma" else 280)
    texts = [f"Document {number} of {options.prompts}.\n{body}" for number in range(options.prompts + 1)]
    try:
        start(console, servers)
        a, b, plain = servers
        for server in (a, b):
            give_core(server, 1)
        warm_up(servers)
        for server in servers:  # and one prompt of the size measured, which tells the connector how fast prefill is
            server.complete(prompt(texts[-1], OTHER_QUESTION, chat=False), max_tokens=2)
        drain(a)
        figures = measure(a, b, plain, texts[:-1], options.model == "gemma", console)
    finally:
        for server in servers:
            server.stop()
    report = {
        "device": f"CPU, {os.cpu_count()} cores, one for the engine",
        **environment(MODELS[options.model]),
        **figures,
    }
    (ROOT / "build" / "ttft.json").write_text(json.dumps(report, indent=2) + "\n")
    if options.json:
        print(json.dumps(report))
    else:
        for name, value in report.items():
            console.print(f"{name:24} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
