"""A redis-server, and nodes of one fleet that share it."""

import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from hyperspace_vllm.core.response import lookup
from hyperspace_vllm.daemon.redis import redis_link
from tests.support.daemons import redis_server
from tests.support.daemons.redis_fleet import FleetNode, MakeNode
from tests.support.daemons.redis_server import RedisServer


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Redis that is there may be as slow as the machine is busy."""
    monkeypatch.setattr(redis_link, "READ_S", 10.0)
    monkeypatch.setattr(lookup, "SHARED_MS", 10_000)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server.running(tmp_path) as made:
        yield made


@pytest.fixture
async def client(server: RedisServer) -> AsyncIterator[Redis]:
    client = server.client()
    yield client
    await client.aclose()


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "network.key"
    path.touch(0o600)
    path.write_text(secrets.token_hex(32))
    return path


@pytest.fixture
async def node(tmp_path: Path, server: RedisServer, key_file: Path) -> AsyncIterator[MakeNode]:
    made: list[FleetNode] = []

    async def make(name: str, key: Path | None = key_file, url: str = server.url, **settings: object) -> FleetNode:
        made.append(FleetNode(tmp_path / name, url, key, **settings))
        made[-1].start()
        return made[-1]

    yield make
    for each in made:
        await each.close()
