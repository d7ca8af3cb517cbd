"""A load that was promised and then fails in a real engine: its prompt is computed, by every supported vLLM."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from hyperspace_vllm.vllm_adapter.older_vllm import FAILED_LOADS_HAVE_NAMES
from tests.end_to_end.test_engine import Node, prompt
from tests.support.engines.step_probe import SteppedEngine
from tests.support.paths import MODELS
from tests.support.until import until

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.feature("a load that fails is computed"),
]


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
    until(lambda: node.rows() >= before + 3, what="staging")
    engine.ask("reset", connector=False)
    if local_tokens:
        engine.generate(tokens[: local_tokens + 1])
    engine.ask("kill_after_promise", pid=node.process.pid)
    again = engine.generate(tokens)
    assert again["tokens"] == expected["tokens"]
    assert engine.ask("state")["loads"] == ["no_node"]
    engine.ask("reset", connector=False)
    assert engine.generate(tokens)["tokens"] == expected["tokens"]


@pytest.mark.skipif(FAILED_LOADS_HAVE_NAMES, reason="this vLLM goes on after a failed load of any model")
def test_a_model_with_several_kv_groups_is_declined_where_a_failed_load_would_stop_vllm(node: Node) -> None:
    engine = SteppedEngine(MODELS / "tiny-gemma3", {"data_dir": str(node.directory)}, max_num_seqs=4)
    with closing(engine):
        assert len(engine.generate(prompt(600))["tokens"][0]) == 4
        assert not engine.ask("state")["on"]
        said = [line for line in engine.log if "KV sharing (L2) is off" in line]
        assert ["several KV cache groups" in line for line in said] == [True] * 2  # its scheduler and its worker
