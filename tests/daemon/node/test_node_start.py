"""Starts that fail, and who hears of it; what signals do at any moment; nodes in containers."""

import fcntl
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hyperspace_vllm.client import NodeClient, start_node
from hyperspace_vllm.config import Config
from hyperspace_vllm.core.local.session_messages import GetStatus, Status
from hyperspace_vllm.core.records.ids import peer_id
from hyperspace_vllm.core.records.limits import LEASE_MS, MiB
from hyperspace_vllm.daemon.identity import Identity
from hyperspace_vllm.session_lock import look
from tests.support.node_processes import Nodes, alive, descendants, hyperspace
from tests.support.paths import ROOT
from tests.support.until import until

pytestmark = pytest.mark.io
NODE = [sys.executable, "-m", "hyperspace_vllm.cli", "node"]
STOPS_WITHIN_S = 10.0  # as long as Docker waits


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    nodes = Nodes(tmp_path / "d")
    yield nodes
    nodes.stop()


@pytest.fixture
def taken() -> Iterator[str]:
    """An address of this machine that somebody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def arena_is_left(nodes: Nodes) -> bool:
    return (nodes.config.data_dir / "arena.path").is_file() and nodes.arena().exists()


@contextmanager
def ended_at_last(process: "subprocess.Popen[str]") -> Iterator[None]:
    try:
        yield
    finally:
        process.kill()
        process.communicate()


# --- a start that fails ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Obstacle:
    """What is in a node's way, and what it has to say of it."""

    says: str
    settings: dict[str, Any]
    directory: str = ""  # of that name stands where a file should be
    file: str = ""  # and the other way round


