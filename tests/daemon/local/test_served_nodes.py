"""Two real nodes: what engines tell the one of them shows in the status of the other."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from hyperspace_vllm.client import NodeClient
from hyperspace_vllm.core.local.kv_messages import PrefixesInMemory, RegisterLayout
from hyperspace_vllm.core.records.ids import sha256
from hyperspace_vllm.core.records.layout import Layout, Part
from tests.support.network_nodes import NetworkedNode, private_network
from tests.support.until import until

pytestmark = [pytest.mark.io, pytest.mark.timeout(120)]

LAYOUT = Layout(sha256(b"fingerprint"), 256, (Part(0, 4096),), 1)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[NetworkedNode]]:
    running = private_network(tmp_path, 2)
    yield running
    for node in running:
        node.stop()


def shown(asked: NetworkedNode, of: NetworkedNode) -> dict[str, object]:
    """What one node's status says of another."""
    peer_id = of.status()["peer_id"]
    return next((peer for peer in asked.status()["p2p"].get("peers", ()) if peer["peer_id"] == peer_id), {})


def test_status_shows_what_a_peer_serves_until_its_engine_goes(nodes: list[NetworkedNode]) -> None:
    first, second = nodes
    until(lambda: shown(second, first))
    first.store("x")
    engine = NodeClient(first.config, "scheduler", "engine")
    assert engine.wait_connected(60)
    assert engine.send(RegisterLayout(LAYOUT, bytes(range(16))))
    assert engine.send(PrefixesInMemory(300, tuple(sha256(bytes([number])) for number in range(20)), ()))
    serving = {
        "peer_id": first.status()["peer_id"],
        "models": 1,
        "fingerprints": 1,
        "load_permille": 300,
        "segments_in_memory": 20,
    }
    until(lambda: shown(second, first) == serving)
    assert first.status()["p2p"]["serves"] == serving
    engine.close()
    gone = serving | {"fingerprints": 0, "load_permille": 0, "segments_in_memory": 0}
    until(lambda: shown(second, first) == gone)
