"""Real engines, real nodes, the network between them: what B loads is what A held."""

import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.engine_probe import Engine

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

MODELS = Path(__file__).parents[1] / ".models"
WAIT_S = 30.0


def prompt(tokens: int, seed: int = 0) -> list[int]:
    """Any ids of the byte tokenizer; a prompt with another seed shares no segment."""
    return [(i * 7 + seed * 31 + i // 250) % 250 for i in range(tokens)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} didn't happen within {WAIT_S} s"
        time.sleep(0.05)


class Nodes:
    """Nodes of one network that know each other, each with a data directory and a process."""

    def __init__(self, base: Path, count: int) -> None:
        self.directories = [base / f"n{i}" for i in range(count)]
        self.processes: list[subprocess.Popen[bytes]] = []
        ports = [free_port() for _ in range(count)]
        peers = []
        for directory, port in zip(self.directories, ports, strict=True):
            out = self._cli(directory, "id").stdout.strip().split()[-1]
            peers.append(f"{out}@127.0.0.1:{port}")
        self.settings = [
            {"data_dir": str(directory), "listen": f"127.0.0.1:{port}", "peers": [p for p in peers if p != own]}
            for directory, port, own in zip(self.directories, ports, peers, strict=True)
        ]
        for settings in self.settings:
            env = _environ(Path(settings["data_dir"])) | {
                "HYPERSPACE_LISTEN": settings["listen"],
                "HYPERSPACE_PEERS": ",".join(settings["peers"]),
                "HYPERSPACE_ARENA_BYTES": "256MiB",
                "HYPERSPACE_FETCH": "always",
            }
            command = [sys.executable, "-m", "hyperspace_vllm.cli", "node"]
            self.processes.append(subprocess.Popen(command, env=env))

    def engine_settings(self, number: int) -> dict[str, object]:
        return {"data_dir": str(self.directories[number]), "fetch": "always"}

    def metric(self, number: int, name: str, **labels: str) -> float:
        """Sum of one metric of a node over the labels that aren't given."""
        status = self._cli(self.directories[number], "status", "--json").stdout
        metrics = json.loads(status)["metrics"] if status.strip() else []
        matching = [m for m in metrics if m["name"] == name and labels.items() <= m["labels"].items()]
        return float(sum(m["value"] for m in matching))

    def stored(self, number: int, rows: int) -> None:
        """Wait until the node has that many rows on disk: from then on others can have them."""
        until(lambda: self.metric(number, "hyperspace_rows", tier="disk") >= rows, f"storing {rows} rows")

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def _cli(self, directory: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "hyperspace_vllm.cli", *arguments]
        return subprocess.run(command, env=_environ(directory), capture_output=True, text=True, check=False, timeout=30)


def _environ(directory: Path) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if "HYPERSPACE" not in k} | {"HYPERSPACE_DATA_DIR": str(directory)}


@pytest.fixture
def cleanup() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def two_nodes(tmp_path_factory: pytest.TempPathFactory, cleanup: ExitStack) -> Nodes:
    nodes = Nodes(tmp_path_factory.mktemp("hs"), 2)
    cleanup.callback(nodes.close)
    return nodes


def engine(cleanup: ExitStack, model: str, settings: dict[str, object], **options: object) -> Engine:
    made = Engine(MODELS / model, settings, **options)  # type: ignore[arg-type]
    cleanup.callback(made.close)
    return made


def test_an_engine_without_a_node_serves_as_if_we_were_not_there(tmp_path: Path, cleanup: ExitStack) -> None:
    # Somebody holds the directory's lock and answers nothing: the embedded node leaves, and nobody else is there.
    lock = os.open(tmp_path / "node.lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    cleanup.callback(os.close, lock)
    alone = engine(cleanup, "tiny", {"data_dir": str(tmp_path)}).started()
    answers = [alone.generate(prompt(600)) for _ in range(2)]
    assert answers[0]["tokens"] == answers[1]["tokens"]
    state = alone.ask("state")
    assert (state["on"], state["connected"]) == (True, False)
    assert state["counts"]["hyperspace_l2_lookups_total"] == {"miss|no_node": 1}  # the second is in vLLM's own cache


@pytest.mark.parametrize("model", ["tiny", "tiny-gemma3"])
def test_a_prefix_computed_by_a_is_loaded_by_b_over_the_network_byte_by_byte(
    model: str, two_nodes: Nodes, cleanup: ExitStack
) -> None:
    a = engine(cleanup, model, two_nodes.engine_settings(0))
    b = engine(cleanup, model, two_nodes.engine_settings(1))
    a.started(), b.started()
    rows = 0
    for length in (255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 1500):
        tokens = prompt(length, seed=length)
        computed = a.generate(tokens)
        rows += len(computed["blocks"]["saved"]) // 2  # two blocks of 128 tokens a row
        two_nodes.stored(0, rows)
        loaded = b.generate(tokens)
        usable = (length - 1) // 256 * 256
        assert loaded["cached"] == usable, f"{length} tokens: {b.ask('state')}"
        if usable == 0:
            continue
        assert loaded["blocks"]["loaded"], length
        for place, block in loaded["blocks"]["loaded"].items():
            assert computed["blocks"]["saved"][place] == block, f"{length} tokens: block {place} differs"
        assert not any(block < usable // 128 for _, block, _ in loaded["blocks"]["saved"])
