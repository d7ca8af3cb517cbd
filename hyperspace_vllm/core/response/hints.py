"""Hints from gossip: which peer announces which id. A request to the peer shows whether a hint is true.

A peer's newest hints replace its own oldest ones. If all hints together are too many, the oldest of the peer with the
most are dropped, first of peers without standing. So a peer cannot push out another peer's hints. Of the providers of
one id the first stay, because a peer that copies others' announcements comes after them; but a provider with standing
replaces one without, so that unknown peers that announce an id early keep no member out.
"""

from collections import OrderedDict
from collections.abc import Callable
from itertools import islice

from ..records.ids import PeerId
from ..records.limits import PROVIDERS_MAX, RESPONSE_HINTS_MAX

HINTS_PER_PEER_MAX = 20_000
_THINNED = 64  # at once: finding the peer with the most hints takes a look at every peer


class Hints:
    """Providers by id (request hash or row id). `has_standing(peer)`: whether it was chosen, or has delivered."""

    def __init__(self, has_standing: Callable[[PeerId], bool]) -> None:
        self._has_standing = has_standing
        self._providers: dict[bytes, dict[PeerId, int]] = {}
        self._said: dict[PeerId, OrderedDict[bytes, None]] = {}  # by each peer, the oldest first
        self._count = 0

    def __len__(self) -> int:
        """Pairs of provider and id."""
        return self._count

    def add(self, name: bytes, peer: PeerId, expires_at_ms: int, wall_ms: int) -> None:
        """`peer` announces that it serves `name` until then."""
        if peer not in self._providers.get(name, ()) and not self._make_room(name, peer, wall_ms):
            return
        providers = self._providers.setdefault(name, {})
        if peer not in providers:
            self._count += 1
        providers[peer] = expires_at_ms
        said = self._said.setdefault(peer, OrderedDict())
        said[name] = None
        said.move_to_end(name)

    def providers(self, name: bytes, wall_ms: int) -> tuple[PeerId, ...]:
        """The peers with an unexpired hint, in the order of their first announcement."""
        self._forget_expired(name, wall_ms)
        return tuple(self._providers.get(name, ()))

    def remove(self, name: bytes, peer: PeerId) -> None:
        """The peer does not serve the id after all."""
        providers = self._providers.get(name)
        if providers is None or providers.pop(peer, None) is None:
            return
        self._count -= 1
        if not providers:
            del self._providers[name]
        said = self._said[peer]
        del said[name]
        if not said:
            del self._said[peer]

    def _make_room(self, name: bytes, peer: PeerId, wall_ms: int) -> bool:
        if len(self._providers.get(name, ())) >= PROVIDERS_MAX:
            self._forget_expired(name, wall_ms)
            if len(self._providers.get(name, ())) >= PROVIDERS_MAX and not self._give_way(name, peer):
                return False
        if len(self._said.get(peer, ())) >= HINTS_PER_PEER_MAX:
            self._forget_oldest(peer, 1)
        if self._count >= RESPONSE_HINTS_MAX:
            self._forget_oldest(max(self._said, key=self._said_too_much), _THINNED)
        return True

    def _said_too_much(self, peer: PeerId) -> tuple[bool, int]:
        return not self._has_standing(peer), len(self._said[peer])

    def _give_way(self, name: bytes, peer: PeerId) -> bool:
        """Whether `peer` takes the place of another one: of the last without standing."""
        if not self._has_standing(peer):
            return False
        loser = next((other for other in reversed(self._providers[name]) if not self._has_standing(other)), None)
        if loser is not None:
            self.remove(name, loser)
        return loser is not None

    def _forget_expired(self, name: bytes, wall_ms: int) -> None:
        providers = self._providers.get(name, {})
        for peer in [peer for peer, expires_at_ms in providers.items() if expires_at_ms <= wall_ms]:
            self.remove(name, peer)

    def _forget_oldest(self, peer: PeerId, count: int) -> None:
        for name in list(islice(self._said[peer], count)):
            self.remove(name, peer)
