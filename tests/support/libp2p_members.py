"""Libp2p hosts for tests: members of a network on real sockets, and strangers who attack one."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

import pytest
import trio
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from nacl.signing import SigningKey

from hyperspace_vllm.core.peers.gossip_gate import GossipGate
from hyperspace_vllm.core.records.ids import PeerId, peer_id
from hyperspace_vllm.core.records.rank import Tier
from hyperspace_vllm.daemon.libp2p.libp2p_host import Libp2pHost
from hyperspace_vllm.daemon.libp2p.libp2p_node import Libp2pNode, NodeSettings, dht_key
from hyperspace_vllm.daemon.peer_failed import PeerFailed
from tests.support.network_world import OpenGate
from tests.support.until import until_async

PROTOCOL = "/hyperspace/cache/1.0.0"


TOPIC = "hyperspace/test"


class Member:
    """A host with a handler that notes what happens and answers with what it was asked."""

    def __init__(
        self,
        network_key: bytes | None = None,
        mdns: bool = False,
        listen: str = "127.0.0.1:0",
        topic: str = TOPIC,
        gate: GossipGate | None = None,
    ) -> None:
        self.key = SigningKey.generate()
        self.peer = peer_id(self.key.verify_key.encode())
        self.topic = topic
        self.gate = gate or OpenGate()
        self.host = Libp2pHost(self.key, listen, network_key, mdns, (PROTOCOL,), (topic,), self, self.gate)
        self.gossip: list[tuple[PeerId, bytes]] = []
        self.spoilers: list[PeerId] = []
        self.asked_to_dial: list[tuple[PeerId, str, str]] = []
        self.dials = True
        self.changes: list[tuple[PeerId, bool]] = []
        self.hosts: dict[PeerId, str] = {}  # the IP addresses that peers were met at
        self.violations: list[PeerId] = []
        self.discovered: dict[PeerId, str] = {}
        self.answer: Callable[[bytes], Awaitable[bytes | None]] = self.echo
        self.answering = 0

    async def echo(self, frame: bytes) -> bytes | None:
        return frame

    async def on_request(self, peer: PeerId, protocol: str, frame: bytes) -> bytes | None:
        assert protocol == PROTOCOL
        self.answering += 1
        try:
            return await self.answer(frame)
        finally:
            self.answering -= 1

    def on_gossip(self, topic: str, relay: PeerId, payload: bytes) -> None:
        assert topic == self.topic
        self.gossip.append((relay, payload))

    def on_gossip_spoiled(self, relay: PeerId) -> None:
        self.spoilers.append(relay)

    def on_connected(self, peer: PeerId, host: str) -> None:
        self.hosts[peer] = host
        self.changes.append((peer, True))

    def on_disconnected(self, peer: PeerId) -> None:
        self.changes.append((peer, False))

    def on_violation(self, peer: PeerId) -> None:
        self.violations.append(peer)

    def tier(self, peer: PeerId) -> Tier:
        return Tier.PROVEN

    def on_discovered(self, peer: PeerId, address: str, told_from: str) -> None:
        self.discovered[peer] = address

    def may_dial(self, peer: PeerId, address: str, told_from: str) -> bool:
        self.asked_to_dial.append((peer, address, told_from))
        return self.dials

    async def meet(self, *others: "Member") -> None:
        for other in others:
            await self.host.connect(other.peer, other.host.address, 5)

    async def provide(self, key: str, *keepers: "Member") -> None:
        """Provide a key until the keepers hold the record; the host itself does not wait for what peers do with it."""
        assert await self.host.provide(key, 5)
        await until_async(lambda: all(self.peer in keeper.providers_kept(key) for keeper in keepers))

    def providers_kept(self, key: str) -> list[str]:
        """The providers of a key in this host's own store."""
        link = self.host._link
        assert link is not None
        return [str(info.peer_id) for info in link.node._dht.provider_store.get_providers(dht_key(key))]

    async def ask(self, other: "Member", frame: bytes = b"?", timeout_s: float = 5) -> bytes:
        return await self.host.request(other.peer, PROTOCOL, frame, timeout_s)


Members = Callable[..., Awaitable[list[Member]]]


@pytest.fixture
async def members() -> AsyncIterator[Members]:
    """Starts hosts; with `meet` every one of them is connected to every other."""
    all_of_them: list[Member] = []

    async def start(count: int, meet: bool = True, **options: object) -> list[Member]:
        started = [Member(**options) for _ in range(count)]  # type: ignore[arg-type]
        all_of_them.extend(started)
        for member in started:
            await member.host.start()
        if meet:
            for number, member in enumerate(started):
                await member.meet(*started[:number])
            # Who dials is through a moment before who is dialled.
            await until_async(lambda: all(len(member.host.connected) >= count - 1 for member in started))
        return started

    yield start
    await asyncio.gather(*(member.host.close() for member in all_of_them))


async def failure(call: Awaitable[object]) -> str:
    with pytest.raises(PeerFailed) as caught:
        await call
    return caught.value.reason


class Silent:
    """The events of a node that nobody listens to."""

    async def answer(self, peer: PeerId, protocol: str, frame: bytes) -> bytes | None:
        return None

    def gossip(self, topic: str, relay: PeerId, payload: bytes) -> None:
        pass

    def gossip_spoiled(self, relay: PeerId) -> None:
        pass

    def violated(self, peer: PeerId) -> None:
        pass

    def tier(self, peer: PeerId) -> Tier:
        return Tier.PROVEN

    async def may_dial(self, peer: PeerId, address: str, told_from: str) -> bool:
        return False

    def peer_changed(self, peer: PeerId, host: str | None) -> None:
        pass


async def attack(victim: Member, deed: Callable[[Libp2pNode, ID], Awaitable[None]], *also: Member) -> None:
    """Run `deed(node, victim's id)` as a stranger who is connected to the victim."""

    async def main() -> None:
        node = Libp2pNode(NodeSettings(SigningKey.generate(), "127.0.0.1:0", None, (), (TOPIC,)), Silent())
        with trio.fail_after(30):
            async with node.running():
                for member in (victim, *also):
                    await node.connect(member.peer, member.host.address)
                await deed(node, ID.from_base58(victim.peer))

    await asyncio.to_thread(trio.run, main)


async def open_stream(node: Libp2pNode, victim: ID, protocol: str = PROTOCOL) -> INetStream:
    return await node._host.new_stream(victim, [TProtocol(protocol)])


async def wait_closed(stream: INetStream, timeout_s: float) -> None:
    with trio.fail_after(timeout_s), suppress(Exception):
        while await stream.read(65536):
            pass


async def meshed(*group: Member) -> None:
    """Until what anybody says reaches everybody."""
    for speaker in group:
        probe = secrets.token_bytes(8)

        def heard(probe: bytes = probe, speaker: Member = speaker) -> bool:
            return all(any(payload == probe for _, payload in each.gossip) for each in group if each is not speaker)

        async with asyncio.timeout(60):
            while not heard():
                assert speaker.host.publish(TOPIC, probe)
                await asyncio.sleep(0.1)
    for each in group:
        each.gossip.clear()
