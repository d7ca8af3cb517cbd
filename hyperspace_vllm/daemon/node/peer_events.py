"""What libp2p reports of peers, as events for the core."""

from collections.abc import Callable

from ...core.events.conduct import PeerMisbehaved
from ...core.events.connections import PeerConnected, PeerDisconnected, PeerDiscovered
from ...core.events.gossip import GossipReceived, GossipSpoiled
from ...core.events.vocabulary import NetworkEvent
from ...core.node.node import Node
from ...core.peers.trust import Trust
from ...core.records.ids import PeerId
from ...core.records.rank import Tier
from .. import clock
from .open_requests import PeerRequests


class PeerEvents:
    """libp2p's handler (libp2p_host.HostHandler)."""

    def __init__(
        self, node: Node, trust: Trust, requests: PeerRequests, submit: Callable[[NetworkEvent], None]
    ) -> None:
        self._node = node
        self._trust = trust
        self._requests = requests
        self._submit = submit

    async def on_request(self, peer: PeerId, protocol: str, frame: bytes) -> bytes | None:
        """Answer a peer's request; None resets its stream."""
        return await self._requests.answer(peer, protocol, frame)

    def on_gossip(self, topic: str, relay: PeerId, payload: bytes) -> None:
        """A message on one of the topics."""
        self._submit(GossipReceived(topic, relay, payload))

    def on_gossip_spoiled(self, relay: PeerId) -> None:
        """A neighbour passed on too much that is invalid."""
        self._submit(GossipSpoiled(relay))

    def on_connected(self, peer: PeerId, host: str) -> None:
        """A connection is open."""
        self._submit(PeerConnected(peer, host))

    def on_disconnected(self, peer: PeerId) -> None:
        """The last connection has closed."""
        self._submit(PeerDisconnected(peer))

    def on_violation(self, peer: PeerId) -> None:
        """It broke a rule of the streams, or the protocol of the bulk transport."""
        self._submit(PeerMisbehaved(peer))

    def on_discovered(self, peer: PeerId, address: str, told_from: str) -> None:
        """Multicast DNS has seen a node: its greeting will say which."""
        self._submit(PeerDiscovered(peer, address, told_from))

    def tier(self, peer: PeerId) -> Tier:
        """Whose needs come first; looks into dicts alone, and so from any thread."""
        return self._trust.tier(peer)

    def may_dial(self, peer: PeerId, address: str, told_from: str) -> bool:
        """Whether a search of the DHT may dial a peer there; saying yes counts as a dial."""
        return self._node.may_dial(peer, address, told_from, clock.now())
