"""How much this node uses the DHT: searches within a CPU budget, and providing at a fixed rate, popular keys first.

A search costs tens to hundreds of CPU-ms (docs/notes/py-libp2p.md), and so does providing: without bounds a busy node
would spend its cores on searches that find nothing.
"""

from collections import OrderedDict
from collections.abc import Iterable

from ..records.now import Now

SEARCH_SHARE = 0.05  # of a core
SEARCH_BURST_MS = 2_000.0
SEARCH_COST_MS = 100.0  # before one was measured
NOT_FOUND_MS = 10_000
NOT_FOUND_MAX = 10_000
PROVIDE_EVERY_MS = 5_000
PROVIDES_MAX = 1_024


class SearchBudget:
    """CPU-ms that are left for searches, and the keys that were just searched in vain."""

    def __init__(self, now: Now) -> None:
        self._left_ms = SEARCH_BURST_MS
        self._at_ms = now.mono_ms
        self._cost_ms = SEARCH_COST_MS
        self._not_found_at_ms: OrderedDict[bytes, int] = OrderedDict()

    def take(self, request_hash: bytes, now: Now) -> bool:
        """Whether to search now; if so, the search is paid for."""
        self._left_ms = min(self._left_ms + (now.mono_ms - self._at_ms) * SEARCH_SHARE, SEARCH_BURST_MS)
        self._at_ms = now.mono_ms
        failed_at_ms = self._not_found_at_ms.get(request_hash)
        if failed_at_ms is not None and now.mono_ms - failed_at_ms < NOT_FOUND_MS:
            return False
        price_ms = min(self._cost_ms, SEARCH_BURST_MS)  # a search that costs more than the burst is still tried
        if self._left_ms < price_ms:
            return False
        self._left_ms -= price_ms
        return True

    def cost(self, cost_ms: float) -> None:
        """The measured cost of a search; 0: not measured."""
        if cost_ms:
            self._cost_ms = 0.8 * self._cost_ms + 0.2 * cost_ms

    def not_found(self, request_hash: bytes, now: Now) -> None:
        """The search found no provider: do not repeat it at once."""
        self._not_found_at_ms[request_hash] = now.mono_ms
        self._not_found_at_ms.move_to_end(request_hash)
        if len(self._not_found_at_ms) > NOT_FOUND_MAX:
            self._not_found_at_ms.popitem(last=False)


class ProvideQueue:
    """Keys for which this node is to be found as a provider, with the number of requests for each."""

    def __init__(self, now: Now) -> None:
        self._requests: dict[str, float] = {}
        self._next_at_ms = now.mono_ms

    def add(self, key: str, requests: float) -> None:
        """Provide the key when its turn comes; if there are too many, the least popular are dropped."""
        self._requests[key] = requests
        if len(self._requests) > PROVIDES_MAX:
            popular = sorted(self._requests, key=lambda key: -self._requests[key])[: PROVIDES_MAX // 2]
            self._requests = {key: self._requests[key] for key in popular}

    def remove(self, keys: Iterable[str]) -> None:
        """The responses of these keys are deleted."""
        for key in keys:
            self._requests.pop(key, None)

    def next_deadline_ms(self) -> int | None:
        """When the next may be provided."""
        return self._next_at_ms if self._requests else None

    def due(self, now: Now) -> str | None:
        """The key to provide now."""
        if not self._requests or now.mono_ms < self._next_at_ms:
            return None
        self._next_at_ms = now.mono_ms + PROVIDE_EVERY_MS
        key = max(self._requests, key=lambda key: self._requests[key])
        del self._requests[key]
        return key
