"""What the peers of one lookup were asked for and delivered, and how long a further request to each would take."""

from collections.abc import Iterable
from dataclasses import dataclass

from ..records.ids import PeerId
from ..records.limits import FETCH_STALL_MS
from .cost_model import RateEstimator, transfer_ms


@dataclass(slots=True)
class _Delivery:
    """The delivery of one peer, in bytes and ms."""

    asked: int = 0
    verified: int = 0
    first_ms: int = 0
    last_ms: int = 0


class Deliveries:
    """`rtt_ms` has the peers that have answered the search."""

    def __init__(self, rates: RateEstimator) -> None:
        self._rates = rates
        self.rtt_ms: dict[PeerId, int] = {}
        self._asked_at_ms: dict[PeerId, int] = {}
        self._of_peer: dict[PeerId, _Delivery] = {}

    def manifest_asked(self, peer: PeerId, now_ms: int) -> None:
        """The peer is asked for a manifest."""
        self._asked_at_ms.setdefault(peer, now_ms)

    def asked(self, peer: PeerId, size: int, now_ms: int) -> None:
        """The peer is asked for `size` bytes of a row."""
        self._asked_at_ms.setdefault(peer, now_ms)
        self._of_peer.setdefault(peer, _Delivery(first_ms=now_ms, last_ms=now_ms)).asked += size

    def delivered(self, peer: PeerId, size: int, now_ms: int) -> None:
        """`size` bytes from the peer have been verified."""
        delivery = self._of_peer.get(peer)
        if delivery is not None:
            delivery.verified += size
            delivery.last_ms = now_ms

    def cost_ms(self, peer: PeerId, size: int, now_ms: int) -> int:
        """Expected time of a transfer of `size` bytes from the peer."""
        return transfer_ms(size, self._rates.rate(peer, now_ms), self.rtt_ms[peer])

    def estimate_ms(self, sizes: Iterable[tuple[int, list[PeerId]]], now_ms: int) -> int:
        """Expected time of transfers of these sizes, each from the one of its peers that would deliver it first."""
        queued: dict[PeerId, int] = {}
        for size, peers in sizes:
            best = min(peers, key=lambda peer: self.cost_ms(peer, queued.get(peer, 0) + size, now_ms))
            queued[best] = queued.get(best, 0) + size
        waits = (self.cost_ms(peer, size, now_ms) + self.rtt_ms[peer] for peer, size in queued.items())
        return max(waits, default=0)

    def end(self, late: set[PeerId], now_ms: int) -> None:
        """Update the rates; `late` peers have not delivered everything."""
        for peer, delivery in self._of_peer.items():
            end_ms = now_ms if peer in late else delivery.last_ms
            elapsed_ms = end_ms - delivery.first_ms - self.rtt_ms[peer]
            self._rates.measured(peer, delivery.asked, delivery.verified, elapsed_ms, now_ms)
        self._of_peer.clear()

    def waited_ms(self, peers: Iterable[PeerId], now_ms: int) -> dict[PeerId, int]:
        """How long ago each was first asked; only peers for which that is FETCH_STALL_MS or more."""
        waited_ms = {peer: now_ms - self._asked_at_ms[peer] for peer in peers}
        return {peer: for_ms for peer, for_ms in waited_ms.items() if for_ms >= FETCH_STALL_MS}
