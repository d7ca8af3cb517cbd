"""Which peers are evicted first from a full table.

New identities cost nothing, machines do. So everything that one machine brings is counted together: the peers that
connected from its address, and those that such peers reported. One machine (a `source`) may hold a quarter of any
table. In a full table TOLD peers are evicted before MET ones, peers of the largest source first, and the newest before
the older ones. LISTED peers are not part of a source's quarter and are evicted last.

Rejected: bounds by identity alone (a peer that invents a thousand others has a thousand times the bound); the largest
document first (many small invented ones push out a few honest ones with more content).
"""

from collections.abc import Iterable
from heapq import heapify, heapreplace
from typing import Generic, TypeVar

from ..records.rank import Acquaintance, Rank

T = TypeVar("T")


class _Source(Generic[T]):
    """What one source holds; the first to be evicted is at the end."""

    def __init__(self, holders: list[tuple[T, Rank, int]]) -> None:
        self._holders = sorted(holders, key=lambda holder: (-holder[1], holder[2]))  # of equals the newest is last
        self.size = sum(size for *_, size in holders)

    def __lt__(self, other: "_Source[T]") -> bool:
        return self._order < other._order

    @property
    def _order(self) -> tuple[int, int]:
        return (self._holders[-1][1] if self._holders else Rank.LISTED + 1, -self.size)

    def drop(self) -> T:
        holder, _, size = self._holders.pop()
        self.size -= size
        return holder


def select_evicted(held: Iterable[tuple[T, Acquaintance, int]], room: int, source_room: int) -> list[T]:
    """Of holders with their sizes, oldest first: those to evict so that the rest fit into `room`."""
    by_source: dict[str | None, list[tuple[T, Rank, int]]] = {}
    for holder, acquaintance, size in held:
        source = acquaintance.source if acquaintance.rank < Rank.LISTED else None
        by_source.setdefault(source, []).append((holder, acquaintance.rank, size))
    sources = {source: _Source(holders) for source, holders in by_source.items()}
    gone = []
    for source, each in sources.items():
        while source is not None and each.size > source_room:
            gone.append(each.drop())
    left = sum(each.size for each in sources.values())
    heap = list(sources.values())
    heapify(heap)
    while left > room:
        least = heap[0]
        left -= least.size
        gone.append(least.drop())
        left += least.size
        heapreplace(heap, least)
    return gone
