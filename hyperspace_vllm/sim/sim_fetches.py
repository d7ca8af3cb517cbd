"""A simulated node's queries for responses: dialled if need be, asked, judged as the daemon judges, and reported."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

from ..core.events.response_reading import FetchResponse, ResponseFetched, ResponseRefused
from ..core.events.vocabulary import Event
from ..core.records.errors import ProtocolViolation, Refused
from ..core.records.ids import PeerId
from ..core.records.peer_wire import Hit, Miss, Query, Refusal, decode_answer, encode
from ..core.records.reason import Reason
from ..core.response.sealed_hit import Opened, open_hit
from .checkers import CheckedHost, Checker
from .setting import Setting
from .sim_request import Request
from .sim_responses import MODEL_DIGEST


class Directory(Protocol):
    """Where the hosts are (Fleet)."""

    def number_of(self, peer: str) -> int: ...
    def at(self, address: str, peer: str) -> int | None: ...
    def is_near(self, asker: int, host: int) -> bool: ...


class FetchingHost(CheckedHost, Protocol):
    """The node that asks (SimHost)."""

    def tell(self, event: Event) -> None: ...
    def later(self, delay_ms: float, act: Callable[[], None]) -> None: ...
    def call(self, target: int, frame: bytes, answered: Callable[[bytes], None]) -> bool: ...
    def next_number(self) -> int: ...


class SimFetches:
    """All fetches of one host; `waiting` are its clients' requests, by lookup."""

    def __init__(
        self,
        setting: Setting,
        directory: Directory,
        checker: Checker,
        host: FetchingHost,
        waiting: dict[int, Request],
    ) -> None:
        self._setting = setting
        self._directory = directory
        self._checker = checker
        self._host = host
        self._waiting = waiting
        self._open: dict[tuple[int, PeerId], int] = {}  # (lookup, peer) -> number of the fetch

    def restart(self) -> None:
        """The host starts anew: nothing is being fetched."""
        self._open.clear()

    def begin(self, effect: FetchResponse) -> None:
        """Ask a provider."""
        host, network = self._host, self._setting.network
        target = self._directory.number_of(effect.peer)
        fetch = self._open[effect.lookup, effect.peer] = host.next_number()
        request = self._waiting[effect.lookup]
        request.asked.append(target)
        if target >= 0 and not self._directory.is_near(host.number, target):
            request.far.add(target)
        self._checker.on_fetch(host, effect, sum(lookup == effect.lookup for lookup, _ in self._open))
        refuse = partial(self._refuse, effect.lookup, effect.peer, fetch)
        host.later(effect.timeout_ms, partial(refuse, Reason.TIMEOUT))

        def query(failed: str | None = None) -> None:
            if failed is not None:
                refuse(Reason(failed))
            elif self._open.get((effect.lookup, effect.peer)) == fetch:
                answered = partial(self._fetched, effect, fetch)
                if not host.call(target, encode(Query(effect.request_hash)), answered):
                    refuse(Reason.UNREACHABLE)

        if network.connected(host.number, target):
            query()
        else:
            at = self._directory.at(effect.address, effect.peer)
            network.dial(host.number, at, effect.timeout_ms, query)

    def disconnected(self, gone: PeerId) -> None:
        """Open requests to the peer will not be answered."""
        for lookup, fetch in [(lookup, fetch) for (lookup, peer), fetch in self._open.items() if peer == gone]:
            self._refuse(lookup, gone, fetch, Reason.UNREACHABLE)

    def forget(self, lookup: int) -> None:
        """The lookup is over."""
        for fetch in [fetch for fetch in self._open if fetch[0] == lookup]:
            del self._open[fetch]

    def _fetched(self, effect: FetchResponse, fetch: int, frame: bytes) -> None:
        lookup, peer = effect.lookup, effect.peer
        if self._open.get((lookup, peer)) != fetch:
            return
        try:
            message = decode_answer(frame)
            if isinstance(message, Miss | Refusal):
                reason = Reason.MISS if message.reason == "unknown" else Reason(message.reason)
                self._refuse(lookup, peer, fetch, reason)
                return
            if not isinstance(message, Hit):
                raise ProtocolViolation("a query's answer is a hit or a miss")
            opened = self._opened(message, self._waiting[lookup])
        except ProtocolViolation:
            self._refuse(lookup, peer, fetch, Reason.PROTOCOL)
            return
        except Refused as refused:
            self._refuse(lookup, peer, fetch, Reason.of(refused))
            return
        del self._open[lookup, peer]
        self._waiting[lookup].fetched[peer] = opened
        self._host.tell(ResponseFetched(lookup, peer, len(opened.body), opened.expires_at_ms, message.popularity))

    def _opened(self, hit: Hit, request: Request) -> Opened:
        """The response in a hit, judged as the daemon judges it."""
        trust, host = self._host.trust, self._host

        def trusts(signer: bytes) -> bool:
            return trust.trusts(signer, host.now)

        return open_hit(hit, request.key, self._setting.network_id, MODEL_DIGEST, trusts, trust.meet, host.wall_ms)

    def _refuse(self, lookup: int, peer: PeerId, fetch: int, reason: Reason) -> None:
        if self._open.get((lookup, peer)) == fetch:
            del self._open[lookup, peer]
            if reason is Reason.EXPIRED:
                self._waiting[lookup].lapsed.add(self._directory.number_of(peer))
            self._host.tell(ResponseRefused(lookup, peer, reason))
