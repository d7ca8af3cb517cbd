"""The part of a node that has to do with Redis, without p2p, for tests with a real redis-server."""

from collections.abc import Awaitable, Callable
from pathlib import Path

from hyperspace_vllm.config import Config
from hyperspace_vllm.core.local.message_fields import Scope
from hyperspace_vllm.core.local.response_cache_messages import StoreResponse
from hyperspace_vllm.core.records.ids import network_id
from hyperspace_vllm.core.records.limits import RESPONSE_TTL_MS
from hyperspace_vllm.core.response.cache_proof import request_hash
from hyperspace_vllm.daemon.clock import wall_ms
from hyperspace_vllm.daemon.identity import Identity
from hyperspace_vllm.daemon.metrics import Metrics
from hyperspace_vllm.daemon.node.join import load_network_key, make_trust, node_options
from hyperspace_vllm.daemon.redis import redis_responses
from hyperspace_vllm.daemon.responses.response_lookups import FoundResponse
from hyperspace_vllm.daemon.responses.response_server import ResponseServer
from hyperspace_vllm.daemon.responses.response_store import ResponseStore
from hyperspace_vllm.response_db import ResponseReader, database_path
from tests.support.network_nodes import MODEL, body_of, request_key
from tests.support.network_shell import NetworkShell
from tests.support.until import until_async

NETWORK = network_id("default")
WAIT_S = 60.0
DEADLINE_S = 30.0  # of a lookup


def redis_key(name: object) -> str:
    return f"hyperspace:{NETWORK.hex()[:16]}:response:{request_hash(NETWORK, request_key(name)).hex()}"


class FleetNode:
    """All of a node that has to do with Redis, without p2p; it is its own client."""

    def __init__(self, directory: Path, url: str, key_file: Path | None, **settings: object) -> None:
        directory.mkdir(mode=0o700, exist_ok=True)
        self.config = Config(
            data_dir=directory,
            p2p_listen="",
            network_key_file=str(key_file or ""),
            shared_responses=url,
            **settings,  # type: ignore[arg-type]
        )
        self.identity = Identity.load(directory)
        self.metrics = Metrics()
        self.path = database_path(directory)
        self.trust = trust = make_trust(self.config, self.identity, load_network_key(self.config))
        self.store = ResponseStore(self.path, self.config.response_bytes, RESPONSE_TTL_MS, self.identity, NETWORK)
        options, key = node_options(self.config, None), self.identity.signing_key
        self.server = ResponseServer(self.path, NETWORK, trust.vouch)
        self.shared = redis_responses.RedisResponses(url, NETWORK, self.server, trust, self.metrics)
        shell = NetworkShell(options, key, trust, self, self.store, self.metrics, listens=False, shared=self.shared)
        self.network, self.open_lookups = shell.responses, shell.lookups
        self.answers: dict[int, tuple[FoundResponse | None, str]] = {}
        self.lookups = 0

    def start(self) -> None:
        self.store.start(self.network.heard)

    async def close(self) -> None:
        self.store.close()
        await self.shared.close()
        self.server.close()

    def hint(self, lookup: int, hinted: bool) -> None:
        """Without p2p there is none."""

    def let_try(self, lookup: int, body: bytes, proof: bytes) -> None: ...

    def answer(self, lookup: int, found: FoundResponse | None, reason: str) -> None:
        self.answers[lookup] = found, reason

    def compute(self, name: object, scope: Scope = "network", ttl_ms: int = RESPONSE_TTL_MS) -> None:
        assert self.store.store(StoreResponse(request_key(name), scope, MODEL, "vllm test", ttl_ms, body_of(name)))

    async def share(self, name: object) -> None:
        """Compute it, and wait until it lies in Redis."""
        before = self.written
        self.compute(name)
        await until_async(lambda: self.written > before)

    def begin(self, name: object) -> int:
        self.lookups += 1
        self.network.find(self.lookups, request_key(name), MODEL, round(DEADLINE_S * 1000))
        return self.lookups

    async def find(self, name: object) -> FoundResponse | None:
        lookup = self.begin(name)
        await until_async(lambda: lookup in self.answers)
        return self.answers[lookup][0]

    def stored(self, name: object) -> bytes | None:
        """The proof of what lies in its own database."""
        assert self.store.flush(60)
        reader = ResponseReader(self.path)
        entry = reader.get(request_key(name), wall_ms())
        reader.close()
        return entry.proof if entry else None

    @property
    def written(self) -> int:
        written = self.shared.status()["written"]
        assert isinstance(written, int)
        return written

    def failures(self, reason: str) -> float:
        return (
            self.metrics.registry.get_sample_value("hyperspace_failures_total", {"layer": "l1", "reason": reason})
            or 0.0
        )


async def until_found(node: FleetNode, name: object) -> None:
    await until_async(lambda: node.find(name))


MakeNode = Callable[..., Awaitable[FleetNode]]
