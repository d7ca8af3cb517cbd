"""What clients ask of a node over its socket, and what it lets them do: real sockets, real shared memory."""

import asyncio
import stat
from functools import partial
from pathlib import Path

import pytest

from hyperspace_vllm.core.events.node_state import ServedChanged
from hyperspace_vllm.core.events.prefix_reading import PrefixReleased, PrefixWanted
from hyperspace_vllm.core.events.prefix_writing import ClientGone, RequestOver, RowArrived
from hyperspace_vllm.core.local.kv_messages import (
    PrefixAnswer,
    PrefixesInMemory,
    ReleaseLookup,
    RequestEnded,
    RowStaged,
    SegmentNamed,
    StagingUnused,
    WantStaging,
)
from hyperspace_vllm.core.local.messages import ClientMessage, decode_node_message, encode
from hyperspace_vllm.core.local.response_cache_messages import (
    FindResponse,
    PurgeResponses,
    ResponseAudited,
    StoreResponse,
    TouchResponses,
)
from hyperspace_vllm.core.local.session_messages import (
    LOCAL_PROTOCOL,
    GetStatus,
    Hello,
    LeaseLost,
    Rejected,
    Status,
    Welcome,
)
from hyperspace_vllm.core.local.slab import PAGE_BYTES, Slab
from hyperspace_vllm.core.records.ids import SegmentKey, network_id, sha256, wire_id
from hyperspace_vllm.core.records.layout import Layout
from hyperspace_vllm.core.records.limits import LOOKUPS_PER_CLIENT_MAX, MiB
from hyperspace_vllm.core.records.vram_digest import approximate_count, overlap
from hyperspace_vllm.daemon.identity import Identity
from hyperspace_vllm.daemon.local import served
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
    raw_socket,
    small_node,
)
from tests.support.until import until_async

pytestmark = pytest.mark.io


async def test_the_socket_is_private(node: SmallNode) -> None:
    async with connected(node, "cli"):
        assert stat.S_IMODE(node.config.socket_path.stat().st_mode) == 0o600


async def test_a_client_learns_who_its_node_is(node: SmallNode) -> None:
    async with connected(node, "api") as client:
        assert client.epoch == 1
        assert client.peer_id == Identity.load(node.config.data_dir).peer_id
        assert client.network_id == network_id("default")
        assert node.metrics.clients._value.get() == 1
        assert node.server.engine_leases == 1
    await until_async(lambda: node.server.engine_leases == 0)


async def test_status_needs_no_engine_lease(node: SmallNode) -> None:
    async with connected(node, "cli", layout=None) as client:
        assert node.server.engine_leases == 0
        client.send(GetStatus())
        assert (await next_message(client, Status)).json == b"{}"


@pytest.mark.parametrize(("scope", "asks"), [("private", False), ("network", True), ("public", True)])
async def test_only_a_private_lookup_stays_inside_the_node(tmp_path: Path, scope: str, asks: bool) -> None:
    async with small_node(tmp_path) as node, connected(node, "scheduler") as scheduler:
        scheduler.send(lookup(1, scope=scope))
        await next_message(scheduler, PrefixAnswer)
        wanted = next(e for e in node.events if isinstance(e, PrefixWanted))
        assert wanted.may_ask_peers is asks


async def test_a_request_that_ends_is_forgotten(node: SmallNode) -> None:
    async with connected(node, "scheduler") as scheduler:
        scheduler.send(RequestEnded("r"))
        await until_async(lambda: RequestOver(ENGINE.hex(), "r") in node.events)


async def test_responses_go_to_their_store_and_hits_of_them_to_the_network(node: SmallNode) -> None:
    async with connected(node, "api", layout=None) as client:
        message = StoreResponse(bytes(32), "network", bytes(32), "0.32.0", 1000, b"{}")
        client.send(message)
        client.send(TouchResponses((bytes(32),)))
        await until_async(lambda: node.touched)
        assert node.stored == [message]
    assert node.finder is not None
    assert node.finder.hits == [bytes(32)]


