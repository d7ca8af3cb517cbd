"""The connector in a real engine, step by step: aborts, preemption, resets, a node that is absent, killed or frozen."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.engines.step_probe import SteppedEngine
from tests.support.paths import MODELS
from tests.support.until import until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

LOOKUPS = "hyperspace_l2_lookups_total"


def prompt(tokens: int, seed: int = 0) -> list[int]:
    """Ids of the byte tokenizer; prompts with different seeds share no segment."""
    return [(i * 7 + seed * 31 + i // 250) % 250 for i in range(tokens)]


class Node:
    """One standalone node."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        kept = {k: v for k, v in os.environ.items() if "HYPERSPACE" not in k}
        self._env = kept | {"HYPERSPACE_DATA_DIR": str(directory), "HYPERSPACE_ARENA_BYTES": "256MiB"}
        self.process = subprocess.Popen([sys.executable, "-m", "hyperspace_vllm.cli", "node"], env=self._env)
        until(lambda: bool(self.metrics()), what="starting")

    def status(self) -> dict[str, Any]:
        """The node's own status; empty while it isn't there."""
        command = [sys.executable, "-m", "hyperspace_vllm.cli", "status", "--json"]
        done = subprocess.run(command, env=self._env, capture_output=True, text=True, check=False, timeout=30)
        found: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
        return found

    def metrics(self) -> list[dict[str, object]]:
        metrics: list[dict[str, object]] = self.status().get("metrics", [])
        return metrics

    def in_memory(self) -> int:
        """About how many segments its PeerRecord counts in its engine's memory."""
        serves = self.status()["p2p"].get("serves", {})
        return int(serves.get("segments_in_memory", -1))  # it has yet to join

    def rows(self) -> int:
        """Rows in the memory tier."""
        at = {"name": "hyperspace_rows", "labels": {"tier": "memory"}}
        return sum(int(float(str(m["value"]))) for m in self.metrics() if at.items() <= m.items())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    running = Node(tmp_path_factory.mktemp("hs"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def engine(node: Node) -> Iterator[SteppedEngine]:
    settings = {"data_dir": str(node.directory), "fetch": "always", "lookup_deadline_ms": 3000}
    running = SteppedEngine(MODELS / "tiny-gemma3", settings, max_num_batched_tokens=256, max_num_seqs=4)
    yield running
    running.close()


def test_what_vllm_forgot_comes_back_from_the_nodes_memory(engine: SteppedEngine, node: Node) -> None:
    tokens = prompt(1000, seed=1)
    before = node.rows()
    first = engine.generate(tokens)
    until(lambda: node.rows() > before, what="staging")
    engine.ask("reset", connector=False)
    second = engine.generate(tokens)
    assert second["cached"] == [768]
    assert second["tokens"] == first["tokens"]


@pytest.mark.parametrize("known", [False, True])
def test_an_abort_after_any_step_leaves_nothing_and_the_engine_serves_on(
    engine: SteppedEngine, node: Node, known: bool
) -> None:
    tokens = prompt(1000, seed=2 + known)
    expected = engine.generate(tokens)["tokens"] if known else None
    seen = set()
    for steps in range(12):
        engine.ask("reset", connector=False)
        aborted = engine.ask("abort", tokens=tokens if known else prompt(1000, seed=100 + steps), steps=steps)
        assert aborted["left"] == [0, 0, 0], f"after {steps} steps"
        seen.update(aborted["seen"])
    assert {"WAITING", "RUNNING"} <= seen
    if known:
        engine.ask("reset", connector=False)
        assert engine.generate(tokens)["tokens"] == expected


def test_after_a_reset_of_the_connector_the_same_weights_share_again(engine: SteppedEngine, node: Node) -> None:
    tokens, before = prompt(1000, seed=4), node.rows()
    engine.generate(tokens)
    until(lambda: node.rows() > before, what="staging")
    assert engine.ask("reset", connector=True)["ok"]
    assert engine.generate(tokens)["cached"] == [768]


def test_a_prompt_is_in_memory_with_sliding_windows_too(engine: SteppedEngine) -> None:
    tokens = prompt(1000, seed=6)
    engine.generate(tokens)
    until(lambda: engine.ask("in_memory", tokens=tokens)["of_prompt"] == [True] * 3, what="the report")
    engine.ask("reset", connector=False)
    until(lambda: engine.ask("in_memory", tokens=tokens)["told"] == 0, what="the report of a reset")


def test_prompts_that_share_a_prefix_in_one_batch_are_each_right(engine: SteppedEngine) -> None:
    shared = prompt(600, seed=5)
    prompts = [shared + prompt(100, seed=50 + i) for i in range(3)]
    alone = [engine.generate(p)["tokens"][0] for p in prompts]
    engine.ask("reset", connector=False)
    assert engine.generate(*prompts)["tokens"] == alone


def test_a_frozen_node_costs_its_deadline_and_a_killed_one_does_not(engine: SteppedEngine, node: Node) -> None:
    node.process.send_signal(signal.SIGSTOP)
    engine.generate(prompt(600, seed=7))
    reason, waited_s = engine.ask("state")["last_miss"]
    assert reason == "deadline"
    assert 3 < waited_s < 6  # and the lease, which would end the wait too, lasts 5 s

    until(lambda: _reconnected(engine, node), what="a new session")
    node.process.send_signal(signal.SIGSTOP)
    killer = threading.Timer(1.0, node.process.kill)
    killer.start()
    engine.generate(prompt(600, seed=8))  # waits for the frozen node, which dies in the meantime
    killer.join()
    reason, waited_s = engine.ask("state")["last_miss"]
    assert reason == "node_gone"
    assert waited_s < 3
    engine.generate(prompt(600, seed=9))
    assert engine.ask("state")["last_miss"][1] < 3  # no node, or the one that the engine's process has started since


def _reconnected(engine: SteppedEngine, node: Node) -> bool:
    node.process.send_signal(signal.SIGCONT)
    return bool(engine.ask("state")["connected"])


def test_an_error_of_ours_while_a_prefix_is_loaded_costs_a_miss_and_switches_both_halves_off(tmp_path: Path) -> None:
    with (
        closing(Node(tmp_path)) as node,
        closing(SteppedEngine(MODELS / "tiny", {"data_dir": str(tmp_path), "fetch": "always"})) as running,
    ):
        first, second = prompt(1000, seed=1), prompt(1000, seed=2)
        expected = [running.generate(each)["tokens"] for each in (first, second)]
        until(lambda: node.rows() >= 6, what="staging")
        running.ask("reset", connector=False)
        running.ask("spoil", method="_load")
        for number, each in enumerate((first, second)):
            answer = running.generate(each)
            assert (answer["tokens"], answer["cached"]) == (expected[number], [0])
            assert not running.ask("state")["on"]


@contextmanager
def cramped_engine(directory: Path, model: str, blocks: int) -> Iterator[tuple[Node, SteppedEngine]]:
    """An engine with `blocks` blocks of 128 tokens, one of which is the null block."""
    settings = {"data_dir": str(directory), "fetch": "always"}
    with (
        closing(Node(directory)) as node,
        closing(SteppedEngine(MODELS / model, settings, num_gpu_blocks_override=blocks, max_model_len=1024)) as engine,
    ):
        yield node, engine


@pytest.fixture(scope="module")
def cramped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, SteppedEngine]]:
    with cramped_engine(tmp_path_factory.mktemp("cramped"), "tiny", 10) as pair:
        yield pair


