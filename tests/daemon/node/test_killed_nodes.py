"""What nodes leave behind when they are killed, and which node removes it."""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from hyperspace_vllm.client import NodeClient
from hyperspace_vllm.core.local.kv_messages import RegisterLayout, StagingGranted, WantStaging
from hyperspace_vllm.core.records.layout import Layout, Part
from hyperspace_vllm.core.records.limits import KiB
from tests.support.node_processes import Nodes, descendants
from tests.support.until import until

pytestmark = pytest.mark.io

ROW_BYTES = 128 * KiB
LAYOUT = Layout(bytes(32), 256, (Part(0, ROW_BYTES),), 1)


@pytest.fixture
def directories(tmp_path: Path) -> Iterator[list[Nodes]]:
    """Nodes of four data directories."""
    directories = [Nodes(tmp_path / name) for name in "abcd"]
    for nodes in directories:
        nodes.config = replace(nodes.config, metrics_listen="", listen="127.0.0.1:0")
    yield directories
    for nodes in directories:
        nodes.stop()


def make_old(path: Path) -> Path:
    os.utime(path, (0, 0))
    return path


def writes(client: NodeClient) -> bool:
    """Whether a worker gets a slab that it can write."""
    until(lambda: client.connected)
    assert client.send(RegisterLayout(LAYOUT, bytes(range(16))))
    assert client.send(WantStaging(ROW_BYTES, 1))
    answers = until(client.receive)
    assert isinstance(answers[0], StagingGranted)
    (slab,) = answers[0].slabs
    client.view(slab)[:4] = b"mine"
    return client.is_current(slab)


def test_a_starting_node_frees_the_arena_of_one_that_was_killed_and_leaves_that_of_one_that_lives(
    directories: list[Nodes],
) -> None:
    killed, living, starting, _ = directories
    for nodes in (killed, living):
        nodes.config = replace(nodes.config, kv_cache=True)
        nodes.start_and_wait()
    workers = until(lambda: descendants(killed.started[0].pid))
    try:
        for pid in workers:  # the node's own processes: frozen, they outlive it with all that they were handed
            os.kill(pid, signal.SIGSTOP)
        killed.started[0].kill()
        killed.started[0].wait()
        left, used = make_old(killed.arena()), make_old(living.arena())
        assert left.exists()
        starting.start_and_wait()
        assert not left.exists()
        assert used.exists()
    finally:
        for pid in workers:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    client = NodeClient(living.config, "worker", "new")
    assert writes(client)
    client.close()


def test_a_worker_goes_on_with_the_next_node_of_its_directory_when_another_has_removed_the_arena(
    directories: list[Nodes],
) -> None:
    killed, other, *_ = directories
    killed.config = replace(killed.config, kv_cache=True)
    killed.start_and_wait()
    client = NodeClient(killed.config, "worker", "engine")
    assert writes(client)
    killed.started[0].kill()
    killed.started[0].wait()
    left = make_old(killed.arena())
    other.start_and_wait()
    assert not left.exists()
    killed.start_and_wait()
    until(lambda: client.epoch == 2)
    assert writes(client)
    client.close()


def test_drafts_of_processes_that_were_killed_go_with_the_next_start_and_those_of_living_ones_stay(
    directories: list[Nodes],
) -> None:
    nodes = directories[0]
    data_dir = nodes.config.data_dir
    (data_dir / "sessions").mkdir(parents=True)
    drafts = {name: data_dir / name for name in (".node.key.0123456789abcdef", f"sessions/{'ab' * 16}.new")}
    fresh = [path.with_stem(f"{path.stem}0") for path in drafts.values()]
    for path in (*drafts.values(), *fresh):
        path.write_bytes(bytes(32))
    for path in drafts.values():
        make_old(path)
    nodes.start_and_wait()
    assert not any(path.exists() for path in drafts.values())
    assert all(path.exists() for path in fresh)


def test_everything_that_a_killed_node_leaves_in_its_directory_is_the_next_ones(directories: list[Nodes]) -> None:
    nodes = directories[0]
    data_dir = nodes.config.data_dir
    nodes.config = replace(nodes.config, kv_cache=True)
    nodes.start_and_wait()
    nodes.started[0].kill()
    nodes.started[0].wait()
    for name in ("node.json.new", "peers.json.new", f"chunks/{'ab' * 16}.tmp", f"chunks/{'cd' * 32}.obj"):
        (data_dir / name).write_bytes(b"half a")
    second = nodes.start_and_wait()
    client = NodeClient(nodes.config, "worker", "engine")
    assert writes(client)
    client.close()
    assert not list((data_dir / "chunks").iterdir())
    second.terminate()
    assert second.wait(60) == 0
    left = {path.name for path in data_dir.iterdir()} - {"node.key", "node.lock", "arena.path", "responses.sqlite"}
    assert left == {"chunks", "sessions", "peers.json.new"}, "the last is written over, once there are peers"
