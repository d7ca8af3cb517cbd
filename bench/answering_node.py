"""The local socket of a node, in a process of its own, that answers each lookup of a response at once."""

import asyncio
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.machine import ROOT
from hyperspace_vllm.config import Config
from hyperspace_vllm.core.records.ids import RequestKey, network_id
from hyperspace_vllm.core.records.limits import LEASE_MS, MiB
from hyperspace_vllm.daemon.identity import Identity
from hyperspace_vllm.daemon.kv.arena import Arena
from hyperspace_vllm.daemon.kv.row_cache import RowCache
from hyperspace_vllm.daemon.local.local_server import LocalServer
from hyperspace_vllm.daemon.metrics import Metrics
from hyperspace_vllm.daemon.responses.response_lookups import FoundResponse
from hyperspace_vllm.daemon.served import Served


@contextmanager
def answering_node(data_dir: Path, lease_ms: int = LEASE_MS) -> Iterator["subprocess.Popen[bytes]"]:
    """Its process, which may be frozen or killed."""
    command = [sys.executable, "-m", "bench.answering_node", str(data_dir), str(lease_ms)]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def serve(config: Config, lease_ms: int) -> None:
    """Serve until killed."""

    class Finder:
        def find(self, lookup: int, request_key: RequestKey, model_digest: bytes, deadline_ms: int) -> None:
            server.answer_response(lookup, FoundResponse(request_key, b"", 1, 2, "peer", "gossip", "members"), "hit")

        def release(self, lookup: int) -> None:
            pass

        def purge(self, keys: Iterable[bytes]) -> None:
            pass

    server = LocalServer(
        config,
        Identity.load(config.data_dir),
        RowCache(Arena.create(config.data_dir, MiB, config.data_dir)),
        submit=lambda event: None,
        responses=None,
        status=lambda: b"{}",
        metrics=Metrics(),
        finder=Finder(),
        served=Served(network_id("test"), lambda changed: None),
        lease_ms=lease_ms,
    )
    server.bind()
    await server.run()


if __name__ == "__main__":
    asyncio.run(serve(Config(data_dir=Path(sys.argv[1])), int(sys.argv[2])))