async def test_what_is_purged_or_found_false_goes_from_where_it_is_shared_too(node: SmallNode) -> None:
    async with connected(node) as client:
        client.send(ResponseAudited(b"passed".ljust(32), b"proof", 9, 0))
        client.send(ResponseAudited(b"false".ljust(32), b"proof", 9, 1))
        client.send(PurgeResponses((b"purged".ljust(32),)))
        await until_async(lambda: len(node.finder.purged) == 2 if node.finder else False)
    assert node.finder is not None
    assert node.finder.purged == [b"false".ljust(32), b"purged".ljust(32)]


async def test_lookups_beyond_the_bound_are_answered_busy_and_a_release_makes_room(node: SmallNode) -> None:
    node.answers = False
    async with connected(node, "scheduler") as scheduler:
        for number in range(LOOKUPS_PER_CLIENT_MAX + 1):
            await until_async(partial(scheduler.send, lookup(number)))
        answer = await next_message(scheduler, PrefixAnswer)
        assert (answer.lookup, answer.end_segment, answer.reason) == (LOOKUPS_PER_CLIENT_MAX, 0, "busy")
        scheduler.send(ReleaseLookup(0))
        scheduler.send(lookup(LOOKUPS_PER_CLIENT_MAX))
        await until_async(lambda: node.count(PrefixWanted) == LOOKUPS_PER_CLIENT_MAX + 1)
        assert not scheduler.receive()


async def test_an_answer_after_the_release_is_ignored(node: SmallNode) -> None:
    node.answers = False
    async with connected(node, "scheduler") as scheduler:
        scheduler.send(lookup(1))
        scheduler.send(ReleaseLookup(1))
        await until_async(lambda: node.count(PrefixReleased) == 1)
        wanted = next(e for e in node.events if isinstance(e, PrefixWanted))
        node.prefixes.answer(wanted.lookup, 0, (), "none", "", "late")
        scheduler.send(GetStatus())
        await next_message(scheduler, Status)


async def test_a_miss_ends_its_lookup(node: SmallNode) -> None:
    async with connected(node, "scheduler") as scheduler:
        for _ in range(3):  # the same number again
            scheduler.send(lookup(1))
            assert (await next_message(scheduler, PrefixAnswer)).end_segment == 0


async def test_without_the_kv_cache_nothing_is_staged_or_found(tmp_path: Path) -> None:
    async with small_node(tmp_path, kv_cache=False) as node, connected(node, "scheduler") as client:
        assert await granted(client, 4) == ()
        client.send(lookup(1))
        assert (await next_message(client, PrefixAnswer)).reason == "off"


async def test_goodbye_frees_what_was_granted_and_drops_what_was_not_named(node: SmallNode) -> None:
    async with connected(node) as worker:
        first, _second = await granted(worker, 2)
        worker.send(RowStaged("r", 0, 0, 0, first))
    await until_async(lambda: node.count(ClientGone) == 1)
    assert node.cache.arena.free_bytes == node.cache.arena.capacity_bytes
    assert node.metrics.staged_dropped_total.labels("client_gone")._value.get() == 1


async def test_the_network_hears_what_all_engines_serve_and_no_more_of_those_that_go(
    node: SmallNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "PEER_RECORD_AGAIN_MS", 200)
    keys = [SegmentKey(sha256(f"segment {number}".encode())) for number in range(3)]
    ids = [wire_id(network_id("default"), key) for key in keys]
    model = bytes([8]) * 32
    other = Layout(bytes([9]) * 32, 256, LAYOUT.parts, 1)
    async with connected(node, "scheduler") as stays, connected(node, "api", layout=None) as api:
        assert stays.send(PrefixesInMemory(400, (keys[0], keys[1]), ()))
        assert api.send(FindResponse(1, KEY, model, 100))
        await until_async(lambda: node.told)
        both = node.told[-1]
        assert (both.models, both.fingerprints, both.load_permille) == ((model,), (LAYOUT.fingerprint,), 400)
        assert overlap(both.vram_digest, ids) == 2
        async with connected(node, "scheduler", layout=other) as goes:
            assert goes.send(PrefixesInMemory(1000, (keys[0], keys[2]), ()))
            await until_async(lambda: node.told[-1] != both)
            assert [*node.told[-1].fingerprints] == [LAYOUT.fingerprint, other.fingerprint]
            assert node.told[-1].load_permille == 700
            assert overlap(node.told[-1].vram_digest, ids) == 3
            assert stays.send(PrefixesInMemory(400, (), (keys[1],)))
        await until_async(lambda: node.told[-1].fingerprints == (LAYOUT.fingerprint,))
        assert node.told[-1].load_permille == 400
        assert overlap(node.told[-1].vram_digest, ids) == approximate_count(node.told[-1].vram_digest) == 1
    await until_async(lambda: node.told[-1] == ServedChanged((), (), 0, b""))


