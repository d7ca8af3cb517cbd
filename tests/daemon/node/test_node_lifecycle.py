"""Whole node processes: who starts them, who may live, when they go, and what they leave behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import TypeVar

import pytest

from hyperspace_vllm.client import NodeClient
from hyperspace_vllm.config import Config
from hyperspace_vllm.core.local.kv_messages import (
    LookupPrefix,
    PrefixAnswer,
    RegisterLayout,
    ReleaseLookup,
    RequestEnded,
    RowStaged,
    SegmentNamed,
    StagingGranted,
    WantStaging,
)
from hyperspace_vllm.core.local.session_messages import GetStatus, Status
from hyperspace_vllm.core.records.layout import Layout, Part
from hyperspace_vllm.core.records.limits import EMBEDDED_LINGER_MS, LEASE_MS, KiB, MiB
from hyperspace_vllm.daemon.identity import Identity
from hyperspace_vllm.node_process import revive_node
from tests.support.node_processes import Nodes, alive, hyperspace
from tests.support.paths import ROOT
from tests.support.until import until

pytestmark = pytest.mark.io


M = TypeVar("M")


AT_ONCE_S = 0.9 * EMBEDDED_LINGER_MS / 1000


def test_a_second_standalone_node_says_who_to_ask(nodes: Nodes) -> None:
    nodes.start_and_wait()
    second = nodes.start()
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 1
    assert "hyperspace status" in errors


def test_a_second_embedded_node_leaves_quietly(nodes: Nodes) -> None:
    first = nodes.start_and_wait()
    second = nodes.start("--embedded")
    output, errors = second.communicate(timeout=60)
    assert (output, errors.strip()) == ("", "")
    assert second.returncode == 0
    assert first.poll() is None


def test_a_stopped_node_leaves_only_what_the_next_one_needs(nodes: Nodes) -> None:
    process = nodes.start_and_wait()
    arena = nodes.arena()
    assert arena.exists()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert not arena.exists()
    left = {path.name for path in nodes.config.data_dir.iterdir()}
    assert left == {"node.key", "node.lock", "arena.path", "responses.sqlite"}


def test_a_node_whose_directory_was_replaced_leaves_the_next_one_its_files(nodes: Nodes) -> None:
    first = nodes.start_and_wait()
    nodes.config.data_dir.rename(nodes.config.data_dir.with_name("replaced"))  # removing it would race what it writes
    second = nodes.start_and_wait()
    first.terminate()
    first.communicate(timeout=60)
    assert nodes.card()["pid"] == second.pid
    status = hyperspace("status", "--json", **nodes.config.as_environ())
    assert json.loads(status.stdout)["pid"] == second.pid


def test_after_a_killed_node_the_next_one_cleans_up_and_its_clients_come_back(nodes: Nodes) -> None:
    killed = nodes.start_and_wait()
    client = NodeClient(nodes.config, "worker", "n")
    assert client.wait_connected(60)
    arena = nodes.arena()
    killed.kill()
    killed.wait()
    until(lambda: not client.send(GetStatus()), LEASE_MS / 2000)  # a dead node is noticed long before its lease is over
    assert arena.exists()
    nodes.start_and_wait()
    assert not arena.exists()
    until(lambda: client.epoch == 2 and client.connected)
    client.close()


def test_a_client_of_a_frozen_node_neither_waits_nor_stays_connected(nodes: Nodes) -> None:
    process = nodes.start_and_wait()
    client = NodeClient(nodes.config, "worker", "n")
    assert client.wait_connected(60)
    process.send_signal(signal.SIGSTOP)
    quickest_s = 1.0
    for _ in range(100):
        began = time.monotonic()
        client.send(GetStatus())
        client.receive()
        quickest_s = min(quickest_s, time.monotonic() - began)
    assert quickest_s < 0.005
    until(lambda: not client.connected)
    process.send_signal(signal.SIGCONT)
    until(lambda: client.connected)
    assert client.epoch >= 2
    client.close()


SERVER = """
import os, sys
from pathlib import Path
from hyperspace_vllm.client import NodeClient, start_node
from hyperspace_vllm.config import load_config
config = load_config()
start_node(config)
if sys.argv[1] == "attach":
    client = NodeClient(config, "api", "server")
    assert client.wait_connected(60)
