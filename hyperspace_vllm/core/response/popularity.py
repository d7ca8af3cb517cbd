"""How often a response was requested recently, and how many nodes should therefore have it."""

from collections import OrderedDict
from math import ceil, log2

from ..records.now import Now

HALF_LIFE_MS = 600_000
TRACKED_MAX = 20_000
REPLICAS_MAX = 8
CLAIM_MAX = float(1 << REPLICAS_MAX)  # what a peer may claim: enough for every copy, forgotten within hours


def replicas_wanted(requests: float) -> int:
    """Copies in the network of a response with that many (decayed) requests: 1, then one more at every doubling."""
    return min(1 + ceil(log2(1 + max(requests, 0.0))), REPLICAS_MAX)


def decayed(requests: float, age_ms: int) -> float:
    """`requests` after `age_ms`: halved after each half-life."""
    return requests * float(0.5 ** (age_ms / HALF_LIFE_MS))


class Popularity:
    """Decayed counts; the ids that were asked for longest ago are forgotten."""

    def __init__(self) -> None:
        self._counts: OrderedDict[bytes, tuple[float, int]] = OrderedDict()

    def add(self, request_hash: bytes, now: Now, requests: float = 1.0) -> None:
        """The response was requested."""
        self._counts[request_hash] = self.requests(request_hash, now) + requests, now.mono_ms
        self._counts.move_to_end(request_hash)
        if len(self._counts) > TRACKED_MAX:
            self._counts.popitem(last=False)

    def claimed(self, request_hash: bytes, now: Now, requests: float) -> None:
        """A provider's count. It may include this node's requests, so the counts are not added."""
        more = min(requests, CLAIM_MAX) - self.requests(request_hash, now)
        if more > 0:
            self.add(request_hash, now, more)

    def requests(self, request_hash: bytes, now: Now) -> float:
        """The decayed number of requests."""
        count, at_ms = self._counts.get(request_hash, (0.0, now.mono_ms))
        return decayed(count, now.mono_ms - at_ms)

    def sixteenths(self, request_hash: bytes, now: Now) -> int:
        """The number of requests as encoded in a Hit."""
        return min(int(16 * self.requests(request_hash, now)), (1 << 32) - 1)
