"""What gossip has said about who serves what. Hints only: each is checked by asking."""

from collections import OrderedDict

from ..records.ids import PeerId
from ..records.limits import PROVIDERS_MAX, RESPONSE_HINTS_MAX

HINTS_PER_PEER_MAX = 20_000


class Hints:
    """Providers by id (request hash or row id); the ids that were announced longest ago make room."""

    def __init__(self) -> None:
        self._providers: OrderedDict[bytes, dict[PeerId, int]] = OrderedDict()
        self._counts: dict[PeerId, int] = {}

    def __len__(self) -> int:
        return len(self._providers)

    def add(self, name: bytes, peer: PeerId, expires_at_ms: int) -> None:
        """`peer` says that it serves `name` until then."""
        providers = self._providers.get(name)
        if providers is None:
            providers = self._providers[name] = {}
        self._providers.move_to_end(name)
        if peer not in providers:
            if self._counts.get(peer, 0) >= HINTS_PER_PEER_MAX or len(providers) >= PROVIDERS_MAX:
                if not providers:
                    del self._providers[name]
                return
            self._counts[peer] = self._counts.get(peer, 0) + 1
        providers[peer] = expires_at_ms
        if len(self._providers) > RESPONSE_HINTS_MAX:
            self._forget(next(iter(self._providers)))

    def providers(self, name: bytes, now_ms: int) -> tuple[PeerId, ...]:
        """Who said so and hasn't expired, in the order in which they first did."""
        providers = self._providers.get(name)
        if providers is None:
            return ()
        for peer in [peer for peer, expires_at_ms in providers.items() if expires_at_ms <= now_ms]:
            self.remove(name, peer)
        return tuple(self._providers.get(name, ()))

    def remove(self, name: bytes, peer: PeerId) -> None:
        """It doesn't serve it after all."""
        providers = self._providers.get(name)
        if providers is not None and providers.pop(peer, None) is not None:
            self._uncount(peer)
            if not providers:
                del self._providers[name]

    def _forget(self, name: bytes) -> None:
        for peer in self._providers.pop(name):
            self._uncount(peer)

    def _uncount(self, peer: PeerId) -> None:
        self._counts[peer] -= 1
        if not self._counts[peer]:
            del self._counts[peer]
