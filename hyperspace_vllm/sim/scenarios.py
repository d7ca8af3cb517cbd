"""Scenarios: which hosts boot, send requests, die, freeze, are cut off or lie, and when.

Seeds that once found a bug are in tests/sim/test_sim_network.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from ..core.records.limits import RESPONSE_TTL_MS
from .fleet import Fleet
from .host import SimHost
from .liars import KINDS, Kind
from .setting import EPOCH_MS
from .sim_clients import FRAMER
from .sim_responses import compute, right_body

RUN_MS = 60_000
BOOT_MS = 2_000  # within which all hosts start
WARM_MS = 15_000  # before the first fault
ASK_EVERY_MS = 2_000  # a client of a host, on average
REQUESTS_PER_HOST = 5  # distinct ones, the first asked for most (Zipf)
CHECK_EVERY_MS = 25_000
OPEN_ASK_EVERY_MS, OPEN_REQUESTS = 30, 600  # of all hosts together: enough for a stranger to earn trust
FRAMED = 40  # requests of a framer
FLASH = 1_000_000  # numbers of requests that are only sent in a flash crowd


@dataclass(frozen=True, slots=True)
class Scenario:
    """`begin` sets everything that happens beside the usual requests; some hosts lie; `holders` identities hold
    places at every host; `kept` is how many responses a host brings along from an earlier life, a few of them about to
    expire."""

    name: str
    text: str
    begin: Callable[[Fleet], None]
    liars: float = 0.0
    kinds: tuple[Kind, ...] = KINDS
    holders: int = 0
    kept: int = 3
    first_ask_ms: int = 5_000
    is_calm: bool = False  # no host lies, dies, stops or is cut off
    is_open: bool = False  # there is no network key, and trust can be earned


def build(scenario: Scenario, nodes: int, seed: int, with_liars: bool = True, with_kv: bool = True) -> Fleet:
    """A fleet in which the scenario will happen when its agenda runs; without its liars, those never start."""
    count = round(nodes * scenario.liars)
    step = max(nodes // count, 1) if count else 0
    kinds = scenario.kinds
    liars: dict[int, Kind] = {1 + index * step: kinds[(index + seed) % len(kinds)] for index in range(count)}
    liars = {number: kind for number, kind in liars.items() if number < nodes}
    fleet = Fleet(nodes, seed, liars, scenario.is_open, scenario.holders, with_kv)
    requests, every_ms = nodes * REQUESTS_PER_HOST, ASK_EVERY_MS
    if scenario.is_open:
        requests, every_ms = OPEN_REQUESTS, OPEN_ASK_EVERY_MS * len(fleet.honest)
        for number in range(requests):
            fleet.key(number)  # attackers can guess every one
    for host in fleet.honest:
        for _ in range(scenario.kept):
            _keep(fleet, host, fleet.rng.randrange(requests))
    for host in fleet.hosts:
        boots_ms = 0 if host.number == 0 else fleet.rng.uniform(0, BOOT_MS)
        if host.liar is None or with_liars:
            fleet.agenda.after(boots_ms, host.boot)
    if with_liars:
        for holder in fleet.holders:
            fleet.agenda.after(0, holder.boot)
    weights = list(accumulate(1 / (rank + 1) for rank in range(requests)))
    for host in fleet.honest:
        first_ms = scenario.first_ask_ms + fleet.rng.expovariate(1 / every_ms)
        fleet.agenda.after(first_ms, partial(_ask_again, fleet, host, weights, every_ms))
    fleet.agenda.after(CHECK_EVERY_MS, partial(_check_again, fleet))
    if fleet.kv is not None:
        fleet.kv.begin_prompts([host.prefixes.engine for host in fleet.honest if host.prefixes is not None], RUN_MS)
    scenario.begin(fleet)
    return fleet


def _keep(fleet: Fleet, host: SimHost, number: int) -> None:
    """Put a response on a host's shelf; one in five expires while the scenario runs."""
    key = fleet.key(number)
    left_ms = (
        fleet.rng.uniform(0, RUN_MS) if not fleet.rng.randrange(5) else fleet.rng.uniform(0.1, 1) * RESPONSE_TTL_MS
    )
    computed_at_ms = EPOCH_MS - RESPONSE_TTL_MS + round(left_ms)
    response = compute(host.key, fleet.network_id, key, right_body(key), host.tag, computed_at_ms)
    host.shelf.put(response)


def _ask_again(fleet: Fleet, host: SimHost, weights: list[float], every_ms: int) -> None:
    (number,) = fleet.rng.choices(range(len(weights)), cum_weights=weights)
    key = fleet.key(number)
    if fleet.network.acts(host.number):
        host.clients.ask(key)
    fleet.agenda.after(fleet.rng.expovariate(1 / every_ms), partial(_ask_again, fleet, host, weights, every_ms))


def _check_again(fleet: Fleet) -> None:
    fleet.checker.check_tables()
    fleet.checker.check_convictions()
    fleet.agenda.after(CHECK_EVERY_MS, partial(_check_again, fleet))


