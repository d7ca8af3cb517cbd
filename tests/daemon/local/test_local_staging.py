"""Rows that workers stage, name and read back through shared memory, and how much of the arena they may take."""

from functools import partial
from pathlib import Path

import pytest

from hyperspace_vllm.core.events.prefix_reading import PrefixReleased
from hyperspace_vllm.core.events.prefix_writing import ClientGone, RowArrived, SegmentKeyKnown
from hyperspace_vllm.core.local.kv_messages import (
    NO_ENGINE,
    PrefixAnswer,
    ReleaseLookup,
    RowStaged,
    SegmentNamed,
    StagingGranted,
    StagingUnused,
)
from hyperspace_vllm.core.local.session_messages import Rejected
from hyperspace_vllm.core.records.ids import RowKey, SegmentKey
from hyperspace_vllm.core.records.layout import Layout, Part
from hyperspace_vllm.core.records.limits import MiB
from hyperspace_vllm.daemon.kv.row_cache import UNSTORED
from tests.support.daemons.small_node import (
    ENGINE,
    KEY,
    LAYOUT,
    ROW_BYTES,
    SmallNode,
    connected,
    granted,
    lookup,
    next_message,
    small_node,
)
from tests.support.until import until_async

pytestmark = pytest.mark.io


async def test_a_staged_and_named_row_is_read_back_through_shared_memory(node: SmallNode) -> None:
    async with connected(node, "worker") as worker, connected(node, "scheduler") as scheduler:
        (slab,) = await granted(worker)
        worker.view(slab)[:] = b"K" * ROW_BYTES
        assert worker.send(RowStaged("r", 0, 0, 0, slab))
        await until_async(lambda: node.count(RowArrived) == 1)
        assert scheduler.send(SegmentNamed("r", 0, KEY, "private"))
        assert scheduler.send(lookup(7))
        answer = await next_message(scheduler, PrefixAnswer)
        assert (answer.lookup, answer.end_segment, answer.source) == (7, 1, "memory")
        (row,) = answer.rows
        assert bytes(worker.view(row.slab)) == b"K" * ROW_BYTES
        assert worker.is_current(row.slab)
        scheduler.send(ReleaseLookup(7))
        await until_async(lambda: node.count(PrefixReleased) == 1)
        named = next(e for e in node.events if isinstance(e, SegmentKeyKnown))
        arrived = next(e for e in node.events if isinstance(e, RowArrived))
        assert (named.client, named.shareable, arrived.client, arrived.length) == (
            ENGINE.hex(),
            False,
            ENGINE.hex(),
            ROW_BYTES,
        )


async def test_engines_of_one_name_never_get_each_others_rows(node: SmallNode) -> None:
    others = bytes(range(1, 17))
    async with (
        connected(node, "worker") as worker,
        connected(node, "scheduler") as scheduler,
        connected(node, "worker", others) as other_worker,
        connected(node, "scheduler", others) as other_scheduler,
    ):
        for client in (worker, other_worker):
            (slab,) = await granted(client)
            assert client.send(RowStaged("1", 0, 0, 0, slab))
        for client in (scheduler, other_scheduler):
            assert client.send(SegmentNamed("1", 0, KEY, "private"))
        await until_async(lambda: node.count(RowArrived) == node.count(SegmentKeyKnown) == 2)
        rows = {event.client for event in node.events if isinstance(event, RowArrived)}
        names = {event.client for event in node.events if isinstance(event, SegmentKeyKnown)}
        assert rows == names == {ENGINE.hex(), others.hex()}
        scheduler.close()
        await until_async(lambda: ClientGone(ENGINE.hex()) in node.events)
        assert ClientGone(others.hex()) not in node.events


async def test_a_row_of_no_known_engine_is_rejected(node: SmallNode) -> None:
    async with connected(node, "worker", NO_ENGINE) as worker:
        (slab,) = await granted(worker)
        assert worker.send(RowStaged("1", 0, 0, 0, slab))
        assert "register" in (await next_message(worker, Rejected)).detail
        assert not node.count(RowArrived)


async def test_staging_never_takes_more_than_half_of_the_arena(node: SmallNode) -> None:
    one_part = Layout(bytes(32), 256, (Part(0, ROW_BYTES),), 1)
    async with (
        connected(node, layout=one_part) as worker,
        connected(node, engine=bytes(range(1, 17)), layout=one_part) as other,
    ):
        half = node.cache.arena.capacity_bytes // 2
        shares = [len(await granted(client, 1000)) for client in (worker, other)]
        assert shares == [half * 3 // 4 // ROW_BYTES, (half - shares[0] * ROW_BYTES) * 3 // 4 // ROW_BYTES]
        assert min(shares) > 0
        (free,) = {len(await granted(client, 1000)) for client in (worker, other)}
        assert free == 0
        assert node.cache.arena.free_bytes >= half


async def test_rows_of_one_size_leave_room_for_those_of_the_other_that_a_segment_needs(node: SmallNode) -> None:
    async with connected(node) as worker:
        sizes = [part.row_bytes for part in LAYOUT.parts]
        counts = [len(await granted(worker, 1000, size)) for size in sizes]
        share = node.cache.arena.capacity_bytes // 2 * 3 // 4
        assert counts == [share // sum(sizes)] * 2


async def test_rows_that_wait_to_be_stored_count_as_staged_and_what_did_not_fit_comes_later(node: SmallNode) -> None:
    half = node.cache.arena.capacity_bytes // 2
    for number in range(half // ROW_BYTES):
        slab = node.cache.allocate(ROW_BYTES)
        assert slab is not None
        node.cache.keep(RowKey(bytes([number]) * 32), slab)
        node.cache.lease(RowKey(bytes([number]) * 32), UNSTORED)
    async with connected(node) as worker:
        assert await granted(worker, 5) == ()
        node.cache.end_leases(UNSTORED)
        assert len((await next_message(worker, StagingGranted)).slabs) == 5


async def test_a_thousand_cycles_of_staging_and_leasing_leak_nothing(tmp_path: Path) -> None:
    """A worker and a scheduler; rows are named, dropped, returned unwritten, looked up and evicted."""
    async with small_node(tmp_path, size=2 * MiB) as node:
        capacity = node.cache.arena.capacity_bytes
        async with connected(node) as worker, connected(node, "scheduler") as scheduler:
            read = 0
            for cycle in range(1000):
                key = SegmentKey(cycle.to_bytes(32, "big"))
                (slab,) = await granted(worker)
                if cycle % 5 == 4:
                    worker.send(StagingUnused(slab))
                    continue
                worker.view(slab)[:8] = cycle.to_bytes(8, "big")
                worker.send(RowStaged(f"r{cycle}", 0, 0, 0, slab))
                await until_async(partial(node._staged.get, (ENGINE.hex(), f"r{cycle}", 0)))
                scheduler.send(SegmentNamed(f"r{cycle}", 0, key, "network"))
                scheduler.send(lookup(cycle, key))
                (row,) = (await next_message(scheduler, PrefixAnswer)).rows
                copy = bytes(scheduler.view(row.slab)[:8])
                assert scheduler.is_current(row.slab)
                assert copy == cycle.to_bytes(8, "big")
                read += 1
                scheduler.send(ReleaseLookup(cycle))
            assert read == 800
            await until_async(lambda: node.count(PrefixReleased) == read)
            arena = node.cache.arena
            await until_async(lambda: arena.free_bytes + len(node.cache) * ROW_BYTES == capacity)
            assert node.cache.arena.quarantined_bytes == 0
            assert node.cache.allocate(capacity) is not None, "no row is pinned"
    assert not node.cache.arena.path.exists()
