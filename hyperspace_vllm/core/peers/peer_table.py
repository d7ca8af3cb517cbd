"""The peers that a node knows, and who has to go when there are too many.

New identities cost nothing, so a flood of them must not push out those that are of use: connected and configured peers
stay; members and those that were once heard go last; of the rest whoever introduced most loses one, so that a neighbour
that invents peers displaces its own inventions.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from ..records.ids import PeerId
from ..records.limits import PEERS_KNOWN_MAX
from ..records.peer_record import PeerRecord


@dataclass(slots=True)
class Peer:
    """What is known of one other node. Times are 0 for never."""

    peer: PeerId
    configured: str = ""  # its address on the bootstrap list
    told_by: PeerId | None = None  # None: it came by itself
    record: PeerRecord | None = None
    raw: bytes = b""
    advertised: str = ""  # its record's address, if it may be dialled
    member: bool = False
    connected: bool = False
    outbound: bool = False  # this node chose it
    dismissed: bool = False  # this node hung up: what it hears no more says nothing of the peer
    connected_at_ms: int = 0
    asked_at_ms: int = 0  # for its record
    silent: bool = False  # it left a ping or a dial unanswered
    silent_at_ms: int = 0
    heard_at_ms: int = 0
    alive_at_ms: int = 0  # when something fresh of it last came, through others too
    pinged_at_ms: int = 0  # the ping is unanswered
    used_at_ms: int = 0  # for something other than staying in touch
    dialling: bool = False
    dialled_at_ms: int = 0
    dial_at_ms: int = 0
    failures: int = 0
    rtt_ms: float = 0.0

    @property
    def bootstrap(self) -> bool:
        """Whether it is on the bootstrap list."""
        return bool(self.configured)

    @property
    def address(self) -> str:
        """Where to dial it: as it says itself, or after a failure as configured. '' if nowhere."""
        if self.configured and (self.failures % 2 or not self.advertised):
            return self.configured
        return self.advertised

    def may_be_asked(self, now_ms: int) -> bool:
        """Over its connection, or over a new one; a silent one, when it was heard of since or may be dialled."""
        if self.connected:
            return not self.silent
        was_heard_of = self.alive_at_ms > self.silent_at_ms
        return bool(self.address) and (not self.silent or was_heard_of or self.dial_at_ms <= now_ms)

    def shift(self, by_ms: int) -> None:
        """The clock was set."""
        self.connected_at_ms += by_ms
        self.asked_at_ms += by_ms
        self.silent_at_ms += by_ms
        self.heard_at_ms += by_ms if self.heard_at_ms else 0
        self.alive_at_ms += by_ms
        self.pinged_at_ms += by_ms if self.pinged_at_ms else 0
        self.used_at_ms += by_ms
        self.dialled_at_ms += by_ms
        self.dial_at_ms += by_ms


class PeerTable:
    """At most PEERS_KNOWN_MAX peers, in the order in which they were met."""

    def __init__(self) -> None:
        self._peers: dict[PeerId, Peer] = {}

    def __len__(self) -> int:
        return len(self._peers)

    def __iter__(self) -> Iterator[Peer]:
        return iter(list(self._peers.values()))

    def get(self, peer: PeerId) -> Peer | None:
        """What is known of a peer."""
        return self._peers.get(peer)

    def add(self, peer: Peer) -> bool:
        """False: the table is full of peers that must stay."""
        if len(self._peers) >= PEERS_KNOWN_MAX and not self._make_room():
            return False
        self._peers[peer.peer] = peer
        return True

    def remove(self, peer: PeerId) -> None:
        """Forget a peer."""
        del self._peers[peer]

    def _make_room(self) -> bool:
        idle = [each for each in self._peers.values() if not (each.connected or each.bootstrap or each.dialling)]
        if not idle:
            return False
        introduced = Counter(each.told_by for each in idle if not each.heard_at_ms)
        loser = min(
            idle,
            key=lambda each: (
                each.member,
                each.heard_at_ms > 0,
                -introduced[each.told_by],
                each.heard_at_ms,
                each.record.expires_at_ms if each.record else 0,
            ),
        )
        del self._peers[loser.peer]
        return True
