"""Builds a node from its parts, runs it and takes it down. One node per data directory, by a lock."""

import asyncio
import json
import logging
import os
import random
import time
from contextlib import AsyncExitStack, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

from ... import arena_size, session_lock
from ...config import Config
from ...core.local.message_fields import Scope
from ...core.node.node import Node
from ...core.peers.dials import Dials
from ...core.records.ids import PeerId, network_id
from ...file_digests import in_progress
from ...response_db import database_path
from .. import clock
from ..identity import Identity
from ..kv.arena import Arena
from ..kv.row_cache import RowCache
from ..local.engine_messages import EngineMessages
from ..local.local_server import LocalServer, make_welcome
from ..local.local_socket import LocalSocket
from ..local.prefix_lookups import PrefixLookups
from ..local.response_messages import ResponseMessages, Similar
from ..local.served import Served
from ..local.staging import Staging
from ..logs import log_to_file, log_to_stderr
from ..metrics import Metrics
from ..responses.audit_requests import AuditRequests
from ..responses.response_lookups import ResponseLookups
from ..responses.response_server import ResponseServer
from ..responses.response_store import ResponseStore
from ..start_error import StartError, needed
from ..stopping import Stopping
from .directory import claim_directory, lock_directory
from .driver import Driver, PerformsPrefixes
from .embedded import say_all_is_well, until_unwanted, wait_in_line
from .join import Joining, load_network_key, make_trust, node_options
from .network_effects import NetworkEffects
from .network_lookups import SharedStore
from .network_responses import NetworkResponses, Shared
from .peer_events import PeerEvents

logger = logging.getLogger(__name__)

_LISTEN = "choose an address and a free port of this machine"


def run_node(config: Config, embedded: bool, stopping: Stopping) -> int:
    """Run the node of `config.data_dir` until it is told to stop; the process's exit status.

    Embedded: quiet when another node is there, and gone when nobody needs it.
    """
    os.umask(0o077)
    log_to_stderr(config, embedded)
    try:
        claim_directory(config.data_dir)
        if embedded:
            log_to_file(config)
        lock = lock_directory(config.data_dir)
        if lock is None and embedded:
            logger.info("pid %d: another node serves %s already", os.getpid(), config.data_dir)
            lock = wait_in_line(config)
            if lock is None:
                return 0
        if lock is None:
            raise StartError(
                f"a node serves {config.data_dir} already (`hyperspace status` shows it); "
                "stop it, or give this one a directory of its own with --data-dir"
            )
        try:
            asyncio.run(_Node(config).run(embedded, stopping))
        finally:
            os.close(lock)
    except StartError as error:
        logger.critical("no node: %s", error)
        return 1
    return 0


class _Prefixes(PerformsPrefixes, Protocol):
    """What performs prefix effects (PrefixEffects)."""

    def report_stored(self) -> None: ...
    def status(self, waiting_rows: int, /) -> dict[str, object]: ...


class _Transport(Protocol):
    """The bulk transport (ChunkTransport)."""

    @property
    def endpoint(self) -> str: ...
    @property
    def peers(self) -> tuple[PeerId, ...]: ...
    def endpoint_of(self, peer: PeerId, /) -> str: ...
    def is_connected(self, peer: PeerId, /) -> bool: ...


class _SharedResponses(SharedStore, Shared, Protocol):
    """The fleet's responses (RedisResponses), for which redis must be installed."""

    def status(self) -> dict[str, object]: ...


class _Similar(Similar, Protocol):
    """Semantic hits (SimilarQuestions), for which an extra must be installed."""

    def stats(self) -> dict[str, object]: ...
    def wrong_ratio(self, end: str, /) -> float: ...


