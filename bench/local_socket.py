"""What it costs the API server to ask its node: woken by the socket, and looking at it each millisecond.

    python -m bench.local_socket [--json]

A node's local socket in a process of its own, which answers each lookup at once; one client that looks, as before, and
one that is woken, in turn, on asyncio's loop and on uvloop (vLLM's). Latency is of lookups at random moments, one at a
time; the rate is that of one lookup after the other. On a core that is busy otherwise the slowest lookups, with either
client, are those that waited for the core.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop

from bench.answering_node import answering_node
from bench.machine import describe
from hyperspace_vllm.api.node_lookup import NodeLookup
from hyperspace_vllm.async_client import AsyncNodeClient
from hyperspace_vllm.client import NodeClient
from hyperspace_vllm.config import Config
from hyperspace_vllm.core.local.messages import NodeMessage
from hyperspace_vllm.core.records.ids import RequestKey

ROUNDS = 60
PACED, IN_A_ROW = 40, 50  # lookups a round
PAUSE_S = 0.006  # at most, before a paced one
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}
KEY = RequestKey(bytes(32))


class Looking(AsyncNodeClient):
    """Looks at the socket while a lookup is pending: each millisecond, and less often once it has lasted."""

    def __init__(self, client: NodeClient) -> None:
        super().__init__(client)
        self._pending = 0
        self._poller: asyncio.Task[None] | None = None

    def listen(self, hear: Callable[[list[NodeMessage]], None]) -> None:
        """Look from now on; each lookup asks for it before it begins."""
        self._pending += 1
        self._eager_until_s = time.monotonic() + 0.03
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._look(hear))

    async def _look(self, hear: Callable[[list[NodeMessage]], None]) -> None:
        while self._pending:
            await asyncio.sleep(0.001 if time.monotonic() < self._eager_until_s else 0.003)
            messages = self.receive()
            self._pending -= len(messages)
            hear(messages)


async def ask(lookups: NodeLookup) -> float:
    """Seconds of one lookup."""
    began_s = time.perf_counter()
    pending = lookups.start(KEY, bytes(32), 10.0)
    if pending is None:
        raise RuntimeError("the node is not there")
    await pending.answer
    return time.perf_counter() - began_s


async def measure_round(lookups: NodeLookup, times: list[float], rates: list[float]) -> None:
    """Lookups at random moments, then one after the other."""
    for _ in range(PACED):
        await asyncio.sleep(random.uniform(0, PAUSE_S))
        times.append(await ask(lookups))
    began_s = time.perf_counter()
    for _ in range(IN_A_ROW):
        await ask(lookups)
    rates.append(IN_A_ROW / (time.perf_counter() - began_s))


async def measure(data_dir: Path) -> dict[str, dict[str, float]]:
    """Figures of the client that looks, and of the one that is woken."""
    clients = {name: NodeClient(Config(data_dir=data_dir), "api", name) for name in ("polled", "woken")}
    assert all(client.wait_connected(30) for client in clients.values())
    lookups = {"polled": NodeLookup(Looking(clients["polled"])), "woken": NodeLookup(AsyncNodeClient(clients["woken"]))}
    times: dict[str, list[float]] = {name: [] for name in clients}
    rates: dict[str, list[float]] = {name: [] for name in clients}
    for number in range(ROUNDS):
        for name in clients if number % 2 else reversed(clients):
            await measure_round(lookups[name], times[name], rates[name])
    for client in clients.values():
        client.close()
    return {name: figures(times[name], rates[name]) for name in clients}


def figures(times: list[float], rates: list[float]) -> dict[str, float]:
    """What is printed of one client."""
    cuts = statistics.quantiles(times, n=100)
    return {
        "messages_per_s": round(statistics.median(rates)),
        "p50_us": round(cuts[49] * 1e6),
        "p99_us": round(cuts[98] * 1e6),
    }


def main() -> int:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory, answering_node(Path(directory)):
        for name, loop_factory in LOOPS.items():
            with asyncio.Runner(loop_factory=loop_factory) as runner:
                found[name] = runner.run(measure(Path(directory)))
    if options.json:
        print(json.dumps({"machine": describe(), **found}, indent=2))
        return 0
    print(describe())
    for name, clients in found.items():
        for client, its in clients.items():
            print(f"{name:8} {client:7} " + "  ".join(f"{figure} {value:,}" for figure, value in its.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
