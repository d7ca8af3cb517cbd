"""What happens before a node has joined its network reaches the core that comes then, once."""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import cast

import pytest
from nacl.signing import SigningKey

from hyperspace_vllm.core.events.connections import PeerConnected, PeerDisconnected
from hyperspace_vllm.core.events.node_state import NetworkJoined, NetworkLeft, ServedChanged
from hyperspace_vllm.core.events.prefix_writing import RowsStored
from hyperspace_vllm.core.events.response_reading import ResponseWanted
from hyperspace_vllm.core.events.stored_responses import ResponsesGone, ResponseStored
from hyperspace_vllm.core.events.vocabulary import Effect, Event, NetworkEvent
from hyperspace_vllm.core.node.node import Node
from hyperspace_vllm.core.node.node_options import NodeOptions
from hyperspace_vllm.core.peers.gossip_gate import GossipGate
from hyperspace_vllm.core.peers.trust import Trust
from hyperspace_vllm.core.records.ids import ManifestDigest, PeerId, RequestKey, network_id
from hyperspace_vllm.core.records.now import Now
from hyperspace_vllm.core.response.cache_proof import request_hash
from hyperspace_vllm.daemon import clock
from hyperspace_vllm.daemon.metrics import Metrics
from hyperspace_vllm.daemon.node import early_events
from hyperspace_vllm.daemon.node.address_book import AddressBook
from hyperspace_vllm.daemon.node.early_events import EarlyEvents
from hyperspace_vllm.daemon.node.joined_network import Joined, PeerHost
from hyperspace_vllm.daemon.responses.response_lookups import FoundResponse
from hyperspace_vllm.daemon.responses.store_changes import ServableEntry
from tests.support.network_shell import NetworkShell

NETWORK = network_id("test")
PEER = PeerId("a peer")
JOINED = NetworkJoined("192.0.2.2:7791", "")
ROWS = RowsStored(ManifestDigest(bytes(32)), bytes(32), bytes(48), (), True)


def name(number: int) -> bytes:
    return bytes([number]) * 32


def stored(number: int) -> ResponseStored:
    return ResponseStored(name(number), 1_000, True)


def test_a_response_that_has_gone_again_is_not_reported() -> None:
    early = EarlyEvents()
    for event in (stored(1), stored(2), ResponsesGone((name(1),))):
        early.add(event)
    assert early.take() == [stored(2)]
    assert early.take() == []


def test_of_what_the_engines_serve_the_last_word_counts() -> None:
    early = EarlyEvents()
    early.add(ServedChanged((name(1),), (), 0, b""))
    early.add(ServedChanged((name(2),), (), 0, b""))
    assert early.take() == [ServedChanged((name(2),), (), 0, b"")]


def test_what_peers_do_keeps_its_order() -> None:
    early = EarlyEvents()
    events: list[NetworkEvent] = [PeerConnected(PEER, "h"), PeerDisconnected(PEER), PeerConnected(PEER, "h")]
    for event in events:
        early.add(event)
    assert early.take() == events


def test_every_kind_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early_events, "KEPT_MAX", 3)
    early = EarlyEvents()
    for number in range(9):
        early.add(stored(number))
        early.add(ROWS)
    assert early.take() == [stored(0), stored(1), stored(2), ROWS, ROWS, ROWS]
    for _ in range(early_events.PEER_EVENTS_MAX + 9):
        early.add(PeerDisconnected(PEER))
    assert len(early.take()) == early_events.PEER_EVENTS_MAX


class Core:
    """A core that only notes what it is told."""

    network = None

    def __init__(self, *_: object) -> None:
        self.told: list[Event] = []

    def handle(self, event: Event, now: Now) -> list[Effect]:
        self.told.append(event)
        return []

    def next_deadline_ms(self) -> None: ...


