"""What a node has once it has joined its network, which takes seconds: what performs the effects of its core."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from ...core.events.node_state import NetworkJoined
from ...core.events.owner_documents import DeltasImported, DeltasRefused, ImportDeltas, OwnDeltaWritten, WriteRegistry
from ...core.peers.gossip_gate import GossipGate
from ...core.records.ids import PeerId
from ..responses.response_server import ResponseServer
from .address_book import AddressBook
from .network_lookups import Hints, Providers


class PeerHost(Providers, Protocol):
    """What reaches peers (Libp2pHost)."""

    @property
    def address(self) -> str:
        """host:port of the listener."""

    async def disconnect(self, peer: PeerId) -> None:
        """Close every connection to a peer."""

    def publish(self, topic: str, payload: bytes) -> bool:
        """Send to a topic's subscribers; False: dropped."""

    async def provide(self, key: str, timeout_s: float) -> bool:
        """Become a provider of `key` in the DHT; False: no peer was told."""


class Documents(Protocol):
    """The registry that peers pass on (RegistryDocuments)."""

    async def write(self, change: WriteRegistry, /) -> OwnDeltaWritten | DeltasRefused:
        """Sign a change of the own document."""

    async def import_deltas(self, deltas: ImportDeltas, /) -> DeltasImported | DeltasRefused:
        """Follow an owner's changes."""

    async def forget(self, owner: bytes, /) -> None:
        """Drop an owner's copy."""


class SharedHints(Hints, Protocol):
    """The registry in a fleet's Redis (RedisRegistry)."""

    def note_stored(self, id: bytes, expires_at_ms: int, /) -> None:
        """This node can serve it until then."""

    def note_gone(self, ids: Iterable[bytes], /) -> None:
        """This node can no longer serve them."""


@dataclass(frozen=True)
class Joined:
    """What joining has brought (join.py)."""

    event: NetworkJoined
    host: PeerHost
    gate: GossipGate
    book: AddressBook
    responses: ResponseServer | None
    documents: Documents | None
    hints: SharedHints | None
