"""Ten minutes of a small network under load, outside CI (`pytest -m soak`): memory stays flat, and answers continue."""

import random
import time
from collections.abc import Iterator

import pytest

from hyperspace_vllm.core.records.limits import MiB
from tests.support.network_nodes import NetworkedNode, body_of, memory_bytes, private_network, workers_of
from tests.support.until import until

pytestmark = [pytest.mark.io, pytest.mark.soak, pytest.mark.timeout(1_500)]

NODES, SOAK_S, PER_S = 5, 600, 10
GROWTH_BYTES_MAX = 24 * MiB  # between the third minute, when every table has been used, and the last


@pytest.fixture
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[NetworkedNode]]:
    started = private_network(tmp_path_factory.mktemp("soak"), NODES)
    until(lambda: all(node.card().get("p2p") for node in started))
    until(lambda: all(node.status()["p2p"].get("known_peers") == NODES - 1 for node in started))
    yield started
    for node in started:
        node.stop()


def test_memory_is_flat_over_ten_minutes_of_answers(nodes: list[NetworkedNode]) -> None:
    rng, began, stored, hits, asked = random.Random(3), time.monotonic(), 0, 0, 0
    origins: list[int] = []
    sizes: list[tuple[float, list[int]]] = []
    while (elapsed := time.monotonic() - began) < SOAK_S:
        origins.append(rng.randrange(NODES))
        nodes[origins[-1]].store(stored)
        stored += 1
        if stored > 20 * PER_S:  # stored at least two seconds ago
            name = rng.randrange(max(0, stored - 2_000), stored - 10 * PER_S)
            asked += 1
            asker = rng.choice([number for number in range(NODES) if number != origins[name]])
            hits += nodes[asker].find(name).body == body_of(name)
        if elapsed // 20 > len(sizes) - 1:
            sizes.append((elapsed, [memory_bytes(node.process.pid) for node in nodes]))
            print(f"{elapsed:4.0f} s, {stored} stored, {hits} of {asked} hits, MiB {[s // MiB for s in sizes[-1][1]]}")
        time.sleep(max(0.0, stored / PER_S - (time.monotonic() - began)))
    early = next(each for at, each in sizes if at >= 180)
    late = sizes[-1][1]
    assert all(after - before <= GROWTH_BYTES_MAX for before, after in zip(early, late, strict=True)), sizes
    assert all(size <= 200 * MiB for size in late)
    assert all(memory_bytes(worker) <= 150 * MiB for node in nodes for worker in workers_of(node.process.pid))
    assert hits >= 0.95 * asked
