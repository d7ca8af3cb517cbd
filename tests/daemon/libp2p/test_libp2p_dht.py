"""The DHT between real hosts: providers, what is kept of peers, and what its streams may cost."""

import asyncio
import os
from contextlib import suppress
from typing import Any
from unittest.mock import ANY

import libp2p.kad_dht.kad_dht as kad_module
import libp2p.kad_dht.provider_store as provider_module
import pytest
import trio
from libp2p.custom_types import TProtocol
from libp2p.host.exceptions import StreamFailure
from libp2p.kad_dht.pb.kademlia_pb2 import Message as DhtMessage
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.utils import encode_varint_prefixed
from libp2p.utils.varint import read_varint_prefixed_bytes_limited
from nacl.signing import SigningKey

from hyperspace_vllm.core.records.endpoint import Endpoint
from hyperspace_vllm.daemon.libp2p import libp2p_dht, libp2p_overrides, libp2p_swarm, libp2p_time
from hyperspace_vllm.daemon.libp2p.libp2p_node import Libp2pNode, NodeSettings, dht_key, reachable_hosts
from hyperspace_vllm.daemon.libp2p.libp2p_swarm import NodePeerStore
from tests.support.libp2p_members import PROTOCOL, TOPIC, Member, Members, Silent, attack, open_stream, wait_closed
from tests.support.until import until_async

pytestmark = pytest.mark.io


async def test_providers_are_found_by_any_key_string(members: Members) -> None:
    group = await members(4)
    keys = ("/cache/" + "ab" * 32, "/kv-prefix/" + "cd" * 32 + "/" + "ef" * 32)
    for key in keys:
        assert await group[0].host.provide(key, 5)
        for member in group[1:]:
            peers, cost_ms = await member.host.find_providers(key, 2, 5)
            assert peers == (group[0].peer,)
            assert 0 <= cost_ms < 1000
    assert (await group[0].host.find_providers(keys[0], 2, 5))[0] == ()  # oneself is no provider to oneself
    assert (await group[1].host.find_providers("/cache/unknown", 2, 5))[0] == ()
    (alone,) = await members(1)
    assert not await alone.host.provide(keys[0], 5)
    assert (await alone.host.find_providers(keys[0], 2, 5))[0] == ()


async def test_a_search_dials_whom_it_is_led_to_only_where_it_may(members: Members) -> None:
    """The seeker knows one peer, which knows the one that keeps the record."""
    provider, keeper, middle, seeker = await members(4, meet=False)
    await provider.meet(keeper)
    await provider.provide("/cache/1", keeper)
    await provider.host.disconnect(keeper.peer)
    await middle.meet(keeper)
    await seeker.meet(middle)
    seeker.dials = False
    async with asyncio.timeout(60):
        while not seeker.asked_to_dial:  # peers hear each other's addresses a moment after they have connected
            assert await seeker.host.find_providers("/cache/1", 2, 5) == ((), ANY)
    assert set(seeker.asked_to_dial) == {(keeper.peer, keeper.host.address, "127.0.0.1")}
    assert seeker.host.connected == {middle.peer}
    seeker.dials = True
    async with asyncio.timeout(60):
        while await seeker.host.find_providers("/cache/1", 2, 5) != ((provider.peer,), ANY):
            pass
    assert keeper.peer in seeker.host.connected


async def test_the_dht_passes_on_no_address_that_reaches_less_far_than_where_its_peer_is_connected_from(
    members: Members,
) -> None:
    """A peer at another address of this machine says that it is at 127.0.0.1, to a node whom a third asks."""
    outward = reachable_hosts("0.0.0.0")[0]
    if outward == "127.0.0.1":
        pytest.skip("this machine has no other address than loopback")
    liar, seeker = await members(2, meet=False)
    (middle,) = await members(1, meet=False, listen="0.0.0.0:0")
    port = Endpoint.parse(middle.host.address).port
    await liar.host.connect(middle.peer, f"{outward}:{port}", 5)
    await seeker.host.connect(middle.peer, f"127.0.0.1:{port}", 5)
    await liar.provide("/cache/1", middle)
    store: Any = middle.host._link.node._host.get_peerstore()  # type: ignore[union-attr]
    await until_async(
        lambda: all(PROTOCOL in _protocols(store, each) for each in (liar, seeker))
    )  # they are identified
    assert await seeker.host.find_providers("/cache/1", 2, 5) == ((liar.peer,), ANY)
    assert seeker.asked_to_dial == []
    told = [store.addrs(ID.from_base58(each.peer)) for each in (seeker, liar)]
    assert [len(each) for each in told] == [1, 0]
    assert store.get_peer_record(ID.from_base58(liar.peer)) is None
    providers = middle.host._link.node._dht.provider_store.get_providers(dht_key("/cache/1"))  # type: ignore[union-attr]
    assert [(str(each.peer_id), each.addrs) for each in providers] == [(liar.peer, [])]


