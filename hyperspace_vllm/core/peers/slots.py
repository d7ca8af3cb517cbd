"""Which connection is closed when all places for inbound connections are taken.

If new connections were refused, 48 invented identities would keep every other node out. So a new connection takes the
place of the one that is worth least; among equals, of one from the host that holds most places, then from the address
prefix that does, and there of the one that has been idle longest. A host that opens many connections replaces its own.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv6Address, ip_address, ip_network
from itertools import count
from typing import TypeVar

from .address import source_of

IPV4_PREFIX_BITS = 24
IPV6_PREFIX_BITS = 48  # what a provider gives one customer, who has 2^80 addresses in it
FAIR_S = 0.5  # most handshakes end within this time, also when a whole fleet connects at once
ARRIVALS_PER_S = 20.0  # of one host
ARRIVALS_BURST = 100.0
PREFIX_HOSTS = 8  # a prefix may open as many as this number of hosts
ORIGINS_MAX = 2048  # hosts and prefixes whose arrivals are counted; 400 KiB

K = TypeVar("K", bound=Hashable)


@dataclass(slots=True)
class Place:
    """One inbound connection. `worth`: the lowest is closed first; `used_at`: in any unit, the same for all."""

    host: str
    used_at: float
    worth: int = 0


@lru_cache(4096)
def address_prefix(host: str) -> str:
    """The network that an IP address belongs to, also for loopback addresses; '' if it is not an address."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return ""
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    bits = IPV4_PREFIX_BITS if address.version == 4 else IPV6_PREFIX_BITS
    return str(ip_network(f"{address}/{bits}", strict=False))


def by_value(places: Mapping[K, Place], *newcomers: Place) -> list[K]:
    """The order in which connections are closed; `newcomers` count where hosts are counted."""
    hosts = Counter(place.host for place in (*places.values(), *newcomers))
    prefixes = Counter(address_prefix(place.host) for place in (*places.values(), *newcomers))

    def value(key: K) -> tuple[int, int, int, float]:
        place = places[key]
        return place.worth, -hosts[place.host], -prefixes[address_prefix(place.host)], place.used_at

    return sorted(places, key=value)


def evicted_for(places: Mapping[K, Place], newcomer: Place) -> K | None:
    """The place that a newcomer takes; None: every other is worth more than the newcomer."""
    rivals = {key: place for key, place in places.items() if place.worth <= newcomer.worth}
    return next(iter(by_value(rivals, newcomer)), None)


@dataclass(slots=True)
class _Arrivals:
    """A token bucket: how many connections a host or a prefix may still open now."""

    left: float
    at_s: float


class Handshakes:
    """Inbound connections whose peer has not proved its identity yet, by a number that `begin` returns.

    At most `places_max`. A new one ends the oldest of the host with the most, unless that is its own host, or has no
    more, and the oldest has not had FAIR_S. Connections of a host beyond ARRIVALS_BURST and ARRIVALS_PER_S, and of its
    prefix beyond PREFIX_HOSTS times that, do not begin, so that a flood costs an `accept` each and no cryptography.
    """

    def __init__(self, places_max: int) -> None:
        self._places_max = places_max
        self._places: dict[int, Place] = {}
        self._ends: dict[int, Callable[[], None]] = {}
        self._arrivals: OrderedDict[str, _Arrivals] = OrderedDict()
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._places)

    def begin(self, host: str, now_s: float, end: Callable[[], None]) -> int | None:
        """Take a place for a connection from `host`; `end` is called if it must close early. None: close it now."""
        place = Place(source_of(host), now_s)
        if not (self._may_arrive(place.host, 1, now_s) and self._may_arrive(address_prefix(host), PREFIX_HOSTS, now_s)):
            return None
        if len(self._places) >= self._places_max:
            evicted = evicted_for(self._places, place)
            assert evicted is not None  # all are worth the same
            if self._is_fair(self._places[evicted], place):
                return None
            ends = self._ends[evicted]
            self.end(evicted)
            ends()
        number = next(self._numbers)
        self._places[number], self._ends[number] = place, end
        return number

    def end(self, number: int) -> None:
        """The connection is closed, or its peer has proved its identity; may be called twice."""
        self._places.pop(number, None)
        self._ends.pop(number, None)

    def _is_fair(self, place: Place, newcomer: Place) -> bool:
        """Whether `place` stays and the newcomer is refused: it is recent, and its host has no more places."""
        hosts = Counter(each.host for each in (*self._places.values(), newcomer))
        return newcomer.used_at - place.used_at < FAIR_S and hosts[place.host] <= hosts[newcomer.host]

    def _may_arrive(self, origin: str, hosts: int, now_s: float) -> bool:
        arrivals = self._arrivals.setdefault(origin, _Arrivals(hosts * ARRIVALS_BURST, now_s))
        self._arrivals.move_to_end(origin)
        if len(self._arrivals) > ORIGINS_MAX:
            self._arrivals.popitem(last=False)
        refill = (now_s - arrivals.at_s) * hosts * ARRIVALS_PER_S
        arrivals.left = min(hosts * ARRIVALS_BURST, arrivals.left + refill)
        arrivals.at_s = now_s
        if arrivals.left < 1:
            return False
        arrivals.left -= 1
        return True
