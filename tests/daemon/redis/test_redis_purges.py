"""What is purged, or found false, stays out of Redis and is not brought back from there."""

import asyncio
import signal
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from hyperspace_vllm.core.local.response_cache_messages import ResponseAudited
from hyperspace_vllm.core.peers.findings import FINDING_EVERY_MS, FINDINGS_MIN
from hyperspace_vllm.daemon import clock
from hyperspace_vllm.daemon.responses.audit_requests import AuditRequests
from tests.support.daemons import redis_server
from tests.support.daemons.redis_fleet import NETWORK, MakeNode, redis_key
from tests.support.daemons.redis_server import RedisServer
from tests.support.network_nodes import request_key
from tests.support.until import until_async

pytestmark = [pytest.mark.io, redis_server.NEEDED, pytest.mark.usefixtures("patience")]


async def test_a_purged_entry_leaves_redis_too_and_an_evicted_one_stays(node: MakeNode, client: "Redis") -> None:
    a = await node("a", response_bytes=4096)
    await a.share("purged")
    await a.share("evicted")
    a.store.purge([request_key("purged")])
    a.network.purge([request_key("purged")])
    for number in range(4):
        await a.share(number)
    assert a.stored("evicted") is None
    assert await client.exists(redis_key("purged")) == 0
    assert await client.exists(redis_key("evicted")) == 1


@pytest.mark.parametrize("turns", [0, 1, 2, 4, 8, 16])
async def test_a_read_under_way_brings_back_nothing_that_is_purged(node: MakeNode, turns: int) -> None:
    a, b = await node("a"), await node("b")
    await a.share("x")
    await a.share("y")
    assert await b.find("y") is not None  # it is connected
    lookup = b.begin("x")
    for _ in range(turns):
        await asyncio.sleep(0)
    was_answered = lookup in b.answers
    b.store.purge([request_key("x")])
    b.network.purge([request_key("x")])
    after = b.begin("x")
    await until_async(lambda: {lookup, after} <= b.answers.keys())
    assert b.answers[after] == (None, "not_found")
    assert was_answered or b.answers[lookup] == (None, "not_found")
    await until_async(lambda: b.shared.status()["queued"] == 0)
    assert await b.find("x") is None
    assert b.stored("x") is None
    assert b.stored("y") is not None


async def test_what_is_purged_while_redis_is_frozen_is_not_brought_back(node: MakeNode, server: RedisServer) -> None:
    a, b = await node("a"), await node("b")
    await a.share("x")
    assert await b.find("nothing") is None  # it is connected
    server.signal(signal.SIGSTOP)
    lookup = b.begin("x")
    await asyncio.sleep(0)
    b.store.purge([request_key("x")])
    b.network.purge([request_key("x")])
    assert b.answers[lookup] == (None, "not_found")
    server.signal(signal.SIGCONT)
    await until_async(lambda: b.shared.status()["queued"] == 0)
    assert await b.find("x") is None
    assert b.stored("x") is None


@pytest.mark.parametrize("busy", [False, True])
async def test_what_is_computed_after_a_purge_takes_the_place_of_what_was_purged(
    node: MakeNode, server: RedisServer, client: "Redis", busy: bool
) -> None:
    a = await node("a")
    await a.share("x")
    purged = await client.get(redis_key("x"))
    server.signal(signal.SIGSTOP)
    if busy:  # the deletion has to wait
        a.compute("y")
        await until_async(lambda: a.shared.status()["queued"] == 1)
    a.store.purge([request_key("x")])
    a.network.purge([request_key("x")])
    a.compute("x")
    assert a.stored("x") is not None
    await asyncio.sleep(0)  # it has been told
    server.signal(signal.SIGCONT)
    await until_async(lambda: a.shared.status()["queued"] == 0)
    await until_async(lambda: a.written == 2 + busy)
    assert await client.get(redis_key("x")) not in (None, purged)


async def test_whom_a_node_that_has_only_redis_convicts_is_believed_no_more(
    node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await node("a"), await node("b")
    await a.share("x")
    await a.share("y")
    found = await b.find("x")
    assert found is not None
    audits = AuditRequests(NETWORK, b.identity.public_key, b.store, b.network.audited, b.metrics)
    now = clock.now()
    for number in range(FINDINGS_MIN):
        ago_ms = (FINDINGS_MIN - 1 - number) * FINDING_EVERY_MS
        earlier = replace(now, mono_ms=now.mono_ms - ago_ms)
        monkeypatch.setattr(clock, "now", lambda earlier=earlier: earlier)
        audits.heard(ResponseAudited(request_key("x"), found.proof, 40, 40, bytes([number])))
    assert await b.find("y") is None
    assert b.failures("untrusted_signer") == 1
    assert b.stored("x") is None
