"""The Kademlia DHT as the nodes see it: provider records on the hosts nearest to a key, and searches that take time.

Records live RECORD_TTL_MS, are lost with the hosts that keep them, and cannot be withdrawn. A search asks the hosts
that it can reach; frozen ones among the nearest cost QUERY_MS each round, and one search in FAILS_IN finds nothing.
"""

import random
from collections.abc import Callable
from functools import lru_cache
from hashlib import sha256

from .sim_network import SimNetwork

RECORD_TTL_MS = 15 * 60 * 1000
REPLICAS = 8
PARALLEL = 3
QUERY_MS = 1_500
FAILS_IN = 50
PROVIDERS_FOUND_MAX = 20


class Dht:
    """The DHT of the whole simulation; `found` callbacks run at the host that searches."""

    def __init__(self, network: SimNetwork, rng: random.Random, now_ms: Callable[[], int], hosts: int) -> None:
        self._network = network
        self._rng = rng
        self._now_ms = now_ms
        self._records: list[dict[str, dict[int, int]]] = [{} for _ in range(hosts)]

    def forget(self, host: int) -> None:
        """A host has died, and its records are lost."""
        self._records[host].clear()

    def provide(self, host: int, key: str) -> None:
        """Store `host` as a provider at the hosts nearest to the key."""
        expires_ms = self._now_ms() + RECORD_TTL_MS
        for keeper in self._nearest(host, key)[:REPLICAS]:
            if self._network.acts(keeper):
                self._records[keeper].setdefault(key, {})[host] = expires_ms

    def search(self, host: int, key: str) -> tuple[float, tuple[int, ...]]:
        """How long a search takes, and which providers it finds."""
        nearest = self._nearest(host, key)[:REPLICAS]
        frozen = sum(self._network.frozen(keeper) for keeper in nearest)
        takes_ms = self._rng.uniform(30, 300) + QUERY_MS * -(-frozen // PARALLEL)
        if not nearest or not self._rng.randrange(FAILS_IN):
            return takes_ms, ()
        providers: dict[int, None] = {}
        for keeper in nearest:
            if self._network.acts(keeper):
                for provider, expires_ms in self._records[keeper].get(key, {}).items():
                    if expires_ms > self._now_ms():
                        providers[provider] = None
        return takes_ms, tuple(providers)[:PROVIDERS_FOUND_MAX]

    def _nearest(self, host: int, key: str) -> list[int]:
        """Hosts that are up as far as `host` can see, nearest to the key first."""
        return [
            keeper
            for keeper in _by_distance(key, len(self._records))
            if self._network.up(keeper) and self._network.reaches(host, keeper)
        ]


@lru_cache(maxsize=4096)
def _by_distance(key: str, hosts: int) -> tuple[int, ...]:
    return tuple(sorted(range(hosts), key=lambda host: sha256(f"{key}/{host}".encode()).digest()))
