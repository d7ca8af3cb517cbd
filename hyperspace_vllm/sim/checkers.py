"""The rules that must hold in every run, for any network and any attackers.

Safety: no client gets a wrong or an expired response; every lookup is hinted once and answered once, by its deadline;
tables and the effects of one event stay within bounds; every request of a peer is answered at once; no honest node is
charged or convicted by another honest node, and no request waits for peers that have never delivered. Liveness: a
request is a hit within its deadline if an honest node that announced the response SPREAD_MS before was reachable all
the time; the engine may be faster only if the request did not wait. A miss is excused by lost segments between the two
nodes, by a freeze, and by SILENT_MAX asked peers that could not help (fleet.py): they take half of the time, and the
next peer needs a handshake.
"""

from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Protocol

from ..core.events.response_reading import AnswerResponse, FetchResponse
from ..core.events.vocabulary import Effect, Event
from ..core.node.node import Node
from ..core.peers.trust import Trust
from ..core.records.ids import RequestKey
from ..core.records.now import Now
from ..core.records.peer_wire import PeerRequest
from ..core.records.reason import Reason
from ..core.response.lookup import ATTEMPTS_MAX, IN_FLIGHT_MAX, RACE_MS
from .setting import Setting
from .sim_request import Request
from .sim_responses import right_body

LATE_MS = 1  # virtual milliseconds are whole
EFFECTS_MAX = 64  # of one event
EFFECTS_PER_PEER_MAX = 3  # on top: ping, greet and sync with each
TICKS_MAX = 10  # at one moment
TABLE_MAX = 4_096  # without a leak, a hundred nodes and their liars do not fill it within a minute


class _Liar(Protocol):
    @property
    def kind(self) -> str: ...


class _Suspect(Protocol):
    @property
    def liar(self) -> object | None: ...


class CheckedHost(Protocol):
    """The part of a host that is checked (SimHost)."""

    @property
    def number(self) -> int: ...
    @property
    def now(self) -> Now: ...
    @property
    def wall_ms(self) -> int: ...
    @property
    def public_key(self) -> bytes: ...
    @property
    def liar(self) -> _Liar | None: ...
    @property
    def trust(self) -> Trust: ...
    @property
    def core(self) -> Node: ...


class CheckedFleet(Protocol):
    """All hosts, and the truth about a request (Fleet)."""

    @property
    def hosts(self) -> Sequence[CheckedHost]: ...
    @property
    def honest(self) -> Sequence[CheckedHost]: ...
    @property
    def requests(self) -> Sequence[Request]: ...
    def host(self, number: int) -> _Suspect: ...
    def number_of(self, peer: str) -> int: ...
    def allowed_ms(self, request: Request) -> int: ...


