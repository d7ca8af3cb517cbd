"""A real server whose engine is frozen for a while; its API server continues."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.servers import Server
from tests.support.network_nodes import workers_of


@contextmanager
def frozen_engine(server: Server) -> Iterator[None]:
    """In the meantime the server accepts requests and answers none."""
    (engine,) = [
        pid for pid in workers_of(server.process.pid) if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(engine, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(engine, signal.SIGCONT)