class Hints:
    """A fleet's registry that only notes what it is told."""

    def __init__(self) -> None:
        self.stored: list[bytes] = []

    async def providers(self, id: bytes) -> tuple[PeerId, ...]:
        return ()

    def note_stored(self, id: bytes, expires_at_ms: int) -> None:
        self.stored.append(id)

    def note_gone(self, ids: Iterable[bytes]) -> None: ...


class Clients:
    """Where lookups end."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def hint(self, lookup: int, hinted: bool) -> None: ...

    def let_try(self, lookup: int, body: bytes, proof: bytes) -> None: ...

    def answer(self, lookup: int, found: FoundResponse | None, reason: str) -> None:
        self.reasons.append(reason)


def shell_of(share: str = "network", listens: bool = True) -> tuple[NetworkShell, Clients]:
    clients, key = Clients(), SigningKey(bytes(32))
    trust = Trust("members", key.verify_key.encode(), frozenset(), frozenset(), None)
    make = cast(Callable[..., Node], Core)
    shell = NetworkShell(NodeOptions(NETWORK), key, trust, clients, None, Metrics(), share, listens, make)
    return shell, clients


async def joined(shell: NetworkShell, directory: Path, failures: int = 0) -> tuple[list[Event], Hints]:
    """Let the node join, at the attempt after those that fail, and leave; what its core is told."""
    hints, has_joined, left = Hints(), asyncio.Event(), [failures]

    async def join(parts: AsyncExitStack) -> Joined:
        shell.events.on_connected(PEER, "192.0.2.1")
        if left[0]:
            left[0] -= 1
            shell.events.on_disconnected(PEER)
            raise OSError("the port is taken")
        host = cast(PeerHost, None)
        return Joined(JOINED, host, GossipGate(NETWORK, clock.now()), AddressBook(directory), None, None, hints)

    running = asyncio.create_task(shell.driver.run(join, has_joined.set))
    await asyncio.wait_for(has_joined.wait(), 60)
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    shell.events.on_connected(PEER, "192.0.2.1")  # nothing is heard any more
    return cast(Core, shell.node).told, hints


async def test_a_driver_tells_its_core_what_happened_before_it_joined(tmp_path: Path) -> None:
    shell, _ = shell_of()
    shell.responses.heard((ServableEntry(name(1), 1_000, True), ServableEntry(name(2), 1_000, False)), ())
    shell.responses.heard((), (name(1),))
    shell.driver.submit(ROWS)
    await asyncio.sleep(0)
    told, hints = await joined(shell, tmp_path)
    assert told == [
        JOINED,
        ResponseStored(name(2), 1_000, False),
        ROWS,
        PeerConnected(PEER, "192.0.2.1"),
        NetworkLeft(),
    ]
    assert hints.stored == [name(2)]


async def test_a_port_that_is_taken_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperspace_vllm.daemon.node.driver.JOIN_AGAIN_S", 0.01)
    shell, _ = shell_of()
    assert shell.driver.network_status() == {"state": "joining"}
    told, _ = await joined(shell, tmp_path, failures=2)
    connected, gone = PeerConnected(PEER, "192.0.2.1"), PeerDisconnected(PEER)
    assert told == [JOINED, connected, gone, connected, gone, connected, NetworkLeft()]


async def test_a_node_that_shares_nothing_tells_no_core_what_it_has(tmp_path: Path) -> None:
    shell, _ = shell_of("private")
    shell.responses.heard((ServableEntry(name(1), 1_000, True),), ())
    shell.responses.served(ServedChanged((name(1),), (), 0, b""))
    await asyncio.sleep(0)
    told, hints = await joined(shell, tmp_path)
    assert told == [JOINED, PeerConnected(PEER, "192.0.2.1"), NetworkLeft()]
    assert hints.stored == []


async def test_a_lookup_before_the_node_has_joined_reaches_the_core_at_once() -> None:
    shell, _ = shell_of()
    shell.responses.find(1, RequestKey(name(1)), name(2), 300)
    wanted = ResponseWanted(1, request_hash(NETWORK, RequestKey(name(1))), 300)
    assert cast(Core, shell.node).told == [wanted]
