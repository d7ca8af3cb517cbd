"""Real `hyperspace node` processes that form one private network on loopback, and an API server's requests to them."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from hyperspace_vllm.client import NodeClient
from hyperspace_vllm.config import Config
from hyperspace_vllm.core.local.message_fields import Scope
from hyperspace_vllm.core.local.messages import NodeMessage
from hyperspace_vllm.core.local.response_cache_messages import (
    FindResponse,
    ResponseFound,
    ResponseHint,
    ResponseNotFound,
    ResponseToTry,
    StoreResponse,
)
from hyperspace_vllm.core.local.session_messages import GetStatus, Status
from hyperspace_vllm.core.records.ids import RequestKey, sha256
from hyperspace_vllm.core.records.limits import RESPONSE_TTL_MS, MiB
from tests.support.until import until

MODEL = sha256(b"a model")


def request_key(name: object) -> RequestKey:
    return RequestKey(sha256(f"request {name}".encode()))


def body_of(name: object) -> bytes:
    return json.dumps({"answer": f"the answer to {name}"}).encode()


@dataclass(frozen=True)
class Lookup:
    """The outcome of one FindResponse."""

    answer: ResponseFound | ResponseNotFound | None
    hinted: bool
    took_s: float

    @property
    def body(self) -> bytes | None:
        return self.answer.body if isinstance(self.answer, ResponseFound) else None


@dataclass
class NetworkedNode:
    """One node process, and a client of it."""

    config: Config
    process: "subprocess.Popen[bytes]" = field(init=False)
    client: NodeClient = field(init=False)

    def __post_init__(self) -> None:
        self._numbers = count(1)
        self._inbox: list[NodeMessage] = []
        self.tried: list[ResponseToTry] = []  # to be audited
        self.start()

    def start(self) -> None:
        with (self.config.data_dir / "log").open("ab") as log:
            command = [sys.executable, "-m", "hyperspace_vllm.cli", "node"]
            self.process = subprocess.Popen(command, env=os.environ | self.config.as_environ(), stderr=log)
        self.client = NodeClient(self.config, "api", "test")

    def stop(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            self.process.wait(60)

    def card(self) -> dict[str, Any]:
        try:
            card: dict[str, Any] = json.loads((self.config.data_dir / "node.json").read_text())
        except FileNotFoundError:
            return {}
        return card if card["pid"] == self.process.pid else {}

    def status(self) -> dict[str, Any]:
        assert self.client.wait_connected(60)
        self.client.send(GetStatus())
        answer = self._await(lambda message: isinstance(message, Status), 60)
        assert isinstance(answer, Status)
        status: dict[str, Any] = json.loads(answer.json)
        return status

    def store(self, name: object, scope: Scope = "network") -> None:
        assert self.client.wait_connected(60)
        message = StoreResponse(request_key(name), scope, MODEL, "vllm test", RESPONSE_TTL_MS, body_of(name))
        until(lambda: self.client.send(message))

    def find(self, name: object, deadline_ms: int = 5_000) -> Lookup:
        """Ask as the middleware does, with more time than its 300 ms, which a busy machine may need for itself."""
        assert self.client.wait_connected(60)
        number = next(self._numbers)
        began, hinted = time.monotonic(), False
        assert self.client.send(FindResponse(number, request_key(name), MODEL, deadline_ms))

        def ours(message: NodeMessage) -> bool:
            nonlocal hinted
            if isinstance(message, ResponseHint) and message.lookup == number:
                hinted = message.hinted
            if isinstance(message, ResponseToTry):
                self.tried.append(message)
            return isinstance(message, ResponseFound | ResponseNotFound) and message.lookup == number

        answer = self._await(ours, deadline_ms / 1000 + 30)
        assert answer is None or isinstance(answer, ResponseFound | ResponseNotFound)
        return Lookup(answer, hinted, time.monotonic() - began)

    def _await(self, wanted: Callable[[NodeMessage], bool], timeout_s: float) -> NodeMessage | None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for message in self.client.receive():
                if wanted(message):
                    return message
            time.sleep(0.0005)
        return None


def private_network(root: Path, size: int, **settings: Any) -> list[NetworkedNode]:
    """`size` nodes with one key; all but the first know the first one's address, and nothing else."""
    key = root / "network.key"
    key.touch(0o600)
    key.write_text(secrets.token_hex(32))
    nodes: list[NetworkedNode] = []
    for number in range(size):
        directory = root / str(number)
        directory.mkdir(mode=0o700)
        nodes.append(NetworkedNode(config_of(directory, key, nodes, **settings)))
        if number == 0:
            until(lambda: nodes[0].card().get("p2p"), 600)
    return nodes


def config_of(directory: Path, key: Path, others: Sequence[NetworkedNode], **settings: Any) -> Config:
    """The configuration of a node that joins through the first of `others`."""
    bootstrap = tuple(f"{first['peer_id']}@{first['p2p']}" for first in [others[0].card()]) if others else ()
    return Config(
        data_dir=directory,
        kv_cache=False,
        arena_bytes=MiB,
        network_key_file=str(key),
        bootstrap=bootstrap,
        **settings,
    )


def memory_bytes(pid: int) -> int:
    """Resident memory of one process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


def workers_of(pid: int) -> list[int]:
    """The child processes of a process."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]
