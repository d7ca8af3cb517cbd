"""GossipSub as the nodes see it: a flood over the connections that work, hop by hop.

The library's own job (meshes, message ids, its caches) isn't replayed, only what it does to a message: it reaches
whoever a chain of acting neighbours leads to, later with every hop; a receiver in LOST_IN misses it, and one in
DOUBLED_IN gets it again much later, when the caches of seen messages have forgotten it. A publisher's messages beyond
PER_SECOND vanish silently (DESIGN §9).
"""

import random
from collections import deque
from collections.abc import Callable
from functools import partial

from .network import Network

HOP_MS = 2.0  # of py-libp2p's own work
LOST_IN = 200
DOUBLED_IN = 50
DOUBLED_AFTER_MS = 10_000
PER_SECOND = 10

Receive = Callable[[int, int, str, bytes], None]  # (host, relay, topic, payload)


class Gossip:
    """`receive(host, relay, topic, payload)` is called at each receiver."""

    def __init__(self, network: Network, rng: random.Random, now_ms: Callable[[], int], receive: Receive) -> None:
        self._network = network
        self._rng = rng
        self._now_ms = now_ms
        self._receive = receive
        self._topology = -1
        self._mesh: dict[int, list[int]] = {}
        self._ways: dict[int, list[tuple[int, int, float]]] = {}
        self._sent_ms: dict[tuple[int, str], deque[int]] = {}

    def publish(self, host: int, topic: str, payload: bytes) -> None:
        """Send it to everybody whom a chain of neighbours leads to."""
        if not self._within_rate(host, topic):
            return
        for receiver, relay, way_ms in self._ways_from(host):
            if not self._rng.randrange(LOST_IN):
                continue
            act = partial(self._receive, receiver, relay, topic, payload)
            self._network.on(receiver, way_ms + self._network.jitter_ms(), act)
            if not self._rng.randrange(DOUBLED_IN):
                self._network.on(receiver, way_ms + self._rng.uniform(0, DOUBLED_AFTER_MS), act)

    def _within_rate(self, host: int, topic: str) -> bool:
        sent_ms = self._sent_ms.setdefault((host, topic), deque(maxlen=PER_SECOND))
        if len(sent_ms) == PER_SECOND and self._now_ms() - sent_ms[0] < 1_000:
            return False
        sent_ms.append(self._now_ms())
        return True

    def _ways_from(self, host: int) -> list[tuple[int, int, float]]:
        """Receivers, whom they hear it from, and after how long; the same until some connection changes."""
        if self._topology != self._network.topology:
            self._topology = self._network.topology
            self._ways.clear()
            self._mesh = {}
            for one, other in self._network.open_pairs():
                self._mesh.setdefault(one, []).append(other)
                self._mesh.setdefault(other, []).append(one)
        ways = self._ways.get(host)
        if ways is None:
            ways = self._ways[host] = self._spread(host)
        return ways

    def _spread(self, host: int) -> list[tuple[int, int, float]]:
        found: list[tuple[int, int, float]] = []
        met = {host}
        wave = [(host, 0.0)]
        while wave:
            following: list[tuple[int, float]] = []
            for relay, way_ms in wave:
                for receiver in self._mesh.get(relay, []):
                    if receiver not in met:
                        met.add(receiver)
                        arrives_ms = way_ms + self._network.trip_ms(relay, receiver) / 2 + HOP_MS
                        found.append((receiver, relay, arrives_ms))
                        following.append((receiver, arrives_ms))
            wave = following
        return found
