"""GossipSub as the nodes see it: a flood over the connections that work, hop by hop.

The library's internals (meshes, message ids, its caches) are not simulated, only their effect: a message reaches every
host to which a chain of acting neighbours passes it on, later with every hop. One receiver in LOST_IN misses it, and
one in DOUBLED_IN gets it again much later, when the caches of seen messages have dropped it.
"""

import random
from collections import Counter
from collections.abc import Callable
from functools import partial

from .sim_network import SimNetwork

HOP_MS = 2.0  # of py-libp2p's own work
LOST_IN = 200
DOUBLED_IN = 50
DOUBLED_AFTER_MS = 10_000

Receive = Callable[[int, int, str, bytes], None]  # (host, relay, topic, payload)
PassesOn = Callable[[int, int, str, int, bytes], bool]  # (host, relay, topic, author, payload)


class Gossip:
    """`receive` is called at each receiver, of those that `passes_on` says yes for."""

    def __init__(self, network: SimNetwork, rng: random.Random, passes_on: PassesOn, receive: Receive) -> None:
        self._network = network
        self._rng = rng
        self._passes_on = passes_on
        self._receive = receive
        self._topology = -1
        self._mesh: dict[int, list[int]] = {}
        self.published: Counter[int] = Counter()  # by author
        self.reached: Counter[int] = Counter()  # receivers of all of its messages

    def publish(self, host: int, topic: str, payload: bytes) -> None:
        """Send it to every host to which a chain of neighbours leads."""
        ways = self._spread(host, topic, payload)
        self.published[host] += 1
        self.reached[host] += len(ways)
        for receiver, relay, way_ms in ways:
            if not self._rng.randrange(LOST_IN):
                continue
            act = partial(self._receive, receiver, relay, topic, payload)
            self._network.on(receiver, way_ms + self._network.jitter_ms(), act)
            if not self._rng.randrange(DOUBLED_IN):
                self._network.on(receiver, way_ms + self._rng.uniform(0, DOUBLED_AFTER_MS), act)

    def _spread(self, author: int, topic: str, payload: bytes) -> list[tuple[int, int, float]]:
        """Receivers, the relay of each, and the delay."""
        mesh = self._connections()
        found: list[tuple[int, int, float]] = []
        met = {author}
        wave = [(author, 0.0)]
        while wave:
            following: list[tuple[int, float]] = []
            for relay, way_ms in wave:
                for receiver in mesh.get(relay, []):
                    if receiver not in met and self._passes_on(receiver, relay, topic, author, payload):
                        met.add(receiver)
                        arrives_ms = way_ms + self._network.trip_ms(relay, receiver) / 2 + HOP_MS
                        found.append((receiver, relay, arrives_ms))
                        following.append((receiver, arrives_ms))
            wave = following
        return found

    def _connections(self) -> dict[int, list[int]]:
        """The connections between hosts; the same until some connection changes."""
        if self._topology != self._network.topology:
            self._topology = self._network.topology
            self._mesh = {}
            for one, other in self._network.open_pairs():
                self._mesh.setdefault(one, []).append(other)
                self._mesh.setdefault(other, []).append(one)
        return self._mesh
