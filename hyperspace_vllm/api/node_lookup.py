"""Lookups of responses in other nodes, through this host's node: they never delay a request beyond its deadline.

A node without peers says so, and is not asked for a second. After that, and after a node that did not answer in time, a
lookup begins without waiting for its hint: a node that is alone or frozen does not delay requests.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from itertools import count

from ..core.local.claim_messages import ClaimEnded, ClaimRequest, RequestClaimed, RequestDone
from ..core.local.messages import NodeMessage
from ..core.local.response_cache_messages import (
    FindResponse,
    ReleaseResponse,
    ResponseFound,
    ResponseHint,
    ResponseNotFound,
    ResponseToTry,
)
from ..core.local.session_messages import Rejected
from ..core.local.similar_messages import FindSimilar, Question, SimilarFound, SimilarNotFound
from ..core.records.ids import RequestKey
from ..core.records.limits import RESPONSE_LOOKUPS_MAX, SIMILAR_LOOKUPS_MAX
from ..core.response.similar.guards import Mode
from .options import NodeLink

logger = logging.getLogger(__name__)

HINT_S = 0.01  # a healthy node says within two milliseconds whether it has a hint
RACE_S = 3.0  # as long as the node continues the search
SIMILAR_S = 0.1  # an embedding takes some 5 ms, and more beside an engine that uses every core
_USELESS_S = 1.0  # between lookups in a node without peers
_USELESS = ("off", "alone", "no_peers")


class Pending:
    """One lookup. Both futures are done by its deadline at the latest; `release` does them at once.

    A lookup without a hint, or whose hint is withdrawn, races the engine and delays no request: `race` gives it RACE_S
    instead.
    """

    def __init__(self, lookups: "NodeLookup", number: int, to_try: Callable[[ResponseToTry], None]) -> None:
        loop = asyncio.get_running_loop()
        self.number = number
        self.to_try = to_try
        self.hint: asyncio.Future[bool] = loop.create_future()  # is it worth waiting for the answer?
        self.withdrawn: asyncio.Future[None] = loop.create_future()  # it was, and is no longer
        self.answer: asyncio.Future[ResponseFound | None] = loop.create_future()
        self.timers: list[asyncio.TimerHandle] = []  # the last one is that of the deadline
        self.raced_by: float | None = None  # set once the node has said that it searches without a hint
        self._lookups = lookups

    def race(self) -> None:
        """The lookup races the engine: no request waits for it."""
        if not self.answer.done() and self.raced_by is not None:
            self.timers.pop().cancel()
            loop = asyncio.get_running_loop()
            self.timers.append(loop.call_at(self.raced_by, self._lookups.overdue, self))

    def release(self) -> None:
        """No request waits any more. After its end this does nothing."""
        self._lookups.release(self)

    def end(self, found: ResponseFound | None) -> None:
        """The answer is here, or there is none."""
        for timer in self.timers:
            timer.cancel()
        self.say_hint(found is not None)
        if not self.answer.done():
            self.answer.set_result(found)

    def say_hint(self, hinted: bool) -> None:
        """The first hint counts; a second one can only withdraw it."""
        if not self.hint.done():
            self.hint.set_result(hinted)
        elif self.hint.result() and not hinted and not self.withdrawn.done():
            self.withdrawn.set_result(None)


class _Claim:
    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.granted: asyncio.Future[bool] = loop.create_future()
        self.over: asyncio.Future[None] = loop.create_future()


class NodeLookup:
    """The pending lookups of one process, of questions too; they belong to one event loop."""

    def __init__(self, client: NodeLink) -> None:
        self._client = client
        self._numbers = count(1)
        self._pending: dict[int, Pending] = {}
        self._similar: dict[int, asyncio.Future[SimilarFound | str]] = {}
        self._claims: dict[int, _Claim] = {}
        self._similar_not_before_s = 0.0
        self._epoch = 0  # of the session that the pending ones belong to
        self._silent = False  # the last lookup got no hint in time, or the node was useless
        self._not_before_s = 0.0

    @property
    def pending(self) -> int:
        """How many lookups are unfinished, claims of a lease included."""
        return len(self._pending) + len(self._claims)

    def start(
        self,
        key: RequestKey,
        model_digest: bytes,
        deadline_s: float,
        to_try: Callable[[ResponseToTry], None] = lambda message: None,
    ) -> Pending | None:
        """Ask the node; None when it is absent, has no peers, or is too busy.

        `to_try` gets responses that are only for an audit.
        """
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        if now_s < self._not_before_s or len(self._pending) >= RESPONSE_LOOKUPS_MAX or not self._client.connected:
            return None
        self._listen()
        number = next(self._numbers) % (1 << 32)
        if not self._client.send(FindResponse(number, key, model_digest, max(round(deadline_s * 1000), 1))):
            return None
        pending = self._pending[number] = Pending(self, number, to_try)
        if self._silent:
            pending.say_hint(False)
        else:
            pending.timers.append(loop.call_later(min(HINT_S, deadline_s), self._hint_overdue, pending))
        pending.timers.append(loop.call_later(deadline_s, self.overdue, pending))
        return pending

    async def find_similar(
        self, question: Question, mode: Mode, model_digest: bytes, max_error: float
    ) -> SimilarFound | str:
        """The answer to a similar question, or the reason why there is none: within SIMILAR_S.

        A node that does not answer in time, or has no semantic hits, is not asked for a second.
        """
        loop = asyncio.get_running_loop()
        if loop.time() < self._similar_not_before_s or len(self._similar) >= SIMILAR_LOOKUPS_MAX:
            return "busy"
        if not self._client.connected:
            return "no_node"
        self._listen()
        number = next(self._numbers) % (1 << 32)
        if not self._client.send(FindSimilar(number, question, mode, model_digest, max_error, round(SIMILAR_S * 1000))):
            return "no_node"
        answer = self._similar[number] = loop.create_future()
        found: SimilarFound | str
        try:
            async with asyncio.timeout(SIMILAR_S):
                found = await asyncio.shield(answer)
        except TimeoutError:
            self._hear(self._client.receive())  # a loop that was busy itself must not blame the node
            found = answer.result() if answer.done() else "late"
        finally:
            self._similar.pop(number, None)
        if found in ("late", "off"):
            self._similar_not_before_s = loop.time() + _USELESS_S
        return found

    def lead(self, key: RequestKey) -> None:
        """Tell the node that this process computes a request, and waits for no other process."""
        self._client.send(ClaimRequest(next(self._numbers) % (1 << 32), key, False))

    async def lead_or_wait(self, key: RequestKey, deadline_s: float) -> bool:
        """Whether this process should compute a request: False once another one of the host has ended it."""
        self._listen()
        number = next(self._numbers) % (1 << 32)
        if len(self._claims) >= RESPONSE_LOOKUPS_MAX or not self._client.send(ClaimRequest(number, key, True)):
            return True
        claim = self._claims[number] = _Claim()
        try:
            async with asyncio.timeout(HINT_S):
                if await claim.granted:
                    return True
            async with asyncio.timeout(deadline_s):
                await claim.over
        except TimeoutError:
            return True
        finally:
            del self._claims[number]
        return False

    def done(self, key: RequestKey) -> None:
        """This process has computed a request, or has stopped computing it."""
        self._client.send(RequestDone(key))

    def release(self, pending: Pending) -> None:
        """End a lookup without its answer, and tell the node; one that has ended is left alone."""
        if self._pending.pop(pending.number, None) is not None:
            self._client.send(ReleaseResponse(pending.number))
            pending.end(None)

    def _hint_overdue(self, pending: Pending) -> None:
        self._hear(self._client.receive())  # a loop that was busy itself must not blame the node
        if not pending.hint.done():
            self._silent = True
            pending.say_hint(False)

    def overdue(self, pending: Pending) -> None:
        """Its time is up."""
        self._hear(self._client.receive())
        if pending.number in self._pending and self._silent:
            # No message in all this time. Its lease shows whether it lives; until then it is asked seldom.
            self._not_before_s = asyncio.get_running_loop().time() + _USELESS_S
        self.release(pending)

    def _listen(self) -> None:
        """Read the node's messages as they arrive; lookups of an earlier session have ended."""
        self._client.listen(self._hear)
        if (epoch := self._client.epoch) != self._epoch:
            self._end_all()
            self._epoch = epoch

    def _hear(self, messages: Iterable[NodeMessage]) -> None:
        self._take(messages)
        if not self._client.connected or self._client.epoch != self._epoch:
            self._end_all()  # the node that knew of them is gone

    def _take(self, messages: Iterable[NodeMessage]) -> None:
        for message in messages:
            match message:
                case ResponseHint(number, hinted):
                    self._silent = False
                    if (pending := self._pending.get(number)) is not None:
                        if not hinted:
                            pending.raced_by = asyncio.get_running_loop().time() + RACE_S
                        pending.say_hint(hinted)
                case ResponseToTry(number):
                    if (pending := self._pending.get(number)) is not None:
                        pending.to_try(message)
                case ResponseFound(number):
                    self._silent = False
                    self._end(number, message)
                case ResponseNotFound(number, reason):
                    self._silent = reason in _USELESS
                    if self._silent:
                        self._not_before_s = asyncio.get_running_loop().time() + _USELESS_S
                    self._end(number, None)
                case SimilarFound(number) | SimilarNotFound(number):
                    answer = self._similar.get(number)
                    if answer is not None and not answer.done():
                        answer.set_result(message if isinstance(message, SimilarFound) else message.reason)
                case RequestClaimed(number, granted):
                    if (claim := self._claims.get(number)) is not None and not claim.granted.done():
                        claim.granted.set_result(granted)
                case ClaimEnded(number):
                    if (claim := self._claims.get(number)) is not None and not claim.over.done():
                        claim.over.set_result(None)
                case Rejected():
                    pass  # the client has logged it
                case _:
                    logger.debug("hyperspace node: unexpected %s", type(message).__name__)

    def _end(self, number: int, found: ResponseFound | None) -> None:
        if (pending := self._pending.pop(number, None)) is not None:
            pending.end(found)

    def _end_all(self) -> None:
        for claim in self._claims.values():
            if not claim.over.done():
                claim.over.set_result(None)
        for number in list(self._pending):
            self._end(number, None)
