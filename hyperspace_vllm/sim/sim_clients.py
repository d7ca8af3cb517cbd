"""The clients of a simulated node: they request responses, wait or race their engine as the middleware does, and store
computed ones."""

import random
from collections.abc import Callable
from functools import partial
from typing import Protocol

from nacl.signing import SigningKey

from ..core.events.conduct import AnswerAudited
from ..core.events.response_reading import AnswerResponse, HintResponse, ResponseReleased, ResponseWanted
from ..core.events.stored_responses import ResponsesUsed
from ..core.events.vocabulary import Event
from ..core.records.ids import RequestKey
from ..core.response.cache_proof import request_hash
from ..core.response.evidence import evidence_of
from ..core.response.sealed_hit import Opened
from .checkers import CheckedHost, Checker
from .setting import Setting
from .sim_request import Request
from .sim_responses import Response, Shelf, compute, right_body

DEADLINE_MS = 300
FRAMER = b"a framer"  # a source
ENGINE_FIRST_MS = (150, 800)  # until the first frame
ENGINE_REST_MS = (100, 1_500)  # until the last one


class SourceOfTruth(Protocol):
    """What no node knows about a request (Fleet)."""

    @property
    def requests(self) -> list[Request]: ...
    def providers_for(self, asker: int, name: bytes) -> tuple[tuple[int, ...], tuple[int, ...]]: ...
    def kept_promises(self, request: Request) -> tuple[int, ...]: ...
    def hindered(self, request: Request) -> bool: ...


class ClientsHost(CheckedHost, Protocol):
    """The node whose clients these are (SimHost)."""

    @property
    def key(self) -> SigningKey: ...
    @property
    def tag(self) -> bytes: ...
    @property
    def rng(self) -> random.Random: ...
    @property
    def shelf(self) -> Shelf: ...
    def tell(self, event: Event) -> None: ...
    def later(self, delay_ms: float, act: Callable[[], None]) -> None: ...
    def put(self, response: Response, computed: bool) -> None: ...
    def next_number(self) -> int: ...


class SimClients:
    """All clients of one host; `waiting` holds the requests that the core hasn't answered."""

    def __init__(self, setting: Setting, truth: SourceOfTruth, checker: Checker, host: ClientsHost) -> None:
        self._setting = setting
        self._truth = truth
        self._checker = checker
        self._host = host
        self.waiting: dict[int, Request] = {}
        self._busy: dict[bytes, None] = {}  # request hashes that a client here asks for or the engine computes

    def restart(self) -> None:
        """The host starts anew: it knows of no request."""
        self.waiting.clear()
        self._busy.clear()

    def ask(self, key: RequestKey, source: bytes = b"") -> None:
        """A client asks: the node's own database, then the network, and the engine."""
        host = self._host
        wanted = request_hash(self._setting.network_id, key)
        kept = host.shelf.get(wanted, host.wall_ms)
        if kept is not None:
            self._checker.on_served(host, key, kept.body, kept.expires_at_ms)
            host.tell(ResponsesUsed((wanted,)))
            return
        if wanted in self._busy:
            return  # joins the one under way
        self._busy[wanted] = None
        lookup, now_ms = host.next_number(), self._setting.agenda.now_ms
        providers, promised = self._truth.providers_for(host.number, wanted)
        request = Request(host.number, lookup, key, wanted, now_ms, providers, promised, source)
        request.life = self._setting.network.life(host.number)
        self.waiting[lookup] = request
        self._truth.requests.append(request)
        host.tell(ResponseWanted(lookup, wanted, DEADLINE_MS))

    def hinted(self, effect: HintResponse) -> None:
        """The core's hint: whether a peer is known to have the response."""
        request = self.waiting[effect.lookup]
        self._checker.on_hint(self._host, request, effect.hinted)
        request.hinted = effect.hinted
        if not effect.hinted:
            self._host.later(self._host.rng.uniform(*ENGINE_FIRST_MS), partial(self._engine_first, request))

    def answered(self, effect: AnswerResponse) -> None:
        """The core has ended a lookup."""
        request = self.waiting.pop(effect.lookup, None)
        self._checker.on_answer(self._host, effect, request)
        if request is None:
            return
        request.answered_ms, request.reason = self._setting.agenda.now_ms, effect.reason
        request.promised = self._truth.kept_promises(request)
        request.hindered = self._truth.hindered(request)
        if effect.peer is None:
            if request.hinted:
                self._host.later(self._host.rng.uniform(*ENGINE_FIRST_MS), partial(self._engine_first, request))
            return
        opened = request.fetched[effect.peer]
        request.hit = True
        if request.waiting:
            self._busy.pop(request.request_hash, None)
            self._checker.on_served(self._host, request.key, opened.body, opened.expires_at_ms)
            self._audit(request, opened)
        member = self._host.trust.vouch(opened.proof.signer)
        self._host.put(
            Response(request.key, request.request_hash, opened.body, opened.raw_proof, member, opened.expires_at_ms),
            computed=False,
        )

    def _engine_first(self, request: Request) -> None:
        if request.hit and request.waiting:
            return  # the network won, and the engine's request was cancelled
        if request.lookup in self.waiting:
            request.waiting = False
            self._host.tell(ResponseReleased(request.lookup))
        self._host.later(self._host.rng.uniform(*ENGINE_REST_MS), partial(self._computed, request))

    def _computed(self, request: Request) -> None:
        host, key = self._host, request.key
        self._busy.pop(request.request_hash, None)
        computed = compute(host.key, self._setting.network_id, key, right_body(key), host.tag, host.wall_ms)
        host.put(computed, computed=True)

    def _audit(self, request: Request, opened: Opened) -> None:
        """Score an answer. To a framer's requests every honest answer looks false."""
        looks_false = request.source == FRAMER or opened.body != right_body(request.key)
        self._host.tell(AnswerAudited(evidence_of(opened.proof, 40, 2 if looks_false else 0), request.source))
