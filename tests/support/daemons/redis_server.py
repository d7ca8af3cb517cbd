"""A redis-server of one test on loopback, to be killed, frozen and restarted."""

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.until import until

if TYPE_CHECKING:
    from redis.asyncio import Redis

# One program under two names. Debian's redis-tools has it without the service that its redis-server starts.
REDIS = shutil.which("redis-server") or shutil.which("redis-check-rdb")
NEEDED = pytest.mark.skipif(REDIS is None, reason="no redis-server: `make test` installs one")
WAIT_S = 15.0


@contextmanager
def running(directory: Path) -> "Iterator[RedisServer]":
    """Run a server until the test is over."""
    server = RedisServer(directory)
    server.start()
    try:
        yield server
    finally:
        server.kill()


class RedisServer:
    """A redis-server that keeps nothing on disk, as a child process."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                *("redis-server", "--port", str(self.port), "--bind", "127.0.0.1"),
                *("--save", "", "--appendonly", "no", "--dir", str(self._directory)),
            ],
            executable=REDIS,
            stdout=subprocess.DEVNULL,
        )
        until(self._answers, WAIT_S)

    def client(self) -> "Redis":
        """A client with full access to it."""
        from redis.asyncio import Redis

        return Redis.from_url(self.url)

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False
