"""One computation of equal requests, whichever of a host's API servers they come to."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hyperspace_vllm.core.local.claim_messages import ClaimEnded, ClaimRequest, RequestClaimed
from hyperspace_vllm.core.local.messages import NodeMessage
from hyperspace_vllm.core.records.limits import LOOKUPS_PER_CLIENT_MAX, REQUEST_LEASES_MAX
from hyperspace_vllm.daemon.local.request_leases import RequestLeases
from tests.support.cached_server import CHAT, STREAM, Bench, MakeBench, benches, text_of
from tests.support.until import until_async

KEY, OTHER = bytes(32), bytes([1]) * 32


class Table:
    def __init__(self) -> None:
        self.sent: list[tuple[bytes, NodeMessage]] = []
        self.leases = RequestLeases(self._send)

    def _send(self, route: bytes, message: NodeMessage) -> bool:
        self.sent.append((route, message))
        return True

    def claim(self, route: bytes, number: int, key: bytes = KEY, waits: bool = True) -> None:
        self.leases.claim(route, ClaimRequest(number, key, waits))

    def news(self) -> list[tuple[bytes, NodeMessage]]:
        sent, self.sent = self.sent, []
        return sent


def test_the_first_computes_and_the_others_hear_when_it_has_ended() -> None:
    table = Table()
    table.claim(b"a", 1)
    table.claim(b"b", 5)
    table.claim(b"a", 2)
    table.claim(b"b", 6, OTHER)
    assert table.news() == [
        (b"a", RequestClaimed(1, True)),
        (b"b", RequestClaimed(5, False)),
        (b"a", RequestClaimed(2, False)),
        (b"b", RequestClaimed(6, True)),
    ]
    table.leases.over(b"b", KEY)  # which it doesn't hold
    assert table.news() == []
    table.leases.over(b"a", KEY)
    assert table.news() == [(b"b", ClaimEnded(5)), (b"a", ClaimEnded(2))]
    table.claim(b"b", 7)
    assert table.news() == [(b"b", RequestClaimed(7, True))]


def test_who_streams_holds_the_lease_and_is_told_nothing() -> None:
    table = Table()
    table.claim(b"a", 1, waits=False)
    table.claim(b"b", 2, waits=False)
    table.claim(b"c", 3)
    assert table.news() == [(b"c", RequestClaimed(3, False))]
    table.leases.over(b"a", KEY)
    assert table.news() == [(b"c", ClaimEnded(3))]


def test_a_client_that_dies_ends_what_it_held_and_waits_no_more() -> None:
    table = Table()
    table.claim(b"a", 1)
    table.claim(b"b", 2)
    table.claim(b"c", 3)
    table.leases.end(b"c")
    table.news()
    table.leases.end(b"a")
    assert table.news() == [(b"b", ClaimEnded(2))]
    assert len(table.leases) == 0


def test_with_too_many_of_either_everybody_computes() -> None:
    table = Table()
    for number in range(REQUEST_LEASES_MAX + 1):
        table.claim(b"a", number, number.to_bytes(32, "big"))
    assert len(table.leases) == REQUEST_LEASES_MAX
    table.news()
    for number in range(LOOKUPS_PER_CLIENT_MAX + 1):
        table.claim(b"b", number, bytes(32))
    granted = [message.granted for _, message in table.news() if isinstance(message, RequestClaimed)]
    assert granted == [False] * LOOKUPS_PER_CLIENT_MAX + [True]


# --- two servers of one node --------------------------------------------------------------------


@pytest.fixture
async def make_bench(tmp_path: Path) -> AsyncIterator[MakeBench]:
    async with benches(tmp_path) as make:
        yield make


@pytest.fixture
async def pair(make_bench: MakeBench) -> tuple[Bench, Bench]:
    first, second = await make_bench(), await make_bench()
    nodes = {b"first": first.node, b"second": second.node}

    def send(route: bytes, message: NodeMessage) -> bool:
        nodes[route].inbox.append(message)
        return True

    leases = RequestLeases(send)
    for route, node in nodes.items():
        node.route, node.leases, node.api_servers = route, leases, 2
    return first, second


@pytest.mark.io
@pytest.mark.parametrize("led_by", [{}, STREAM])
async def test_a_server_waits_for_the_answer_of_another(pair: tuple[Bench, Bench], led_by: dict[str, object]) -> None:
    first, second = pair
    first.upstream.gate.clear()
    leading = asyncio.create_task(first.ask(CHAT | led_by))
    await until_async(lambda: len(first.upstream.bodies) == 1)
    waiting = [asyncio.create_task(second.ask(CHAT)) for _ in range(3)]
    await until_async(lambda: second.cache.node.pending == 1 and second.cache.flights.readers == 3)
    first.upstream.gate.set()
    answers = await asyncio.gather(leading, *waiting)
    assert {text_of(answer) for answer in answers} == {text_of(answers[0])}
    for answer in answers[1:]:
        assert answer.headers["cache-status"] == "hyperspace; fwd=uri-miss; collapsed"
        assert "age" in answer.headers
    assert second.upstream.bodies == []
    assert len(first.node.leases) == 0


@pytest.mark.io
async def test_who_streams_does_not_wait(pair: tuple[Bench, Bench]) -> None:
    first, second = pair
    first.upstream.gate.clear()
    leading = asyncio.create_task(first.ask(CHAT))
    await until_async(lambda: len(first.upstream.bodies) == 1)
    answer = await second.ask(CHAT | STREAM)
    assert answer.headers["cache-status"] == "hyperspace; fwd=uri-miss; stored"
    first.upstream.gate.set()
    await leading


@pytest.mark.io
@pytest.mark.parametrize("failure", ["refuse", "raise"])
async def test_when_the_other_fails_it_computes_itself(pair: tuple[Bench, Bench], failure: str) -> None:
    first, second = pair
    first.upstream.failures.append(failure)
    first.upstream.gate.clear()
    leading = asyncio.create_task(first.ask(CHAT))
    await until_async(lambda: len(first.upstream.bodies) == 1)
    waiting = asyncio.create_task(second.ask(CHAT))
    if failure == "raise":
        await until_async(lambda: second.cache.node.pending == 1)
        first.upstream.gate.set()
    assert (await leading).status_code in (500, 503)
    answer = await waiting
    assert answer.headers["cache-status"] == "hyperspace; fwd=uri-miss; stored"
    assert len(second.upstream.bodies) == 1
    assert len(first.node.leases) == 0


@pytest.mark.io
async def test_a_client_that_leaves_frees_the_lease(pair: tuple[Bench, Bench]) -> None:
    first, second = pair
    first.upstream.gate.clear()
    leading = asyncio.create_task(first.ask(CHAT))
    await until_async(lambda: len(first.upstream.bodies) == 1)
    waiting = asyncio.create_task(second.ask(CHAT))
    await until_async(lambda: second.cache.node.pending == 1)
    leading.cancel()
    answer = await waiting
    assert answer.headers["cache-status"] == "hyperspace; fwd=uri-miss; stored"


@pytest.mark.io
async def test_a_node_that_says_nothing_costs_a_hint_s_time(pair: tuple[Bench, Bench]) -> None:
    first, _ = pair
    first.node.leases = RequestLeases(lambda route, message: True)
    began = asyncio.get_running_loop().time()
    assert (await first.ask(CHAT)).status_code == 200
    assert asyncio.get_running_loop().time() - began < 1
