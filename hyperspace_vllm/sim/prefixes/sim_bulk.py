"""The bulk transport between simulated hosts: calls over links of their own, beside libp2p's connections.

* A link is opened by the host that asks, as soon as the peer is met, and again whenever it was closed; it takes a
  handshake. Without one, a call waits CONNECT_MS for it and fails as `unreachable`. A host that does not admit the
  asker finishes none.
* Every host sends and receives at LINK_BYTES_PER_MS. What goes to one peer goes in order; peers take turns, a batch
  each, and what is small goes between the batches of others. A receiver's batches queue as well.
* A message takes its pair's latency. One that is lost comes late, and what follows it waits: a batch by a round trip
  (the batches behind it show the loss), anything else by the retransmission timeout, which doubles.
* Nothing crosses a partition. Calls end long before TCP would give up, and what is lost is asked for anew.
* A frozen host's kernel takes what comes; the host acts on it when it is thawed. A host that dies resets its links;
  one that loses power leaves them, and calls over them end by their timeouts.
"""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from ...core.records.limits import KV_CONNECTIONS_MAX, KV_LINKS_MAX
from ...core.records.reason import Reason
from ..agenda import Agenda
from ..sim_network import JITTER_MS, LOSSES_MAX, RETRANSMIT_MS, SimNetwork

LINK_BYTES_PER_MS = 125_000  # 1 Gbit/s, each way
FRAME_BYTES = 160  # a message's frames, CURVE, ZMTP, TCP and IP
SMALL_BYTES = 80_000  # goes between the batches of others: less than a millisecond of the link
HANDSHAKE_TRIPS = 4  # TCP, ZMTP's greeting, CURVE's two
CONNECT_MS = 1_000
REDIAL_MS = 1_000
HEARTBEAT_MS = 2_000  # until a link to a host that has lost power and is back is found to be void
PENDING_MAX = 64  # calls to one peer that wait for its link

_Lane = tuple[int, bool]  # a receiver, and whether it is the one who is asked: two hosts may have a link each


@dataclass(slots=True, eq=False)
class Call:
    """A request of `asker` to `server`, which may be answered by several messages."""

    asker: int
    server: int
    serve: Callable[["Call"], None]
    failed: Callable[[Reason], None]
    size: int
    life: int  # the server's, when it was sent
    over: bool = False  # to the asker
    cancelled: bool = False  # to the server


@dataclass(slots=True)
class _Link:
    lives: tuple[int, int]
    opened: bool = False
    used_ms: int = 0
    waiting: list[Call] = field(default_factory=list)
    open: dict[Call, None] = field(default_factory=dict)


@dataclass(slots=True)
class _Message:
    size: int
    act: Callable[[], None]
    call: Call


@dataclass(slots=True)
class _Port:
    """What leaves and enters one host."""

    queues: dict[_Lane, deque[_Message]] = field(default_factory=dict)
    sending: bool = False
    in_free_ms: float = 0.0


