"""A node that hears neither gossip nor registry, and one that hears everything: what one finds and the other learns.

Both run in this process, on the real libp2p, among ten node processes.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest
from nacl.signing import SigningKey

from hyperspace_vllm.core.events.node_state import NetworkJoined
from hyperspace_vllm.core.node.node_options import NodeOptions
from hyperspace_vllm.core.peers import dials
from hyperspace_vllm.core.peers.gossip_gate import GossipGate
from hyperspace_vllm.core.peers.trust import Trust
from hyperspace_vllm.core.records.announcement import PREFIX_TOPIC, RESPONSE_TOPIC, ResponseEntry, decode_announcement
from hyperspace_vllm.core.records.ids import NetworkId, PeerId, network_id
from hyperspace_vllm.core.records.limits import PEER_RECORD_TTL_MS
from hyperspace_vllm.core.records.peer_record import PeerRecord
from hyperspace_vllm.core.records.peer_wire import (
    CACHE_PROTOCOL,
    PEERS_PROTOCOL,
    Deltas,
    Greet,
    Hit,
    PeerRequest,
    Query,
    WantDeltas,
    WantPeers,
    decode_answer,
    encode,
    protocol_of,
)
from hyperspace_vllm.core.records.rank import Tier
from hyperspace_vllm.core.records.signing import member_tag
from hyperspace_vllm.core.response import dht_use
from hyperspace_vllm.core.response.cache_proof import request_hash
from hyperspace_vllm.daemon import clock
from hyperspace_vllm.daemon.libp2p.libp2p_host import Libp2pHost
from hyperspace_vllm.daemon.metrics import Metrics
from hyperspace_vllm.daemon.node.address_book import AddressBook
from hyperspace_vllm.daemon.node.joined_network import Joined
from hyperspace_vllm.daemon.responses.response_lookups import FoundResponse
from tests.support.network_nodes import MODEL, NetworkedNode, body_of, private_network, request_key
from tests.support.network_shell import NetworkShell
from tests.support.network_world import OpenGate
from tests.support.until import until

pytestmark = [pytest.mark.io, pytest.mark.timeout(2_400)]

NODES, PER_NODE = 10, 2
NETWORK = network_id("default")
NAMES = tuple(f"{number}/{each}" for number in range(NODES) for each in range(PER_NODE))


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[NetworkedNode]]:
    started = private_network(tmp_path_factory.mktemp("network"), NODES)
    until(lambda: all(node.card().get("p2p") for node in started), 600)
    until(lambda: all(node.status()["p2p"].get("known_peers") == NODES - 1 for node in started), 600)
    yield started
    for node in started:
        node.stop()


def network_key(nodes: list[NetworkedNode]) -> bytes:
    return bytes.fromhex(Path(nodes[0].config.network_key_file).read_text())


def address_of(node: NetworkedNode) -> tuple[PeerId, str]:
    card = node.card()
    return PeerId(card["peer_id"]), card["p2p"]


class Clients:
    """Where the driver answers; one lookup at a time."""

    ended: "asyncio.Future[FoundResponse | None]"
    hinted = False

    def hint(self, lookup: int, hinted: bool) -> None:
        self.hinted = hinted

    def let_try(self, lookup: int, body: bytes, proof: bytes) -> None: ...

    def answer(self, lookup: int, found: FoundResponse | None, reason: str) -> None:
        self.ended.set_result(found)


@asynccontextmanager
async def deaf_node(nodes: list[NetworkedNode], directory: Path) -> AsyncIterator[tuple[NetworkShell, Clients]]:
    """A whole node that subscribes to no topic and syncs no registry."""
    signing_key, key, clients = SigningKey.generate(), network_key(nodes), Clients()
    trust = Trust("members", signing_key.verify_key.encode(), frozenset(), frozenset(), key)
    options = NodeOptions(NETWORK, key, (address_of(nodes[0]),), registry=False)
    shell = NetworkShell(options, signing_key, trust, clients, None, Metrics())

    async def join(parts: AsyncExitStack) -> Joined:
        host = Libp2pHost(signing_key, "127.0.0.1:0", key, False, (CACHE_PROTOCOL, PEERS_PROTOCOL), (), shell.events)
        await host.start()
        parts.push_async_callback(host.close)
        gate, book = GossipGate(NETWORK, clock.now()), AddressBook(directory)
        return Joined(NetworkJoined(host.address, ""), host, gate, book, None, None, None)

    joined = asyncio.Event()
    running = asyncio.create_task(shell.driver.run(join, joined.set))
    await joined.wait()
    try:
        yield shell, clients
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


async def test_the_dht_alone_finds_what_was_provided(
    nodes: list[NetworkedNode], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dht_use, "SEARCH_SHARE", 1.0)  # searches one after another, each whatever it costs
    for budget in ("DIALS_OF_PEER_PER_S", "DIALS_TO_HOST_PER_S", "DIALS_OWN_TO_HOST_PER_S", "DIALS_PER_S"):
        monkeypatch.setattr(dials, budget, 1000.0)  # all ten nodes are on one host
    for number, node in enumerate(nodes):
        for each in range(PER_NODE):
            node.store(f"{number}/{each}")
    await asyncio.to_thread(until, lambda: all(node.status()["p2p"]["provided"] >= PER_NODE for node in nodes), 600)
    took = []
    async with deaf_node(nodes, tmp_path) as (shell, clients):
        await asyncio.to_thread(until, lambda: len(connected(shell)) >= 5, 600)
        for number, name in enumerate(NAMES):
            began = time.monotonic()
            clients.ended = asyncio.get_running_loop().create_future()
            shell.responses.find(number, request_key(name), MODEL, 20_000)
            found = await asyncio.wait_for(clients.ended, 600)
            assert not clients.hinted
            if found is not None and found.body == body_of(name):
                took.append(time.monotonic() - began)
    took.sort()
    print(f"found {len(took)} of {len(NAMES)}, p50 {took[len(took) // 2]:.3f} s, longest {took[-1]:.3f} s")
    assert len(took) >= 0.99 * len(NAMES)
    assert took[len(took) // 2] <= 5


def connected(shell: NetworkShell) -> list[object]:
    peers = shell.driver.network_status()["connected"]
    assert isinstance(peers, list)
    return peers


class Listener:
    """A member that joins every topic, asks for every record and every response, and keeps all the bytes it gets."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.announced: set[bytes] = set()

    async def on_request(self, peer: PeerId, protocol: str, frame: bytes) -> bytes | None:
        self.heard.append(frame)
        return None

    def on_gossip(self, topic: str, relay: PeerId, payload: bytes) -> None:
        self.heard.append(payload)
        for entry in decode_announcement(payload).entries:
            if isinstance(entry, ResponseEntry):
                self.announced.add(entry.request_hash)

    def on_connected(self, peer: PeerId, host: str) -> None: ...

    def on_disconnected(self, peer: PeerId) -> None: ...

    def on_violation(self, peer: PeerId) -> None: ...

    def tier(self, peer: PeerId) -> Tier:
        return Tier.STRANGER

    def on_discovered(self, peer: PeerId, address: str, told_from: str) -> None: ...

    def may_dial(self, peer: PeerId, address: str, told_from: str) -> bool:
        return False

    def on_gossip_spoiled(self, relay: PeerId) -> None: ...


