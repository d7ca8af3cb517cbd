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
from hyperspace_vllm.daemon.local.engine_messages import EngineMessages
from hyperspace_vllm.daemon.local.local_server import LocalServer, make_welcome
from hyperspace_vllm.daemon.local.local_socket import LocalSocket
from hyperspace_vllm.daemon.local.prefix_lookups import PrefixLookups
from hyperspace_vllm.daemon.local.response_messages import ResponseMessages
from hyperspace_vllm.daemon.local.served import Served
from hyperspace_vllm.daemon.local.staging import Staging
from hyperspace_vllm.daemon.metrics import Metrics
from hyperspace_vllm.daemon.responses.response_lookups import FoundResponse, ResponseLookups


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
    config.data_dir.mkdir(exist_ok=True, mode=0o700)
    socket, network, metrics = LocalSocket(config.socket_path), network_id("test"), Metrics()
    lookups, prefixes = ResponseLookups(socket.send), PrefixLookups(socket.send)
    cache = RowCache(Arena.create(config.data_dir, MiB, config.data_dir))
    served = Served(network, lambda changed: None)

    class Finder:
        def find(self, lookup: int, request_key: RequestKey, model_digest: bytes, deadline_ms: int) -> None:
            lookups.answer(lookup, FoundResponse(request_key, b"", 1, 2, "peer", "gossip", "members"), "hit")

        def release(self, lookup: int) -> None:
            pass

        def used(self, keys: Iterable[bytes]) -> None:
            pass

        def purge(self, keys: Iterable[bytes]) -> None:
            pass

    engines = EngineMessages(
        False, config.data_dir, Staging(cache, metrics), prefixes, lambda event: None, served, socket.send
    )
    responses = ResponseMessages(config.share, None, None, lambda audit: None, Finder(), lookups, served, socket.send)
    welcome = make_welcome(Identity.load(config.data_dir).peer_id, network, cache.arena)
    server = LocalServer(socket, welcome, engines, responses, served, lambda: b"{}", metrics, lease_ms)
    socket.bind()
    await server.run()


if __name__ == "__main__":
    asyncio.run(serve(Config(data_dir=Path(sys.argv[1])), int(sys.argv[2])))
