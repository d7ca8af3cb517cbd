"""The peers that a node knows; when there are too many, eviction.py chooses which to forget.

Connected and configured peers, and those that are being dialled, stay.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ..records.ids import PeerId
from ..records.limits import PEERS_KNOWN_MAX, PEERS_OF_SOURCE_MAX
from ..records.now import Now
from ..records.peer_record import PeerRecord
from ..records.rank import Acquaintance, Rank
from .address import host_of, source_of
from .eviction import select_evicted

NEVER_MS = -(1 << 62)
HOSTS_MAX = 2  # a machine may be dialled at one address, and dial from another


@dataclass(slots=True)
class Peer:
    """What is known of one other node. Times are monotonic."""

    peer: PeerId
    configured: str = ""  # its address on the bootstrap list
    listed: bool = False  # on one of this node's own lists
    source: str = ""  # the machine that brought it (eviction.py)
    record: PeerRecord | None = None
    raw: bytes = b""
    advertised: str = ""  # its record's address, if it may be dialled
    endpoint: str = ""  # its record's endpoint, if it may be dialled
    hosts: tuple[str, ...] = ()  # the last HOSTS_MAX IP addresses that it was met at, the latest first
    member: bool = False
    connected: bool = False
    outbound: bool = False  # this node chose it
    dismissed: bool = False  # this node closed the connection: unanswered requests do not count against the peer
    connected_at_ms: int = NEVER_MS
    asked_at_ms: int = NEVER_MS  # for its record
    exchanged_at_ms: int = NEVER_MS  # when it was last asked for others' records
    silent: bool = False  # it left a ping or a dial unanswered
    silent_at_ms: int = NEVER_MS
    heard_at_ms: int = NEVER_MS
    alive_at_ms: int = NEVER_MS  # when something recent of it last came, also through others
    pinged_at_ms: int | None = None  # the ping is unanswered
    used_at_ms: int = NEVER_MS  # for something other than staying in touch
    dialling: bool = False
    dialled_at_ms: int = NEVER_MS
    dial_at_ms: int = NEVER_MS
    failures: int = 0
    rtt_ms: float = 0.0

    @property
    def bootstrap(self) -> bool:
        """Whether it is on the bootstrap list."""
        return bool(self.configured)

    @property
    def met(self) -> bool:
        """Whether it has ever proved its identity over a connection."""
        return self.heard_at_ms > NEVER_MS

    @property
    def acquaintance(self) -> Acquaintance:
        """How well it is known."""
        rank = Rank.LISTED if self.listed or self.bootstrap else Rank.MET if self.met else Rank.TOLD
        return Acquaintance(rank, self.source)

    @property
    def address(self) -> str:
        """Where to dial it: the advertised address, or after a failure the configured one. '' if there is none."""
        if self.configured and (self.failures % 2 or not self.advertised):
            return self.configured
        return self.advertised

    @property
    def may_all_be_dialled(self) -> bool:
        """Whether every address in its record may be dialled."""
        return self.record is None or (self.advertised, self.endpoint) == (self.record.address, self.record.endpoint)

    def owns(self, address: str) -> bool:
        """Whether host:port is at a host where the peer was met."""
        return host_of(address) in self.hosts

    def meet(self, host: str) -> None:
        """The peer is connected from, or at, this IP address."""
        self.source = source_of(host)
        self.hosts = tuple(dict.fromkeys((host_of(f"{host}:0"), *self.hosts)))[:HOSTS_MAX]

    def may_be_asked(self, now: Now) -> bool:
        """Whether to send it a request; a silent peer only if it was reported alive since, or may be dialled."""
        if self.connected:
            return not self.silent
        was_heard_of = self.alive_at_ms > self.silent_at_ms
        return bool(self.address) and (not self.silent or was_heard_of or self.dial_at_ms <= now.mono_ms)


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
        """False: the table is full of peers that must stay, or of better known ones."""
        self._peers[peer.peer] = peer
        if len(self) <= PEERS_KNOWN_MAX and self.of_source(peer.source) <= PEERS_OF_SOURCE_MAX:
            return True
        idle = [each for each in self if not (each.connected or each.bootstrap or each.dialling)]
        room = PEERS_KNOWN_MAX - (len(self) - len(idle))
        losers = select_evicted(((each, each.acquaintance, 1) for each in idle), max(room, 0), PEERS_OF_SOURCE_MAX)
        for loser in losers if room >= 0 else [peer]:
            del self._peers[loser.peer]
        return peer.peer in self._peers

    def of_source(self, source: str) -> int:
        """How many peers count as brought by one machine."""
        return sum(each.source == source for each in self._peers.values())

    def remove(self, peer: PeerId) -> None:
        """Forget a peer."""
        del self._peers[peer]
