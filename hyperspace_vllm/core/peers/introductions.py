"""Tells the node's other parts which peers it knows: the authors of gossip at once, all the rest now and then."""

from collections.abc import Iterable

from ..events.gossip import AuthorsChanged
from ..events.known_peers import KvEndpoint, KvPeersChanged, PeersChanged
from ..events.vocabulary import NetworkEffect
from ..records.ids import PeerId
from ..records.now import Now
from ..records.peer_record import PeerRecord
from ..records.rank import Acquaintance
from .membership import Membership
from .trust import Trust

TELL_AGAIN_MS = 100  # 2 ms of work with a full table


def kv_peers(usable: Iterable[PeerRecord], endpoints: Iterable[KvEndpoint], trust: Trust) -> KvPeersChanged:
    """The peers that are served KV, and the endpoints of those that are asked for it: not the same peers."""
    records = tuple(usable)
    admitted = tuple(record.peer for record in records if trust.serves_kv(record.public_key))
    asked = {record.peer for record in records if trust.asks_for_kv(record.public_key)}
    return KvPeersChanged(admitted, tuple(endpoint for endpoint in endpoints if endpoint.peer in asked))


class Introductions:
    """What was last told, so that only changes are."""

    def __init__(self, members: Membership, trust: Trust, now: Now) -> None:
        self._members = members
        self._trust = trust
        self._tell_at_ms = now.mono_ms  # not before
        self._told: tuple[object, ...] = ()
        self._authors: tuple[tuple[PeerId, Acquaintance], ...] = ()

    def due(self, now: Now) -> list[NetworkEffect]:
        """Tell of what has changed, if it is time."""
        if self._members.changed and now.mono_ms >= self._tell_at_ms:
            self._members.changed = False
            self._tell_at_ms = now.mono_ms + TELL_AGAIN_MS
            return self.tell(now)
        return self._tell_authors() if self._members.has_new else []  # whose announcements may come at once

    def tell(self, now: Now) -> list[NetworkEffect]:
        """Tell of what has changed."""
        effects = self._tell_authors()
        usable = self._members.usable(now)
        endpoints, addresses = self._members.endpoints(now), self._members.addresses(now)
        said = ((record.peer, record.address, record.endpoint) for record in usable)
        told = (*said, endpoints, addresses)
        if told != self._told:
            self._told = told
            effects += [PeersChanged(usable, addresses), kv_peers(usable, endpoints, self._trust)]
        return effects

    def next_deadline_ms(self) -> int | None:
        """When `due` has something to tell."""
        return self._tell_at_ms if self._members.changed else None

    def _tell_authors(self) -> list[NetworkEffect]:
        self._members.has_new = False
        authors = self._members.authors()
        if authors == self._authors:
            return []
        self._authors = authors
        return [AuthorsChanged(authors)]
