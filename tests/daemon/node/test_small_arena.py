"""Nodes whose arena holds less than a prompt: real arena, disk, sealing, coding and bulk transport."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hyperspace_vllm.core.records.ids import row_key
from hyperspace_vllm.core.records.layout import Layout, Part
from hyperspace_vllm.core.records.limits import MiB
from hyperspace_vllm.daemon.identity import Identity
from tests.support.nodes import SharedPool, TestNode, keys, peer_of
from tests.support.until import until_async

pytestmark = pytest.mark.io

ROW_BYTES = 512 * 1024
LAYOUT = Layout(bytes(32), 256, (Part(0, ROW_BYTES),), 1)
WINDOWED = Layout(bytes(32), 256, (Part(0, ROW_BYTES), Part(512, ROW_BYTES)), 1)
ARENA_BYTES = 8 * MiB  # a header of one page and 15 rows
KEYS = keys("long", 31)


@pytest.fixture
async def pool() -> AsyncIterator[SharedPool]:
    async with SharedPool.started() as pool:
        yield pool


async def stored(node: TestNode, layout: Layout = LAYOUT, step: int = 3) -> None:
    """The prompt is computed, a few segments a step, and lies on the node's disk."""
    per_segment = len(layout.parts)
    for first in range(0, len(KEYS), step):
        node.stage(KEYS[first : first + step], layout)
        await until_async(lambda: not node.node.prefixes.publisher.waiting_rows)
    await until_async(lambda: node.store.rows == len(KEYS) * per_segment)


async def test_the_beginning_of_a_prompt_longer_than_the_arena_is_served(tmp_path: Path, pool: SharedPool) -> None:
    node = TestNode(tmp_path, arena_bytes=ARENA_BYTES, compute=pool)
    await stored(node)
    await node.look_up(KEYS[:15], LAYOUT)
    node.release()
    slabs = []  # of a worker, which take the place of row 0 and others; it keeps one
    while row_key(KEYS[0], 0, 0) in node.cache:
        slabs.append(node.cache.allocate(ROW_BYTES))
    for slab in slabs[1:]:
        assert slab is not None
        node.cache.free(slab)
    for source in ("disk", "memory"):
        answer = await node.look_up(KEYS, LAYOUT)
        assert (answer.end_segment, answer.source, answer.reason) == (14, source, "arena_full")
        assert node.rows_are_right(answer, KEYS)
        node.release()
    assert node.failures()["arena_full"] == 2
    await node.close()


async def test_a_window_leaves_more_of_a_small_arena_to_full_attention(tmp_path: Path, pool: SharedPool) -> None:
    node = TestNode(tmp_path, arena_bytes=ARENA_BYTES, compute=pool)
    await stored(node, WINDOWED)
    answer = await node.look_up(KEYS, WINDOWED)
    assert (answer.end_segment, len(answer.rows)) == (13, 15)
    assert node.rows_are_right(answer, KEYS)
    node.release()
    await node.close()


async def test_a_peer_fills_a_small_arena_as_far_as_it_goes(tmp_path: Path, pool: SharedPool) -> None:
    identity = Identity.load(tmp_path / "small")
    large = TestNode(tmp_path / "large", (peer_of(identity),), compute=pool)
    small = TestNode(tmp_path / "small", (large.address,), arena_bytes=ARENA_BYTES, compute=pool)
    await stored(large, step=len(KEYS))
    await until_async(lambda: small.transport.is_connected(large.identity.peer_id))
    answer = await small.look_up(KEYS, LAYOUT)
    assert (answer.end_segment, answer.source, answer.reason) == (15, "network", "arena_full"), small.failures()
    assert small.rows_are_right(answer, KEYS)
    small.release()
    await small.close()
    await large.close()


async def test_rows_are_stored_however_much_is_written_after_them(tmp_path: Path, pool: SharedPool) -> None:
    node = TestNode(tmp_path, arena_bytes=ARENA_BYTES, compute=pool)
    node.stage(KEYS[:7], LAYOUT)
    while node.cache.allocate(ROW_BYTES) is not None:
        pass  # another engine's rows
    await until_async(lambda: not node.node.prefixes.publisher.waiting_rows)
    await until_async(lambda: node.store.rows == 7)
    assert "evicted" not in node.failures()
    assert node.cache.allocate(ROW_BYTES) is not None  # nothing stays for longer
    await node.close()


async def test_engines_of_several_layouts_share_a_small_arena(tmp_path: Path, pool: SharedPool) -> None:
    """Two architectures, and one model under two block sizes, hence segment lengths: keys and rows of each its own."""
    layouts = (
        Layout(b"a" * 32, 256, (Part(0, 100_000),), 1),
        Layout(b"b" * 32, 256, (Part(0, 300_000), Part(600, 40_000)), 2),
        Layout(b"c" * 32, 384, (Part(0, 150_000),), 1),
        Layout(b"d" * 32, 1024, (Part(512, 700_000), Part(4096, 9_000)), 1),
    )
    node = TestNode(tmp_path, arena_bytes=ARENA_BYTES, compute=pool)
    prompts = [keys(f"prompt {number}", 8) for number in range(len(layouts))]
    for first in range(0, 8, 2):
        for prompt, layout in zip(prompts, layouts, strict=True):
            node.stage(prompt[first : first + 2], layout)
        await until_async(lambda: not node.node.prefixes.publisher.waiting_rows)
    await until_async(lambda: node.store.rows == 8 * sum(len(layout.parts) * layout.ranks for layout in layouts))
    for _ in range(2):
        answers = []
        for prompt, layout in zip(prompts, layouts, strict=True):
            answers.append(await node.look_up(prompt, layout))
            assert answers[-1].end_segment > 0
            assert node.rows_are_right(answers[-1], prompt)
            node.release()
        assert [answer.end_segment for answer in answers] == [8, 8, 8, 8]
    await node.close()


async def test_rows_for_a_client_that_cannot_be_told_of_them_make_room(tmp_path: Path, pool: SharedPool) -> None:
    node = TestNode(tmp_path, arena_bytes=ARENA_BYTES, compute=pool)
    await stored(node)
    for reached in (True, False):
        node.clients.reached = reached
        answer = await node.look_up(KEYS[:3], LAYOUT)
        assert answer.end_segment == 3
        assert [node.cache.is_leased(row_key(key, 0, 0)) for key in KEYS[:3]] == [reached] * 3
        if reached:
            node.release()
    await node.close()
