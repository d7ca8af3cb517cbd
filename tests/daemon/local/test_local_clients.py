"""Clients and nodes that die, freeze and fork, in real processes; a lease is short where it is lost."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from hyperspace_vllm.client import NodeClient
from hyperspace_vllm.config import Config
from hyperspace_vllm.core.events.prefix_reading import PrefixReleased
from hyperspace_vllm.core.events.prefix_writing import ClientGone
from hyperspace_vllm.core.local.kv_messages import RegisterLayout
from hyperspace_vllm.core.local.session_messages import GetStatus, Status
from hyperspace_vllm.core.local.slab import PAGE_BYTES, Slab
from hyperspace_vllm.core.records.ids import RowKey, row_key
from tests.support.daemons.small_node import (
    ENGINE,
    KEY,
    LAYOUT,
    ROW_BYTES,
    SmallNode,
    connected,
    granted,
    next_message,
    small_node,
)
from tests.support.until import until_async

pytestmark = pytest.mark.io

CLIENT = """
import sys, time
from pathlib import Path
from hyperspace_vllm.api.node_lookup import HINT_S, NodeLookup
from hyperspace_vllm.client import NodeClient
from hyperspace_vllm.config import Config
from hyperspace_vllm.core.records.layout import Layout, Part
from hyperspace_vllm.core.local.messages import *

def receive(kind):
    while True:
        for message in client.receive():
            if isinstance(message, kind):
                return message
        time.sleep(0.001)

