"""A real server whose engine stands still for a while: its API server goes on."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.servers import Server
from tests.support.network_nodes import workers_of


@contextmanager
def frozen_engine(server: Server) -> Iterator[None]:
    """Meanwhile the server takes requests and answers none."""
    (engine,) = [
        pid for pid in workers_of(server.process.pid) if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(engine, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(engine, signal.SIGCONT)