print("up", flush=True)
sys.stdin.readline()
"""


def server(nodes: Nodes, mode: str) -> "subprocess.Popen[str]":
    """A process that starts an embedded node as `vllm serve` does."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | nodes.config.as_environ(),
    )
    nodes.started.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


@pytest.mark.slow
def test_an_embedded_node_outlives_a_killed_server_by_its_linger_only(nodes: Nodes) -> None:
    first = server(nodes, "attach")
    pid = nodes.card()["pid"]
    assert os.getpgid(pid) != os.getpgid(first.pid), "Ctrl-C on the server must not reach the node"
    assert os.getpriority(os.PRIO_PROCESS, pid) == os.getpriority(os.PRIO_PROCESS, 0), "requests wait for it"
    second = server(nodes, "attach")
    assert nodes.card()["pid"] == pid, "the second server attached to the first one's node"
    first.kill()
    began = time.monotonic()
    until(lambda: time.monotonic() - began > 1.5 * LEASE_MS / 1000)
    assert alive(pid), "the second server still holds a lease"
    second.kill()
    began = time.monotonic()
    until(lambda: not alive(pid))
    assert time.monotonic() - began > EMBEDDED_LINGER_MS / 1000
    assert not nodes.card()
    assert not nodes.arena().exists()
    assert "nobody needs this node" in (nodes.config.data_dir / "node.log").read_text()


def test_an_embedded_node_whose_server_dies_before_it_came_leaves_at_once(nodes: Nodes) -> None:
    process = server(nodes, "only start")
    until(lambda: nodes.card())
    pid = nodes.card()["pid"]
    process.kill()
    until(lambda: not alive(pid), AT_ONCE_S)
    assert not nodes.arena().exists()


def test_status_does_not_keep_an_embedded_node_alive(nodes: Nodes) -> None:
    process = server(nodes, "only start")
    until(lambda: nodes.card())
    pid = nodes.card()["pid"]
    watcher = NodeClient(nodes.config, "cli", "watch")
    assert watcher.wait_connected(60)
    watcher.send(GetStatus())
    answers = until(watcher.receive)
    assert isinstance(answers[0], Status)
    process.kill()
    until(lambda: not alive(pid))
    watcher.close()


def test_a_restarted_server_keeps_its_predecessors_node_or_takes_its_place(nodes: Nodes) -> None:
    first = server(nodes, "attach")
    pid = nodes.card()["pid"]
    second = server(nodes, "only start")  # loading its model for minutes

    def leases() -> int:
        shown = hyperspace("status", "--json", "--data-dir", str(nodes.config.data_dir))
        return int(json.loads(shown.stdout)["engine_leases"]) if shown.stdout else 0

    until(lambda: leases() == 2)
    assert nodes.card()["pid"] == pid
    first.kill()
    os.kill(pid, signal.SIGKILL)
    until(lambda: nodes.card()["pid"] != pid)
    successor = nodes.card()["pid"]
    second.kill()
    until(lambda: not alive(successor), AT_ONCE_S)


def test_start_node_starts_one_however_often_it_is_called(nodes: Nodes) -> None:
    servers = [server(nodes, "only start") for _ in range(3)]
    log = nodes.config.data_dir / "node.log"
    until(lambda: log.exists() and log.read_text().count("another node serves") == 2)
    pid = nodes.card()["pid"]
    for process in servers:
        process.kill()
    until(lambda: not alive(pid))
    assert log.read_text().count("nobody needs this node") == 1


