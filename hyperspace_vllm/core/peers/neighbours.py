"""The peers that a node keeps connected: which ones it dials, and which connections it closes.

OUTBOUND_MIN neighbours are of this node's own choice, so that peers that connect to it cannot be all that it knows.
`explore` dials one more, because both halves of a parted network may have enough neighbours. Connections beyond
NEIGHBOURS_MAX that are not used are closed.
"""

import random
from collections import Counter
from itertools import islice

from ..events.connections import Connect, Disconnect
from ..events.vocabulary import NetworkEffect
from ..records.ids import PeerId
from ..records.limits import PEERS_KNOWN_MAX
from ..records.now import Now
from .address import may_dial
from .dials import Dials
from .inbound import least_useful_first, select_replaced
from .own_record import OwnRecord
from .peer_table import Peer, PeerTable
from .trust import Trust

TARGET_NEIGHBOURS = 8
OUTBOUND_MIN = 4
NEIGHBOURS_MAX = 24
CONNECT_MS = 3_000
UNUSED_MS = 10_000  # an unused connection may be closed
DIAL_AGAIN_MS = 2_000  # doubled for every failure
DIAL_AGAIN_MS_MAX = 10_000  # a parted network joins again within seconds
DIALS_MAX = 4  # at once


def dial_delay_ms(failures: int) -> int:
    """How long a peer is not dialled after so many failures in a row."""
    return min(DIAL_AGAIN_MS << min(failures, 10), DIAL_AGAIN_MS_MAX)


class Neighbours:
    """Marks peers of `peers` as dialling or dismissed; what becomes of the connection is Membership's."""

    def __init__(self, peers: PeerTable, own: OwnRecord, trust: Trust, dials: Dials, rng: random.Random) -> None:
        self._peers = peers
        self._own = own
        self._trust = trust
        self._dials = dials
        self._rng = rng

    def dial(self, now: Now) -> list[NetworkEffect]:
        """Connect to as many more as are wanted: the bootstrap list first, then members and peers that were met."""
        linked = [known for known in self._peers if known.connected and not known.silent]
        dialling = sum(known.dialling for known in self._peers)
        lacking = max(TARGET_NEIGHBOURS - len(linked), OUTBOUND_MIN - sum(known.outbound for known in linked))
        wanted = min(lacking - dialling, DIALS_MAX - dialling)
        if wanted <= 0:
            return []
        ready = self._ready(now)
        self._rng.shuffle(ready)
        ready.sort(key=lambda each: (not each.bootstrap, each.failures, not each.member, not each.met))
        within_budget = (known for known in ready if self.may_dial(known, now))
        return [_connect(known, now) for known in islice(within_budget, wanted)]

    def explore(self, now: Now) -> list[NetworkEffect]:
        """Connect to one more, at random."""
        ready = self._ready(now)
        if not ready or sum(known.dialling for known in self._peers) >= DIALS_MAX:
            return []
        known = self._rng.choice(ready)
        return [_connect(known, now)] if self.may_dial(known, now) else []

    def may_dial(self, known: Peer, now: Now) -> bool:
        """Whether to dial the peer at its address now; if so, it is counted."""
        if known.address == known.configured:
            return True
        return self._dials.take(known.peer, known.address, known.owns(known.address), now)

    def may_dial_at(self, peer: PeerId, address: str, told_from: str, now: Now) -> bool:
        """Whether to dial a peer at the address that a DHT answer from `told_from` names; if so, it is counted."""
        known = self._peers.get(peer)
        if not may_dial(address, self._own.record.address, told_from):
            return False
        return self._dials.take(peer, address, known is not None and known.owns(address), now)

    def dial_failed(self, known: Peer, now: Now) -> None:
        """The peer could not be reached."""
        known.dialling = False
        known.failures += 1
        self._dial_later(known, now)

    def disconnected(self, known: Peer, now: Now) -> None:
        """The connection to the peer, or the dial, has ended."""
        # A peer that accepts connections only to close them is dialled less and less often.
        lasted = known.connected and now.mono_ms - known.connected_at_ms >= UNUSED_MS
        known.failures = 0 if lasted else known.failures + 1
        known.connected = known.outbound = known.dialling = False
        known.pinged_at_ms = None
        self._dial_later(known, now)

    def trim(self, now: Now) -> list[NetworkEffect]:
        """Close connections beyond NEIGHBOURS_MAX, the least useful first."""
        connected = [known for known in self._peers if known.connected]
        excess = min(len(connected) - NEIGHBOURS_MAX, DIALS_MAX)
        if excess <= 0:
            return []
        hosts = Counter(known.source for known in connected)
        spare = [
            known
            for known in connected
            if not known.bootstrap
            and now.mono_ms - known.connected_at_ms > UNUSED_MS
            and (now.mono_ms - known.used_at_ms > UNUSED_MS or (hosts[known.source] > 1 and not known.outbound))
        ]
        return _dismiss(least_useful_first(spare, self._trust)[:excess])

    def make_room(self, newcomer: Peer) -> list[NetworkEffect]:
        """Close the connection that the newcomer's replaces, or the newcomer's."""
        evicted = select_replaced(self._peers, newcomer, self._trust)
        return [] if evicted is None else _dismiss([evicted])

    def _ready(self, now: Now) -> list[Peer]:
        return [
            known
            for known in self._peers
            if known.address and not known.connected and not known.dialling and known.dial_at_ms <= now.mono_ms
        ]

    def _dial_later(self, known: Peer, now: Now) -> None:
        delay_ms = dial_delay_ms(known.failures)  # less a random part, so that peers do not all dial at once
        known.dial_at_ms = max(known.dial_at_ms, now.mono_ms + round(delay_ms * self._rng.uniform(0.5, 1.0)))


def _connect(known: Peer, now: Now) -> Connect:
    known.dialling, known.dialled_at_ms = True, now.mono_ms
    return Connect(known.peer, known.address, CONNECT_MS)


def _dismiss(peers: list[Peer]) -> list[NetworkEffect]:
    for known in peers:
        known.dismissed = True
    return [Disconnect(known.peer) for known in peers]


assert OUTBOUND_MIN <= TARGET_NEIGHBOURS < NEIGHBOURS_MAX < PEERS_KNOWN_MAX
