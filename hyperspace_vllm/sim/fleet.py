"""A whole simulated network: hosts, their connections, gossip and DHT on one virtual clock, and the truth about them.

The truth is unknown to the nodes: which hosts have which response, which hosts lie, and which can reach each other.
Checkers judge by it.
"""

import random
from collections.abc import Sequence
from hashlib import sha256

from nacl.signing import SigningKey

from ..core.prefix.cost_model import HEDGE_MS_MAX
from ..core.records.ids import RequestKey, network_id
from ..core.response.cache_proof import request_hash
from ..core.response.lookup import RACE_MS
from .agenda import Agenda
from .checkers import Checker
from .holders import Holder
from .host import CLOCK_SKEW_MS, SimHost
from .liars import Kind
from .prefixes.kv_fleet import KvFleet
from .setting import Setting
from .sim_clients import DEADLINE_MS
from .sim_dht import Dht
from .sim_gossip import Gossip
from .sim_network import HANDSHAKE_CPU_MS, HANDSHAKE_TRIPS, SimNetwork
from .sim_request import Request
from .sim_responses import request_key
from .trace import Trace

SPREAD_MS = 10_000
SLACK_MS = 50  # jitter, queues
SILENT_MAX = 2
LOSS = 0.002
NETWORK_KEY = sha256(b"the key of a simulated network").digest()
NETWORK = network_id("simulation")
BOOTSTRAPS = 3  # with one that is dead for good, a host that returns without its data would know no peer