def test_a_killed_embedded_node_is_started_again_by_its_engine(nodes: Nodes) -> None:
    first = nodes.start_and_wait("--embedded")
    engine = NodeClient(nodes.config, "scheduler", "engine")
    assert engine.wait_connected(60)
    epoch = engine.epoch
    first.kill()
    until(lambda: nodes.card()["pid"] != first.pid)
    until(lambda: engine.connected and engine.epoch != epoch)
    successor = nodes.card()["pid"]
    engine.close()
    until(lambda: not alive(successor))


def test_only_an_embedded_node_that_was_killed_is_started_again(nodes: Nodes) -> None:
    assert not revive_node(nodes.config)  # there never was one
    embedded = nodes.start_and_wait("--embedded")
    embedded.send_signal(signal.SIGSTOP)
    assert not revive_node(nodes.config)  # it may go on
    embedded.send_signal(signal.SIGCONT)
    embedded.terminate()
    embedded.wait(60)
    assert not revive_node(nodes.config)  # somebody wanted it gone
    standalone = nodes.start_and_wait()
    standalone.kill()
    standalone.wait(60)
    assert not revive_node(nodes.config)  # somebody else looks after it


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def receive(client: NodeClient, kind: type[M]) -> M:
    found = until(client.receive)
    assert isinstance(found[0], kind), found
    return found[0]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Nodes, Nodes]]:
    ports = free_port(), free_port()
    ids = [Identity.load(tmp_path / name).peer_id for name in "ab"]
    nodes = [Nodes(tmp_path / name) for name in "ab"]
    with ExitStack() as running:
        for node, port, other in zip(nodes, ports, (1, 0), strict=True):
            node.config = Config(
                data_dir=node.config.data_dir,
                listen=f"127.0.0.1:{port}",
                peers=(f"{ids[other]}@127.0.0.1:{ports[other]}",),
                fetch="always",
                arena_bytes=16 * MiB,
                disk_bytes=64 * MiB,
            )
            running.callback(node.stop)
            node.start_and_wait()
        yield nodes[0], nodes[1]


def test_a_prefix_that_one_node_was_given_is_read_whole_from_another(pair: tuple[Nodes, Nodes]) -> None:
    layout = Layout(bytes(32), 256, (Part(0, 128 * KiB),), 1)
    keys = tuple(bytes([i]) * 32 for i in range(3))
    payload = [os.urandom(128 * KiB) for _ in keys]
    clients = [NodeClient(node.config, role, "engine") for node in pair for role in ("worker", "scheduler")]
    for client in clients:
        assert client.wait_connected(60)
        assert client.send(RegisterLayout(layout, bytes(range(16))))
    worker_a, scheduler_a, worker_b, scheduler_b = clients

    worker_a.send(WantStaging(128 * KiB, len(keys)))
    for segment, slab in enumerate(receive(worker_a, StagingGranted).slabs):
        worker_a.view(slab)[:] = payload[segment]
        worker_a.send(RowStaged("r", segment, 0, 0, slab))
        scheduler_a.send(SegmentNamed("r", segment, keys[segment], "network"))
    scheduler_a.send(RequestEnded("r"))

    def encoded() -> bool:
        status = json.loads(hyperspace("status", "--json", "--data-dir", str(pair[0].config.data_dir)).stdout)
        return bool(status["publish"]["objects"])

    until(encoded, 300)  # behind everything else that the machine does
    numbers = count()

    def look_up() -> PrefixAnswer | None:
        scheduler_b.send(LookupPrefix(next(numbers), "r", keys, 0, 10_000, 10_000, "network"))
        answer = receive(scheduler_b, PrefixAnswer)
        if answer.end_segment < len(keys):
            scheduler_b.send(ReleaseLookup(answer.lookup))
            return None
        return answer

    answer = until(look_up)
    assert answer.source == "network"
    for row in answer.rows:
        assert bytes(worker_b.view(row.slab)) == payload[row.segment]
        assert worker_b.is_current(row.slab)
    shown = hyperspace("status", "--data-dir", str(pair[1].config.data_dir), COLUMNS="120").stdout
    assert "l2 hits" in shown
    assert ", connected" in shown
    for client in clients:
        client.close()
