"""How much of this node's CPU time goes into what peers send, whatever it says.

Messages, frames, bytes, new streams, requests and whatever else comes in any number on a stream (gossip, pings, the
DHT's) have each a price, about what they take on a slow core. A peer
that has used up its time is not read for a while, so that TCP holds it back and an honest one loses nothing but speed,
beyond 30 MB/s. The peers of a host share, and all together; strangers have shares of their own, and take nothing from
the rest. Rejected: measuring the time, most of which is spent in tasks that cannot say for whom.
"""

from collections import OrderedDict
from collections.abc import Callable
from weakref import WeakValueDictionary

import trio

from ..core.peers.address import source_of
from ..core.records.ids import PeerId

MESSAGE_S = 100e-6  # one Noise message, whatever is in it
FRAME_S = 4e-6
BYTE_S = 5e-9
STREAM_S = 1e-3  # to agree on its protocol
DHT_MESSAGE_S = 500e-6
REQUEST_S = 1e-3  # to decode and answer it, in two threads
PING_S = 150e-6
IDENTIFY_BYTE_S = 2e-6  # 20 us an address, of ten bytes at least
GOSSIP_RPC_S = 200e-6  # one RPC, whatever is in it
GOSSIP_FIELD_S = 5e-6  # of its messages and control entries, message ids among them
GOSSIP_MESSAGE_S = 200e-6  # to judge a new one, as often as `message_cost` says
GOSSIP_CONTROL_S = 200e-6  # a subscription, a GRAFT, which may take an answer
GOSSIP_RECORD_S = 1e-3  # to verify a sender's addresses

PEER_SHARE = 0.2  # of a core
HOST_SHARE = 0.25
STRANGERS_SHARE = 0.3  # of all strangers together
KNOWN_SHARE = 0.5  # of all peers with standing together
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


class Account:
    """The time of one peer; `shares()` are those in which it has a part."""

    def __init__(self, shares: Callable[[], tuple[Share, ...]]) -> None:
        self._own = Share(PEER_SHARE)
        self._shares = shares
        self._turn = trio.Lock()  # in what it shares a peer has one place in the queue

    async def spend(self, cost_s: float) -> None:
        """Return, after a checkpoint at least, when there is time for work of `cost_s`."""
        async with self._turn:
            for share in (self._own, *self._shares()):
                now_s = trio.current_time()
                at_s = share.reserve(cost_s, now_s)
                if at_s > now_s:
                    await trio.sleep_until(at_s)


class PeerTime:
    """The time of all peers; those that `has_standing` says no to are strangers."""

    def __init__(self, has_standing: Callable[[PeerId], bool]) -> None:
        self._has_standing = has_standing
        self._known, self._strangers = Share(KNOWN_SHARE), Share(STRANGERS_SHARE)
        self._of_host: OrderedDict[tuple[str, bool], Share] = OrderedDict()
        self._accounts: WeakValueDictionary[PeerId, Account] = WeakValueDictionary()

    def account(self, peer: PeerId, host: str) -> Account:
        """The account of a peer that is connected from `host`, the same for all who keep it."""
        account = self._accounts.get(peer)
        if account is None:
            account = self._accounts[peer] = Account(lambda: self._shares(peer, source_of(host)))
        return account

    def _shares(self, peer: PeerId, source: str) -> tuple[Share, ...]:
        known = self._has_standing(peer)
        share = self._of_host.setdefault((source, known), Share(HOST_SHARE))
        self._of_host.move_to_end((source, known))
        if len(self._of_host) > HOSTS_MAX:
            self._of_host.popitem(last=False)
        return share, self._known if known else self._strangers
