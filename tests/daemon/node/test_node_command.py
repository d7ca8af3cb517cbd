"""A node's identity, and the `hyperspace` command as a user types it."""

import json
import os
import stat
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from hyperspace_vllm.config import Config
from hyperspace_vllm.daemon.identity import Identity, IdentityError, curve_public_of
from hyperspace_vllm.daemon.metrics import Metrics
from hyperspace_vllm.daemon.node.join import load_network_key
from tests.support.node_processes import Nodes, hyperspace
from tests.support.paths import ROOT

pytestmark = pytest.mark.io


def test_a_node_keeps_its_key_and_nobody_else_can_read_it(tmp_path: Path) -> None:
    first, again = Identity.load(tmp_path / "d"), Identity.load(tmp_path / "d")
    assert first == again
    assert stat.S_IMODE((tmp_path / "d" / "node.key").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o700
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["node.key"]


def test_a_peer_id_alone_pins_the_curve_key(tmp_path: Path) -> None:
    identity = Identity.load(tmp_path)
    assert curve_public_of(identity.peer_id) == identity.curve_public
    assert len(identity.curve_secret) == 40


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_key_that_others_can_read_is_refused_with_what_to_do(tmp_path: Path, mode: int) -> None:
    Identity.load(tmp_path)
    (tmp_path / "node.key").chmod(mode)
    with pytest.raises(IdentityError, match="chmod 600"):
        Identity.load(tmp_path)


@pytest.mark.parametrize("key", ["node.key", "network.key"])
def test_a_key_of_another_user_is_refused(tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Identity.load(tmp_path)
    load: dict[str, Callable[[], object]] = {
        "node.key": lambda: Identity.load(tmp_path),
        "network.key": lambda: load_network_key(Config(network_key_file=str(tmp_path / "network.key"))),
    }
    (tmp_path / "network.key").touch(0o600)
    (tmp_path / "network.key").write_text("00" * 32)
    load[key]()
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    with pytest.raises(IdentityError, match=f"owner {own}"):
        load[key]()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_network_key_that_others_can_read_is_refused_with_what_to_do(tmp_path: Path, mode: int) -> None:
    (tmp_path / "network.key").write_text("00" * 32)
    (tmp_path / "network.key").chmod(mode)
    with pytest.raises(IdentityError, match="chmod 600"):
        load_network_key(Config(network_key_file=str(tmp_path / "network.key")))


def test_a_damaged_or_linked_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "node.key").write_bytes(bytes(31))
    (tmp_path / "node.key").chmod(0o600)
    with pytest.raises(IdentityError, match="31 bytes"):
        Identity.load(tmp_path)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "node.key").symlink_to(tmp_path / "node.key")
    with pytest.raises(OSError, match="symbolic links"):
        Identity.load(tmp_path / "d")


def test_id_creates_the_key_and_prints_the_same_peer_id_again(tmp_path: Path) -> None:
    first = hyperspace("id", "--data-dir", str(tmp_path / "d"))
    again = hyperspace("id", "--data-dir", str(tmp_path / "d"))
    assert first.stdout == again.stdout == Identity.load(tmp_path / "d").peer_id + "\n"


def test_config_says_where_each_setting_came_from(tmp_path: Path) -> None:
    shown = hyperspace("config", "--data-dir", str(tmp_path), HYPERSPACE_NICE="3").stdout
    assert "nice = 3  # the environment\n" in shown
    assert f"data_dir = {tmp_path}  # the command line\n" in shown
    assert "network = default  # default\n" in shown


def test_a_wrong_setting_ends_the_command_with_one_line(tmp_path: Path) -> None:
    wrong = hyperspace("config", HYPERSPACE_NICE="30")
    assert wrong.returncode == 1
    assert wrong.stderr == "hyperspace: nice = 30 (from the environment): expected a whole number from 0 to 19\n"


def test_an_unknown_variable_is_one_line_of_the_command_that_goes_on(tmp_path: Path) -> None:
    shown = hyperspace("config", "--data-dir", str(tmp_path), HYPERSPACE_NICEST="3", HYPERSPACE_PORT="tcp://10.0.0.7:1")
    assert shown.returncode == 0
    assert shown.stderr == (
        "hyperspace: ignored: HYPERSPACE_NICEST (from the environment): no such setting; "
        "did you mean HYPERSPACE_NICE?\n"
    )


def test_status_without_a_node_says_what_to_do(tmp_path: Path) -> None:
    status = hyperspace("status", "--data-dir", str(tmp_path))
    assert status.returncode == 1
    assert "hyperspace node --data-dir" in status.stderr


def test_status_shows_the_node_as_a_table_and_as_json(nodes: Nodes) -> None:
    process = nodes.start_and_wait()
    directory = str(nodes.config.data_dir)
    table = hyperspace("status", "--data-dir", directory, COLUMNS="120")
    assert nodes.card()["peer_id"] in table.stdout
    status = json.loads(hyperspace("status", "--json", "--data-dir", directory).stdout)
    assert (status["pid"], status["peer_id"]) == (process.pid, nodes.card()["peer_id"])
    assert status["arena"]["free_bytes"] == status["arena"]["capacity_bytes"]
    assert {"name": "hyperspace_clients", "labels": {}, "value": 1.0} in status["metrics"]


def test_metrics_are_served_where_they_were_asked_for(nodes: Nodes) -> None:
    nodes.start_and_wait()
    address = nodes.card()["metrics"]
    assert address.startswith("127.0.0.1:")
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        assert b"\nhyperspace_clients 0.0\n" in answer.read()


def test_every_metric_and_command_is_documented() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    for family in Metrics().registry.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        assert f"| `{name}` |" in page, name
    for command in ("node", "id", "status", "config"):
        assert f"`hyperspace {command}" in page
    for flag in ("--data-dir", "--embedded", "--json"):
        assert flag in page
