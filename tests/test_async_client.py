"""An event loop that is woken by its node: real sockets, and a node in a process of its own; asyncio's loop and uvloop.

Where a test has no heartbeats, nothing but the socket wakes the loop: an edge that was lost would stay lost.
"""

import asyncio
import gc
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import pytest
import uvloop

from bench.answering_node import answering_node
from hyperspace_vllm import client as client_module
from hyperspace_vllm.api.node_lookup import NodeLookup, Pending
from hyperspace_vllm.async_client import AsyncNodeClient
from hyperspace_vllm.client import NodeClient
from hyperspace_vllm.config import Config
from hyperspace_vllm.core.local.messages import NodeMessage
from hyperspace_vllm.core.local.response_cache_messages import TouchResponses
from hyperspace_vllm.core.local.session_messages import GetStatus, Status
from hyperspace_vllm.core.records.ids import RequestKey
from hyperspace_vllm.core.records.limits import LEASE_MS, RESPONSE_LOOKUPS_MAX

pytestmark = pytest.mark.io

T = TypeVar("T")
PATIENT_S = 60.0


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Callable[[Awaitable[object]], object]]:
    """Runs a coroutine on one loop or the other."""
    with asyncio.Runner(loop_factory=request.param) as runner:
        yield runner.run  # type: ignore[misc]


Run = Callable[[Awaitable[T]], T]


def started(lookups: NodeLookup, number: int) -> Pending:
    pending = lookups.start(RequestKey(number.to_bytes(32, "big")), bytes(32), PATIENT_S)
    assert pending is not None
    return pending


async def answered(lookups: NodeLookup, number: int, timeout_s: float = PATIENT_S / 2) -> float:
    """Seconds until the node's answer to a lookup; it must be of this one."""
    began_s = time.perf_counter()
    async with asyncio.timeout(timeout_s):
        answer = await started(lookups, number).answer
    assert answer is not None
    assert answer.body == number.to_bytes(32, "big")
    return time.perf_counter() - began_s


def connected(data_dir: Path) -> NodeClient:
    client = NodeClient(Config(data_dir=data_dir), "api", "server")
    assert client.wait_connected(PATIENT_S)
    return client


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_no_answer_waits_for_a_heartbeat(tmp_path: Path, run: Run[None], monkeypatch: pytest.MonkeyPatch) -> None:
    # A heartbeat in a while, for the lease alone: no answer may come as late as that.
    monkeypatch.setattr(client_module, "_BEAT_S", 2 * PATIENT_S)
    monkeypatch.setattr(client_module, "_LEASE_S", 4 * PATIENT_S)
    with answering_node(tmp_path, lease_ms=round(4 * PATIENT_S * 1000)), closing(connected(tmp_path)) as client:

        async def ask() -> None:
            link = AsyncNodeClient(client)
            lookups = NodeLookup(link)
            for number in range(300):
                await answered(lookups, number)
            # Sends consume edges: many at once, and more while the answers arrive.
            for burst in range(20):
                at = 1000 * (burst + 1)
                pendings = [started(lookups, at + number) for number in range(RESPONSE_LOOKUPS_MAX)]
                for _ in range(16):
                    link.send(TouchResponses((bytes(32),)))
                    await asyncio.sleep(0)
                async with asyncio.timeout(PATIENT_S / 2):
                    answers = [await pending.answer for pending in pendings]
                assert all(answer is not None for answer in answers)
                assert lookups.pending == 0

        run(ask())


async def overheard(link: AsyncNodeClient, busy: Callable[[], object]) -> None:
    """The node's answer arrives while the loop is busy, then `busy` uses the socket, and the loop goes on."""
    for _ in range(10):
        heard: asyncio.Future[NodeMessage] = asyncio.get_running_loop().create_future()
        link.listen(lambda messages, heard=heard: heard.set_result(messages[0]) if messages else None)  # type: ignore[misc]
        assert link.send(GetStatus())
        time.sleep(0.1)  # noqa: ASYNC251
        busy()
        async with asyncio.timeout(PATIENT_S / 4):
            assert isinstance(await heard, Status)


