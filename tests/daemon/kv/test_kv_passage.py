"""The Unix socket between a KV connection and ZeroMQ: other processes neither reach it nor take its connection."""

import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from hyperspace_vllm.daemon.kv.kv_passage import attach
from hyperspace_vllm.daemon.zmq_pump import set_link_options

pytestmark = pytest.mark.io

CONNECT = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1].replace('@', chr(0)))"


class Watched:
    """A ZeroMQ socket; `seen` is called with the name that it is to connect to, before it does."""

    def __init__(self, made: "zmq.Socket[bytes]", seen: Callable[[str], object]) -> None:
        self._made = made
        self._seen = seen

    def connect(self, endpoint: str) -> None:
        self._seen(endpoint.removeprefix("ipc://"))
        self._made.connect(endpoint)


@pytest.fixture
def made() -> Iterator["zmq.Socket[bytes]"]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as made:
        set_link_options(made)
        yield made


async def test_the_socket_has_a_path_that_no_other_user_reaches_and_soon_none(made: "zmq.Socket[bytes]") -> None:
    paths: list[Path] = []

    def seen(name: str) -> None:
        paths.append(Path(name))
        assert stat.S_IMODE(paths[0].parent.stat().st_mode) == 0o700
        assert paths[0].parent.stat().st_uid == os.getuid()

    with await attach(Watched(made, seen)) as local:  # type: ignore[arg-type]
        assert local.family == socket.AF_UNIX
    assert not paths[0].parent.exists()


@pytest.mark.parametrize("why", ["long", "none"])
async def test_another_process_that_connects_first_takes_nothing(
    made: "zmq.Socket[bytes]", monkeypatch: pytest.MonkeyPatch, tmp_path: Path, why: str
) -> None:
    """Where no path can be had the name is abstract, and any process of the network namespace sees it."""
    directory = tmp_path / ("d" * 100)
    if why == "long":
        directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    names: list[str] = []

    def seen(name: str) -> None:
        names.append(name)
        for _ in range(3):
            subprocess.run([sys.executable, "-c", CONNECT, name], check=True, timeout=10)

    with await attach(Watched(made, seen)) as local:  # type: ignore[arg-type]
        credentials = local.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        assert int.from_bytes(credentials[:4], sys.byteorder) == os.getpid()
    assert names[0].startswith("@hyperspace-")
    assert why == "none" or not list(directory.iterdir())