class _Node:
    """The parts of one node, from start to end."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._network = network_id(config.network)
        self._started_at = time.monotonic()
        self._metrics_endpoint = ""

    async def run(self, embedded: bool, stopping: Stopping) -> None:
        """Serve until a signal, or (embedded) until nobody needs it."""
        stopping.attach()  # an interrupted start of a worker process would leave it behind
        async with AsyncExitStack() as parts:
            try:
                server = await self._build(parts)
                with needed(self._card, "make room, or choose another HYPERSPACE_DATA_DIR"):
                    self._write_card(embedded)
                parts.callback(self._remove_card)
                await self._serve(server, embedded, stopping)
            finally:
                stopping.set_deadline()
        logger.info("node %s has stopped", self._identity.peer_id)

    async def _serve(self, server: LocalServer, embedded: bool, stopping: Stopping) -> None:
        serving = asyncio.create_task(server.run())
        joining = asyncio.create_task(self._join(embedded))
        stop = asyncio.create_task(stopping.requested())
        unwanted = asyncio.create_task(until_unwanted(server)) if embedded else stop
        logger.info("node %s serves %s", self._identity.peer_id, self._config.data_dir)
        if embedded:
            say_all_is_well()
        try:
            done, _ = await asyncio.wait((serving, unwanted, stop), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                await task  # a server that failed ends the node with its error
        finally:
            for task in (joining, serving, unwanted, stop):
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    async def _build(self, parts: AsyncExitStack) -> LocalServer:
        config = self._config
        key = config.data_dir / "node.key"
        with needed(key, f"let this user alone read {key}, or delete it to become a new node"):
            self._identity = Identity.load(config.data_dir)
        self._metrics = Metrics()
        size = config.arena_bytes or arena_size.arena_bytes(None, arena_size.memory_bytes())
        with needed("arena_bytes", "make room in /dev/shm (docker run --shm-size) or in the data directory"):
            arena = Arena.create(config.data_dir, size)
        parts.callback(arena.close)
        self._cache = RowCache(arena)
        socket = LocalSocket(config.socket_path)
        response_lookups, prefix_lookups = ResponseLookups(socket.send), PrefixLookups(socket.send)
        self._network_key = load_network_key(config)
        self._trust, self._dials = make_trust(config, self._identity, self._network_key), Dials(clock.now())
        store = self._responses = self._make_store() if config.response_cache else None
        options = node_options(config, self._network_key)
        node = Node(options, self._identity.signing_key, self._trust, self._dials, random.Random())
        driver = self._driver = Driver(node)
        scope: Scope = "public" if config.share == "public" else "network"
        shared = self._shared = self._open_shared(parts) if store else None
        effects = NetworkEffects(
            self._network, self._trust, response_lookups, store, scope, self._metrics, driver.submit, shared
        )
        self._peer_events = PeerEvents(node, self._trust, effects.requests, driver.submit)
        network = NetworkResponses(driver, effects.lookups, self._trust, config.share, shared)
        if store:
            store.start(network.heard)
            parts.callback(store.close)
        self._similar = self._open_similar(store, parts) if store else None
        staging = Staging(self._cache, self._metrics)
        self._prefixes: _Prefixes | None = None
        self._transport: _Transport | None = None
        if config.kv_cache:
            self._prefixes, self._transport = self._open_data_plane(staging, prefix_lookups)
        parts.push_async_callback(driver.close)
        driver.begin(effects, self._prefixes)
        served = Served(self._network, network.served)
        parts.callback(served.close)
        audits = AuditRequests(self._network, self._identity.public_key, store, network.audited, self._metrics)
        submit, kv = driver.submit, config.kv_cache
        engines = EngineMessages(kv, config.data_dir, staging, prefix_lookups, submit, served, socket.send)
        responses = ResponseMessages(
            config.share, store, self._similar, audits.heard, network, response_lookups, served, socket.send
        )
        welcome = make_welcome(self._identity.peer_id, self._network, arena)
        self._server = LocalServer(socket, welcome, engines, responses, served, self._status, self._metrics)
        self._measure()
        if config.metrics_listen:
            with needed(f"metrics_listen = {config.metrics_listen!r}", f"{_LISTEN} (HYPERSPACE_METRICS_LISTEN)"):
                self._metrics_endpoint = self._metrics.listen(config.metrics_listen)
        parts.callback(socket.close)
        with needed(config.socket_path, "the data directory (HYPERSPACE_DATA_DIR) must allow sockets"):
            session_lock.remove_leftovers(config.data_dir)
            socket.bind()
        return self._server

    async def _join(self, embedded: bool) -> None:
        if not self._config.p2p_listen:
            return
        joining = Joining(
            self._config,
            self._identity,
            self._network_key,
            self._trust,
            self._transport.endpoint if self._transport else "",
            self._responses is not None,
            self._peer_events,
        )
        try:
            await self._driver.run(joining.join, lambda: self._on_joined(embedded))
        except Exception:  # a node without its network still serves its host
            logger.exception("the network has failed: please report it")

    def _on_joined(self, embedded: bool) -> None:
        try:
            self._write_card(embedded)
        except OSError as error:  # the one from the start is there, without the network's address
            logger.error("%s: %s; make room on that disk, and let this user write there", self._card, error.strerror)
        if self._prefixes:
            self._prefixes.report_stored()

    def _open_shared(self, parts: AsyncExitStack) -> _SharedResponses | None:
        config = self._config
        if not config.shared_responses:
            return None
        if config.share == "private":
            logger.warning('shared_responses is off: share = "private" lets no response leave this node')
            return None
        trust = self._trust
        if not trust.may_trust_others():
            lists = "allowed" if trust.mode == "allowlist" else "network_key_file (or peers, bootstrap, allowed)"
            logger.warning("shared_responses: this node believes no other's responses; set %s", lists)
        server = ResponseServer(database_path(config.data_dir), self._network, trust.vouch)
        parts.callback(server.close)
        try:
            from ..redis.redis_responses import RedisResponses

            shared = RedisResponses(config.shared_responses, self._network, server, trust, self._metrics)
        except (ImportError, ValueError) as error:  # pip install hyperspace-vllm[redis]; an option of the URL
            logger.error("shared_responses is off: %s", error)
            return None
        parts.push_async_callback(shared.close)
        return shared

    def _make_store(self) -> ResponseStore:
        config = self._config
        path, ttl_ms = database_path(config.data_dir), config.response_ttl_s * 1000
        return ResponseStore(path, config.response_bytes, ttl_ms, self._identity, self._network)

    def _open_similar(self, responses: ResponseStore, parts: AsyncExitStack) -> _Similar | None:
        config = self._config
        if config.semantic == "off":
            return None
        try:
            from ..responses.similar import SimilarQuestions
        except ImportError as error:
            logger.error("semantic hits are off: %s; pip install hyperspace-vllm[semantic]", error)
            return None
        from ...core.response.similar.canonical import ACRONYMS
        from ..responses.embedding import load_embedder

        acronyms = {**ACRONYMS, **config.acronym_table}
        load = partial(load_embedder, config.semantic_model)
        similar = SimilarQuestions(database_path(config.data_dir), load, acronyms, responses)
        parts.callback(similar.close)
        return similar

    def _open_data_plane(self, staging: Staging, clients: PrefixLookups) -> tuple[_Prefixes, _Transport]:
        from ..kv.chunk_store import ChunkStore
        from ..kv.chunk_transport import ChunkTransport
        from ..workers.compute_pool import ComputePool
        from .prefix_effects import PrefixEffects

        config = self._config
        chunks = config.data_dir / "chunks"
        with needed(chunks, "delete it: its KV is then computed anew"):
            store = ChunkStore(chunks, config.disk_bytes)
        with needed(f"listen = {config.listen!r}", f"{_LISTEN} (HYPERSPACE_LISTEN)"):
            transport = ChunkTransport(
                config,
                self._identity,
                store,
                self._metrics,
                self._trust,
                self._dials,
                self._peer_events.on_violation,
            )
        compute = ComputePool(config.nice)
        prefixes = PrefixEffects(
            self._cache,
            store,
            transport,
            compute,
            self._metrics,
            self._identity,
            self._network,
            self._trust,
            staging,
            clients,
            self._driver.submit,
        )
        return prefixes, transport

    def _measure(self) -> None:
        self._metrics.rows.labels("memory").set_function(lambda: len(self._cache))
        self._metrics.store_bytes.labels("memory").set_function(lambda: self._cache.row_bytes)
        if (similar := self._similar) is not None:
            for end in ("low", "estimate", "high"):
                self._metrics.semantic_wrong_ratio.labels(end).set_function(partial(similar.wrong_ratio, end))
        if (responses := self._responses) is not None:
            self._metrics.store_bytes.labels("response").set_function(lambda: responses.stats()["bytes"])

    @property
    def _card(self) -> Path:
        return self._config.data_dir / "node.json"

    def _remove_card(self) -> None:
        """Unless it is another node's, whose directory has taken the place of ours."""
        with suppress(OSError, ValueError):
            if json.loads(self._card.read_text())["pid"] == os.getpid():
                self._card.unlink()

    def _write_card(self, embedded: bool) -> None:
        draft = self._card.with_suffix(".json.new")
        draft.write_text(
            json.dumps(
                {
                    "pid": os.getpid(),
                    "peer_id": self._identity.peer_id,
                    "endpoint": self._transport.endpoint if self._transport else "",
                    "p2p": self._driver.joined.host.address if self._driver.joined else "",
                    "metrics": self._metrics_endpoint,
                    "embedded": embedded,
                }
            )
        )
        draft.replace(self._card)

    def _peers(self) -> list[dict[str, object]]:
        if (transport := self._transport) is None:
            return []
        return [
            {"peer_id": peer, "endpoint": transport.endpoint_of(peer), "connected": transport.is_connected(peer)}
            for peer in transport.peers
        ]

    def _status(self) -> bytes:
        """What `hyperspace status --json` prints."""
        arena = self._cache.arena
        return json.dumps(
            {
                "version": _version(),
                "pid": os.getpid(),
                "peer_id": self._identity.peer_id,
                "network": self._config.network,
                "data_dir": str(self._config.data_dir),
                "endpoint": self._transport.endpoint if self._transport else "",
                "metrics_endpoint": self._metrics_endpoint,
                "uptime_s": round(time.monotonic() - self._started_at, 1),
                "engine_leases": self._server.engine_leases,
                "peers": self._peers(),
                "p2p": self._driver.network_status() if self._config.p2p_listen else None,
                "arena": {
                    "path": str(arena.path),
                    "capacity_bytes": arena.capacity_bytes,
                    "free_bytes": arena.free_bytes,
                    "quarantined_bytes": arena.quarantined_bytes,
                    "rows": len(self._cache),
                },
                "identifying": in_progress(self._config.data_dir),
                "shared_responses": self._shared.status() if self._shared else None,
                "responses": self._responses.stats() if self._responses else None,
                "similar": self._similar.stats() if self._similar else None,
                **(self._prefixes.status(self._driver.node.prefixes.publisher.waiting_rows) if self._prefixes else {}),
                "metrics": [
                    {"name": sample.name, "labels": sample.labels, "value": sample.value}
                    for family in self._metrics.registry.collect()
                    for sample in family.samples
                    if not sample.name.endswith(("_bucket", "_created"))
                ],
            }
        ).encode()


def _version() -> str:
    try:
        return version("hyperspace-vllm")
    except PackageNotFoundError:  # run from a checkout
        return "checkout"
