"""Answers from other nodes: requested first, or while vLLM computes (network_race.py)."""

import json
from collections.abc import Callable
from functools import partial

from starlette.types import ASGIApp

from ...contained import contained, report_error
from ...core.local.response_cache_messages import PurgeResponses, ResponseFound, ResponseToTry
from ...core.local.similar_messages import Question, RememberQuestion
from ...core.records.ids import RequestKey
from ...core.response.audit import plain_answer, prompt_of
from ...response_db import StoredResponse
from ..large_bodies import Busy
from ..network_race import HITS, NetworkRace, Outcome
from ..ready_answer import Ready
from ..request_context import RequestContext
from ..stored_answer import StoredAnswer, entry_of, origin_header
from .refusals import NotCached


class OtherNodes:
    """A lookup in other nodes for one request."""

    def __init__(self, context: RequestContext, key: RequestKey, question: Question | None) -> None:
        self._context = context
        self._key = key
        self._question = question

    def ask(
        self,
        engine: ASGIApp,
        usage: bool,
        decided: Callable[[Outcome], None] = lambda outcome: None,
        waits: bool = False,
    ) -> NetworkRace | None:
        """Ask; the returned race of their answer against the engine's runs once.

        None if the request must not leave this node, or wants to be computed, or there is no node to ask.
        """
        context, options, facts = self._context, self._context.options, self._context.facts
        digest, deadline_s = options.model_digest(), options.network_deadline_s
        if facts.reach.scope == "private" or facts.wishes.no_cache or digest is None or deadline_s <= 0:
            return None
        lookup = context.cache.node.start(self._key, digest, deadline_s, self._try)
        if lookup is None:
            return None

        def count(outcome: Outcome) -> None:
            context.cache.metrics.network.labels(outcome).inc()
            if outcome in HITS:
                context.count_lookup("hit", "network")
            decided(outcome)

        return NetworkRace(engine, lookup, partial(self._found, usage), count, context.cache.sending, waits)

    async def _found(self, usage: bool, found: ResponseFound) -> StoredAnswer | None:
        """The answer from another node's response, if it is valid and fresh enough; after an error there is none."""
        context = self._context
        try:
            now_ms = context.now_ms()
            size = len(found.body) + len(context.facts.raw)
            entry = await context.read_found(size, partial(self._judged, found, now_ms))
            if entry is None:
                context.tell_node(PurgeResponses((self._key,)))  # the node, which can't tell, has stored it
                return None
            answer = await context.rendered(entry, usage, now_ms, "peer")
        except Busy:
            return None
        except Exception:
            report_error("the response cache: another node's answer")
            return None
        if answer is not None:
            answer.headers.append(origin_header(found))
            context.cache.recent.add(self._key, entry, now_ms)
            self._have_audited(entry.body, entry.proof, found.suspect)
            if self._question is not None:
                context.tell_node(RememberQuestion(self._key, self._question))
        return answer

    def _judged(self, found: ResponseFound, now_ms: int) -> StoredResponse | None:
        facts = self._context.facts
        entry = entry_of(found, facts.endpoint, facts.body, now_ms, self._context.options.ttl_ms)
        return None if entry is None or self._cannot_be_audited(entry) else entry

    def _cannot_be_audited(self, entry: StoredResponse) -> bool:
        """Whether this server's model would never give this answer: then an audit is impossible, and not needed."""
        facts = self._context.facts
        if not self._context.options.audits or prompt_of(facts.endpoint, facts.body) is None:
            return False
        return plain_answer(facts.endpoint, json.loads(entry.body)) is None

    @contained()
    def _try(self, message: ResponseToTry) -> None:
        """Audit the answer of an untrusted signer."""
        self._have_audited(message.body, message.proof, True)

    def _have_audited(self, body: bytes, proof: bytes, surely: bool) -> None:
        context, audits = self._context, self._context.cache.audits
        if context.options.audits and not context.facts.wishes.only_if_cached and audits.draw(surely):
            audits.start(audits.audit(context, self._key, body, proof))


class Awaited:
    """`only-if-cached`: other nodes are waited for, and nothing is computed."""

    def __init__(self, context: RequestContext, key: RequestKey, question: Question | None) -> None:
        self._context = context
        self._others = OtherNodes(context, key, question)

    async def answer(self, why: str) -> Ready | None:
        """Their response; None once the client knows that there is none."""
        context = self._context

        async def refuse(*_: object) -> None:
            await NotCached(context).answer(why)

        race = self._others.ask(refuse, context.facts.wants_usage, waits=True)
        if race is None:
            await NotCached(context).answer(why)
            return None
        await race(context.facts.scope, context.client.again(context.facts.raw), context.client.send)
        answer, seconds = race.answer, context.cache.metrics.network_hit_seconds
        return None if answer is None else context.ready(answer, seconds)
