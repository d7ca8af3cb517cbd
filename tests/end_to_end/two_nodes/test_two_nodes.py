"""Two nodes over real sockets: B gets A's rows byte for byte, those of nodes that found each other too."""

import asyncio
import time

import pytest

from hyperspace_vllm.core.records.ids import sha256
from hyperspace_vllm.core.records.layout import Layout, Part
from hyperspace_vllm.core.records.limits import KiB, MiB
from hyperspace_vllm.daemon import clock
from hyperspace_vllm.daemon.identity import Identity
from tests.support.daemons.node_pair import (
    KEYS,
    NETWORK_KEY,
    ROWS_NEEDED,
    ROWS_STORED,
    Pair,
    Tampered,
    has_document,
    introduce,
    is_whole,
    refused,
)
from tests.support.engines.fault_servers import FAULT_S
from tests.support.nodes import TestNode, keys, peer_of
from tests.support.until import until_async

pytestmark = [pytest.mark.io, pytest.mark.asyncio(loop_scope="module")]


# --- what works ---------------------------------------------------------------------------------


async def test_b_gets_byte_for_byte_what_a_held(pair: Pair) -> None:
    a, b = await pair.start()
    answer = await b.look_up(KEYS)
    assert is_whole(b, answer)
    assert (answer.source, answer.verified_by, answer.reason) == ("network", "ed25519+kzg+blake3", "hit")
    assert a.failures() == b.failures() == {}
    b.release()
    again = await b.look_up(KEYS)
    assert (again.source, again.verified_by) == ("memory", "memory")
    assert is_whole(b, again)


async def test_a_prefix_of_a_longer_prompt_is_fetched_with_its_own_window(pair: Pair) -> None:
    _, b = await pair.start()
    wanted = KEYS[:2] + keys("other", 3)
    answer = await b.look_up(wanted)
    assert answer.end_segment == 2
    assert b.rows_are_right(answer, wanted)


async def test_after_a_restart_b_is_served_from_its_own_disk_and_serves_others(pair: Pair) -> None:
    a, b = await pair.start()
    assert is_whole(b, await b.look_up(KEYS))
    await pair.stop(b)
    await pair.stop(a)
    c_identity = Identity.load(pair._at("c"))
    b = pair.node("b", (peer_of(a.identity), peer_of(c_identity)))
    answer = await b.look_up(KEYS)
    assert (answer.source, answer.verified_by) == ("disk", "blake3")
    assert is_whole(b, answer)
    # C trusts A, which made the rows, and gets them from B: A's manifest vouches for them.
    c = pair.node("c", (b.address, peer_of(a.identity)))
    await until_async(lambda: c.transport.is_connected(b.identity.peer_id))
    assert is_whole(c, await c.look_up(KEYS))


async def test_nodes_that_know_each_other_only_by_discovery_share_a_prefix(pair: Pair) -> None:
    a, b = pair.node("a", (), network_key=NETWORK_KEY), pair.node("b", (), network_key=NETWORK_KEY)
    await has_document(a)
    introduce(a, b)
    assert b.node.prefixes.peers == (a.identity.peer_id,)
    assert is_whole(b, await b.look_up(KEYS))
    assert a.failures() == b.failures() == {}
    assert b.trust.standings.service(a.identity.peer_id, clock.now()) > 0.1
    # Both can announce what they have: A its objects, B those that it keeps.
    await until_async(lambda: len(rows_told(a)) == ROWS_STORED)
    await until_async(lambda: rows_told(b) <= rows_told(a) and len(b.stored) >= 4)
    assert {event.manifest for event in b.stored} <= {event.manifest for event in a.stored}
    b.introduce()
    assert not b.node.prefixes.peers
    assert (await b.look_up(keys("other", 3))).reason == "no_peers"


async def test_what_the_disk_kept_is_reported_again_and_private_rows_never_are(pair: Pair) -> None:
    a = pair.node("a", ())
    a.stage(keys("secret", 2), shareable=False)
    await has_document_besides(a, 2 * 2 * 2)
    await until_async(lambda: len(rows_told(a)) == ROWS_STORED)
    await pair.stop(a)
    assert len(rows_told(a)) == ROWS_STORED
    a = pair.node("a", ())
    assert a.stored == []
    a.prefixes.report_stored()
    assert len(rows_told(a)) == ROWS_STORED


def rows_told(node: TestNode) -> set[bytes]:
    """What the node told its listener; an object is reported a moment after its rows are stored."""
    return {row for event in node.stored if event.shareable for row in event.row_ids}


async def has_document_besides(node: TestNode, rows: int) -> None:
    node.stage(KEYS)
    await until_async(lambda: node.store.rows == ROWS_STORED + rows)


