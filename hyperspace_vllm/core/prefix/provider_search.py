"""The search for providers of one lookup: which peers have not answered, and how long it waited for them in vain."""

from collections.abc import Iterable

from ..records.ids import PeerId

SILENT_MS_MIN = 100  # shorter searches end before honest peers that are far away can answer


class ProviderSearch:
    """`outstanding` peers have not answered; `silent` did not answer within SILENT_MS_MIN or more."""

    def __init__(self, peers: tuple[PeerId, ...], now_ms: int) -> None:
        self.outstanding: set[PeerId] = set(peers)
        self.silent: dict[PeerId, None] = {}  # an ordered set
        self.ends_ms = now_ms
        self._began_ms = now_ms

    def begin(self, now_ms: int, ends_ms: int) -> None:
        """The peers are asked now."""
        self._began_ms, self.ends_ms = now_ms, ends_ms

    def answered(self, peer: PeerId) -> None:
        """The peer has said what it has, or failed."""
        self.outstanding.discard(peer)

    def may_bring_more(self, now_ms: int) -> bool:
        """Whether a peer may still answer in time."""
        return bool(self.outstanding) and now_ms < self.ends_ms

    def waited_ms(self, peers: Iterable[PeerId], now_ms: int) -> dict[PeerId, int]:
        """How long the search has waited in vain for each of these peers; notes which of them are silent."""
        if now_ms > self.ends_ms + SILENT_MS_MIN:
            return {}  # this node itself did not run: their answers may be waiting behind this event
        for_ms = min(now_ms, self.ends_ms) - self._began_ms
        waited_ms = dict.fromkeys(peers, for_ms)
        if for_ms >= SILENT_MS_MIN:
            self.silent |= dict.fromkeys(waited_ms)
        return waited_ms
