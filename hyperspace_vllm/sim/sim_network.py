"""The seeded network under the simulated nodes: hosts, connections and messages.

libp2p runs over TCP, so the model is TCP's:
 * A message takes its pair's latency (log-normal over pairs, plus exponential jitter a message) and its share of the
   sender's uplink. Streams of one connection are independent here, so messages overtake each other.
 * A lost segment comes late instead of never: after the retransmission timeout, which doubles at every loss, and what
   follows it in that direction waits for it. A connection that loses LOSSES_MAX in a row breaks on both sides.
 * A partition loses everything that crosses it. Connections survive if it heals within BREAK_MS of the first message
   that doesn't get through, and then what was sent arrives; else they break.
 * A frozen host (SIGSTOP) has a living kernel: messages to it wait there, and it acts on all of them when it is
   thawed. A handshake with it does not finish.
 * A host takes as many connections as libp2p does, and refuses the next ones.
 * A host whose process dies resets its connections; one that loses power leaves them half open, and what is sent
   over them breaks them after BREAK_MS, or as soon as the host is back.
Messages are not duplicated, as in TCP; gossip is (sim_gossip.py).
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from ..core.records.limits import PEER_CONNECTIONS_INBOUND_MAX
from .agenda import Agenda

LATENCY_MEDIAN_MS = 6.0
LATENCY_SIGMA = 0.7
LATENCY_MS_MAX = 60.0
JITTER_MS = 2.0
UPLINK_BYTES_PER_MS = 12_500  # 100 Mbit/s
RETRANSMIT_MS = 200  # Linux's least timeout
LOSSES_MAX = 6  # 200 ms doubled five times: 6 s
BREAK_MS = 15_000
HANDSHAKE_TRIPS = 4  # TCP, Noise (1.5), Yamux and identify
HANDSHAKE_CPU_MS = 40  # of py-libp2p, both sides together


class NetworkHost(Protocol):
    """The network's events for a host; hosts are numbered from 0."""

    def opened(self, peer: int) -> None:
        """A connection is there."""

    def closed(self, peer: int) -> None:
        """The connection is closed."""


@dataclass(slots=True)
class _SimConnection:
    """A connection between the incarnations of two hosts; per direction (by sender) what delays it."""

    dialler: int
    lives: dict[int, int]
    clear_at_ms: dict[int, float]
    stuck_since_ms: dict[int, int] = field(default_factory=dict)
    stuck: list[tuple[int, int, Callable[[], None]]] = field(default_factory=list)


@dataclass(slots=True)
class _State:
    up: bool = False
    frozen: bool = False
    life: int = 0
    since_ms: int = 0  # when it last came up or thawed
    inbox: list[Callable[[], None]] = field(default_factory=list)
    uplink_free_ms: float = 0.0