async def test_an_engine_is_gone_with_its_last_worker_or_its_scheduler(node: SmallNode) -> None:
    async with connected(node, "worker") as first:
        async with connected(node, "worker"):
            pass
        await until_async(lambda: node.server.engine_leases == 1)
        assert not node.count(ClientGone)
        async with connected(node, "scheduler"):
            pass
        await until_async(lambda: node.count(ClientGone) == 1)
        first.close()
        await until_async(lambda: node.count(ClientGone) == 2)


@pytest.mark.parametrize(
    "wrong",
    [
        "part",
        "rank",
        "length",
        "generation",
        "never granted",
        "another's",
        "row bytes",
        "lookup twice",
    ],
)
async def test_a_clients_mistake_is_rejected_and_harms_nobody(tmp_path: Path, wrong: str) -> None:
    async with small_node(tmp_path) as node, connected(node) as client, connected(node) as other:
        node.answers = False
        (slab,) = await granted(client)
        (others,) = await granted(other)
        forged = Slab(slab.slot, slab.offset, slab.length, slab.generation + 1)
        client.send(lookup(1))
        mistakes: dict[str, ClientMessage] = {
            "part": RowStaged("r", 0, 2, 0, slab),
            "rank": RowStaged("r", 0, 0, 1, slab),
            "length": RowStaged("r", 0, 1, 0, slab),
            "generation": RowStaged("r", 0, 0, 0, forged),
            "never granted": StagingUnused(Slab(60, 60 * PAGE_BYTES, ROW_BYTES, 1)),
            "another's": RowStaged("r", 0, 0, 0, others),
            "row bytes": WantStaging(12345, 1),
            "lookup twice": lookup(1),
        }
        client.send(mistakes[wrong])
        assert (await next_message(client, Rejected)).detail
        assert not node.count(RowArrived)
        client.send(RowStaged("r", 0, 0, 0, slab))
        other.send(RowStaged("r", 1, 0, 0, others))
        await until_async(lambda: node.count(RowArrived) == 2)


async def test_nothing_that_depends_on_the_layout_comes_before_it(node: SmallNode) -> None:
    async with connected(node, "scheduler", layout=None) as client:
        for message in (WantStaging(ROW_BYTES, 1), lookup(1), SegmentNamed("r", 0, KEY, "network")):
            client.send(message)
            assert "register" in (await next_message(client, Rejected)).detail


async def test_garbage_is_rejected_and_strangers_have_no_lease(node: SmallNode) -> None:
    async with raw_socket(node) as socket, asyncio.timeout(10):
        for frames in ([b"\xff\x00garbage"], [b""], [b"a", b"b"]):
            await socket.send_multipart(frames)
            assert isinstance(decode_node_message(await socket.recv()), Rejected)
        await socket.send(encode(GetStatus()))
        assert decode_node_message(await socket.recv()) == LeaseLost()
        await socket.send(encode(Hello(99, "api", bytes(16), "n")))
        assert "protocol" in decode_node_message(await socket.recv()).detail  # type: ignore[union-attr]
    assert node.metrics.failures_total.labels("local", "protocol")._value.get() == 4


async def test_a_session_belongs_to_one_connection(node: SmallNode) -> None:
    hello = encode(Hello(LOCAL_PROTOCOL, "worker", bytes(16), "n"))
    async with raw_socket(node) as first, raw_socket(node) as second, asyncio.timeout(10):
        await first.send(hello)
        assert isinstance(decode_node_message(await first.recv()), Welcome)
        await second.send(hello)
        assert "in use" in decode_node_message(await second.recv()).detail  # type: ignore[union-attr]


async def test_a_message_beyond_the_size_limit_is_never_queued(node: SmallNode) -> None:
    async with connected(node, "api") as client:
        huge = StoreResponse(bytes(32), "network", bytes(32), "v", 1, bytes(9 * MiB))
        assert not client.send(huge)
        assert client.connected
