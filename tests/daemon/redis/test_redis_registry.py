"""The registry in Redis, with a real redis-server of the test's own on loopback: killed, frozen and restarted."""

import asyncio
import secrets
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from nacl.signing import SigningKey

from hyperspace_vllm.core.local.response_cache_messages import ResponseNotFound
from hyperspace_vllm.core.records.ids import PeerId, network_id, peer_id
from hyperspace_vllm.core.records.limits import PROVIDERS_MAX, REGISTRY_TTL_MS
from hyperspace_vllm.daemon.redis import redis_link, redis_registry
from tests.support import network_nodes
from tests.support.daemons import redis_server
from tests.support.daemons.redis_server import RedisServer
from tests.support.network_nodes import NetworkedNode, body_of, private_network
from tests.support.until import until, until_async

pytestmark = [
    pytest.mark.io,
    redis_server.NEEDED,
]

NETWORK = network_id("test")


def new_peer() -> PeerId:
    return peer_id(SigningKey.generate().verify_key.encode())


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Redis that is there may be as slow as the machine is busy."""
    monkeypatch.setattr(redis_link, "READ_S", 10.0)
    monkeypatch.setattr(redis_registry, "READ_S", 10.0)


MakeRegistry = Callable[[], redis_registry.RedisRegistry]


@pytest.fixture
async def registry(server: RedisServer) -> AsyncIterator[MakeRegistry]:
    made = []

    def make() -> redis_registry.RedisRegistry:
        made.append(redis_registry.RedisRegistry(server.url, NETWORK, new_peer(), now_ms))
        return made[-1]

    yield make
    for each in made:
        await each.close()


def found(registry: redis_registry.RedisRegistry, id: bytes) -> Callable[[], Awaitable[bool]]:
    async def condition() -> bool:
        return await registry.providers(id) != ()

    return condition


async def test_what_one_node_can_serve_the_others_find_until_it_is_gone(registry: MakeRegistry) -> None:
    a, b, id, other = registry(), registry(), secrets.token_bytes(32), secrets.token_bytes(32)
    a.note_stored(id, now_ms() + 60_000)
    a.note_stored(other, now_ms() + 60_000)
    await until_async(found(b, id))
    await until_async(found(b, other))
    assert await a.providers(id) == ()  # not itself
    assert await b.providers(secrets.token_bytes(32)) == ()
    a.note_gone([id])

    async def is_gone() -> bool:
        return await b.providers(id) == ()

    await until_async(is_gone)
    assert await b.providers(other) != ()


async def test_entries_expire_and_the_longest_lasting_come_first(registry: MakeRegistry) -> None:
    reader, id = registry(), secrets.token_bytes(32)
    writers = [registry() for _ in range(PROVIDERS_MAX + 3)]
    for number, writer in enumerate(writers):
        writer.note_stored(id, now_ms() + 60_000 * (number + 1))

    async def all_there() -> bool:
        return len(await reader.providers(id)) == PROVIDERS_MAX

    await until_async(all_there)
    short = secrets.token_bytes(32)
    writers[0].note_stored(short, now_ms() + 400)
    await until_async(found(reader, short))

    async def expired() -> bool:
        return await reader.providers(short) == ()

    await until_async(expired)
    assert len(await reader.providers(id)) == PROVIDERS_MAX


async def test_what_is_no_peer_or_lasts_too_long_is_no_provider(registry: MakeRegistry, server: RedisServer) -> None:
    reader, id, honest = registry(), secrets.token_bytes(32), new_peer()
    client = server.client()
    key = f"hyperspace:{NETWORK.hex()[:16]}:{id.hex()}"
    soon = now_ms() + 60_000
    scores = {b"nobody": soon, b"\xff" * 40: soon, b"1" * 5000: soon, b"": soon, honest.encode(): soon}
    await client.zadd(key, scores)
    await client.zadd(key, {new_peer(): now_ms() + 2 * REGISTRY_TTL_MS, new_peer(): "+inf", new_peer(): 5})
    assert await reader.providers(id) == (honest,)
    wrong = secrets.token_bytes(32)
    await client.set(f"hyperspace:{NETWORK.hex()[:16]}:{wrong.hex()}", b"a string, not a set")
    assert await reader.providers(wrong) == ()
    await client.aclose()


async def test_a_set_is_bounded_and_redis_forgets_it_by_itself(registry: MakeRegistry, server: RedisServer) -> None:
    writer, id, client = registry(), secrets.token_bytes(32), server.client()
    key = f"hyperspace:{NETWORK.hex()[:16]}:{id.hex()}"
    await client.zadd(key, {f"peer {n}": now_ms() + 1000 + n for n in range(200)})
    writer.note_stored(id, now_ms() + 60_000)

    async def bounded() -> bool:
        return int(await client.zcard(key)) == redis_registry.PEERS_MAX

    await until_async(bounded)
    assert 0 < await client.pttl(key) <= REGISTRY_TTL_MS
    await client.aclose()


async def test_a_killed_redis_is_a_quick_miss_and_its_return_without_data_brings_everything_back(
    registry: MakeRegistry, server: RedisServer
) -> None:
    a, b = registry(), registry()
    before, meanwhile = [secrets.token_bytes(32) for _ in range(600)], secrets.token_bytes(32)
    for id in before:
        a.note_stored(id, now_ms() + 60_000)
    await until_async(found(b, before[-1]))
    server.kill()
    for id in before[:200]:
        assert await b.providers(id) == ()
    assert b._link._failures < 10  # it isn't asked each time
    a.note_stored(meanwhile, now_ms() + 60_000)
    a.note_gone([before[0]])
    server.start()
    await until_async(found(b, meanwhile))
    await until_async(found(b, before[1]))
    await until_async(found(b, before[-1]))
    assert await b.providers(before[0]) == ()


async def test_a_redis_that_lost_its_data_unnoticed_is_filled_again(
    registry: MakeRegistry, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_registry, "CHECK_S", 0.2)
    a, b, id, client = registry(), registry(), secrets.token_bytes(32), server.client()
    a.note_stored(id, now_ms() + 60_000)
    await until_async(found(b, id))
    await client.flushall()
    await client.aclose()
    await until_async(found(b, id))


async def test_a_frozen_redis_costs_its_deadline_once_and_mixes_no_answers(
    registry: MakeRegistry, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, c = registry(), registry(), registry()
    first, second = secrets.token_bytes(32), secrets.token_bytes(32)
    a.note_stored(first, now_ms() + 60_000)
    b.note_stored(second, now_ms() + 60_000)
    await until_async(found(c, first))
    await until_async(found(c, second))
    expected = (await c.providers(first), await c.providers(second))
    server.signal(signal.SIGSTOP)
    with monkeypatch.context() as impatient:
        impatient.setattr(redis_registry, "READ_S", 0.1)
        started = time.monotonic()
        assert await asyncio.gather(*(c.providers(first) for _ in range(50))) == [()] * 50
        assert time.monotonic() - started < 5
    server.signal(signal.SIGCONT)
    await until_async(found(c, second))
    for _ in range(20):
        assert (await c.providers(first), await c.providers(second)) == expected


async def test_without_redis_the_queue_stays_bounded(
    registry: MakeRegistry, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.kill()
    monkeypatch.setattr(redis_registry, "QUEUE_MAX", 300)
    monkeypatch.setattr(redis_registry, "REGISTRY_ENTRIES_MAX", 100)
    a, b = registry(), registry()
    every = [secrets.token_bytes(32) for _ in range(1000)]
    for id in every:
        a.note_stored(id, now_ms() + 60_000)
    assert len(a._queue) <= 300
    assert len(a._own) == 100
    server.start()
    await until_async(found(b, every[-1]))
    await until_async(found(b, every[-100]))
    assert await b.providers(every[0]) == ()


def test_whole_nodes_find_each_others_responses_through_redis_and_do_without_it(
    tmp_path: Path, server: RedisServer
) -> None:
    nodes = private_network(tmp_path, 2, registry=server.url)
    try:
        first, second = nodes
        until(lambda: second.card().get("p2p") and first.status()["p2p"]["known_peers"] == 1)
        names = [f"early {number}" for number in range(20)]
        for name in names:
            first.store(name)
        until(lambda: first.find("nothing").answer is not None)
        directory = tmp_path / "late"
        directory.mkdir(mode=0o700)
        key = Path(first.config.network_key_file)
        nodes.append(NetworkedNode(network_nodes.config_of(directory, key, nodes, registry=server.url)))
        late = nodes[-1]  # it has heard no gossip of it
        until(lambda: late.card().get("p2p") and late.status()["p2p"]["known_peers"] == 2)
        found = ((late.find(name), body_of(name)) for name in names)  # Redis has 100 ms for a hint
        assert any(lookup.hinted and lookup.body == body for lookup, body in found)

        server.kill()
        second.store("without Redis")
        until(lambda: first.find("without Redis").body == body_of("without Redis"))
        assert isinstance(late.find("nobody has this").answer, ResponseNotFound)
    finally:
        for node in nodes:
            node.stop()
