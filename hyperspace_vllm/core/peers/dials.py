"""How often this node dials where others say that somebody is: one budget for every path that dials.

Those paths are neighbours to be, fetches of responses, chunks of KV, searches of the DHT and mDNS. What an address may
be says address.py. Each dial is counted for the peer in whose name it is made, for the host that it goes to, and for
all together. An address is the peer's *own* when this node has met the peer at its host: dialling it harms nobody
else, so there it may dial often. Any other address is a claim, and dialling it is how the claim is tried: seldom, so
that whoever signs records with a third party's address makes no weapon of this node.

What the operator configured (`bootstrap`, `peers`) is dialled without asking here.
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
    """One node's."""

    def __init__(self, now: Now) -> None:
        self._all = _allowance(DIALS_PER_S, now)
        self._all_own = _allowance(DIALS_OWN_PER_S, now)
        self._of_peer: OrderedDict[str, Allowance] = OrderedDict()
        self._to_host: OrderedDict[str, Allowance] = OrderedDict()
        self._own_to_host: OrderedDict[str, Allowance] = OrderedDict()

    def take(self, peer: PeerId, address: str, own: bool, now: Now) -> bool:
        """Whether to dial `peer` at host:port now; if so, it is counted."""
        everybody = self._all_own if own else self._all
        if own:
            to, host, per_s = self._own_to_host, source_of(host_of(address)), DIALS_OWN_TO_HOST_PER_S
        else:
            to, host, per_s = self._to_host, host_of(address), DIALS_TO_HOST_PER_S
        spent = (everybody, self._of_peer.get(peer), to.get(host))
        if any(count is not None and count.left(now) < 1 for count in spent):
            return False
        everybody.take(1, now)
        _counted(self._of_peer, peer, DIALS_OF_PEER_PER_S, now).take(1, now)
        _counted(to, host, per_s, now).take(1, now)
        return True


def _counted(counts: OrderedDict[str, Allowance], name: str, per_s: float, now: Now) -> Allowance:
    """The allowance of that name; those longest not dialled are forgotten, when nothing of theirs is spent any more."""
    count = counts.get(name)
    if count is None:
        count = counts[name] = _allowance(per_s, now)
        if len(counts) > DIALS_COUNTED_MAX:
            counts.popitem(last=False)
    counts.move_to_end(name)
    return count


def _allowance(per_s: float, now: Now) -> Allowance:
    return Allowance(per_s, per_s * DIALS_BURST_S, now)
