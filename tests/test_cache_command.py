"""`hyperspace cache` beside a real node: what is listed, shown, exported and deleted."""

import base64
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from hyperspace_vllm.cli import _print_status, main
from hyperspace_vllm.config import Config
from hyperspace_vllm.core.local.response_cache_messages import StoreResponse
from hyperspace_vllm.core.records.ids import network_id, sha256
from hyperspace_vllm.core.records.limits import RESPONSE_TTL_MS, MiB
from hyperspace_vllm.core.response.cache_proof import decode_proof
from hyperspace_vllm.daemon.responses.response_store import ResponseStore
from hyperspace_vllm.response_db import database_path
from tests.support.cached_server import Signer
from tests.support.network_nodes import NetworkedNode, body_of, request_key
from tests.support.until import until

pytestmark = pytest.mark.io


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NetworkedNode]:
    started = NetworkedNode(Config(data_dir=tmp_path, arena_bytes=16 * MiB, p2p_listen=""))
    yield started
    started.stop()


def stored(node: NetworkedNode, count: int) -> None:
    for name in range(count):
        node.store(name, "private" if name % 2 else "network")
    until(lambda: node.status()["responses"]["entries"] == count)


def run(node: NetworkedNode, *arguments: str) -> int:
    return main(["cache", *arguments, "--data-dir", str(node.config.data_dir)])


def test_entries_are_listed_with_who_computed_them(node: NetworkedNode, capsys: pytest.CaptureFixture[str]) -> None:
    stored(node, 3)
    assert run(node, "list", "--json") == 0
    listed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {entry["request_key"] for entry in listed} == {request_key(name).hex() for name in range(3)}
    assert {entry["computed_by"] for entry in listed} == {node.status()["peer_id"]}
    assert sorted(entry["scope"] for entry in listed) == ["network", "network", "private"]
    assert run(node, "list", "--limit", "2") == 0
    assert "2 of 3 responses" in capsys.readouterr().out


def test_an_entry_is_shown_by_the_first_digits_of_its_key(
    node: NetworkedNode, capsys: pytest.CaptureFixture[str]
) -> None:
    stored(node, 2)
    assert run(node, "show", request_key(1).hex()[:12].upper()) == 0
    entry = json.loads(capsys.readouterr().out)
    assert entry["body"].encode() == body_of(1)
    assert entry["intact"] is True
    assert decode_proof(base64.b64decode(entry["proof"])).response_hash == sha256(body_of(1))


HOSTILE = "A\x1b[31m\x9b2J\u202eevil\x7f\u2028\U000e0041\r end, und 漢字"


def test_nothing_that_a_terminal_obeys_is_shown_and_other_scripts_stay_readable(
    node: NetworkedNode, capsys: pytest.CaptureFixture[str]
) -> None:
    body = json.dumps({"text": HOSTILE}, ensure_ascii=False).encode()
    assert node.client.wait_connected(60)
    assert node.client.send(StoreResponse(request_key(1), "network", bytes(32), HOSTILE, RESPONSE_TTL_MS, body))
    until(lambda: node.status()["responses"]["entries"] == 1)
    assert run(node, "show", request_key(1).hex()) == 0
    shown = capsys.readouterr().out
    assert "漢字" in shown
    assert all(char.isprintable() or char == "\n" for char in shown)
    assert json.loads(json.loads(shown)["body"]) == {"text": HOSTILE}


def test_the_status_shows_no_markup_and_nothing_that_a_terminal_obeys(
    node: NetworkedNode, capsys: pytest.CaptureFixture[str]
) -> None:
    status = node.status()
    status["shared_responses"] = {"state": f"[red]{HOSTILE}[/red]"}
    _print_status(status)
    shown = capsys.readouterr().out
    assert "[red]A" in shown
    assert all(char.isprintable() or char == "\n" for char in shown)


