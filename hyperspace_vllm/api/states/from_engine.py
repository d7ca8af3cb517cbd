"""Answers that vLLM computes, or is computing for another request."""

import json
from dataclasses import dataclass
from functools import partial
from typing import Literal

from starlette.types import ASGIApp, Receive, Scope, Send

from ...core.local.similar_messages import Question
from ...core.records.ids import RequestKey
from ...core.response.admission import streams_completely
from .. import aborts, checks
from ..coalesce import Flight, Laggard, LeaderFailed
from ..http_headers import forward_status
from ..naming import Names
from ..network_race import HITS, NetworkRace, Outcome
from ..ready_answer import Ready
from ..relay import Relay, leaving_on_disconnect
from ..request_body import with_content_length
from ..request_context import RequestContext
from ..stored_answer import StoredAnswer
from ..streams.frames import collector
from .computed_answer import ComputedAnswer
from .from_others import OtherNodes
from .from_server import OtherServer
from .from_store import Stored
from .refusals import Bypass

_FOLLOWED_MAX = 2  # computations of others that may fail a request before it is computed alone


@dataclass(frozen=True, slots=True)
class Miss:
    """A request without a stored answer, and the reason.

    `kept`: the existing entry stays. `doubted` is a stored answer that is not served but compared.
    """

    key: RequestKey
    names: Names
    why: str
    kept: bool
    question: Question | None
    doubted: checks.ToCompare | None


@dataclass(frozen=True, slots=True)
class Plan:
    """How a miss is computed: the key that requests share to join it, and the request to the engine."""

    shared: object
    body: bytes
    storing: bool
    asks_usage: bool


class Joined:
    """A computation that another request has begun."""

    def __init__(self, context: RequestContext, why: str) -> None:
        self._context = context
        self._why = why

    async def answer(self, flight: Flight) -> Ready | Literal["failed"] | None:
        """Read it; None if the client has it, "failed", with nothing sent, if the request has to be computed."""
        context, facts, options = self._context, self._context.facts, self._context.options
        strips_usage = facts.chooses_usage and not facts.wants_usage
        answer: StoredAnswer | None = None
        follower = Relay(flight.join(), context.client.send, forward_status(self._why, collapsed=True), strips_usage)
        try:
            async with leaving_on_disconnect(context.client.receive, follower.reader):
                answer = await follower.follow(options.follow_deadline_s, options.stalled_stream_s, facts.own_ids())
            if answer is not None and not context.has_room(answer):
                raise LeaderFailed
        except LeaderFailed:
            if not follower.started:
                flight.close()  # the first follower that it fails leads the others
                return "failed"
            if flight.error is not None:
                raise flight.error from None  # as for the leader: the server ends the connection
        except Laggard:
            pass  # the server ends the connection of a response that is not complete
        context.count_lookup(*(("hit", "network") if flight.from_cache else ("collapsed", self._why)))
        return None if answer is None else context.ready(answer)