row_bytes = int(sys.argv[2])
client = NodeClient(Config(data_dir=Path(sys.argv[1])), "worker", "child")
assert client.wait_connected(60)
layout = Layout(bytes(32), 256, (Part(0, row_bytes), Part(512, row_bytes // 2)), 1)
client.send(RegisterLayout(layout, b"the childs token"))
client.send(WantStaging(row_bytes, 2))
slabs = receive(StagingGranted).slabs
client.send(LookupPrefix(1, "r", (bytes(range(32)),), 0, 0, 1000, "network"))
leased = receive(PrefixAnswer).rows
views = [client.view(slab) for slab in slabs]
epoch = client.epoch
print("ready", flush=True)
sys.stdin.readline()
# Resumed past its lease: it doesn't know yet, and goes on writing where it was writing.
for view in views:
    view[:] = b"X" * len(view)
print("torn" if any(not client.is_current(row.slab) for row in leased) else "whole", flush=True)
deadline = time.monotonic() + 10
while client.epoch == epoch and time.monotonic() < deadline:
    time.sleep(0.001)
print("new session" if client.epoch != epoch and client.connected else "never noticed", flush=True)
try:
    client.view(slabs[0])
except LookupError:
    print("slabs gone", flush=True)
sys.stdin.readline()
for lock in client.take_earlier_locks():
    lock.release()
sys.stdin.readline()
"""


class ClientProcess:
    """A worker process with two granted slabs and one leased row."""

    def __init__(self, data_dir: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(data_dir), str(ROW_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    async def line(self) -> str:
        assert self.process.stdout is not None
        async with asyncio.timeout(30):
            return (await asyncio.to_thread(self.process.stdout.readline)).strip()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
async def child(strict: SmallNode) -> AsyncIterator[ClientProcess]:
    slab = strict.cache.allocate(ROW_BYTES)
    assert slab is not None
    strict.cache.keep(RowKey(row_key(KEY, 0, 0)), slab)
    process = ClientProcess(strict.config.data_dir)
    try:
        assert await process.line() == "ready"
        yield process
    finally:
        process.kill()


async def test_a_client_frozen_past_its_lease_corrupts_nobody_and_notices(
    strict: SmallNode, child: ClientProcess
) -> None:
    arena = strict.cache.arena
    os.kill(child.process.pid, signal.SIGSTOP)
    await until_async(lambda: strict.server.engine_leases == 0)
    assert arena.quarantined_bytes == 2 * ROW_BYTES
    assert strict.count(PrefixReleased) == 1
    assert strict.events[-1] == ClientGone(b"the childs token".hex())
    # Everything that is left goes to others, the leased row's pages too, and they fill it.
    others: list[Slab] = []
    while (slab := strict.cache.allocate(PAGE_BYTES)) is not None:
        arena.view(slab)[:] = b"o" * PAGE_BYTES
        others.append(slab)
    assert len(others) * PAGE_BYTES == arena.capacity_bytes - arena.quarantined_bytes
    os.kill(child.process.pid, signal.SIGCONT)
    child.go_on()
    assert [await child.line() for _ in range(3)] == ["torn", "new session", "slabs gone"]
    assert all(bytes(arena.view(slab)) == b"o" * PAGE_BYTES for slab in others)
    # Its slabs stay out of use until it has said that it writes there no more.
    await asyncio.sleep(strict.lease_ms / 2000)
    assert arena.quarantined_bytes == 2 * ROW_BYTES
    child.go_on()
    await until_async(lambda: arena.free_bytes == 2 * ROW_BYTES)
    assert arena.quarantined_bytes == 0


async def test_a_killed_client_loses_its_lease_and_its_slabs_are_used_again(
    strict: SmallNode, child: ClientProcess
) -> None:
    child.kill()
    await until_async(lambda: strict.server.engine_leases == 0)
    await until_async(lambda: strict.cache.arena.quarantined_bytes == 0)
    assert strict.metrics.quarantined_bytes._value.get() == 0
    assert list((strict.config.data_dir / "sessions").iterdir()) == []


async def test_a_node_that_was_itself_paused_expires_nobody_whose_heartbeats_wait(strict: SmallNode) -> None:
    async with connected(strict, "worker") as worker:
        epoch = worker.epoch
        time.sleep(1.5 * strict.lease_ms / 1000)  # noqa: ASYNC251  # the pause itself, of the node's whole loop
        for _ in range(5):
            await asyncio.sleep(strict.lease_ms / 5000)
        assert (worker.connected, worker.epoch) == (True, epoch)


async def test_a_forked_child_has_a_session_of_its_own(node: SmallNode) -> None:
    async with connected(node, "worker") as client:
        child = os.fork()
        if child == 0:
            fine = not client.connected and client.wait_connected(60) and client.send(GetStatus())
            client.close()
            os._exit(0 if fine else 1)
        await until_async(lambda: node.server.engine_leases == 2)

        def ended() -> tuple[int, int] | None:
            pid, status = os.waitpid(child, os.WNOHANG)
            return (pid, status) if pid else None

        _, status = await until_async(ended)
        assert os.waitstatus_to_exitcode(status) == 0
        assert client.connected
        client.send(GetStatus())
        await next_message(client, Status)


async def test_without_a_node_a_client_neither_waits_nor_raises(tmp_path: Path) -> None:
    client = NodeClient(Config(data_dir=tmp_path), "worker", "n")
    calls: Counter[object] = Counter()
    quickest_s = 1.0
    for _ in range(200):
        began = time.monotonic()
        calls.update([client.send(GetStatus()), len(client.receive()), client.epoch, client.connected])
        quickest_s = min(quickest_s, time.monotonic() - began)
    assert quickest_s < 0.005
    assert calls == {False: 800}
    with pytest.raises(LookupError):
        client.view(Slab(0, 0, 1, 0))
    assert not client.is_current(Slab(0, 0, 1, 0))
    client.close()
    client.close()
    assert not client.send(GetStatus())


@pytest.mark.parametrize("arena_lies_in", ["/dev/shm", "the data directory"])
async def test_a_client_finds_the_next_node_and_drops_what_the_last_one_leased(
    tmp_path: Path, arena_lies_in: str
) -> None:
    client = NodeClient(Config(data_dir=tmp_path), "worker", "n")
    slabs: list[Slab] = []

    def is_in(epoch: int) -> bool:
        return client.connected and client.epoch == epoch

    for epoch in (1, 2):
        async with small_node(tmp_path, shared_memory=Path(arena_lies_in)):
            await until_async(partial(is_in, epoch))
            assert not any(client.is_current(slab) for slab in slabs)
            client.send(RegisterLayout(LAYOUT, ENGINE))
            slabs = list(await granted(client, 2))
            assert all(client.is_current(slab) for slab in slabs)
    client.close()
