"""Whole node processes of one data directory, and what tests ask of them."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hyperspace_vllm.config import Config
from hyperspace_vllm.core.records.limits import MiB
from tests.support.paths import ROOT
from tests.support.until import until


def hyperspace(*arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "hyperspace_vllm.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env=os.environ | environ,
        check=False,
    )


def alive(pid: int) -> bool:
    """Whether a process runs and is no zombie: its parent may be slow to reap it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def descendants(pid: int) -> list[int]:
    """As psutil lists them, by which vLLM ends processes that don't end by themselves."""
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()
    ]
    return children + [each for child in children for each in descendants(child)]


class Nodes:
    """Nodes of one data directory; killed when the test ends."""

    def __init__(self, data_dir: Path) -> None:
        self.config = Config(data_dir=data_dir, kv_cache=False, arena_bytes=MiB, metrics_listen="0")
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str, under: Sequence[str] = ()) -> "subprocess.Popen[str]":
        """`under`: a command that executes the node."""
        process = subprocess.Popen(
            [*under, sys.executable, "-m", "hyperspace_vllm.cli", "node", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | self.config.as_environ(),
        )
        self.started.append(process)
        return process

    def start_and_wait(self, *arguments: str, under: Sequence[str] = ()) -> "subprocess.Popen[str]":
        process = self.start(*arguments, under=under)
        until(lambda: self.card().get("pid") == process.pid)
        return process

    def card(self) -> dict[str, Any]:
        try:
            card: dict[str, Any] = json.loads((self.config.data_dir / "node.json").read_text())
        except FileNotFoundError:
            return {}
        return card

    def stop(self) -> None:
        pids = [process.pid for process in self.started] + [self.card().get("pid", 0)]
        for pid in filter(alive, filter(None, pids)):
            os.kill(pid, signal.SIGTERM)
        for process in self.started:
            process.communicate(timeout=60)
        until(lambda: not any(map(alive, filter(None, pids))))

    def arena(self) -> Path:
        return Path((self.config.data_dir / "arena.path").read_text())
