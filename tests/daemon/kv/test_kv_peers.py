"""Peers of the bulk transport that come, move and go: who is asked, admitted and called."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from pathlib import Path

import pytest
from nacl.signing import SigningKey

from hyperspace_vllm.core.events.known_peers import KvEndpoint
from hyperspace_vllm.core.records.ids import ManifestDigest, PeerId, peer_id
from hyperspace_vllm.core.records.limits import (
    DIALS_BURST_S,
    DIALS_OWN_TO_HOST_PER_S,
    DIALS_TO_HOST_PER_S,
    KV_LINKS_MAX,
)
from hyperspace_vllm.core.records.reason import Reason
from hyperspace_vllm.daemon import clock
from hyperspace_vllm.daemon.peer_failed import PeerFailed
from hyperspace_vllm.daemon.zmq_pump import HANDSHAKE_MS
from tests.support.daemons.kv_sides import CHUNK, ROW_ID, Side, fetch, put_object
from tests.support.until import until_async

pytestmark = pytest.mark.io


@pytest.fixture
async def strangers(tmp_path: Path) -> AsyncIterator[tuple[Side, Side]]:
    """A server and a client that have never heard of each other."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    server, client = Side(tmp_path / "a"), Side(tmp_path / "b")
    yield server, client
    await client.transport.close()
    await server.transport.close()


def own(peer: PeerId, address: str) -> KvEndpoint:
    return KvEndpoint(peer, address, own=True)


def introduce(server: Side, client: Side) -> PeerId:
    server.transport.admit([client.identity.peer_id])
    client.transport.set_peers([own(server.identity.peer_id, server.transport.endpoint)])
    return server.identity.peer_id


async def test_a_discovered_peer_is_asked_and_served_like_a_configured_one(strangers: tuple[Side, Side]) -> None:
    server, client = strangers
    record = put_object(server.store)
    peer = introduce(server, client)
    assert client.transport.peers == (peer,)
    await until_async(lambda: client.transport.is_connected(peer))
    assert len((await client.transport.find(peer, (ROW_ID,), 5.0)).offers) == 1
    assert len(await fetch(client, server, record.digest, tuple(range(64)))) == 64


async def test_a_peer_that_dials_before_it_is_admitted_gets_in_soon_after(strangers: tuple[Side, Side]) -> None:
    server, client = strangers
    peer = server.identity.peer_id
    client.transport.set_peers([own(peer, server.transport.endpoint)])
    refused = server.metrics.failures_total.labels("l2", "unknown_peer")._value
    await until_async(lambda: refused.get() >= 1)
    assert not client.transport.is_connected(peer)
    server.transport.admit([client.identity.peer_id])
    await until_async(lambda: client.transport.is_connected(peer), 2 * HANDSHAKE_MS / 1000)
    await client.transport.find(peer, (ROW_ID,), 1.0)


async def test_who_is_admitted_no_more_is_answered_no_more(strangers: tuple[Side, Side]) -> None:
    server, client = strangers
    peer = introduce(server, client)
    await client.transport.find(peer, (ROW_ID,), 5.0)
    server.transport.admit(())
    with pytest.raises(PeerFailed, match="timeout"):
        await client.transport.find(peer, (ROW_ID,), 0.3)
    server.transport.admit([client.identity.peer_id])
    await client.transport.find(peer, (ROW_ID,), 5.0)
    assert server.transport.charges == {}


async def test_a_peer_that_nobody_knows_is_not_connected_and_fails_at_once(strangers: tuple[Side, Side]) -> None:
    _, client = strangers
    unknown = peer_id(SigningKey(bytes(32)).verify_key.encode())
    assert not client.transport.is_connected(unknown)
    with pytest.raises(PeerFailed, match="unreachable"):
        await client.transport.find(unknown, (ROW_ID,), 5.0)
    with pytest.raises(PeerFailed, match="unreachable"):
        client.transport.chunks(unknown, ManifestDigest(bytes(32)), 0, (0,), CHUNK, 5.0)


async def test_what_is_under_way_to_a_peer_that_vanishes_fails_at_once(strangers: tuple[Side, Side]) -> None:
    server, client = strangers
    record = put_object(server.store)
    peer = introduce(server, client)
    arrived: list[int] = []

    async def take() -> None:
        async with aclosing(client.transport.chunks(peer, record.digest, 0, (*range(64),), CHUNK, 30.0)) as arriving:
            async for batch in arriving:
                arrived.extend(column for column, _ in batch)
                client.transport.set_peers(())

    began = time.monotonic()
    with pytest.raises(PeerFailed, match="unreachable"):
        await take()
    assert time.monotonic() - began < 15  # of 30
    assert 0 < len(arrived) < 64
    assert client.transport.peers == ()
    introduce(server, client)
    waiting = asyncio.create_task(client.transport.find(peer, (ROW_ID,), 30.0))  # for the connection
    await asyncio.sleep(0)
    client.transport.set_peers(())
    with pytest.raises(PeerFailed, match="unreachable"):
        await waiting