@pytest.mark.parametrize("key", ["", "xyz", "0" * 65, "00000000"])
def test_what_names_no_entry_is_refused_with_what_was_expected(
    node: NetworkedNode, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stored(node, 1)
    for action in ("show", "purge"):
        assert run(node, action, key) == 1
        assert "expected a RequestKey" in (said := capsys.readouterr().err) or "no such entry" in said
    assert node.status()["responses"]["entries"] == 1


def test_everything_is_exported_into_a_private_file_that_is_never_overwritten(
    node: NetworkedNode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored(node, 3)
    file = tmp_path / "out.jsonl"
    assert run(node, "export", str(file)) == 0
    assert {json.loads(line)["body"].encode() for line in file.open()} == {body_of(name) for name in range(3)}
    assert file.stat().st_mode & 0o077 == 0
    before = file.read_bytes()
    assert run(node, "export", str(file)) == 1
    assert (file.read_bytes(), capsys.readouterr().err) == (
        before,
        f"hyperspace: {file} exists and is not overwritten: name another file, or delete this one\n",
    )


def test_what_is_purged_is_gone_and_the_rest_stays(node: NetworkedNode) -> None:
    stored(node, 5)
    assert run(node, "purge", request_key(0).hex(), request_key(3).hex()[:16]) == 0
    until(lambda: node.status()["responses"]["purged"] == 2)
    assert node.status()["responses"]["entries"] == 3
    assert run(node, "purge") == 1
    assert run(node, "purge", "--all") == 0
    until(lambda: node.status()["responses"]["entries"] == 0)


def test_without_a_node_entries_are_read_and_the_way_to_delete_them_is_said(
    node: NetworkedNode, capsys: pytest.CaptureFixture[str]
) -> None:
    stored(node, 1)
    node.stop()
    assert run(node, "list", "--json") == 0
    assert request_key(0).hex() in capsys.readouterr().out
    assert run(node, "purge", "--all") == 1
    assert "with none running" in capsys.readouterr().err


def test_a_damaged_proof_is_an_error_that_says_so(node: NetworkedNode, capsys: pytest.CaptureFixture[str]) -> None:
    stored(node, 1)
    node.stop()
    with closing(sqlite3.connect(database_path(node.config.data_dir))) as database, database:
        database.execute("UPDATE entries SET proof = 'cut'")
    assert run(node, "list") == 1
    assert "cache proof" in capsys.readouterr().err


def test_without_a_database_the_directory_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "--data-dir", str(tmp_path), "list"]) == 1
    assert str(tmp_path) in capsys.readouterr().err


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """The data directory of a node that is gone; an export of it is longer than a pipe holds."""
    store = ResponseStore(database_path(tmp_path), 1 << 30, RESPONSE_TTL_MS, Signer(), network_id("test"))
    store.start()
    for name in range(400):
        message = StoreResponse(request_key(name), "network", bytes(32), "vllm", RESPONSE_TTL_MS, body_of(name))
        assert store.store(message)
    assert store.flush(60)
    store.close()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "said"),
    [("gone/out", "can't be created: No such file or directory"), ("/dev/full", "exists and is not overwritten")],
)
def test_an_export_that_fails_names_its_file_and_not_the_data_directory(
    filled: Path, name: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = filled / name
    assert main(["cache", "--data-dir", str(filled), "export", str(file)]) == 1
    assert (error := capsys.readouterr().err).startswith(f"hyperspace: {file} {said}")
    assert "data directory" not in error


def test_an_export_that_ends_too_early_leaves_no_half_of_it(filled: Path) -> None:
    file = filled / "out"
    limited = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, 65_536)); "
    limited += "from hyperspace_vllm.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", limited, "cache", "--data-dir", str(filled), "export", str(file)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"hyperspace: {file} can't be written: File too large; it is deleted again")
    assert not file.exists()


@pytest.mark.parametrize(
    "arguments", [("export",), ("list", "--json", "--limit", "400"), ("show", request_key(1).hex())]
)
def test_a_reader_that_ends_before_the_output_does_is_what_the_error_names(
    filled: Path, arguments: tuple[str, ...]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "hyperspace_vllm.cli", "cache", "--data-dir", str(filled), *arguments]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == 1
    assert done.stderr == "hyperspace: incomplete: the program that reads this output has ended\n"