OBSTACLES = {
    "listen_taken": Obstacle("listen = '{taken}': Address already in use", {"listen": "{taken}"}),
    "listen_elsewhere": Obstacle("listen = '192.0.2.1:1': ", {"listen": "192.0.2.1:1"}),
    "listen_nowhere": Obstacle("listen = '256.1.1.1:1': ", {"listen": "256.1.1.1:1"}),
    "metrics_taken": Obstacle("metrics_listen = '{taken}': Address already in use", {"metrics_listen": "{taken}"}),
    "peer_without_key": Obstacle("peers: {no_point}@h:1: ", {"peers": ("{no_point}@h:1",)}),
    "peer_without_host": Obstacle("peers: {peer}@a b:1: expected host:port", {"peers": ("{peer}@a b:1",)}),
    "network_key": Obstacle("network_key_file /none: No such file", {"network_key_file": "/none"}),
    "key": Obstacle("node.key", {}, directory="node.key"),
    "lock": Obstacle("node.lock: Is a directory; ", {}, directory="node.lock"),
    "card": Obstacle("node.json: ", {}, directory="node.json"),
    "socket": Obstacle("node.sock: ", {}, directory="node.sock"),
    "chunks": Obstacle("chunks: File exists; delete it", {}, file="chunks"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_a_node_that_cannot_start_says_why_and_leaves_nothing_behind(nodes: Nodes, taken: str, name: str) -> None:
    obstacle = OBSTACLES[name]
    own_id = Identity.load(nodes.config.data_dir).peer_id
    words = {"{taken}": taken, "{no_point}": peer_id(b"\2" + bytes(31)), "{peer}": own_id}

    def fill(text: Any) -> Any:
        if isinstance(text, tuple):
            return tuple(map(fill, text))
        for word, value in words.items():
            text = text.replace(word, value)
        return text

    if obstacle.directory:
        (nodes.config.data_dir / obstacle.directory).unlink(missing_ok=True)
        (nodes.config.data_dir / obstacle.directory / "in the way").mkdir(parents=True)
    if obstacle.file:
        (nodes.config.data_dir / obstacle.file).write_text("")
    nodes.config = replace(
        nodes.config, kv_cache=True, **{key: fill(value) for key, value in obstacle.settings.items()}
    )
    process = nodes.start()
    _, errors = process.communicate(timeout=60)
    if obstacle.directory:
        shutil.rmtree(nodes.config.data_dir / obstacle.directory)
    assert process.returncode == 1
    assert fill(obstacle.says) in errors
    assert "Traceback" not in errors
    assert not arena_is_left(nodes)
    with (nodes.config.data_dir / "node.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_nodes_reach_each_other_by_ipv6(tmp_path: Path) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("there is no IPv6 here")
    a, b = Nodes(tmp_path / "a"), Nodes(tmp_path / "b")
    ids = [Identity.load(each.config.data_dir).peer_id for each in (a, b)]
    with ExitStack() as running:
        a.config = replace(a.config, kv_cache=True, listen="[::1]:0", peers=(f"{ids[1]}@[::1]:1",))
        running.callback(a.stop)
        a.start_and_wait()
        b.config = replace(b.config, kv_cache=True, peers=(f"{ids[0]}@{a.card()['endpoint']}",))
        running.callback(b.stop)
        b.start_and_wait()

        def is_connected() -> bool:
            shown = hyperspace("status", "--json", "--data-dir", str(b.config.data_dir)).stdout
            return bool(shown) and bool(json.loads(shown)["peers"][0]["connected"])

        until(is_connected)


def heard(caplog: pytest.LogCaptureFixture, text: str) -> bool:
    return any(text in record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)


def test_whoever_starts_a_node_hears_why_it_cannot_start(
    tmp_path: Path, taken: str, caplog: pytest.LogCaptureFixture
) -> None:
    start_node(Config(data_dir=tmp_path / "d", kv_cache=False, metrics_listen=taken))
    (tmp_path / "file").write_text("")
    start_node(Config(data_dir=tmp_path / "file"))
    start_node(Config(data_dir=Path("/proc/nowhere/d")))
    for line in (
        f"metrics_listen = '{taken}': Address already in use",
        f"{tmp_path}/file/hyperspace.toml: Not a directory; set HYPERSPACE_DATA_DIR",
        "data_dir = '/proc/nowhere/d': No such file or directory; set HYPERSPACE_DATA_DIR",
    ):
        until(partial(heard, caplog, line))


def test_whoever_starts_a_node_hears_of_a_network_it_cannot_join(
    nodes: Nodes, taken: str, caplog: pytest.LogCaptureFixture
) -> None:
    nodes.config = replace(nodes.config, p2p_listen=taken)
    start_node(nodes.config)
    until(lambda: heard(caplog, f"p2p_listen = '{taken}': Address already in use"))
    assert alive(nodes.card()["pid"]), "it serves its host all the same"


def test_whoever_starts_a_node_hears_of_a_lock_whose_holder_does_not_answer(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    nodes.config.data_dir.mkdir()
    with (nodes.config.data_dir / "node.lock").open("wb") as lock:  # as a node of another host has it, by NFS
        fcntl.flock(lock, fcntl.LOCK_EX)
        start_node(nodes.config)
        until(lambda: heard(caplog, "but no node answers there"))
    until(lambda: nodes.card())
    assert sum("no node answers" in record.getMessage() for record in caplog.records) == 1


def test_a_process_that_cannot_be_started_is_one_line_of_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no such python"))
    start_node(Config(data_dir=tmp_path / "d"))
    assert heard(caplog, "no node could be started")


def test_a_node_writes_its_metrics_nowhere_else(nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_vllm = tmp_path / "of vLLM"
    of_vllm.mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(of_vllm))
    nodes.start_and_wait()
    with urllib.request.urlopen(f"http://{nodes.card()['metrics']}/metrics", timeout=10) as answer:
        assert b"\nhyperspace_clients 0.0\n" in answer.read()
    assert list(of_vllm.iterdir()) == []


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("appears", ["", "node.lock", "arena.path", "node.sock", "node.json"])
def test_sigterm_ends_a_node_at_any_moment_of_its_start(nodes: Nodes, appears: str) -> None:
    nodes.config = replace(nodes.config, kv_cache=True)
    process = nodes.start()
    until(lambda: (nodes.config.data_dir / appears).exists())
    process.terminate()
    assert process.wait(STOPS_WITHIN_S) in (0, -signal.SIGTERM)
    assert not arena_is_left(nodes)


def test_sigterm_ends_a_node_that_hangs_and_shows_where() -> None:
    hangs = "threading.Thread(target=threading.Event().wait).start(); print('up', flush=True); signal.pause()"
    script = f"import signal, threading; from hyperspace_vllm.daemon.stopping import Stopping; Stopping(); {hangs}"
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with ended_at_last(process):
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.terminate()
        _, errors = process.communicate(timeout=STOPS_WITHIN_S)
    assert process.returncode == 1
    assert "threading.py" in errors


REVIVER = """
import sys
from hyperspace_vllm.client import NodeClient
from hyperspace_vllm.config import load_config
client = NodeClient(load_config(), "scheduler", "reviver")
assert client.wait_connected(20)
print("up", flush=True)
sys.stdin.readline()
"""


def test_a_revived_node_outlives_its_reviver_and_all_its_descendants(nodes: Nodes) -> None:
    first = nodes.start_and_wait("--embedded")
    reviver = subprocess.Popen(
        [sys.executable, "-c", REVIVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | nodes.config.as_environ(),
    )
    other = NodeClient(nodes.config, "worker", "other")  # workers revive no node
    with ended_at_last(reviver):
        assert reviver.stdout is not None
        assert reviver.stdout.readline() == "up\n"
        until(lambda: other.connected)
        first.kill()
        first.wait()
        until(lambda: nodes.card()["pid"] != first.pid, 20)
        until(lambda: other.connected and other.epoch == 2, 20)
        revived = nodes.card()["pid"]
        for pid in [*descendants(reviver.pid), reviver.pid]:
            os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    until(lambda: time.monotonic() - began > 1.2 * LEASE_MS / 1000)
    assert alive(revived)
    assert other.connected
    assert other.epoch == 2
    other.close()


# --- containers -----------------------------------------------------------------------------------


def unshared(*options: str) -> list[str]:
    """A command that runs another in namespaces of its own; the test is skipped where that isn't allowed."""
    command = ["unshare", *options]
    try:
        refused = subprocess.run([*command, "true"], capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if refused.returncode:
        pytest.skip(f"no namespaces here: {refused.stderr.strip()}")
    return command


def test_sigterm_ends_a_node_that_is_the_first_process_of_its_container(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path / "d")  # never stopped by the pid in its card: 1 is another process out here
    nodes.config = replace(nodes.config, kv_cache=True)
    container = subprocess.Popen(
        [*unshared("--pid", "--fork", "--kill-child", "--mount-proc"), *NODE],
        cwd=ROOT,
        env=os.environ | nodes.config.as_environ(),
        text=True,
    )
    with ended_at_last(container):
        until(lambda: nodes.card())
        assert nodes.card()["pid"] == 1
        until(lambda: len(descendants(container.pid)) > 1)  # a KZG worker at least
        everybody = descendants(container.pid)
        os.kill(everybody[0], signal.SIGTERM)
        assert container.wait(STOPS_WITHIN_S) == 0
        until(lambda: not any(map(alive, everybody)))
    assert not arena_is_left(nodes)


def test_a_node_serves_on_a_read_only_root_file_system_with_dockers_64_mib_of_dev_shm(nodes: Nodes) -> None:
    directory = nodes.config.data_dir
    directory.mkdir()
    nodes.config = replace(nodes.config, arena_bytes=512 * MiB)
    docker = """
    mount -t tmpfs -o size=64m tmpfs /dev/shm && mount -t tmpfs tmpfs "$HYPERSPACE_DATA_DIR" &&
    mount -o remount,ro,bind / && ! touch /here && exec "$@"
    """
    container = subprocess.Popen(
        [*unshared("--mount"), "sh", "-c", docker, "sh", *NODE],
        cwd=ROOT,
        env=os.environ | nodes.config.as_environ() | {"HOME": "/"},
        text=True,
    )
    seen = Path(f"/proc/{container.pid}/root{directory}")
    with ended_at_last(container):
        until(lambda: (seen / "node.json").exists() or container.poll() is not None)
        assert container.poll() is None
        assert (seen / "arena").stat().st_size == 512 * MiB, "where there is room for one"
        container.terminate()
        assert container.wait(STOPS_WITHIN_S) == 0


@pytest.mark.parametrize(
    ("disk", "says"),
    [
        (
            "size=64k tmpfs {0} && ! dd if=/dev/zero of={0}/other 2>&-",
            "No space left on device; make room on that disk",
        ),
        ("ro tmpfs {0}", "Read-only file system; set HYPERSPACE_DATA_DIR to a directory that this user can write"),
    ],
)
def test_a_node_whose_disk_takes_nothing_says_so_at_its_start(nodes: Nodes, disk: str, says: str) -> None:
    nodes.config.data_dir.mkdir()
    mounted = f'mount -t tmpfs -o {disk.format(nodes.config.data_dir)} && exec "$@"'
    container = subprocess.Popen(
        [*unshared("--mount"), "sh", "-c", mounted, "sh", *NODE],
        cwd=ROOT,
        env=os.environ | nodes.config.as_environ(),
        stderr=subprocess.PIPE,
        text=True,
    )
    with ended_at_last(container):
        _, errors = container.communicate(timeout=60)
        assert container.returncode == 1
        assert says in errors
        assert "Traceback" not in errors


def test_where_dev_shm_is_not_shared_responses_are_and_one_line_says_why_kv_is_not(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    own_dev_shm = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'
    container = subprocess.Popen(
        [*unshared("--mount"), "sh", "-c", own_dev_shm, "sh", *NODE],
        cwd=ROOT,
        env=os.environ | nodes.config.as_environ(),
        text=True,
    )
    with ended_at_last(container):
        until(lambda: nodes.card())
        assert not arena_is_left(nodes)
        api, worker = NodeClient(nodes.config, "api", "server"), NodeClient(nodes.config, "worker", "engine")
        assert api.wait_connected(10)
        until(lambda: heard(caplog, "must share its data directory and /dev/shm"))
        api.send(GetStatus())
        answers = until(api.receive)
        assert isinstance(answers[0], Status)
        began = time.monotonic()
        until(lambda: time.monotonic() - began > 2.5)  # two Hellos later
        assert not worker.connected
        assert sum("/dev/shm" in record.getMessage() for record in caplog.records) == 1
        api.close()
        worker.close()
        container.terminate()
        container.wait(STOPS_WITHIN_S)


def test_a_worker_that_comes_before_its_node_has_a_session_lock(nodes: Nodes) -> None:
    worker = NodeClient(nodes.config, "worker", "first")
    nodes.start_and_wait()
    assert worker.wait_connected(10)
    (session,) = (nodes.config.data_dir / "sessions").iterdir()
    assert look(nodes.config.data_dir, bytes.fromhex(session.name)) == "held"
    worker.close()
    assert look(nodes.config.data_dir, bytes.fromhex(session.name)) == "over"


def test_a_worker_that_can_have_no_session_lock_says_so_once_and_attaches_all_the_same(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    nodes.config.data_dir.mkdir()
    (nodes.config.data_dir / "sessions").write_text("")
    worker = NodeClient(nodes.config, "worker", "first")
    began = time.monotonic()
    until(lambda: time.monotonic() - began > 2.5)  # two Hellos later
    nodes.start_and_wait()
    assert worker.wait_connected(10)
    assert sum("no session lock" in record.getMessage() for record in caplog.records) == 1
    worker.close()


# --- the command ----------------------------------------------------------------------------------

AS_ANOTHER_USER = """
import os, sys
import hyperspace_vllm.cli, hyperspace_vllm.daemon.node.main, rich.console
os.setgroups([])
os.setgid(54321)
os.setuid(54321)
sys.exit(hyperspace_vllm.cli.main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
@pytest.mark.parametrize("command", ["config", "status", "id", "node"])
@pytest.mark.parametrize("place", ["no home", "of another user", "a file", "inside a file"])
def test_a_command_without_a_usable_data_directory_ends_with_one_line(tmp_path: Path, command: str, place: str) -> None:
    (tmp_path / "d").mkdir(mode=0o700)
    (tmp_path / "f").write_text("")
    directory = {"no home": "", "of another user": tmp_path / "d", "a file": tmp_path / "f"}.get(
        place, tmp_path / "f/d"
    )
    environ = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_DATA_HOME")}
    ended = subprocess.run(
        [sys.executable, "-c", AS_ANOTHER_USER, command, *(["--data-dir", str(directory)] if directory else [])],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1
    assert "HYPERSPACE_DATA_DIR" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
