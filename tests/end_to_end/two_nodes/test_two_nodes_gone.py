"""Two nodes over real sockets: a peer that freezes or stops, a full arena and a damaged disk cost a stall or a miss."""

import asyncio
import signal
import sys
import time
from asyncio.subprocess import PIPE
from contextlib import suppress

import pytest

from hyperspace_vllm.core.records.limits import KiB, MiB
from hyperspace_vllm.core.records.reason import Reason
from hyperspace_vllm.daemon.identity import Identity
from tests.support.daemons.node_pair import FAULT_S, KEYS, ROWS_NEEDED, ROWS_STORED, Pair, Tampered, is_whole
from tests.support.nodes import keys, peer_of
from tests.support.paths import ROOT
from tests.support.peer_process import layout_of
from tests.support.until import until_async

pytestmark = [pytest.mark.io, pytest.mark.asyncio(loop_scope="module")]


@pytest.mark.parametrize("chunks_before", [0, 40, 200])
async def test_a_peer_that_freezes_in_the_middle_costs_a_stall(pair: Pair, chunks_before: int) -> None:
    a, b = await pair.start(Tampered)
    assert isinstance(a.store, Tampered)
    a.store.stall_after = chunks_before
    answer = await b.look_up(KEYS)
    after_s = time.monotonic() - a.store.stalled_at
    a.store.go_on.set()
    assert answer.end_segment < len(KEYS)
    assert answer.reason == "stalled"
    assert after_s < FAULT_S
    assert b.transport.charges[a.identity.peer_id, Reason.STALLED]
    b.release()
    await until_async(lambda: len(b.cache) * 64 * KiB <= b.arena.capacity_bytes - b.arena.free_bytes)


@pytest.mark.parametrize("signal_sent", [signal.SIGSTOP, signal.SIGKILL])
async def test_a_process_that_stops_in_the_middle_costs_a_stall(pair: Pair, signal_sent: signal.Signals) -> None:
    layout, wanted = layout_of(MiB), keys("process", 40)
    directory, peer = str(pair._at("p")), peer_of(pair.b_identity)
    arguments = [directory, peer, str(len(wanted)), str(MiB)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.support.peer_process", *arguments, stdin=PIPE, stdout=PIPE, cwd=ROOT
    )
    assert process.stdout is not None
    try:
        address = (await process.stdout.readline()).decode().strip()
        b = pair.node("b", (address,))
        await until_async(lambda: b.transport.is_connected(b.transport.peers[0]))
        looking = asyncio.create_task(b.look_up(wanted, layout))
        await until_async(lambda: len(b.cache) >= 3)
        process.send_signal(signal_sent)
        stopped_at = time.monotonic()
        answer = await looking
        assert time.monotonic() - stopped_at < FAULT_S
        assert 0 < answer.end_segment < len(wanted)  # what came before the fault is used
        assert b.rows_are_right(answer, wanted)
        b.release()
        # The next lookup doesn't wait for that peer again.
        asked = b.transport.charges.copy()
        assert (await b.look_up(keys("other", 3), layout)).end_segment == 0
        assert b.transport.charges == asked
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_a_second_holder_finishes_what_the_first_left(pair: Pair) -> None:
    c_identity = Identity.load(pair._at("c"))
    a = pair.node("a", (peer_of(pair.b_identity), peer_of(c_identity)), store=Tampered)
    a.stage(KEYS)
    await until_async(lambda: a.store.rows == ROWS_STORED)
    c = pair.node("c", (a.address, peer_of(pair.b_identity)))
    await until_async(lambda: c.transport.is_connected(a.identity.peer_id))
    assert is_whole(c, await c.look_up(KEYS))
    await until_async(lambda: c.store.rows == ROWS_NEEDED)
    b = pair.node("b", (a.address, c.address))
    await until_async(lambda: all(b.transport.is_connected(peer) for peer in b.transport.peers))
    assert isinstance(a.store, Tampered)
    a.store.stall_after = 10
    answer = await b.look_up(KEYS)
    a.store.go_on.set()
    assert is_whole(b, answer)


async def test_a_full_arena_is_a_miss(pair: Pair) -> None:
    _, b = await pair.start(arena_bytes=4 * 64 * KiB)
    answer = await b.look_up(KEYS)
    assert (answer.end_segment, answer.reason) == (0, "arena_full")
    assert b.failures()["arena_full"]
    await until_async(lambda: b.arena.free_bytes + len(b.cache) * 128 * KiB >= b.arena.capacity_bytes)


async def test_a_full_disk_leaves_the_rows_in_memory(pair: Pair) -> None:
    a = pair.node("a", (), disk_bytes=1000)
    a.stage(KEYS)
    await until_async(lambda: a.failures().get("disk_full"))
    answer = await a.look_up(KEYS)
    assert answer.source == "memory"
    assert is_whole(a, answer)


async def test_a_fetcher_with_a_full_disk_uses_what_it_fetched(pair: Pair) -> None:
    _, b = await pair.start(b_disk_bytes=1000)
    assert is_whole(b, await b.look_up(KEYS))
    await until_async(lambda: b.failures().get("disk_full"))
    assert b.store.rows == 0


async def test_damage_on_the_own_disk_is_noticed_and_removed(pair: Pair) -> None:
    a = pair.node("a", ())
    a.stage(KEYS)
    await until_async(lambda: a.store.rows == ROWS_STORED)
    await pair.stop(a)
    for path in (pair.directory / "a" / "chunks").glob("*.obj"):
        path.write_bytes(bytes(path.stat().st_size))
    a = pair.node("a", ())
    assert (await a.look_up(KEYS)).end_segment == 0
    assert a.failures()["damaged"]
    await until_async(lambda: a.store.rows < ROWS_STORED)


async def test_a_few_bad_chunks_on_the_own_disk_are_rebuilt(pair: Pair) -> None:
    a = pair.node("a", ())
    a.stage(KEYS)
    await until_async(lambda: a.store.rows == ROWS_STORED)
    await pair.stop(a)
    for path in (pair.directory / "a" / "chunks").glob("*.obj"):
        with path.open("r+b") as file:
            file.write(bytes(3000))
    a = pair.node("a", ())
    answer = await a.look_up(KEYS)
    assert answer.source == "disk"
    assert is_whole(a, answer)
