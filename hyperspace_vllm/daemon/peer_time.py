"""How much of this node's CPU time goes into what peers send, whatever it says.

A message, a frame and a byte have each a price, which is about what they take on a slow core. A connection that has used
up its time is not read for a while, so that TCP holds its sender back and an honest one loses nothing but speed, beyond
30 MB/s. Connections of one host share, and all together, but for those of peers on this node's own lists, which lose
nothing to the others. Rejected: measuring the time, most of which is spent in tasks that cannot say for whom.
"""

from collections import OrderedDict
from collections.abc import Callable

import trio

from ..core.peers.address import source_of
from ..core.records.ids import PeerId

MESSAGE_S = 100e-6  # one Noise message, whatever is in it
FRAME_S = 4e-6
BYTE_S = 5e-9

CONNECTION_SHARE = 0.2  # of a core
HOST_SHARE = 0.25
ALL_SHARE = 0.4
BURST_S = 0.2  # CPU time that may be taken at once
HOSTS_MAX = 2048  # of which the shares are remembered


class Share:
    """A part of a core's time."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._used_until_s = float("-inf")

    def reserve(self, cost_s: float, now_s: float) -> float:
        """When work of `cost_s` may be done, at a time that is past if there is enough left."""
        self._used_until_s = max(self._used_until_s, now_s - BURST_S / self._share) + cost_s / self._share
        return self._used_until_s


class PeerTime:
    """The time of all connections; `is_listed` tells the peers on this node's own lists."""

    def __init__(self, is_listed: Callable[[PeerId], bool]) -> None:
        self._is_listed = is_listed
        self._all = Share(ALL_SHARE)
        self._of_host: OrderedDict[str, Share] = OrderedDict()

    async def spend(self, cost_s: float, own: Share, peer: PeerId, host: str) -> None:
        """Return, after a checkpoint at least, when there is time for work of `cost_s` of a connection from `host`."""
        await trio.lowlevel.checkpoint()
        for share in (own,) if self._is_listed(peer) else (own, self._host(source_of(host)), self._all):
            now_s = trio.current_time()
            at_s = share.reserve(cost_s, now_s)
            if at_s > now_s:
                await trio.sleep_until(at_s)

    def _host(self, source: str) -> Share:
        share = self._of_host.setdefault(source, Share(HOST_SHARE))
        self._of_host.move_to_end(source)
        if len(self._of_host) > HOSTS_MAX:
            self._of_host.popitem(last=False)
        return share
