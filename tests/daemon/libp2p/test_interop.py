"""A js-libp2p program (tests/interop/) in a network of our nodes: it shares no code with us, only the protocol."""

import json
import secrets
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hyperspace_vllm.config import Config
from hyperspace_vllm.core.records.ids import peer_id, public_key_of, sha256
from hyperspace_vllm.core.records.limits import MiB
from tests.support.network_nodes import MODEL, NetworkedNode, body_of, request_key
from tests.support.paths import ROOT
from tests.support.until import until

pytestmark = pytest.mark.io
PROGRAM = ROOT / "tests" / "interop"
VECTORS = ("cache_proof", "sealed_response", "announcement", "peer_record")
INSTALL_S = 300
CLIENT_S = 60
NAME = "interop" * 200_000  # its body of 1.4 MB crosses the flow control of two yamux implementations


@pytest.fixture(scope="module")
def javascript() -> str:
    """The Node.js that runs the program, its packages installed."""
    if not shutil.which("npm"):
        pytest.skip("npm is missing: `make test` installs it")
    command = [sys.executable, str(ROOT / "deploy" / "setup" / "interop.py")]
    installed = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=INSTALL_S)
    assert installed.returncode == 0, installed.stderr
    return installed.stdout.strip()


class Client:
    """One run of client.mjs."""

    def __init__(self, javascript: str, seed: bytes, bootstrap: NetworkedNode, **options: object) -> None:
        card = bootstrap.card()
        host, _, port = card["p2p"].rpartition(":")
        options |= {
            "bootstrap": f"/ip4/{host}/tcp/{port}/p2p/{card['peer_id']}",
            "seed": seed.hex(),
            "network": bootstrap.config.network,
            "model_digest": MODEL.hex(),
            "deadline_s": CLIENT_S,
        }
        self.said = ""
        self._process = subprocess.Popen(
            [javascript, "client.mjs", json.dumps(options)],
            cwd=PROGRAM,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def await_joined(self) -> None:
        until(lambda: "joined\n" in self.said or self._process.poll() is not None, CLIENT_S)
        assert "joined\n" in self.said, self.said

    def result(self) -> dict[str, Any]:
        assert self._process.stdout
        printed = self._process.stdout.read()
        assert self._process.wait(CLIENT_S) == 0, self.said
        self._reader.join(CLIENT_S)
        print(printed, self.said)
        seen: dict[str, Any] = json.loads(printed)
        return seen

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            self.said += line


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., NetworkedNode]]:
    """Starts nodes; they have joined when it returns."""
    nodes: list[NetworkedNode] = []

    def start_one(bootstrap: NetworkedNode | None = None, **settings: Any) -> NetworkedNode:
        directory = tmp_path / str(len(nodes))
        directory.mkdir(mode=0o700)
        known = (f"{bootstrap.card()['peer_id']}@{bootstrap.card()['p2p']}",) if bootstrap else ()
        config = Config(data_dir=directory, kv_cache=False, arena_bytes=MiB, bootstrap=known, **settings)
        nodes.append(NetworkedNode(config))
        until(lambda: nodes[-1].card().get("p2p"))
        return nodes[-1]

    yield start_one
    for node in nodes:
        node.stop()


def test_its_own_crypto_agrees_with_our_vectors_and_refuses_every_altered_byte(javascript: str) -> None:
    ran = subprocess.run([javascript, "vectors.mjs"], cwd=PROGRAM, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert set(json.loads(ran.stdout)) == set(VECTORS)
    assert all(json.loads(ran.stdout).values())


@pytest.mark.parametrize("private", [False, True], ids=["without a network key", "with a network key"])
def test_a_program_that_we_did_not_write_hears_finds_fetches_and_verifies_a_response(
    javascript: str, start: Callable[..., NetworkedNode], tmp_path: Path, private: bool
) -> None:
    """It knows one node; the response is at another one, which it has to find."""
    network_key = secrets.token_bytes(32) if private else None
    settings: dict[str, Any] = {"share": "network" if private else "public"}
    if network_key:
        settings["network_key_file"] = str(tmp_path / "key")
        (tmp_path / "key").touch(0o600)
        (tmp_path / "key").write_text(network_key.hex())
    first = start(**settings)
    second = start(first, **settings)
    holder = second.card()["peer_id"]
    seed = secrets.token_bytes(32)
    client = Client(
        javascript,
        seed,
        first,
        request_key=request_key(NAME).hex(),
        trusted=[public_key_of(holder).hex()],
        network_key=network_key.hex() if network_key else None,
    )
    try:
        client.await_joined()
        second.store(NAME)
        seen = client.result()
    finally:
        client.stop()

    assert seen["body_sha256"] == sha256(body_of(NAME)).hex()
    assert seen["from"] == peer_id(bytes.fromhex(seen["proof"]["signer"])) == holder
    assert peer_id(bytes.fromhex(seen["announcement"]["sender"])) == holder
    assert seen["announcement"]["expires_at_ms"] == seen["proof"]["computed_at_ms"] + 24 * 3600 * 1000
    assert seen["providers"] == [holder]
    assert {first.card()["peer_id"], holder} <= set(seen["met"])
    assert seen["asked"]["greet"] >= 1
    until(lambda: first.status()["p2p"]["known_peers"] == 2, 10)  # the program among them: its record outlives it
