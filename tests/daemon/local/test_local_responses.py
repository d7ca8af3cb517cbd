"""Responses of other nodes, looked up over the local socket."""

import asyncio
import os
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from hyperspace_vllm.api.node_lookup import HINT_S, NodeLookup
from hyperspace_vllm.async_client import AsyncNodeClient
from hyperspace_vllm.client import NodeClient
from hyperspace_vllm.config import Config
from hyperspace_vllm.core.local.messages import encode
from hyperspace_vllm.core.local.response_cache_messages import (
    ReleaseResponse,
    ResponseFound,
    ResponseHint,
    ResponseNotFound,
)
from hyperspace_vllm.core.local.session_messages import LOCAL_PROTOCOL, GetStatus, Hello, Rejected, Status
from hyperspace_vllm.core.records.ids import RequestKey
from hyperspace_vllm.core.records.limits import LOOKUPS_PER_CLIENT_MAX, RESPONSE_BYTES_MAX
from tests.support.daemons.small_node import (
    FOUND,
    SmallNode,
    connected,
    find,
    next_message,
    raw_socket,
    small_node,
    wanted,
)
from tests.support.until import until_async

pytestmark = pytest.mark.io


async def test_a_client_hears_of_the_hint_and_of_the_answer_under_its_own_number(node: SmallNode) -> None:
    async with connected(node, "api", layout=None) as one, connected(node, "api", layout=None) as other:
        for client in (one, other):
            client.send(find(7))
        finder = await wanted(node, 2)
        (first, *rest), (second, *_) = finder.wanted
        assert rest == [bytes(32), bytes([1]) * 32, 300]
        assert first != second
        node.responses.hint(first, True)
        node.responses.hint(second, False)
        hints = [await next_message(client, ResponseHint) for client in (one, other)]
        assert sorted((hint.lookup, hint.hinted) for hint in hints) == [(7, False), (7, True)]
        node.responses.answer(first, FOUND, "hit")
        node.responses.answer(second, None, "not_found")
        hinted, unhinted = (one, other) if hints[0].hinted else (other, one)
        answer = await next_message(hinted, ResponseFound)
        assert answer == ResponseFound(7, b"{}", b"proof", 1, 2, "12D3KooW", "gossip", "members")
        assert await next_message(unhinted, ResponseNotFound) == ResponseNotFound(7, "not_found")
        node.responses.answer(first, FOUND, "twice")
        one.send(find(7))  # the number is free again
        await wanted(node, 3)
        assert finder.released == []


async def test_the_largest_response_crosses_the_socket(node: SmallNode) -> None:
    async with connected(node, "api", layout=None) as client:
        client.send(find(1))
        ((lookup, *_),) = (await wanted(node)).wanted
        body = os.urandom(RESPONSE_BYTES_MAX)
        node.responses.answer(lookup, replace(FOUND, body=body, source="s" * 1000), "hit")
        answer = await next_message(client, ResponseFound)
        assert (answer.body, answer.source) == (body, "s" * 256)


async def test_a_node_that_asks_nobody_says_so(tmp_path: Path) -> None:
    async with small_node(tmp_path, finds=False) as node, connected(node, "api", layout=None) as client:
        client.send(find(1))
        assert await next_message(client, ResponseNotFound) == ResponseNotFound(1, "off")
        client.send(ReleaseResponse(1))
        client.send(GetStatus())
        await next_message(client, Status)


async def test_a_released_lookup_is_neither_hinted_nor_answered(node: SmallNode) -> None:
    async with connected(node, "api", layout=None) as client:
        client.send(find(1))
        client.send(ReleaseResponse(1))
        client.send(ReleaseResponse(1))
        finder = await wanted(node)
        await until_async(lambda: finder.released == [finder.wanted[0][0]])
        node.responses.hint(finder.wanted[0][0], True)
        node.responses.answer(finder.wanted[0][0], FOUND, "late")
        client.send(GetStatus())
        await next_message(client, Status)


@pytest.mark.parametrize("goes", ["goodbye", "silence"])
async def test_a_client_that_goes_releases_its_lookups(strict: SmallNode, goes: str) -> None:
    if goes == "goodbye":
        async with connected(strict, "api", layout=None) as client:
            client.send(find(1))
            client.send(find(2))
            finder = await wanted(strict, 2)
    else:
        async with raw_socket(strict) as socket:
            await socket.send(encode(Hello(LOCAL_PROTOCOL, "api", bytes(16), "n")))
            for number in (1, 2):
                await socket.send(encode(find(number)))
            finder = await wanted(strict, 2)
            await until_async(lambda: strict.server.engine_leases == 0)
    await until_async(lambda: sorted(finder.released) == [lookup for lookup, *_ in finder.wanted])
    for lookup in finder.released:
        strict.responses.answer(lookup, FOUND, "late")


async def test_response_lookups_beyond_the_bound_are_answered_busy(node: SmallNode) -> None:
    async with connected(node, "api", layout=None) as client:
        for number in range(LOOKUPS_PER_CLIENT_MAX + 1):
            await until_async(partial(client.send, find(number)))
        assert await next_message(client, ResponseNotFound) == ResponseNotFound(LOOKUPS_PER_CLIENT_MAX, "busy")
        client.send(ReleaseResponse(0))
        client.send(find(LOOKUPS_PER_CLIENT_MAX))
        await wanted(node, LOOKUPS_PER_CLIENT_MAX + 1)


async def test_a_response_lookup_under_way_keeps_its_number(node: SmallNode) -> None:
    async with connected(node, "api", layout=None) as client:
        client.send(find(1))
        client.send(find(1))
        assert "under way" in (await next_message(client, Rejected)).detail
        assert len((await wanted(node)).wanted) == 1


async def test_an_api_server_learns_of_hint_and_answer_while_its_heartbeat_reads_the_socket_too(
    node: SmallNode,
) -> None:
    async with connected(node, "api", layout=None) as client:
        lookups = NodeLookup(AsyncNodeClient(client))
        hints_s: list[float] = []
        for number in range(1, 101):
            began = time.perf_counter()
            pending = lookups.start(RequestKey(bytes(32)), bytes(32), 30.0)
            assert pending is not None
            lookup, *_ = (await wanted(node, number)).wanted[-1]
            node.responses.hint(lookup, True)
            await pending.hint
            hints_s.append(time.perf_counter() - began)
            node.responses.answer(lookup, FOUND, "hit")
            answer = await pending.answer
            assert answer is not None
            assert answer.body == b"{}"
        print(f"hint p50: {statistics.median(hints_s) * 1000:.2f} ms")  # the loop is the node's as well, and polls
        assert min(hints_s) < HINT_S


async def test_a_node_that_dies_is_not_waited_for(tmp_path: Path) -> None:
    client = NodeClient(Config(data_dir=tmp_path), "api", "n")
    lookups = NodeLookup(AsyncNodeClient(client))
    assert lookups.start(RequestKey(bytes(32)), bytes(32), 30.0) is None
    async with small_node(tmp_path) as node:
        await until_async(lambda: client.connected)
        pending = lookups.start(RequestKey(bytes(32)), bytes(32), 60.0)
        assert pending is not None
        await wanted(node)
    async with small_node(tmp_path):  # it comes back, and knows of nothing
        async with asyncio.timeout(30):
            assert await pending.answer is None
    client.close()