def _protocols(store: NodePeerStore, member: Member) -> list[str]:
    with suppress(Exception):
        return list(store.get_protocols(ID.from_base58(member.peer)))
    return []


async def test_nobody_is_dialled_because_a_stream_to_it_is_wanted(members: Members) -> None:
    a, b = await members(2)
    await a.host.disconnect(b.peer)
    await until_async(lambda: not b.host.connected)
    link = a.host._link
    assert link is not None
    opened: list[BaseException | None] = []

    async def open_stream() -> None:
        try:
            await link.node._host.new_stream(ID.from_base58(b.peer), [TProtocol(PROTOCOL)])
            opened.append(None)
        except Exception as error:
            opened.append(error)

    link.spawn(open_stream)
    await until_async(lambda: opened)
    assert opened != [None]
    assert a.host.connected == b.host.connected == frozenset()


async def test_providers_are_renewed_and_expire(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = await members(2)
    assert await a.host.provide("/cache/1", 5)
    store = b.host._link.node._dht.provider_store  # type: ignore[union-attr]
    monkeypatch.setattr(libp2p_dht, "PROVIDER_RENEWAL_S", 0)
    store._forget(ID.from_base58(a.peer), dht_key("/cache/1"))
    assert (await b.host.find_providers("/cache/1", 1, 5))[0] == (a.peer,)  # a itself still says so
    renewing = a.host._link.node._dht.provider_store  # type: ignore[union-attr]
    assert await a.host._call(lambda node: _renew(renewing), 5)
    await until_async(lambda: store.get_providers(dht_key("/cache/1")))
    monkeypatch.setattr(provider_module, "PROVIDER_RECORD_EXPIRATION_INTERVAL", 0)
    store.cleanup_expired()
    assert not store.providers
    assert not store._keys_of


async def _renew(store: libp2p_dht.NodeProviders) -> bool:
    await store.renew()
    return True


async def test_provider_records_are_bounded_by_peer_and_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libp2p_dht, "PROVIDERS_PER_PEER_MAX", 10)
    monkeypatch.setattr(libp2p_dht, "PROVIDERS_MAX", 25)

    async def main() -> None:
        node = Libp2pNode(NodeSettings(SigningKey.generate(), "127.0.0.1:0", None, (), (TOPIC,)), Silent())
        store = node._dht.provider_store
        peers = [ID.from_base58(Member().peer) for _ in range(30)]
        for number in range(1000):
            store.add_provider(number.to_bytes(4, "big"), PeerInfo(peers[0], []))
        assert len(store.providers) == 10
        assert (999).to_bytes(4, "big") in store.providers  # the newest stay
        for number, peer in enumerate(peers):
            for turn in range(8):
                store.add_provider(b"x" + bytes([number, turn]), PeerInfo(peer, []))
        assert sum(len(records) for records in store.providers.values()) == 25
        assert sum(len(keys) for keys in store._keys_of.values()) == store._count == 25
        for peer in peers:
            store.add_provider(b"popular", PeerInfo(peer, []))
        assert len(store.providers[b"popular"]) <= vars(kad_module)["BUCKET_SIZE"]
        assert sum(len(keys) for keys in store._keys_of.values()) == store._count <= 25
        node._pubsub.seen_messages.stop()

    await asyncio.to_thread(trio.run, main)


async def test_what_is_kept_of_peers_is_bounded_and_never_the_nodes_own_key() -> None:
    async def main() -> None:
        node = Libp2pNode(NodeSettings(SigningKey.generate(), "127.0.0.1:0", None, (), (TOPIC,)), Silent())
        store = node._host.get_peerstore()
        addresses = [libp2p_swarm.multiaddr_of("127.0.0.1", port) for port in range(1, 50)]
        for _ in range(libp2p_swarm.PEERS_KEPT_MAX + 100):
            peer = ID(b"\x00\x24\x08\x01\x12\x20" + os.urandom(32))
            store.add_addrs(peer, addresses, 60)
            store.add_protocols(peer, [f"/p/{number}" for number in range(500)])
        assert len(store.peer_ids()) <= libp2p_swarm.PEERS_KEPT_MAX
        assert len(store.addrs(peer)) <= libp2p_swarm.ADDRESSES_PER_PEER_MAX
        assert len(store.get_protocols(peer)) <= libp2p_swarm.PROTOCOLS_PER_PEER_MAX
        assert node._host.get_private_key()
        node._pubsub.seen_messages.stop()

    await asyncio.to_thread(trio.run, main)