def test_an_edge_that_a_send_consumes_is_not_lost(
    tmp_path: Path, run: Run[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_BEAT_S", 2 * PATIENT_S)
    monkeypatch.setattr(client_module, "_LEASE_S", 4 * PATIENT_S)
    with answering_node(tmp_path, lease_ms=round(4 * PATIENT_S * 1000)), closing(connected(tmp_path)) as client:
        link = AsyncNodeClient(client)
        run(overheard(link, lambda: link.send(TouchResponses((bytes(32),)))))


def test_an_edge_that_the_heartbeats_thread_consumes_is_not_lost(
    tmp_path: Path, run: Run[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_BEAT_S", 0.01)
    monkeypatch.setattr(client_module, "_LEASE_S", 4 * PATIENT_S)
    with answering_node(tmp_path, lease_ms=round(4 * PATIENT_S * 1000)), closing(connected(tmp_path)) as client:
        assert client._link is not None
        client._link._heartbeat_at = float("inf")  # it only reads: no acknowledgement wakes the loop a moment later
        run(overheard(AsyncNodeClient(client), lambda: None))


def test_an_answer_that_the_heartbeats_thread_reads_is_heard_at_once(
    tmp_path: Path, run: Run[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_BEAT_S", 0.0002)  # the two read in turn
    with answering_node(tmp_path), closing(connected(tmp_path)) as client:

        async def ask() -> None:
            lookups = NodeLookup(AsyncNodeClient(client))
            for number in range(1000):
                await answered(lookups, number)

        run(ask())


def test_a_loop_that_stalls_keeps_the_lease_and_hears_what_came_meanwhile(tmp_path: Path, run: Run[None]) -> None:
    with answering_node(tmp_path), closing(connected(tmp_path)) as client:

        async def stall() -> None:
            lookups = NodeLookup(AsyncNodeClient(client))
            await answered(lookups, 1)
            epoch = client.epoch
            pending = started(lookups, 2)
            time.sleep(LEASE_MS / 1000 + 1)  # noqa: ASYNC251  # the stall itself
            assert (client.connected, client.epoch) == (True, epoch)
            async with asyncio.timeout(PATIENT_S / 2):
                assert (await pending.answer) is not None
            await answered(lookups, 3)

        run(stall())


def test_a_frozen_node_ends_the_session_and_the_lookups_and_is_found_again(
    tmp_path: Path, run: Run[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_LEASE_S", 3.0)
    monkeypatch.setattr(client_module, "_BEAT_S", 0.2)
    with answering_node(tmp_path) as node, closing(connected(tmp_path)) as client:

        async def freeze() -> None:
            lookups = NodeLookup(AsyncNodeClient(client))
            await answered(lookups, 1)
            os.kill(node.pid, signal.SIGSTOP)
            pending = started(lookups, 2)
            async with asyncio.timeout(PATIENT_S / 2):
                assert await pending.answer is None  # by the lease, long before its deadline
            assert not client.connected
            assert lookups.start(RequestKey(bytes(32)), bytes(32), PATIENT_S) is None
            os.kill(node.pid, signal.SIGCONT)
            assert await asyncio.to_thread(client.wait_connected, PATIENT_S)
            await answered(lookups, 3)

        run(freeze())


def test_a_node_that_dies_ends_the_lookups_and_the_next_one_answers(
    tmp_path: Path, run: Run[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_LEASE_S", 3.0)
    monkeypatch.setattr(client_module, "_REVIVE_AFTER_S", {})
    with closing(NodeClient(Config(data_dir=tmp_path), "api", "server")) as client:
        lookups = NodeLookup(AsyncNodeClient(client))

        async def die() -> None:
            assert lookups.start(RequestKey(bytes(32)), bytes(32), PATIENT_S) is None, "there is no node"
            for number in (1, 2):
                with answering_node(tmp_path) as node:
                    assert await asyncio.to_thread(client.wait_connected, PATIENT_S)
                    await answered(lookups, number)
                    os.kill(node.pid, signal.SIGSTOP)
                    pending = started(lookups, 9)
                async with asyncio.timeout(PATIENT_S / 2):
                    assert await pending.answer is None

        run(die())


def test_a_client_that_another_thread_closes_leaves_the_loop_nothing_to_watch(tmp_path: Path, run: Run[None]) -> None:
    with answering_node(tmp_path):

        async def close() -> None:
            for _ in range(3):
                client = await asyncio.to_thread(connected, tmp_path)
                link = AsyncNodeClient(client)
                lookups = NodeLookup(link)
                await answered(lookups, 1)
                pending = started(lookups, 2)
                await asyncio.to_thread(link.close)
                async with asyncio.timeout(PATIENT_S / 2):
                    await pending.answer  # it may have come before
                assert lookups.start(RequestKey(bytes(32)), bytes(32), PATIENT_S) is None
                del client, link, lookups, pending
                gc.collect()
                await asyncio.sleep(0.1)
                opened.append(descriptors())

        opened: list[int] = []
        run(close())
        assert opened[0] == opened[-1]


def test_a_client_serves_one_loop_after_the_other(tmp_path: Path) -> None:
    with answering_node(tmp_path), closing(connected(tmp_path)) as client:
        link = AsyncNodeClient(client)
        before = descriptors()
        for number, loop_factory in enumerate([asyncio.new_event_loop, uvloop.new_event_loop] * 3):
            with asyncio.Runner(loop_factory=loop_factory) as runner:
                runner.run(answered(NodeLookup(link), number))
        assert descriptors() <= before + 1


def test_a_loop_in_another_thread_takes_over_while_the_first_one_runs(tmp_path: Path, run: Run[None]) -> None:
    with answering_node(tmp_path), closing(connected(tmp_path)) as client:
        link = AsyncNodeClient(client)

        async def two_loops() -> None:
            await answered(NodeLookup(link), 1)
            for number in range(2, 6):
                await asyncio.to_thread(lambda n=number: asyncio.run(answered(NodeLookup(link), n)))  # type: ignore[misc]
                await answered(NodeLookup(link), 10 + number)

        run(two_loops())


def test_the_loop_of_a_forked_child_has_a_session_of_its_own(tmp_path: Path) -> None:
    with answering_node(tmp_path), closing(connected(tmp_path)) as client:
        link = AsyncNodeClient(client)

        async def fork() -> None:
            lookups = NodeLookup(link)
            await answered(lookups, 1)
            child = os.fork()
            if child == 0:
                fine = False
                try:
                    assert client.wait_connected(PATIENT_S)
                    asyncio.run(answered(NodeLookup(link), 2))
                    fine = True
                finally:
                    os._exit(0 if fine else 1)
            _, status = await asyncio.to_thread(os.waitpid, child, 0)
            assert os.waitstatus_to_exitcode(status) == 0
            for number in range(3, 20):
                await answered(lookups, number)

        asyncio.run(fork())


def test_a_client_without_a_listener_is_looked_at(tmp_path: Path) -> None:
    """vLLM's scheduler polls in each of its steps; nothing is read for it before."""
    with answering_node(tmp_path), closing(connected(tmp_path)) as client:
        assert client.send(GetStatus())
        found: list[NodeMessage] = []
        deadline_s = time.monotonic() + PATIENT_S
        while not found:
            assert time.monotonic() < deadline_s
            found += client.receive()
        assert isinstance(found[0], Status)
