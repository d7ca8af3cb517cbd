"""KV that a node signed while its clock was ahead: others believe it once the clock is right, encoded once."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from hyperspace_vllm.daemon.identity import Identity
from hyperspace_vllm.daemon.kv import object_encoder
from tests.support.nodes import Answer, SharedPool, TestNode, keys, peer_of
from tests.support.until import until_async

pytestmark = pytest.mark.io

KEYS = keys("document", 3)
DAY_S = 86_400


@pytest.fixture
async def pool() -> AsyncIterator[SharedPool]:
    async with SharedPool.started() as pool:
        yield pool


def clock(monkeypatch: pytest.MonkeyPatch, ahead_s: int) -> None:
    """What a node takes for the time when it signs."""
    set_clock = SimpleNamespace(wall_ms=lambda: time.time_ns() // 1_000_000 + ahead_s * 1_000)
    monkeypatch.setattr(object_encoder, "clock", set_clock)


async def found(node: TestNode) -> Answer:
    """The whole prefix; a busy machine may be too slow for one fetch's patience, and has another try."""
    async with asyncio.timeout(30):
        while (answer := await node.look_up(KEYS)).end_segment < len(KEYS):
            node.release()
    return answer


@pytest.mark.parametrize("restarted", [False, True])
async def test_prefixes_signed_by_a_clock_ahead_are_fetched_once_it_is_right(
    tmp_path: Path, pool: SharedPool, monkeypatch: pytest.MonkeyPatch, restarted: bool
) -> None:
    clock(monkeypatch, DAY_S)
    reader_id = peer_of(Identity.load(tmp_path / "reader"))
    writer = TestNode(tmp_path / "writer", (reader_id,), compute=pool)
    writer.stage(KEYS)
    await until_async(lambda: writer.store.rows == 12)
    dated_ahead = {stored.manifest for stored in writer.stored}
    if restarted:
        await writer.close()
        clock(monkeypatch, 0)
        writer = TestNode(tmp_path / "writer", (reader_id,), compute=pool)
    reader = TestNode(tmp_path / "reader", (writer.address,), compute=pool)
    await until_async(lambda: reader.transport.is_connected(writer.identity.peer_id))
    if not restarted:
        assert (await reader.look_up(KEYS)).end_segment == 0
        assert reader.failures() == {"from_the_future": 1}
        assert (await writer.look_up(KEYS)).end_segment == 3
        writer.release()
        writer.stored.clear()
        clock(monkeypatch, 0)
    # Peers hear of as many new ones; the last of the old ones may be told of late.
    await until_async(lambda: len({stored.manifest for stored in writer.stored} - dated_ahead) >= len(dated_ahead))
    for node in (reader, writer):
        assert node.rows_are_right(await found(node), KEYS)
        node.release()
        await node.close()