async def test_a_peer_that_has_moved_is_asked_where_it_is_now(strangers: tuple[Side, Side]) -> None:
    server, client = strangers
    server.transport.admit([client.identity.peer_id])
    client.transport.set_peers([own(server.identity.peer_id, "127.0.0.1:1")])
    await asyncio.sleep(0.05)
    introduce(server, client)
    await client.transport.find(server.identity.peer_id, (ROW_ID,), 5.0)


async def test_configured_peers_stay_whatever_is_discovered(pair: tuple[Side, Side]) -> None:
    server, client = pair
    peer = server.identity.peer_id
    for discovered in ([], [own(peer, "127.0.0.1:1")], [own(client.identity.peer_id, client.transport.endpoint)]):
        client.transport.set_peers(discovered)
        server.transport.admit(())
        assert client.transport.peers == (peer,)
        assert client.transport.endpoint_of(peer) == server.transport.endpoint
        await client.transport.find(peer, (ROW_ID,), 5.0)


class Counter(asyncio.Protocol):
    """A third party, which counts who calls."""

    calls = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        type(self).calls += 1
        transport.close()


@pytest.fixture
async def third_party() -> AsyncIterator[str]:
    Counter.calls = 0
    server = await asyncio.get_running_loop().create_server(Counter, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


@pytest.mark.parametrize("met", [False, True])
async def test_a_third_party_that_peers_name_as_theirs_is_seldom_called(
    strangers: tuple[Side, Side], third_party: str, met: bool
) -> None:
    """By 64 invented peers, which are asked as often as one likes; and by peers at whose host it lies."""
    _, client = strangers
    others = [peer_id(SigningKey(bytes([n]) * 32).verify_key.encode()) for n in range(1, 65)]
    began = time.monotonic()
    client.transport.set_peers([KvEndpoint(peer, third_party, own=met) for peer in others])
    await asyncio.sleep(0)
    assert Counter.calls == 0 if not met else True  # who isn't met is called when it is needed
    while time.monotonic() - began < 3:
        for peer in others:
            with suppress(PeerFailed):
                await client.transport.find(peer, (ROW_ID,), 0.001)
    took_s = time.monotonic() - began
    per_s = DIALS_OWN_TO_HOST_PER_S if met else DIALS_TO_HOST_PER_S
    assert 0 < Counter.calls <= per_s * (DIALS_BURST_S + took_s) + 1


async def test_an_endpoint_elsewhere_is_the_peers_once_it_has_answered_there(strangers: tuple[Side, Side]) -> None:
    server, client = strangers
    peer = server.identity.peer_id
    server.transport.admit([client.identity.peer_id])
    elsewhere = [KvEndpoint(peer, server.transport.endpoint, own=False)]
    client.transport.set_peers(elsewhere)
    assert client.transport._links == {}
    await client.transport.find(peer, (ROW_ID,), 5.0)
    client.transport._drop_link()
    client.transport.set_peers(elsewhere)
    await until_async(lambda: client.transport.is_connected(peer))


async def test_links_are_bounded_and_the_least_recently_useful_makes_room(strangers: tuple[Side, Side]) -> None:
    server, client = strangers
    others = [peer_id(SigningKey(bytes([n]) * 32).verify_key.encode()) for n in range(1, 2 * KV_LINKS_MAX)]
    server.transport.admit([client.identity.peer_id])
    absent = [own(other, "127.0.0.1:1") for other in others]
    client.transport.set_peers([*absent, own(server.identity.peer_id, server.transport.endpoint)])
    assert len(client.transport.peers) == 2 * KV_LINKS_MAX
    assert len(client.transport._links) == KV_LINKS_MAX
    await client.transport.find(server.identity.peer_id, (ROW_ID,), 5.0)  # had no link
    for other in others[KV_LINKS_MAX:]:
        assert not client.transport.is_connected(other)
        with pytest.raises(PeerFailed):
            await client.transport.find(other, (ROW_ID,), 0.001)
    assert len(client.transport._links) == KV_LINKS_MAX
    assert client.transport.is_connected(server.identity.peer_id)


async def test_good_and_bad_service_make_a_reputation_for_service_and_lies_cost_belief_too(
    pair: tuple[Side, Side],
) -> None:
    server, client = pair
    peer, trust = server.identity.peer_id, client.trust
    now = clock.now()
    newcomer = trust.standings.service(peer, now)
    client.transport.credit(peer, 1, 1)
    assert trust.standings.service(peer, now) > newcomer
    assert trust.standings.word(peer, now) == newcomer
    client.transport.charge(peer, Reason.STALLED)
    assert trust.standings.word(peer, now) == newcomer
    client.transport.charge(peer, Reason.BAD_DIGEST)
    assert trust.standings.service(peer, now) < newcomer * 1.1
    assert trust.standings.word(peer, now) < newcomer
