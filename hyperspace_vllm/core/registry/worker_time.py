"""How long the documents of each host may keep the only registry worker busy.

The time of an import is unknown before it ends, so a host has one import under way at a time and pays afterwards. A
document that kills or hangs the worker costs the documents of all owners, which are then rebuilt. One such loss may
have another cause.
"""

from collections import OrderedDict

from ..peers.allowance import Allowance
from ..records.limits import REGISTRY_OWNERS_MAX, WORKER_BURST_MS, WORKER_MS_PER_S
from ..records.now import Now
from ..records.rank import Acquaintance, Rank


class WorkerTime:
    """The time of one node's worker. Owners on the node's own lists belong to no host's share."""

    def __init__(self) -> None:
        self._left: OrderedDict[str, Allowance] = OrderedDict()  # by host, those that paid longest ago first
        self._under_way: dict[bytes, str] = {}  # owner -> host

    def begin(self, owner: bytes, acquaintance: Acquaintance, now: Now) -> bool:
        """Whether to import a document of `owner` now; `ended` follows once for each import that has begun."""
        if acquaintance.rank is Rank.LISTED:
            return True
        left = self._left.get(acquaintance.source)
        if acquaintance.source in self._under_way.values() or (left is not None and left.left(now) <= 0):
            return False
        self._under_way[owner] = acquaintance.source
        return True

    def ended(self, owner: bytes, took_ms: int, now: Now) -> None:
        """The import has ended after this time."""
        host = self._under_way.pop(owner, None)
        if host is not None:
            self.pay(host, took_ms, now)

    def pay(self, host: str, cost_ms: int, now: Now) -> None:
        """A document of that host has cost this time, even if less is left."""
        left = self._left.setdefault(host, Allowance(WORKER_MS_PER_S, WORKER_BURST_MS, now))
        left.spend(cost_ms, now)
        self._left.move_to_end(host)
        if len(self._left) > REGISTRY_OWNERS_MAX:
            self._left.popitem(last=False)