def test_the_record_says_what_is_in_memory_and_no_more_what_was_evicted_or_reset(
    cramped: tuple[Node, SteppedEngine],
) -> None:
    node, engine = cramped
    first, second = prompt(600, seed=1), prompt(900, seed=2)  # the second evicts the end of the first
    engine.generate(first)
    until(lambda: engine.ask("in_memory", tokens=first)["of_prompt"] == [True] * 2, what="the report")
    until(lambda: node.in_memory() == 2, what="a record with two segments")
    engine.generate(second)
    until(lambda: engine.ask("in_memory", tokens=second)["of_prompt"] == [True] * 3, what="the next report")
    assert engine.ask("in_memory", tokens=first)["of_prompt"] != [True] * 2
    assert engine.ask("reset", connector=False)["ok"]
    until(lambda: engine.ask("in_memory", tokens=second)["told"] == 0, what="the report of a reset")
    until(lambda: node.in_memory() == 0, what="a record with none")


def test_preempted_requests_end_as_they_would_have(cramped: tuple[Node, SteppedEngine]) -> None:
    _, engine = cramped
    preempt(engine)


@pytest.mark.slow
def test_preempted_requests_of_a_model_with_windows_end_as_they_would_have(tmp_path: Path) -> None:
    # Gemma 3 needs six blocks where the other model needs one, for its groups of layers.
    with cramped_engine(tmp_path, "tiny-gemma3", 65) as (_, engine):
        preempt(engine)


def preempt(engine: SteppedEngine) -> None:
    """Three requests start, and don't fit with their output."""
    prompts = [prompt(300, seed=i) for i in range(3, 6)]
    alone = [engine.generate(p, max_tokens=8)["tokens"][0] for p in prompts]
    engine.ask("reset", connector=False)
    together = engine.generate(*prompts, max_tokens=250)["tokens"]
    assert [len(tokens) for tokens in together] == [250] * 3
    assert [tokens[:8] for tokens in together] == alone  # later, other batch shapes may change a random model's choice
    assert engine.ask("state")["preemptions"] > 0


@pytest.mark.slow
def test_an_engine_without_a_node_serves_as_if_we_were_not_there(tmp_path: Path) -> None:
    # Another process holds the directory's lock and answers nothing: the embedded node exits, and there is no other.
    lock = os.open(tmp_path / "node.lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    alone = SteppedEngine(MODELS / "tiny", {"data_dir": str(tmp_path)})
    try:
        first, second = (alone.generate(prompt(600)) for _ in range(2))
        assert first["tokens"] == second["tokens"]
        state = alone.ask("state")
        assert (state["on"], state["connected"]) == (True, False)
        assert state["counts"][LOOKUPS] == {"miss|no_node": 1}  # the second finds vLLM's own cache
    finally:
        alone.close()
        os.close(lock)