async def test_a_stranger_is_neither_served_nor_asked(pair: Pair) -> None:
    a = pair.node("a", (), network_key=NETWORK_KEY)
    await has_document(a)
    for name, key in (("without", None), ("wrong", sha256(b"another network's key"))):
        stranger = pair.node(name, (), network_key=key)
        introduce(a, stranger)
        assert a.node.prefixes.peers == stranger.node.prefixes.peers == ()
        # It knows where A is, and would trust A's manifests.
        believer = pair.node(f"{name}-b", (a.address,), network_key=key)
        introduce(a, believer)
        assert (await believer.look_up(KEYS)).end_segment == 0
        assert a.failures()["unknown_peer"]


async def test_a_manifest_outlives_its_producer_where_the_network_key_vouches_for_it(pair: Pair) -> None:
    d_identity = Identity.load(pair._at("d"))
    a = pair.node("a", (), network_key=NETWORK_KEY)
    b = pair.node("b", (peer_of(d_identity),), network_key=NETWORK_KEY)
    await has_document(a)
    introduce(a, b)
    assert is_whole(b, await b.look_up(KEYS))
    await until_async(lambda: b.store.rows == ROWS_NEEDED)
    await pair.stop(a)
    c = pair.node("c", (), network_key=NETWORK_KEY)
    introduce(b, c)
    assert not c.trust.is_member(a.identity.public_key)
    answer = await c.look_up(KEYS)
    assert is_whole(c, answer)
    assert answer.source == "network"
    # After a restart, with no peer to vouch for A, its rows still count: the tag is stored with them.
    await until_async(lambda: c.store.rows == ROWS_NEEDED)
    await pair.stop(c)
    c = pair.node("c", (), network_key=NETWORK_KEY)
    assert is_whole(c, await c.look_up(KEYS))
    # Under another key the tag is worthless, on the wire and on the disk.
    d = pair.node("d", (b.address,), network_key=sha256(b"another network's key"))
    await until_async(lambda: d.transport.is_connected(b.identity.peer_id))
    await refused(b, d, "untrusted_producer")
    await pair.stop(c)
    c = pair.node("c", (), network_key=sha256(b"another network's key"))
    assert c.store.rows == 0


async def test_a_peer_that_is_dropped_in_the_middle_costs_no_more_than_a_stall(pair: Pair) -> None:
    a = pair.node("a", (), store=Tampered, network_key=NETWORK_KEY)
    b = pair.node("b", (), network_key=NETWORK_KEY)
    await has_document(a)
    introduce(a, b)
    assert isinstance(a.store, Tampered)
    a.store.stall_after = 40
    looking = asyncio.create_task(b.look_up(KEYS))
    await until_async(lambda: isinstance(a.store, Tampered) and a.store.stalled_at)
    dropped_at = time.monotonic()
    b.introduce()
    answer = await looking
    assert time.monotonic() - dropped_at < FAULT_S
    a.store.go_on.set()
    assert answer.end_segment < len(KEYS)
    assert "stalled" not in {reason for _, reason in b.transport.charges}
    b.release()
    await until_async(lambda: len(b.cache) * 64 * KiB <= b.arena.capacity_bytes - b.arena.free_bytes)


# --- what stays on the node ----------------------------------------------------------------------


async def test_private_rows_serve_their_own_node_only(pair: Pair) -> None:
    a, b = await pair.start(shareable=False)
    assert (await b.look_up(KEYS)).end_segment == 0
    assert is_whole(a, await a.look_up(KEYS))


async def test_a_private_lookup_asks_nobody(pair: Pair) -> None:
    a, b = await pair.start()
    answer = await b.look_up(KEYS, may_ask_peers=False)
    assert (answer.end_segment, answer.reason) == (0, "local_only")
    assert a.metrics.bytes_total.labels("served")._value.get() == 0


async def test_64_mib_cost_the_core_at_most_200_events(pair: Pair) -> None:
    layout = Layout(bytes(32), 256, (Part(0, 4 * MiB),), 1)
    wanted = keys("long", 16)
    a = pair.node("a", (peer_of(pair.b_identity),), arena_bytes=80 * MiB)
    a.stage(wanted, layout)
    await until_async(lambda: a.store.rows == len(wanted))
    b = pair.node("b", (a.address,), arena_bytes=80 * MiB)
    await until_async(lambda: b.transport.is_connected(a.identity.peer_id))
    answer = await b.look_up(wanted, layout, deadline_ms=30_000)
    assert answer.end_segment == len(wanted)
    assert b.rows_are_right(answer, wanted)
    assert b.driver.events <= 200