class SimBulk:
    """All links of a simulation. `admits(server, asker)`: whether the server serves it."""

    def __init__(
        self, agenda: Agenda, network: SimNetwork, rng: random.Random, loss: float, admits: Callable[[int, int], bool]
    ) -> None:
        self._agenda = agenda
        self._network = network
        self._rng = rng
        self._loss = loss
        self._admits = admits
        self._links: dict[int, dict[int, _Link]] = {}  # asker -> server -> link
        self._met: dict[int, frozenset[int]] = {}  # asker -> servers
        self._ports: dict[int, _Port] = {}
        self._clear_ms: dict[tuple[int, int, bool], float] = {}  # way of a link -> when its last message arrives
        self.disturbed_ms: dict[tuple[int, int], float] = {}  # pair -> until when a loss held it up
        self.payload_bytes = 0  # of batches that were sent

    # --- links ----------------------------------------------------------------------------------

    def links(self, asker: int) -> int:
        """How many a host has opened."""
        return len(self._links.get(asker, {}))

    def meet(self, asker: int, servers: frozenset[int]) -> None:
        """These are the peers that a host keeps links to."""
        self._met[asker] = servers
        for server in sorted(servers):
            self._connect(asker, server, in_place_of_others=False)

    def _connect(self, asker: int, server: int, in_place_of_others: bool) -> None:
        """Open a link, if there is none and room for one."""
        links = self._links.setdefault(asker, {})
        lives = self._network.life(asker), self._network.life(server)
        link = links.get(server)
        if link is not None and link.lives == lives:
            return
        if link is not None:
            self._close(asker, server)
        if len(links) >= KV_LINKS_MAX and not (in_place_of_others and self._drop_idle(asker)):
            return
        link = links[server] = _Link(lives, used_ms=self._agenda.now_ms)
        handshake_ms = self._network.trip_ms(asker, server) * HANDSHAKE_TRIPS * 2 ** self._lost()
        self._network.on(asker, handshake_ms, partial(self._opened, asker, server, link))

    def _opened(self, asker: int, server: int, link: _Link) -> None:
        network = self._network
        inbound = sum(server in links and links[server].opened for links in self._links.values())
        able = network.acts(server) and network.reaches(asker, server) and network.life(server) == link.lives[1]
        if self._links[asker].get(server) is not link:
            return
        if able and inbound < KV_CONNECTIONS_MAX and self._admits(server, asker):
            link.opened = True
            for call in link.waiting:
                self._send_call(call, link)
            link.waiting.clear()
            return
        network.on(asker, CONNECT_MS, partial(self._give_up, asker, server, link))

    def _give_up(self, asker: int, server: int, link: _Link) -> None:
        if self._links[asker].get(server) is link:
            self._close(asker, server)

    def _close(self, asker: int, server: int) -> None:
        link = self._links[asker].pop(server)
        for call in [*link.waiting, *link.open]:
            self._fail(call, Reason.UNREACHABLE)
        self._network.on(asker, REDIAL_MS, partial(self._redial, asker, server))

    def _redial(self, asker: int, server: int) -> None:
        if server in self._met.get(asker, ()) and server not in self._links.get(asker, {}):
            self._connect(asker, server, in_place_of_others=False)

    def _drop_idle(self, asker: int) -> bool:
        links = self._links[asker]
        idle = [server for server, link in links.items() if not link.open and not link.waiting]
        if idle:
            self._close(asker, min(idle, key=lambda server: links[server].used_ms))
        return bool(idle)

    def booted(self, host: int) -> None:
        """A host is back: what links there are to its former life are void."""
        for asker, links in self._links.items():
            if host in links:
                self._network.on(asker, HEARTBEAT_MS, partial(self._reset_void, asker, host))

    def _reset_void(self, asker: int, server: int) -> None:
        link = self._links.get(asker, {}).get(server)
        if link is not None and link.lives[1] != self._network.life(server):
            self._close(asker, server)

    def died(self, host: int, politely: bool) -> None:
        """A host's process has ended, and its own links with it; `politely`: it resets the others."""
        self._links.pop(host, None)
        self._met.pop(host, None)
        self._ports.pop(host, None)
        for asker, links in self._links.items():
            if politely and host in links:
                self._network.on(asker, self._network.trip_ms(host, asker) / 2, partial(self._reset, asker, host))

    def _reset(self, asker: int, server: int) -> None:
        if server in self._links.get(asker, {}):
            self._close(asker, server)

    # --- calls ----------------------------------------------------------------------------------

    def call(
        self,
        asker: int,
        server: int,
        size: int,
        timeout_ms: int,
        serve: Callable[[Call], None],
        failed: Callable[[Reason], None],
    ) -> Call:
        """Let `serve` happen at the server, or `failed` at the asker unless the call is ended before."""
        self._connect(asker, server, in_place_of_others=True)
        call = Call(asker, server, serve, failed, size, self._network.life(server))
        link = self._links[asker].get(server)
        if link is None or len(link.waiting) >= PENDING_MAX:
            self._network.on(asker, 0, partial(self._fail, call, Reason.BUSY))
        elif link.opened:
            self._send_call(call, link)
        else:
            link.waiting.append(call)
        self._network.on(asker, timeout_ms, partial(self._fail, call, Reason.TIMEOUT))
        return call

    def _send_call(self, call: Call, link: _Link) -> None:
        if not call.over:
            link.open[call] = None
            self._enqueue(call.asker, call.server, _Message(call.size + FRAME_BYTES, partial(self._serve, call), call))

    def _serve(self, call: Call) -> None:
        if not call.cancelled and self._network.life(call.server) == call.life:
            call.serve(call)

    def reply(self, call: Call, size: int, act: Callable[[], None]) -> None:
        """Let `act` happen at the asker when `size` bytes have come there, unless the call is over."""
        self._enqueue(call.server, call.asker, _Message(size + FRAME_BYTES, partial(self._answered, call, act), call))

    def _answered(self, call: Call, act: Callable[[], None]) -> None:
        link = self._links.get(call.asker, {}).get(call.server)
        if link is not None:
            link.used_ms = self._agenda.now_ms
        if not call.over:
            act()

    def end(self, call: Call) -> None:
        """The asker has what it wanted, or wants it no more: the server hears of it."""
        if call.over:
            return
        call.over = True
        link = self._links.get(call.asker, {}).get(call.server)
        if link is not None:
            link.open.pop(call, None)
        self._network.on(call.server, self._network.trip_ms(call.asker, call.server) / 2, partial(self._cancel, call))

    def _cancel(self, call: Call) -> None:
        call.cancelled = True

    def _fail(self, call: Call, reason: Reason) -> None:
        if not call.over:
            self.end(call)
            call.failed(reason)

    # --- bytes ----------------------------------------------------------------------------------

    def _enqueue(self, sender: int, receiver: int, message: _Message) -> None:
        port = self._ports.setdefault(sender, _Port())
        lane = receiver, receiver == message.call.server
        if message.size <= SMALL_BYTES and lane not in port.queues:
            self._depart(sender, lane, message, self._agenda.now_ms + message.size / LINK_BYTES_PER_MS)
            return
        port.queues.setdefault(lane, deque()).append(message)
        if not port.sending:
            port.sending = True
            self._next(sender, port)

    def _next(self, sender: int, port: _Port) -> None:
        """Send what is first in the queue whose turn it is."""
        while port.queues:
            lane, queue = next(iter(port.queues.items()))
            message = queue.popleft()
            del port.queues[lane]
            if queue:
                port.queues[lane] = queue  # to the end
            if message.call.cancelled:
                continue
            takes_ms = message.size / LINK_BYTES_PER_MS
            if message.size > SMALL_BYTES:
                self.payload_bytes += message.size
            self._depart(sender, lane, message, self._agenda.now_ms + takes_ms)
            self._network.on(sender, takes_ms, partial(self._sent, sender, port))
            return
        port.sending = False

    def _sent(self, sender: int, port: _Port) -> None:
        if self._ports.get(sender) is port:
            self._next(sender, port)

    def _depart(self, sender: int, lane: _Lane, message: _Message, sent_ms: float) -> None:
        """Let a message that leaves at `sent_ms` arrive, after what went the same way before."""
        receiver, way = lane[0], (sender, *lane)
        trip_ms = self._network.trip_ms(sender, receiver)
        arrives_ms = sent_ms + trip_ms / 2 + min(self._rng.expovariate(1 / JITTER_MS), 5 * JITTER_MS)
        is_batch = message.size > SMALL_BYTES
        if is_batch:
            port = self._ports.setdefault(receiver, _Port())
            arrives_ms = max(arrives_ms, port.in_free_ms + message.size / LINK_BYTES_PER_MS)
            port.in_free_ms = arrives_ms
        lost = self._lost()
        if lost:
            arrives_ms += (trip_ms if is_batch else RETRANSMIT_MS) * (2**lost - 1)
            pair = min(sender, receiver), max(sender, receiver)
            self.disturbed_ms[pair] = max(self.disturbed_ms.get(pair, -1.0), arrives_ms)
        arrives_ms = self._clear_ms[way] = max(arrives_ms, self._clear_ms.get(way, 0.0))
        arrive = partial(self._arrive, sender, receiver, message)
        self._network.on(receiver, arrives_ms - self._agenda.now_ms, arrive)

    def _arrive(self, sender: int, receiver: int, message: _Message) -> None:
        if self._network.reaches(sender, receiver):
            message.act()

    def _lost(self) -> int:
        lost = 0
        while lost < LOSSES_MAX and self._rng.random() < self._loss:
            lost += 1
        return lost