class Fleet:
    """`size` hosts, none of them booted; all hosts know the first few. `liars` says which ones lie, and how; `holders`
    identities hold places at some of them. An open fleet has no network key: the honest hosts list each other, and
    other hosts can earn trust. Without `with_kv` there is no L2.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        liars: dict[int, Kind],
        is_open: bool = False,
        holders: int = 0,
        with_kv: bool = True,
    ) -> None:
        self.seed = seed
        self.rng = random.Random(f"{seed}/fleet")
        self.network_id = NETWORK
        self.agenda = Agenda()
        self.trace = Trace()
        self.network = SimNetwork(self.agenda, random.Random(f"{seed}/network"), size + holders, LOSS)
        self.gossip = Gossip(self.network, random.Random(f"{seed}/gossip"), self._passes_on, self._gossip_arrives)
        self.dht = Dht(self.network, random.Random(f"{seed}/dht"), self._now_ms, size)
        departed = SigningKey(sha256(b"a member that has left").digest())
        self._setting = Setting(
            seed, NETWORK, is_open, departed, self.agenda, self.trace, self.network, self.gossip, self.dht
        )
        self.checker = Checker(self._setting, self)
        self.kv = KvFleet(self._setting, self, size, LOSS) if with_kv else None
        self.hosts = [self._host(number, liars.get(number)) for number in range(size)]
        self.holders = [self._holder(size + number) for number in range(holders)]
        self.bootstrap = self.hosts[:BOOTSTRAPS]
        self.requests: list[Request] = []
        everybody: list[SimHost | Holder] = [*self.hosts, *self.holders]
        self._numbers: dict[str, int] = {host.peer: host.number for host in everybody}
        self._addresses = {host.address: host.number for host in everybody}
        self._holders: dict[bytes, dict[int, int]] = {}  # request hash -> honest host -> since when
        self._announced: dict[bytes, dict[int, int]] = {}  # those of them that have said so

    def _host(self, number: int, kind: Kind | None) -> SimHost:
        network_key = None if kind == "stranger" or self._setting.is_open else NETWORK_KEY
        key = SigningKey(sha256(b"host/%d" % number).digest())
        host = SimHost(self._setting, self, self.checker, number, key, network_key, kind)
        self.network.add(host)
        return host

    def _holder(self, number: int) -> Holder:
        holder = Holder(self._setting, self, number, NETWORK_KEY)
        self.network.add(holder)
        return holder

    def host(self, number: int) -> SimHost | Holder:
        """Host or holder `number`."""
        return self.hosts[number] if number < len(self.hosts) else self.holders[number - len(self.hosts)]

    @property
    def honest(self) -> list[SimHost]:
        """The hosts that do not lie."""
        return [host for host in self.hosts if host.liar is None]

    def number_of(self, peer: str) -> int:
        """The host with this peer id, or -1."""
        return self._numbers.get(peer, -1)

    def at(self, address: str, peer: str) -> int | None:
        """The host that answers as `peer` at an address."""
        number = self._addresses.get(address)
        return number if number is not None and self.host(number).peer == peer else None

    def key(self, number: int) -> RequestKey:
        """The `number`th request's key; from now on it counts as requested."""
        key = request_key(number)
        self._setting.keys.setdefault(request_hash(self.network_id, key), key)
        return key

    # --- the truth ------------------------------------------------------------------------------

    def kept(self, host: int, name: bytes) -> None:
        """A host can serve a response from now on."""
        if self.hosts[host].liar is None:
            self._holders.setdefault(name, {}).setdefault(host, self.agenda.now_ms)

    def announced(self, host: int, name: bytes) -> None:
        """The host has written the response into its registry document."""
        self._announced.setdefault(name, {}).setdefault(host, self.agenda.now_ms)

    def unkept(self, host: int, names: Sequence[bytes]) -> None:
        """The host can no longer serve the response."""
        for name in names:
            self._holders.get(name, {}).pop(host, None)
            self._announced.get(name, {}).pop(host, None)

    def died(self, host: int) -> None:
        """The host has died: it must announce its responses again."""
        for hosts in self._announced.values():
            hosts.pop(host, None)

    def providers_for(self, asker: int, name: bytes) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Honest hosts that have a response and can be reached; and those that announced it long enough ago."""
        here = tuple(host for host in self._holders.get(name, {}) if host != asker and self._serves(asker, host, name))
        said = self._announced.get(name, {})
        promised = [host for host in here if host in said and self._has_spread(asker, host, said[host])]
        return here, tuple(host for host in promised if self.is_near(asker, host))

    def kept_promises(self, request: Request) -> tuple[int, ...]:
        """A request's promised providers that were reachable all the time."""
        return tuple(host for host in request.promised if self._undisturbed(request, host))

    def hindered(self, request: Request) -> bool:
        """Whether SILENT_MAX asked hosts could not help: they lie, are far or delayed, or their copy just expired."""
        excused = request.far | request.lapsed
        silent = [
            host
            for host in request.asked
            if host < 0 or self.host(host).liar is not None or host in excused or self._held_up(request, host)
        ]
        return len(silent) >= SILENT_MAX

    def allowed_ms(self, request: Request) -> int:
        """How long a lookup may take."""
        return DEADLINE_MS if request.hinted else max(DEADLINE_MS, RACE_MS)

    def _has_spread(self, asker: int, host: int, since_ms: int) -> bool:
        starts_ms = (since_ms, self.network.since_ms(asker), self.network.since_ms(host), self.network.split_changed_ms)
        return max(starts_ms) + SPREAD_MS <= self.agenda.now_ms

    def is_near(self, asker: int, host: int) -> bool:
        """Whether a host answers in time, even if it is the second one asked and a connection has to be opened."""
        takes_ms = self.network.trip_ms(asker, host) + SLACK_MS
        if not self.network.connected(asker, host):
            takes_ms += self.network.trip_ms(asker, host) * HANDSHAKE_TRIPS + HANDSHAKE_CPU_MS
        return takes_ms + HEDGE_MS_MAX <= DEADLINE_MS

    def _undisturbed(self, request: Request, host: int) -> bool:
        """Whether the host, its store and the path to it worked from the request to the answer."""
        return (
            self._serves(request.host, host, request.request_hash)
            and self.network.split_changed_ms <= request.asked_ms
            and not self._held_up(request, host)
        )

    def _held_up(self, request: Request, host: int) -> bool:
        """Whether the host was down, frozen or cut off since the request, or a segment between the two was lost."""
        pair = min(request.host, host), max(request.host, host)
        there = self.network.acts(host) and self.network.since_ms(host) <= request.asked_ms
        there = there and self.network.reaches(request.host, host)
        return not there or self.network.disturbed_ms.get(pair, -1) >= request.asked_ms

    def _serves(self, asker: int, host: int, name: bytes) -> bool:
        expires_at_ms = self.hosts[host].shelf.expires_at_ms(name)
        reached = self.network.acts(host) and self.network.reaches(asker, host)
        return reached and expires_at_ms > self._setting.wall_ms + 2 * CLOCK_SKEW_MS

    def _passes_on(self, host: int, relay: int, topic: str, author: int, payload: bytes) -> bool:
        return host < len(self.hosts) and self.hosts[host].passes_on(relay, topic, author, payload)  # holders don't

    def _gossip_arrives(self, host: int, relay: int, topic: str, payload: bytes) -> None:
        self.hosts[host].heard_gossip(relay, topic, payload)

    def _now_ms(self) -> int:
        return self.agenda.now_ms
