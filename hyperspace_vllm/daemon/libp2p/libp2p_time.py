"""Bounds how much of this node's CPU time peers' messages take, whatever they contain.

Messages, frames, bytes, new streams, requests and everything else that comes in any number on a stream (gossip, pings,
the DHT's messages) each have a price, about what they take on a slow core; so has each byte that a peer asks this node
to send: answers, and messages of gossip that it wants again. A peer that has used up its time is not read for a while,
so that TCP holds it back; an honest peer loses nothing but speed, beyond 30 MB/s in either direction. There are shares
for a peer, for the peers of a host, and for all known peers together; strangers have shares of their own, and take
nothing from the rest. When peers want more than there is they take turns, a millisecond at a time: hosts among members,
among proven peers and among strangers, and then the peers of a host. Rejected: measuring the time, most of which is
spent in tasks that don't know which peer it is for.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from weakref import WeakValueDictionary

import trio

from ...core.peers.address import source_of
from ...core.peers.turns import Job, Line
from ...core.records.ids import PeerId
from ...core.records.rank import Tier

MESSAGE_S = 100e-6  # one Noise message, whatever it contains
FRAME_S = 4e-6
BYTE_S = 5e-9
STREAM_S = 1e-3  # to agree on its protocol
DHT_MESSAGE_S = 500e-6
DHT_FIELD_S = 10e-6  # each field of it; of a peer without an id of ours the library makes a line of its log
REQUEST_S = 1e-3  # to decode and answer it, in two threads; an answer to one of this node's as well
SENT_BYTE_S = 5e-9  # of what a peer asked for: to read, seal, encrypt and write it, in three threads
RECORD_S = 1e-3  # to check one in an answer, and to find whom it pushes out of a full table
RECORD_BYTES_MIN = 160
PING_S = 150e-6
IDENTIFY_BYTE_S = 2e-6  # 20 us an address, of ten bytes at least
GOSSIP_RPC_S = 200e-6  # one RPC, whatever it contains
GOSSIP_FIELD_S = 5e-6  # each field of its messages and control entries, message ids included
GOSSIP_MESSAGE_S = 200e-6  # to judge a new message, times `message_cost`
GOSSIP_CONTROL_S = 200e-6  # a subscription or GRAFT, which may take an answer
GOSSIP_RECORD_S = 1e-3  # to verify a sender's addresses

PEER_SHARE = 0.2  # of a core
HOST_SHARE = 0.25
STRANGERS_SHARE = 0.3  # of all strangers together
KNOWN_SHARE = 0.5  # of all peers with standing together
BURST_S = 0.2  # CPU time that may be taken at once
SLICE_S = 1e-3  # of one turn
AHEAD_SHARE = 0.01  # for a host, and for a peer, out of turn: a few queries a second don't wait
HOSTS_MAX = 2048  # hosts whose shares are remembered


def answer_s(size: int, records_max: int) -> float:
    """The price of an answer of `size` bytes that may hold so many records."""
    return REQUEST_S + min(size // RECORD_BYTES_MIN, records_max) * RECORD_S


class Account:
    """The time account of one peer."""

    def __init__(self, own: Callable[[Line | None], Line], turns: "_Turns") -> None:
        self._own = own
        self._line: Line | None = None
        self._turns = turns
        self._held_s = 0.0
        self._waits = 0  # tasks that are waiting now
        self._since_s = 0.0  # when the first of them began to

    @property
    def held_s(self) -> float:
        """How long the peer has waited, in all, because of other peers."""
        return self._held_s + (max(trio.current_time() - self._since_s, 0.0) if self._waits else 0.0)

    async def spend(self, cost_s: float) -> None:
        """Return, after at least one checkpoint, when there is time for work of `cost_s`."""
        await trio.lowlevel.checkpoint()
        while cost_s > 0:
            piece_s = min(cost_s, SLICE_S)
            cost_s -= piece_s
            self._line = self._own(self._line)
            if not self._waits:
                self._since_s = max(trio.current_time(), self._line.free_at_s)
            self._waits += 1
            try:
                await self._turns.take(self._line, piece_s)
            finally:
                held_s = self.held_s
                self._waits -= 1
                if not self._waits:
                    self._held_s = held_s


class PeerTime:
    """The time of all peers; `tier` gives a peer's tier."""

    def __init__(self, tier: Callable[[PeerId], Tier]) -> None:
        self._tier = tier
        self._all = Line(float("inf"), 0.0)
        known = Line(KNOWN_SHARE, BURST_S, self._all)
        self._tiers = {
            Tier.PROVEN: Line(KNOWN_SHARE, BURST_S, known),
            Tier.MEMBER: Line(KNOWN_SHARE, BURST_S, known),
            Tier.STRANGER: Line(STRANGERS_SHARE, BURST_S, self._all),
        }
        self._turns = _Turns(self._all)
        self._hosts: OrderedDict[tuple[str, Tier], Line] = OrderedDict()
        self._accounts: WeakValueDictionary[PeerId, Account] = WeakValueDictionary()

    def account(self, peer: PeerId, host: str) -> Account:
        """The account of a peer that is connected from `host`; all callers for a peer share it."""
        account = self._accounts.get(peer)
        if account is None:
            own = partial(self._line, peer, source_of(host))
            account = self._accounts[peer] = Account(own, self._turns)
        return account

    def _line(self, peer: PeerId, source: str, line: Line | None) -> Line:
        tier = self._tier(peer)
        host = self._hosts.setdefault((source, tier), Line(HOST_SHARE, BURST_S, self._tiers[tier], AHEAD_SHARE))
        self._hosts.move_to_end((source, tier))
        if len(self._hosts) > HOSTS_MAX:
            self._hosts.popitem(last=False)
        return line if line is not None and line.parent is host else Line(PEER_SHARE, BURST_S, host, AHEAD_SHARE)


class _Turns:
    """Starts the jobs of a tree of lines when they are due."""

    def __init__(self, lines: Line) -> None:
        self._lines = lines
        self._alarm: trio.CancelScope | None = None

    async def take(self, line: Line, cost_s: float) -> None:
        """Return when a job of that cost may start."""
        if line.goes_ahead(cost_s, trio.current_time()):
            return
        begun = trio.Event()
        job = Job(cost_s, begun.set)
        line.add(job)
        again_s = max(self._begin(), trio.current_time() + SLICE_S)  # waking up costs as much as many a job
        if begun.is_set():
            return
        if self._alarm is not None:
            self._alarm.deadline = min(self._alarm.deadline, again_s)
        else:
            self._alarm = trio.CancelScope(deadline=again_s)
            trio.lowlevel.spawn_system_task(self._begin_later)
        try:
            await begun.wait()
        finally:
            line.remove(job)

    def _begin(self) -> float:
        """Start what is due; returns when to do so again."""
        while isinstance(found := self._lines.take(trio.current_time()), Job):
            found.begin()
        return found

    async def _begin_later(self) -> None:
        while self._alarm is not None:
            with self._alarm:
                await trio.sleep_forever()
            again_s = max(self._begin(), trio.current_time() + SLICE_S)
            self._alarm = trio.CancelScope(deadline=again_s) if again_s < float("inf") else None
