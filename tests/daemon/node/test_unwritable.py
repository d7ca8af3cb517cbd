"""A node whose data directory can't be written for a while: it serves on, says so once, and stores again afterwards."""

import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import pytest

from hyperspace_vllm.client import NodeClient
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
from hyperspace_vllm.core.local.response_cache_messages import StoreResponse
from hyperspace_vllm.core.records.ids import RequestKey
from hyperspace_vllm.core.records.layout import Layout, Part
from hyperspace_vllm.core.records.limits import KiB, MiB
from hyperspace_vllm.daemon.kv.chunk_store import SIDECAR_BYTES_MAX
from hyperspace_vllm.response_db import ResponseReader
from tests.support.node_processes import Nodes, hyperspace
from tests.support.paths import ROOT
from tests.support.until import until

pytestmark = pytest.mark.io

M = TypeVar("M")
ROW_BYTES = 128 * KiB
LAYOUT = Layout(bytes(32), 256, (Part(0, ROW_BYTES),), 1)
SAYS = "nothing new is stored there until that disk has room and lets this user write"


@dataclass
class Engine:
    """A node, and one engine's processes as it sees them."""

    nodes: Nodes
    process: "subprocess.Popen[str]"
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert self.process.stderr is not None
        threading.Thread(target=self.log.extend, args=(self.process.stderr,), daemon=True).start()
        self.clients = {role: NodeClient(self.nodes.config, role, "engine") for role in ("worker", "scheduler", "api")}
        for role, client in self.clients.items():
            until(partial(getattr, client, "connected"))
            if role != "api":
                assert client.send(RegisterLayout(LAYOUT, bytes(range(16))))
        self.numbers = count()
        self.names = iter(range(100, 256))

    def receive(self, role: str, kind: type[M]) -> M:
        found = until(self.clients[role].receive)
        assert isinstance(found[0], kind), found
        return found[0]

    def compute(self, number: int) -> None:
        """A prompt of one segment, and its response."""
        worker, scheduler = self.clients["worker"], self.clients["scheduler"]
        worker.send(WantStaging(ROW_BYTES, 1))
        (slab,) = self.receive("worker", StagingGranted).slabs
        worker.view(slab)[:] = bytes([number]) * ROW_BYTES
        worker.send(RowStaged(f"r{number}", 0, 0, 0, slab))
        scheduler.send(SegmentNamed(f"r{number}", 0, bytes([number]) * 32, "network"))
        scheduler.send(RequestEnded(f"r{number}"))
        self.clients["api"].send(
            StoreResponse(bytes([number]) * 32, "network", bytes(32), "vllm", 3_600_000, b"%d" % number)
        )

    def kv_source(self, number: int) -> str:
        """Where the prompt's row comes from: memory, disk or none."""
        lookup = next(self.numbers)
        self.clients["scheduler"].send(LookupPrefix(lookup, "q", (bytes([number]) * 32,), 0, 10_000, 10_000, "network"))
        answer = self.receive("scheduler", PrefixAnswer)
        for row in answer.rows:
            assert bytes(self.clients["worker"].view(row.slab)) == bytes([number]) * ROW_BYTES
        self.clients["scheduler"].send(ReleaseLookup(answer.lookup))
        return answer.source

    def status(self) -> dict[str, Any]:
        shown = hyperspace("status", "--json", "--data-dir", str(self.nodes.config.data_dir))
        status: dict[str, Any] = json.loads(shown.stdout)
        return status

    def stored(self) -> tuple[int, int]:
        """Objects of KV, and responses."""
        status = self.status()
        return status["publish"]["objects"], status["responses"]["stored"]

    def metric(self, name: str, **labels: str) -> float:
        return sum(
            float(sample["value"])
            for sample in self.status()["metrics"]
            if sample["name"] == name and labels.items() <= sample["labels"].items()
        )

    def failures(self, reason: str) -> float:
        return self.metric("hyperspace_failures_total", reason=reason)

    def said(self, what: str) -> list[str]:
        return [line for line in self.log if what in line]


@contextmanager
def started(nodes: Nodes) -> Iterator[Engine]:
    """A node that modes of files bind, which they don't a root with its capabilities."""
    nodes.config = replace(nodes.config, kv_cache=True, metrics_listen="", listen="127.0.0.1:0", arena_bytes=64 * MiB)
    under = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    if under and subprocess.run([*under, "true"], capture_output=True).returncode:
        pytest.skip("root may not give up its capabilities here")
    try:
        engine = Engine(nodes, nodes.start_and_wait(under=under))
        yield engine
        for client in engine.clients.values():
            client.close()
    finally:
        let_write(nodes.config.data_dir, True)
        for process in nodes.started:  # its standard error is read already
            process.kill()
            process.wait()


@pytest.fixture
def nodes(tmp_path: Path) -> Nodes:
    return Nodes(tmp_path / "d")


def let_write(directory: Path, may: bool) -> None:
    for path, _, names in os.walk(directory):
        for name in names:
            os.chmod(Path(path) / name, 0o600 if may else 0o400)
        os.chmod(path, 0o700 if may else 0o500)