async def test_an_idle_stream_of_the_dht_ends_soon(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libp2p_dht, "DHT_STREAM_S", 600.0)
    (a,) = await members(1)

    async def idle(node: Libp2pNode, victim: ID) -> None:
        await wait_closed(await open_stream(node, victim, "/ipfs/kad/1.0.0"), 60)

    await attack(a, idle)


async def test_idle_streams_of_the_dht_keep_no_peer_out(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libp2p_overrides, "DHT_IDLE_S", 600.0)
    monkeypatch.setattr(libp2p_dht, "DHT_STREAM_S", 600.0)
    monkeypatch.setattr(libp2p_dht, "DHT_STREAMS_MAX", 8)
    monkeypatch.setattr(libp2p_dht, "DHT_STREAMS_OF_STRANGERS_MAX", 8)
    (a,) = await members(1)
    find = DhtMessage(type=DhtMessage.MessageType.FIND_NODE, key=bytes(34)).SerializeToString()
    held = 0

    async def hold(node: Libp2pNode, victim: ID) -> None:
        nonlocal held
        for _ in range(12):
            with suppress(StreamFailure):  # beyond the places
                await open_stream(node, victim, "/ipfs/kad/1.0.0")
        other = Libp2pNode(NodeSettings(SigningKey.generate(), "127.0.0.1:0", None, (), (TOPIC,)), Silent())
        async with other.running():
            await other.connect(a.peer, a.host.address)
            stream = await open_stream(other, victim, "/ipfs/kad/1.0.0")
            await stream.write(bytes([len(find)]) + find)
            assert await read_varint_prefixed_bytes_limited(stream, 100_000)
            held += 1

    await attack(a, hold)
    assert held


async def test_messages_of_the_dht_are_in_the_time_of_who_sends_them(
    members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libp2p_time, "DHT_MESSAGE_S", 0.05)
    (a,) = await members(1)
    count, took_s = 12, 0.0
    find = DhtMessage(type=DhtMessage.MessageType.FIND_NODE, key=bytes(34)).SerializeToString()

    async def ask(node: Libp2pNode, victim: ID) -> None:
        nonlocal took_s
        stream = await open_stream(node, victim, "/ipfs/kad/1.0.0")
        began_s = trio.current_time()
        await stream.write((bytes([len(find)]) + find) * count)
        for _ in range(count):
            await read_varint_prefixed_bytes_limited(stream, 100_000)
        took_s = trio.current_time() - began_s

    await attack(a, ask)
    assert took_s > (count * 0.05 - 2 * libp2p_time.BURST_S) / libp2p_time.PEER_SHARE


@pytest.mark.parametrize(
    "message",
    [b"\x52\x05", DhtMessage(providerPeers=[DhtMessage.Peer()] * 7_000).SerializeToString()],
    ids=["malformed", "7,000 peers"],
)
async def test_a_message_of_the_dht_that_no_node_sends_ends_the_connection_and_is_told_of(
    members: Members, message: bytes
) -> None:
    a, b = await members(2)

    async def ask(node: Libp2pNode, victim: ID) -> None:
        (conn,) = node._swarm.live(victim)
        stream = await open_stream(node, victim, "/ipfs/kad/1.0.0")
        with suppress(Exception):
            await stream.write(encode_varint_prefixed(message))
        with trio.fail_after(20):
            await conn.event_closed.wait()

    await attack(a, ask)
    await until_async(lambda: len(a.violations) == 1)
    assert await b.ask(a) == b"?"


def test_a_record_that_is_larger_than_any_nodes_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    libp2p_overrides.patch_library()
    read: list[object] = []

    def consume(message: object, *_: object) -> bool:
        read.append(message)
        return True

    monkeypatch.setattr(libp2p_overrides, "consume_dht_record", consume)
    for size in (libp2p_swarm.PEER_ENVELOPE_BYTES_MAX, libp2p_swarm.PEER_ENVELOPE_BYTES_MAX + 1):
        for message in (DhtMessage(senderRecord=bytes(size)), DhtMessage.Peer(signedRecord=bytes(size))):
            is_small = size == libp2p_swarm.PEER_ENVELOPE_BYTES_MAX
            assert vars(kad_module)["maybe_consume_signed_record"](message, None) is is_small
            assert (message in read) is is_small