class Checker:
    """Gets every event; `violations` are descriptions of broken rules."""

    def __init__(self, setting: Setting, fleet: CheckedFleet) -> None:
        self._setting = setting
        self._agenda = setting.agenda
        self._network = setting.network
        self._fleet = fleet
        self._ticks: dict[int, tuple[int, int]] = {}  # host -> when, and how often then
        self._fetches: dict[tuple[int, int, int], int] = {}
        self.violations: list[str] = []

    def violated(self, host: int, what: str) -> None:
        """Note the broken rule, where and when, and how to replay it."""
        self.violations.append(f"seed {self._setting.seed}, {self._agenda.now_ms} ms, node {host}: {what}")

    # --- safety ---------------------------------------------------------------------------------

    def on_served(self, host: CheckedHost, key: RequestKey, body: bytes, expires_at_ms: int) -> None:
        """A client gets `body`."""
        if body != right_body(key):
            self.violated(host.number, f"served a wrong response: {body[:40]!r}")
        if expires_at_ms <= host.wall_ms:
            self.violated(host.number, f"served a response that expired {host.wall_ms - expires_at_ms} ms ago")

    def on_effects(self, host: CheckedHost, event: Event, effects: list[Effect]) -> None:
        """A core has handled an event."""
        if len(effects) > EFFECTS_MAX + EFFECTS_PER_PEER_MAX * len(self._network):
            self.violated(host.number, f"{len(effects)} effects of one {type(event).__name__}")

    def on_request_handled(self, host: CheckedHost, message: PeerRequest, unanswered: bool) -> None:
        """A core has handled a peer's request."""
        if unanswered:
            self.violated(host.number, f"{type(message).__name__} of a peer left without an answer")

    def on_hint(self, host: CheckedHost, request: Request, hinted: bool) -> None:
        """A lookup was hinted, or its hint is withdrawn."""
        withdrawn = request.hinted is True and not hinted
        if request.asked_ms != self._agenda.now_ms and not withdrawn:
            self.violated(host.number, f"lookup {request.lookup}: the hint came late, or twice")

    def on_fetch(self, host: CheckedHost, effect: FetchResponse, in_flight: int) -> None:
        """A provider is asked."""
        lookup = host.number, self._network.life(host.number), effect.lookup
        self._fetches[lookup] = self._fetches.get(lookup, 0) + 1
        if in_flight > IN_FLIGHT_MAX or self._fetches[lookup] > ATTEMPTS_MAX:
            self.violated(host.number, f"lookup {effect.lookup}: {self._fetches[lookup]} fetches, {in_flight} at once")

    def on_answer(self, host: CheckedHost, effect: AnswerResponse, request: Request | None) -> None:
        """A lookup ends."""
        if request is None:
            self.violated(host.number, f"lookup {effect.lookup} answered twice")
            return
        if request.hinted is None:
            self.violated(host.number, f"lookup {effect.lookup} answered before its hint")
        if request.hinted and effect.peer is None and self._waited_for_hinters(request):
            self.violated(host.number, f"lookup {effect.lookup} waited for peers that have never delivered")
        now_ms = self._agenda.now_ms
        late_ms = now_ms - request.asked_ms - self._fleet.allowed_ms(request)
        if late_ms > LATE_MS and self._network.since_ms(host.number) <= request.asked_ms:
            self.violated(host.number, f"lookup {effect.lookup} answered {late_ms} ms after its deadline")

    def _waited_for_hinters(self, request: Request) -> bool:
        liars = [self._fleet.hosts[asked].liar for asked in request.asked]
        return bool(liars) and all(liar is not None and liar.kind == "hinter" for liar in liars)

    def on_tick(self, host: CheckedHost, due_ms: int | None) -> None:
        """A core has handled a tick, and wants the next one at `due_ms` of its clock."""
        now_ms = self._agenda.now_ms
        at_ms, count = self._ticks.get(host.number, (-1, 0))
        count = count + 1 if at_ms == now_ms else 1
        self._ticks[host.number] = now_ms, count
        if count > TICKS_MAX and due_ms is not None and due_ms <= host.now.mono_ms:
            raise RuntimeError(f"seed {self._setting.seed}, {now_ms} ms, node {host.number}: ticks settle nothing")

    def on_charge(self, host: CheckedHost, peer: str, reason: Reason) -> None:
        """A core charges a peer."""
        accused = self._fleet.number_of(peer)
        if host.liar is None and accused >= 0 and self._fleet.host(accused).liar is None:
            self.violated(host.number, f"charged the honest node {accused}: {reason}")

    def check_convictions(self) -> None:
        """Check the peers that every honest node has convicted."""
        for host in self._fleet.honest:
            for other in self._fleet.honest:
                if self._network.up(host.number) and host.trust.is_convicted(other.public_key, host.now):
                    self.violated(host.number, f"convicted the honest node {other.number}")

    def check_tables(self) -> None:
        """Check every table of every honest core."""
        for host in self._fleet.hosts:
            if host.liar is None and self._network.up(host.number):
                for name, size in _tables(host.core, "core", set()):
                    if size > TABLE_MAX:
                        self.violated(host.number, f"{name} has {size} entries")

    # --- at the end -----------------------------------------------------------------------------

    def check_requests(self) -> None:
        """Check that every request was answered, and that promised responses came."""
        for request in self._fleet.requests:
            if not self._lived_through(request):
                continue
            if request.answered_ms < 0:
                if request.asked_ms + RACE_MS + LATE_MS < self._agenda.now_ms:
                    self.violated(request.host, f"lookup {request.lookup} of {request.asked_ms} ms never answered")
            elif (
                not (request.hit and (request.waiting or not request.hinted))
                and request.promised
                and not request.hindered
            ):
                how = {None: "no hint", True: "hinted", False: "unhinted"}[request.hinted]
                self.violated(
                    request.host,
                    f"lookup {request.lookup} of {request.asked_ms} ms, {how}: {request.reason} after "
                    f"{request.answered_ms - request.asked_ms} ms, though nodes {list(request.promised)} have it",
                )

    def _lived_through(self, request: Request) -> bool:
        """Whether the requesting host was up and not frozen all the time."""
        network = self._network
        same_life = network.acts(request.host) and network.life(request.host) == request.life
        return same_life and network.since_ms(request.host) <= request.asked_ms


def _tables(thing: object, name: str, seen: set[int]) -> Iterator[tuple[str, int]]:
    """Names and sizes of the containers inside an object of this package, at any depth."""
    if id(thing) in seen or isinstance(thing, str | bytes | int | float | None):
        return
    seen.add(id(thing))
    if isinstance(thing, Sized) and not hasattr(thing, "__dict__"):
        yield name, len(thing)
    if isinstance(thing, Mapping):
        for value in thing.values():
            yield from _tables(value, f"{name}[]", seen)
    elif isinstance(thing, list | tuple):
        for value in thing:
            yield from _tables(value, f"{name}[]", seen)
    elif type(thing).__module__.startswith("hyperspace_vllm."):
        for attribute in (*getattr(thing, "__dict__", ()), *getattr(thing, "__slots__", ())):
            yield from _tables(getattr(thing, attribute, None), f"{name}.{attribute}", seen)