WORKER = """
import sys, time
from hyperspace_vllm.client import NodeClient
from hyperspace_vllm.config import load_config
from hyperspace_vllm.core.local.kv_messages import RegisterLayout, WantStaging
from tests.daemon.node.test_unwritable import LAYOUT, ROW_BYTES
client = NodeClient(load_config(), "worker", "other")
assert client.wait_connected(60)
client.send(RegisterLayout(LAYOUT, bytes(16)))
client.send(WantStaging(ROW_BYTES, 2))
while not client.receive():
    time.sleep(0.01)
print("holds slabs", flush=True)
time.sleep(600)
"""


def test_a_node_whose_directory_becomes_read_only_serves_on_and_stores_again_when_it_may(nodes: Nodes) -> None:
    chunks = nodes.config.data_dir / "chunks"
    object_bytes = 2 * ROW_BYTES + SIDECAR_BYTES_MAX
    nodes.config = replace(nodes.config, disk_bytes=object_bytes * 5 // 2)
    with started(nodes) as engine:
        for number in (1, 2):
            engine.compute(number)
        until(lambda: engine.stored() == (2, 2))
        environ = os.environ | nodes.config.as_environ()
        worker = subprocess.Popen([sys.executable, "-c", WORKER], stdout=subprocess.PIPE, env=environ, cwd=ROOT)
        assert worker.stdout is not None
        assert worker.stdout.readline()
        let_write(nodes.config.data_dir, False)
        worker.kill()
        worker.communicate()
        for number in (3, 4):
            engine.compute(number)
            until(lambda n=number: engine.failures("io_error") == n - 2)  # type: ignore[misc]
        assert engine.metric("hyperspace_rows", tier="disk") == 2, "what can't be deleted is not forgotten either"
        assert [engine.kv_source(number) for number in (1, 2, 3, 4)] == ["memory"] * 4
        assert len(engine.said(f"{chunks}: Permission denied; {SAYS}")) == 1
        until(lambda: engine.metric("hyperspace_clients") == 4)  # the three, and the one that asks: the killed is gone
        until(lambda: engine.metric("hyperspace_quarantined_bytes") == 0)
        let_write(nodes.config.data_dir, True)
        engine.compute(5)
        until(lambda: engine.stored()[0] == 3)
        assert engine.metric("hyperspace_rows", tier="disk") == 2
        assert len(engine.said(f"{chunks}: written again")) == 1
        assert (engine.failures("io_error"), engine.failures("bug")) == (2, 0)
        engine.process.terminate()
        assert engine.process.wait(60) == 0
        assert not engine.said("Traceback")


def test_a_node_whose_disk_is_full_for_a_while_stores_again_when_there_is_room(nodes: Nodes) -> None:
    directory = nodes.config.data_dir
    directory.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m,mode=700", "hyperspace-tests", str(directory)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is refused")
    try:
        with started(nodes) as engine:
            engine.compute(1)
            until(lambda: engine.stored() == (1, 1))
            with suppress(OSError), (directory / "others").open("wb", buffering=0) as others:
                while True:
                    others.write(bytes(4096))
            while engine.failures("disk_full") < 2 or engine.status()["responses"]["failed"] < 2:
                engine.compute(next(engine.names))
            assert len(engine.said(f"{directory / 'chunks'}: No space left on device; {SAYS}")) == 1
            assert len(engine.said(f"responses.sqlite: database or disk is full; {SAYS}")) == 1
            (directory / "others").unlink()
            objects, responses = engine.stored()
            engine.compute(next(engine.names))
            until(lambda: (objects < engine.stored()[0]) and (responses < engine.stored()[1]))
            assert len(engine.said("written again")) == 2
            assert not engine.said("Traceback")
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def test_a_node_joins_its_network_though_its_directory_becomes_read_only_meanwhile(nodes: Nodes) -> None:
    nodes.config = replace(nodes.config, p2p_listen="127.0.0.1:0")
    with started(nodes) as engine:
        let_write(nodes.config.data_dir, False)  # the libraries that join take seconds to load
        assert engine.status()["p2p"] == {"state": "joining"}
        until(lambda: engine.status()["p2p"] != {"state": "joining"})
        until(lambda: engine.said("node.json: Permission denied; make room on that disk, and let this user write"))
        assert not engine.said("the network has failed")


def test_a_response_database_that_becomes_read_only_is_written_again_when_it_may(nodes: Nodes) -> None:
    database = nodes.config.data_dir / "responses.sqlite"
    with started(nodes) as engine:
        engine.compute(1)
        until(lambda: engine.stored()[1] == 1)
        copy = database.with_suffix(".copy")
        copy.write_bytes(database.read_bytes())
        copy.chmod(0o400)
        copy.replace(database)  # an operator's backup, say: the node opens it
        engine.compute(2)
        until(lambda: engine.status()["responses"]["failed"])
        assert engine.said(f"{database}: it can't be written; {SAYS}")
        reader = ResponseReader(database)  # as an API server's
        reader.get(RequestKey(bytes([1]) * 32), 0)
        shared = database.with_name(f"{database.name}-shm")
        assert stat.S_IMODE(shared.stat().st_mode) == 0o400, "which stays when the file may be written again"
        database.chmod(0o600)
        engine.compute(3)
        until(lambda: engine.stored()[1] == 2)
        assert engine.said(f"{database}: written again")
        reader.close()
        assert len(engine.said("it can't be written")) == 1