async def test_a_listener_on_everything_learns_no_prompt_no_response_and_no_key(nodes: list[NetworkedNode]) -> None:
    signing_key, key, listener = SigningKey.generate(), network_key(nodes), Listener()
    public_key = signing_key.verify_key.encode()
    topics, protocols = (RESPONSE_TOPIC, PREFIX_TOPIC), (CACHE_PROTOCOL, PEERS_PROTOCOL)
    host = Libp2pHost(signing_key, "127.0.0.1:0", key, False, protocols, topics, listener, OpenGate())
    await host.start()
    try:
        peers = [address_of(node) for node in nodes]
        for peer, address in peers:
            await host.connect(peer, address, 30)
        record = PeerRecord(
            NetworkId(NETWORK), public_key, clock.wall_ms(), clock.wall_ms() + PEER_RECORD_TTL_MS, host.address,
            member_tag=member_tag(key, public_key),
        ).sign(signing_key)  # fmt: skip

        async def ask(peer: PeerId, message: PeerRequest) -> bytes:
            frame = await host.request(peer, protocol_of(message), encode(message), 30)
            listener.heard.append(frame)
            return frame

        for peer, _ in peers:
            await ask(peer, Greet(record.encode()))
            await ask(peer, WantPeers(b""))
            assert isinstance(decode_answer(await ask(peer, WantDeltas(()))), Deltas)
        secrets = [f"secret {number}" for number in range(5)]
        wanted = {request_hash(NETWORK, request_key(name)) for name in secrets}

        # GossipSub takes a moment to graft a newcomer: what was announced before that is in the registry.
        for name in secrets:
            nodes[1].store(name)
        await asyncio.to_thread(until, lambda: wanted <= listener.announced, 600)
        await host.connect(*peers[1], 30)  # which may have let go of a neighbour that answers nothing
        hits = [decode_answer(await ask(peers[1][0], Query(each))) for each in wanted]
        assert all(isinstance(hit, Hit) for hit in hits)
    finally:
        await host.close()
    everything = b"\n".join(listener.heard)
    assert len(everything) > 1_000
    for name in (*NAMES, *secrets):
        assert bytes(request_key(name)) not in everything
        assert request_key(name).hex().encode() not in everything
        assert body_of(name) not in everything
        assert f"the answer to {name}".encode() not in everything