class Led:
    """A computation that other requests may join, in a race with other nodes, or by another API server of this node."""

    def __init__(self, context: RequestContext, miss: Miss, plan: Plan) -> None:
        self._context = context
        self._miss = miss
        self._plan = plan
        self._flight: Flight | None = None
        self._race: NetworkRace | None = None
        self._leased = False

    async def answer(self, asks_others: bool) -> Ready | None:
        """Have vLLM answer, unless other nodes are faster; `asks_others`: they have not been asked.

        None if the client has the answer.
        """
        context, facts, miss, plan = self._context, self._context.facts, self._miss, self._plan
        if asks_others:
            others = OtherNodes(context, miss.key, miss.question)
            self._race = others.ask(context.engine, plan.asks_usage, self._decided)
            alone = plan.shared is None or any(facts.served_by())
            self._leased = plan.storing and not alone and context.options.client.api_servers > 1
        if self._race is None and not self._leased:
            context.count_lookup("miss", miss.why if asks_others else "leader-failed")
        # Everything that may raise comes before the flight is open: requests that join it would wait for ever.
        taking = collector(facts.endpoint) if plan.storing else None
        flight = self._flight = context.cache.flights.open(plan.shared, taking)
        adds_usage = plan.asks_usage and not facts.wants_usage
        leader = Relay(flight.join(), context.client.send, forward_status(miss.why, stored=plan.storing), adds_usage)
        abort = aborts.watch()
        if plan.storing:
            end = ComputedAnswer(context, miss.key, miss.names, miss.question, miss.doubted, abort)
            flight.on_end = partial(self._end, end, flight)
        app: ASGIApp = self._engine if self._leased else self._race or context.engine
        flight.start(app, with_content_length(facts.scope, len(plan.body)), plan.body)
        answer: StoredAnswer | None = None
        try:
            async with leaving_on_disconnect(context.client.receive, leader.reader):
                answer = await leader.lead(forward_status(miss.why))
        except LeaderFailed:
            if flight.error is not None:
                raise flight.error from None
        except Laggard:
            pass
        seconds = context.cache.metrics.network_hit_seconds if self._race and self._race.outcome in HITS else None
        if answer is not None:
            return context.ready(answer, seconds)
        if seconds is not None:
            seconds.observe(context.seconds())
        return None

    def _decided(self, outcome: Outcome) -> None:
        if outcome not in HITS:
            self._context.count_lookup("miss", self._miss.why)
        elif self._flight is not None:
            self._flight.from_cache = True  # the node stores it by itself

    async def _engine(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application, unless another API server of the node computes the same: then that one's answer."""
        context = self._context
        answer = await OtherServer(context, self._miss.key).answer()
        if answer is not None and self._flight is not None:
            self._flight.from_cache = True
            context.count_lookup("collapsed", self._miss.why)
            for message in answer.whole(context.cache.sending):
                await send(message)
            return
        if self._race is None:
            context.count_lookup("miss", self._miss.why)
        await (self._race or context.engine)(scope, receive, send)

    async def _end(self, answer: ComputedAnswer, flight: Flight) -> None:
        try:
            await answer.end(flight)
        finally:
            if self._leased:
                self._context.cache.node.done(self._miss.key)


class Computed:
    """The answer of a computation, this request's or another's."""

    def __init__(self, context: RequestContext, miss: Miss) -> None:
        self._context = context
        self._miss = miss

    async def answer(self) -> Ready | None:
        """Join a computation that is under way, or begin one; None if the client has the answer."""
        context, miss = self._context, self._miss
        flights, plan = context.cache.flights, await self._plan()
        failed = 0
        while failed < _FOLLOWED_MAX and flights.find(plan.shared) is not None:
            if await context.is_refused():
                await Bypass(context).answer("bypass", "refused")
                return None
            flight = flights.find(plan.shared)  # it may have ended meanwhile
            if flight is not None and (joined := await Joined(context, miss.why).answer(flight)) != "failed":
                return joined
            failed += 1
            _, stored = await Stored(context).find(miss.key)
            if stored is not None:
                return stored  # of the followers that it has failed before
        return await Led(context, miss, plan).answer(asks_others=not failed)  # after a failure they were asked

    async def _plan(self) -> Plan:
        context, facts, miss = self._context, self._context.facts, self._miss
        complete = not facts.streams or (context.options.store_streams and streams_completely(facts.body))
        storing = complete and context.has_node and not miss.kept
        # Usage is asked for on the client's behalf, and taken out again: without it the answer could only be streamed.
        asks_usage = facts.wants_usage or (facts.chooses_usage and storing)
        # The answer may be a stored response of a certain age, so only requests that accept that age share it.
        freshness = (facts.wishes.max_age_s, facts.wishes.min_fresh_s)
        repeated = await context.read(partial(json.dumps, facts.repeated)) if facts.repeated else ""
        same = (miss.key, facts.streams, asks_usage, freshness, repeated, facts.served_by())
        # Before a flight is looked for: nothing is waited for until the next one is open.
        body = await context.engine_body(asks_usage and not facts.wants_usage)
        return Plan(None if facts.wishes.no_cache else same, body, storing, asks_usage)