# --- the scenarios ------------------------------------------------------------------------------


def _cold_start(fleet: Fleet) -> None:
    pass


def _flash_crowd(fleet: Fleet) -> None:
    """One node has an answer; seconds later all hosts request it at once. Then three more answers."""
    for flash, (at_ms, count) in enumerate(((20_000, 1), (40_000, 3))):
        for index in range(count):
            key = fleet.key(FLASH + 10 * flash + index)
            fleet.agenda.after(at_ms, partial(fleet.rng.choice(fleet.honest).clients.ask, key))
            for host in fleet.honest:
                fleet.agenda.after(at_ms + 5_000 + fleet.rng.uniform(0, 500), partial(host.clients.ask, key))


def _partition_heals(fleet: Fleet) -> None:
    """Two random halves, for longer than any connection lasts."""
    sides = [index % 2 for index in range(len(fleet.hosts))]
    fleet.rng.shuffle(sides)
    fleet.agenda.after(WARM_MS, partial(fleet.network.split, sides))
    fleet.agenda.after(WARM_MS + 22_000, partial(fleet.network.split, [0] * len(sides)))


def _churn(fleet: Fleet) -> None:
    """Three in ten die, by crash or by power cut, and most come back, with their responses or without."""
    for host in fleet.rng.sample(fleet.hosts, round(len(fleet.hosts) * 0.3)):
        dies_ms = WARM_MS + fleet.rng.uniform(0, 30_000)
        keeps = fleet.rng.random() < 0.5
        fleet.agenda.after(dies_ms, partial(host.die, fleet.rng.random() < 0.5, keeps))
        if fleet.rng.random() < 0.7:
            fleet.agenda.after(dies_ms + fleet.rng.uniform(2_000, 12_000), host.boot)


def _freeze(fleet: Fleet) -> None:
    """One host in ten freezes for a while."""
    for host in fleet.rng.sample(fleet.hosts, round(len(fleet.hosts) * 0.1)):
        freezes_ms = WARM_MS + fleet.rng.uniform(0, 20_000)
        fleet.agenda.after(freezes_ms, partial(fleet.network.freeze, host.number))
        fleet.agenda.after(freezes_ms + fleet.rng.uniform(8_000, 25_000), partial(fleet.network.thaw, host.number))


def _restart(fleet: Fleet) -> None:
    """Every host restarts once, one after another, while others hold every place that it leaves."""
    for index, host in enumerate(fleet.honest):
        dies_ms = WARM_MS + 20_000 * index / len(fleet.honest)
        fleet.agenda.after(dies_ms, partial(host.die, True, True))
        fleet.agenda.after(dies_ms + 3_000, host.boot)


def _frame(fleet: Fleet) -> None:
    """One client repeats others' recent requests everywhere, so that audits take the answers for false."""
    for number in range(FRAMED):
        key = fleet.key(FLASH + number)
        first, second = fleet.rng.sample(fleet.honest, 2)
        at_ms = WARM_MS + number * (RUN_MS - WARM_MS - 10_000) / FRAMED
        fleet.agenda.after(at_ms, partial(first.clients.ask, key, FRAMER))
        fleet.agenda.after(at_ms + 5_000, partial(second.clients.ask, key, FRAMER))


_open = partial(Scenario, kept=0, is_open=True)
_ALL = (
    Scenario(
        "cold_start", "Everybody starts at once, with nothing.", _cold_start, kept=0, first_ask_ms=2_000, is_calm=True
    ),
    Scenario("flash_crowd", "Everybody asks for one new answer at once.", _flash_crowd, is_calm=True),
    Scenario("partition_heals", "Two halves lose each other for 22 s.", _partition_heals),
    Scenario("liars_20pct", "One node in five lies, in twelve ways.", _cold_start, liars=0.2),
    Scenario("churn_30pct", "Three nodes in ten die, most come back.", _churn),
    Scenario("inventors", "One node in ten invents a thousand owners.", _cold_start, liars=0.1, kinds=("inventor",)),
    Scenario("gossip_flood", "One node in ten floods the gossip.", _cold_start, liars=0.1, kinds=("flooder",)),
    Scenario("frozen_10pct", "One node in ten stops for 8 to 25 s.", _freeze),
    Scenario("slot_holders", "One host holds places at every node, under 60 names; all restart.", _restart, holders=60),
    _open("open", "Anybody may join, and everybody is honest.", _cold_start, is_calm=True),
    _open("relayers", "One in three relays well, then lies.", _cold_start, liars=1 / 3, kinds=("relayer",)),
    _open(
        "hinters", "One in three claims everything and answers nothing.", _cold_start, liars=1 / 3, kinds=("hinter",)
    ),
    _open("framer", "A client has honest answers look false.", _frame, is_calm=True),
)
SCENARIOS: Mapping[str, Scenario] = {scenario.name: scenario for scenario in _ALL}
