"""A load that was promised and then fails in a real engine: its prompt is computed, by every supported vLLM."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.step_probe import SteppedEngine
from tests.test_adapter_engine import MODELS, Node, prompt, until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600), pytest.mark.feature("a load that fails is computed")]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    running = Node(tmp_path)
    yield running
    running.close()


@pytest.fixture
def engine(node: Node) -> Iterator[SteppedEngine]:
    settings = {"data_dir": str(node.directory), "fetch": "always", "lookup_deadline_ms": 3000}
    running = SteppedEngine(MODELS / "tiny", settings, max_num_seqs=4)
    yield running
    running.close()


@pytest.mark.parametrize("local_tokens", [0, 256], ids=["from the start", "after what vLLM has itself"])
def test_a_node_that_dies_after_its_promise_costs_nothing_but_the_prefill(
    engine: SteppedEngine, node: Node, local_tokens: int
) -> None:
    tokens, before = prompt(1000, seed=7), node.rows()
    expected = engine.generate(tokens)
    until(lambda: node.rows() >= before + 3, "staging")
    engine.ask("reset", connector=False)
    if local_tokens:
        engine.generate(tokens[: local_tokens + 1])
    engine.ask("kill_after_promise", pid=node.process.pid)
    again = engine.generate(tokens)
    assert again["tokens"] == expected["tokens"]
    counts = engine.ask("state")["counts"]
    assert counts["hyperspace_l2_loads_total"] == {"no_node": 1}
    engine.ask("reset", connector=False)
    assert engine.generate(tokens)["tokens"] == expected["tokens"]
