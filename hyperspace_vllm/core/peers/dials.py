"""How often this node dials addresses that peers report: one budget for every path that dials.

Those paths are new neighbours, fetches of responses, chunks of KV, DHT lookups and mDNS. address.py decides which
addresses are allowed. Each dial is counted for the peer that it is meant for, for the host that it goes to, and for all
together. An address is the peer's *own* when this node has met the peer at its host: dialling it harms no third party,
so it may be dialled often. Any other address is a claim that only a dial can check. It is dialled seldom, so that a
peer that signs records with a third party's address cannot use this node to attack it.

Addresses that the operator configured (`bootstrap`, `peers`) are dialled without this budget.
"""

from collections import OrderedDict

from ..records.ids import PeerId
from ..records.limits import (
    DIALS_BURST_S,
    DIALS_COUNTED_MAX,
    DIALS_OF_PEER_PER_S,
    DIALS_OWN_PER_S,
    DIALS_OWN_TO_HOST_PER_S,
    DIALS_PER_S,
    DIALS_TO_HOST_PER_S,
)
from ..records.now import Now
from .address import host_of, source_of
from .allowance import Allowance


class Dials:
    """The budget of one node."""

    def __init__(self, now: Now) -> None:
        self._all = _allowance(DIALS_PER_S, now)
        self._all_own = _allowance(DIALS_OWN_PER_S, now)
        self._of_peer: OrderedDict[str, Allowance] = OrderedDict()
        self._to_host: OrderedDict[str, Allowance] = OrderedDict()
        self._own_to_host: OrderedDict[str, Allowance] = OrderedDict()

    def take(self, peer: PeerId, address: str, own: bool, now: Now) -> bool:
        """Whether to dial `peer` at host:port now; if so, it is counted."""
        total = self._all_own if own else self._all
        if own:
            to, host, per_s = self._own_to_host, source_of(host_of(address)), DIALS_OWN_TO_HOST_PER_S
        else:
            to, host, per_s = self._to_host, host_of(address), DIALS_TO_HOST_PER_S
        spent = (total, self._of_peer.get(peer), to.get(host))
        if any(count is not None and count.left(now) < 1 for count in spent):
            return False
        total.take(1, now)
        _counted(self._of_peer, peer, DIALS_OF_PEER_PER_S, now).take(1, now)
        _counted(to, host, per_s, now).take(1, now)
        return True


def _counted(counts: OrderedDict[str, Allowance], name: str, per_s: float, now: Now) -> Allowance:
    """The allowance of that name; the least recently dialled are forgotten, when they are full again."""
    count = counts.get(name)
    if count is None:
        count = counts[name] = _allowance(per_s, now)
        if len(counts) > DIALS_COUNTED_MAX:
            counts.popitem(last=False)
    counts.move_to_end(name)
    return count


def _allowance(per_s: float, now: Now) -> Allowance:
    return Allowance(per_s, per_s * DIALS_BURST_S, now)