class SimNetwork:
    """`loss` is the probability that a segment is lost once."""

    def __init__(self, agenda: Agenda, rng: random.Random, hosts: int, loss: float) -> None:
        self._agenda = agenda
        self._rng = rng
        self._loss = loss
        self._hosts: list[NetworkHost] = []
        self._states = [_State() for _ in range(hosts)]
        self._side = [0] * hosts
        self._links: dict[tuple[int, int], _SimConnection] = {}
        self.split_changed_ms = 0
        self.topology = 0  # changes whenever gossip may take other ways
        self.disturbed_ms: dict[tuple[int, int], float] = {}  # pair -> until when a lost segment held it up
        self._latency = [
            [min(rng.lognormvariate(0, LATENCY_SIGMA) * LATENCY_MEDIAN_MS, LATENCY_MS_MAX) for _ in range(hosts)]
            for _ in range(hosts)
        ]

    def __len__(self) -> int:
        return len(self._states)

    def add(self, host: NetworkHost) -> None:
        """The next host, by number."""
        self._hosts.append(host)

    # --- hosts ----------------------------------------------------------------------------------

    def up(self, host: int) -> bool:
        """Whether its process runs (it may be frozen)."""
        return self._states[host].up

    def frozen(self, host: int) -> bool:
        """Whether it is stopped."""
        return self._states[host].frozen

    def acts(self, host: int) -> bool:
        """Whether it runs and isn't frozen."""
        state = self._states[host]
        return state.up and not state.frozen

    def since_ms(self, host: int) -> int:
        """Since when it has been up and acting, if it is."""
        return self._states[host].since_ms

    def life(self, host: int) -> int:
        """How often it has been started."""
        return self._states[host].life

    def boot(self, host: int) -> None:
        """Start a host. Peers that hold connections to its former life learn that they are void."""
        state = self._states[host]
        assert not state.up
        self._states[host] = _State(True, False, state.life + 1, self._agenda.now_ms)
        self.topology += 1
        for peer in self.peers(host):
            self._drop(self._pair(host, peer), ends=(peer,))

    def kill(self, host: int, politely: bool) -> None:
        """End a host's process; `politely`: its kernel lives on and resets its connections."""
        state = self._states[host]
        state.up = state.frozen = False
        state.inbox.clear()
        self.topology += 1
        if politely:
            for peer in self.peers(host):
                self._drop(self._pair(host, peer), ends=(peer,))

    def freeze(self, host: int) -> None:
        """Stop a host that is up."""
        if self.acts(host):
            self._states[host].frozen = True
            self.topology += 1

    def thaw(self, host: int) -> None:
        """Let it go on, with what has arrived meanwhile first."""
        state = self._states[host]
        if not state.frozen:
            return
        state.frozen = False
        state.since_ms = self._agenda.now_ms
        self.topology += 1
        waiting, state.inbox = state.inbox, []
        life = state.life
        for act in waiting:
            self._on(host, life, act)

    def on(self, host: int, delay_ms: float, act: Callable[[], None]) -> None:
        """Something happens at a host after a while, when it is thawed if it is frozen then, never once it has died."""
        self._agenda.after(delay_ms, partial(self._on, host, self._states[host].life, act))

    def _on(self, host: int, life: int, act: Callable[[], None]) -> None:
        state = self._states[host]
        if not state.up or state.life != life:
            return
        if state.frozen:
            state.inbox.append(act)
        else:
            act()

    # --- partitions -----------------------------------------------------------------------------

    def split(self, sides: list[int]) -> None:
        """Let only hosts with the same number in `sides` reach each other; all the same: a heal."""
        self._side = sides
        self.split_changed_ms = self._agenda.now_ms
        self.topology += 1
        for pair, link in list(self._links.items()):
            if self.reaches(*pair):
                stuck, link.stuck = link.stuck, []
                link.stuck_since_ms.clear()
                for sender, size, act in stuck:  # the next retransmission finds the way open
                    self._send(link, sender, pair[0] + pair[1] - sender, size, act, self._rng.uniform(0, 3_000))

    def reaches(self, one: int, other: int) -> bool:
        """Whether a packet can get from one to the other."""
        return self._side[one] == self._side[other]

    # --- connections ----------------------------------------------------------------------------

    def connected(self, one: int, other: int) -> bool:
        """Whether `one` believes in a connection to `other`."""
        link = self._links.get(self._pair(one, other))
        return link is not None and link.lives[one] == self._states[one].life

    def peers(self, host: int) -> list[int]:
        """The hosts at the other ends of its connections."""
        return [pair[0] + pair[1] - host for pair in self._links if host in pair]

    def open_pairs(self) -> list[tuple[int, int]]:
        """Connections that work: both ends act, and reach each other."""
        return [
            pair
            for pair, link in self._links.items()
            if self.reaches(*pair) and all(self.acts(h) and link.lives[h] == self._states[h].life for h in pair)
        ]

    def dial(self, host: int, target: int | None, timeout_ms: int, done: Callable[[str | None], None]) -> None:
        """Connect; `done` is called at `host` with '' or the failure's reason. A target of None: no host is there."""
        self._agenda.after(0, partial(self._dial, host, self._states[host].life, target, timeout_ms, done))

    def _dial(
        self, host: int, life: int, target: int | None, timeout_ms: int, done: Callable[[str | None], None]
    ) -> None:
        if target is None or target == host or not self.reaches(host, target) or self.frozen(target):
            self.on(host, timeout_ms, partial(done, "timeout"))
            return
        trip_ms = self._one_way_ms(host, target) + self._one_way_ms(target, host)
        if not self.up(target):
            self.on(host, trip_ms, partial(done, "unreachable"))
            return
        lost = self._lost()
        handshake_ms = trip_ms * HANDSHAKE_TRIPS + HANDSHAKE_CPU_MS + RETRANSMIT_MS * (2**lost - 1)
        if lost:
            self._disturb(host, target, self._agenda.now_ms + handshake_ms)
        if handshake_ms >= timeout_ms:
            self.on(host, timeout_ms, partial(done, "timeout"))
            return
        target_life = self._states[target].life

        def finish() -> None:
            if not self.acts(target) or self._states[target].life != target_life or not self.reaches(host, target):
                self.on(host, max(timeout_ms - handshake_ms, 0), partial(done, "timeout"))
                return
            if not self.connected(host, target) and self._inbound(target) >= PEER_CONNECTIONS_INBOUND_MAX:
                done("unreachable")
                return
            self._open(host, target)
            done(None)

        self.on(host, handshake_ms, finish)

    def _open(self, host: int, target: int) -> None:
        pair = self._pair(host, target)
        link = self._links.get(pair)
        lives = {h: self._states[h].life for h in pair}
        if link is not None and link.lives == lives:
            self._hosts[host].opened(target)  # a second one: the dialling host is notified
            return
        if link is not None:
            self._drop(pair, ends=())
        self._links[pair] = _SimConnection(host, lives, {host: 0.0, target: 0.0})
        self.topology += 1
        self._hosts[host].opened(target)
        self.on(target, 0, partial(self._opened_there, target, host))

    def _inbound(self, host: int) -> int:
        return sum(host in pair and link.dialler != host for pair, link in self._links.items())

    def _opened_there(self, host: int, peer: int) -> None:
        if self.connected(host, peer):
            self._hosts[host].opened(peer)

    def hang_up(self, host: int, peer: int) -> None:
        """Close the connection, if there is one."""
        if self.connected(host, peer):
            self._drop(self._pair(host, peer), ends=(host, peer))

    def _drop(self, pair: tuple[int, int], ends: tuple[int, ...]) -> None:
        link = self._links.pop(pair, None)
        if link is None:
            return
        self.topology += 1
        for end in ends:
            if self._states[end].up and self._states[end].life == link.lives[end]:
                other = pair[0] + pair[1] - end
                self.on(end, self._one_way_ms(other, end), partial(self._closed, end, other))

    def _closed(self, host: int, peer: int) -> None:
        if not self.connected(host, peer):  # it may have been opened anew meanwhile
            self._hosts[host].closed(peer)

    # --- messages -------------------------------------------------------------------------------

    def send(self, host: int, peer: int, size: int, act: Callable[[], None]) -> bool:
        """Let `act` happen at `peer` when `size` bytes have come there; False if there is no connection."""
        link = self._links.get(self._pair(host, peer))
        if link is None or link.lives[host] != self._states[host].life:
            return False
        self._send(link, host, peer, size, act, 0.0)
        return True

    def _send(
        self, link: _SimConnection, host: int, peer: int, size: int, act: Callable[[], None], extra_ms: float
    ) -> None:
        if not self.reaches(host, peer) or not self.up(peer):
            self._stick(link, host, peer, size, act)
            return
        now_ms = self._agenda.now_ms
        state = self._states[host]
        state.uplink_free_ms = max(state.uplink_free_ms, now_ms) + size / UPLINK_BYTES_PER_MS
        arrives_ms = state.uplink_free_ms + self._one_way_ms(host, peer) + extra_ms
        lost = self._lost()
        if lost >= LOSSES_MAX:
            self._agenda.after(BREAK_MS, partial(self._break, link, host, peer))
            return
        if lost:
            arrives_ms += RETRANSMIT_MS * (2**lost - 1)
            link.clear_at_ms[host] = max(link.clear_at_ms[host], arrives_ms)
            self._disturb(host, peer, arrives_ms)
        else:
            arrives_ms = max(arrives_ms, link.clear_at_ms[host])
        self._agenda.after(arrives_ms - now_ms, partial(self._arrive, link, host, peer, size, act))

    def _arrive(self, link: _SimConnection, host: int, peer: int, size: int, act: Callable[[], None]) -> None:
        if self._links.get(self._pair(host, peer)) is not link:
            return
        if not self.reaches(host, peer) or not self.up(peer):
            self._stick(link, host, peer, size, act)
            return
        self._on(peer, link.lives[peer], act)

    def _stick(self, link: _SimConnection, host: int, peer: int, size: int, act: Callable[[], None]) -> None:
        link.stuck.append((host, size, act))
        if host not in link.stuck_since_ms:
            since_ms = link.stuck_since_ms[host] = self._agenda.now_ms
            self._agenda.after(BREAK_MS, partial(self._break_if_stuck, link, host, peer, since_ms))

    def _break_if_stuck(self, link: _SimConnection, host: int, peer: int, since_ms: int) -> None:
        if link.stuck_since_ms.get(host) == since_ms:
            self._break(link, host, peer)

    def _break(self, link: _SimConnection, host: int, peer: int) -> None:
        pair = self._pair(host, peer)
        if self._links.get(pair) is link:
            self._drop(pair, ends=(host, peer))

    # --- leaves ---------------------------------------------------------------------------------

    def trip_ms(self, one: int, other: int) -> float:
        """There and back without jitter."""
        return self._latency[one][other] + self._latency[other][one]

    def jitter_ms(self) -> float:
        """The time of a message beyond its pair's latency."""
        return min(self._rng.expovariate(1 / JITTER_MS), 10 * JITTER_MS)

    def _one_way_ms(self, host: int, peer: int) -> float:
        return self._latency[host][peer] + self.jitter_ms()

    def _lost(self) -> int:
        """How often in a row."""
        lost = 0
        while lost < LOSSES_MAX and self._rng.random() < self._loss:
            lost += 1
        return lost

    def _disturb(self, host: int, peer: int, until_ms: float) -> None:
        pair = self._pair(host, peer)
        self.disturbed_ms[pair] = max(self.disturbed_ms.get(pair, -1.0), until_ms)

    @staticmethod
    def _pair(one: int, other: int) -> tuple[int, int]:
        return (one, other) if one < other else (other, one)
