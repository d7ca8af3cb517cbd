"""Answers that this node has: to the request itself, or to its question in other words."""

import random

from ...core.local.similar_messages import Question
from ...core.records.ids import RequestKey
from ...core.response.similar.guards import Mode, eligible
from ...core.response.similar.match_error import CHECK_EVERY
from ...response_db import StoredResponse
from .. import checks
from ..ready_answer import Ready
from ..request_context import RequestContext


class Stored:
    """An entry of the database, or on its way there."""

    def __init__(self, context: RequestContext) -> None:
        self._context = context

    async def find(self, key: RequestKey) -> tuple[bool, Ready | None]:
        """Whether there is an entry, and the answer to the request if it is usable.

        The entry is not kept: a request that is computed may take long.
        """
        context = self._context
        now_ms = context.now_ms()
        entry = await context.entry(key, now_ms)
        if entry is None or context.facts.wishes.no_cache:
            return entry is not None, None
        return True, await self.answer(key, entry, now_ms)

    async def answer(self, key: RequestKey, entry: StoredResponse, now_ms: int, detail: str = "exact") -> Ready | None:
        """The entry as the request wants it; None if it is not usable."""
        context = self._context
        answer = await context.rendered(entry, context.facts.wants_usage, now_ms, detail)
        if answer is None:
            return None
        context.count_lookup("hit", "local" if detail == "exact" else detail.partition(";")[0])
        context.touch(key)
        return context.ready(answer, context.cache.metrics.hit_seconds)


class Similar:
    """The answer to another wording of the question."""

    def __init__(self, context: RequestContext, question: Question, mode: Mode) -> None:
        self._context = context
        self._question = question
        self._mode = mode

    async def answer(self) -> Ready | checks.ToCompare | None:
        """It, or a match that is only to be compared; None if there is neither."""
        context, question = self._context, self._question
        lookup, options = context.cache.lookup, context.options
        if lookup is None or eligible(question.text) is not None:
            return None
        if options.max_error >= 1:  # otherwise the node decides which matches may be served
            same = await lookup.find_canonical(question.canonical_key, context.now_ms())
            checked = random.randrange(CHECK_EVERY) == 0
            if same is not None and (answer := await self._replay(same, 1.0, "canonical", checked)) is not None:
                return answer
        digest = options.model_digest() or b""
        similar = await context.cache.node.find_similar(question, self._mode, digest, options.max_error)
        if isinstance(similar, str):
            context.cache.metrics.similar.labels(similar).inc()
            return None
        key = RequestKey(similar.request_key)
        if similar.verdict == "compute":
            context.cache.metrics.similar.labels("doubted").inc()
            entry = await context.entry(key, context.now_ms())
            return None if entry is None else await self._match(key, similar.similarity, entry)
        context.cache.metrics.similar.labels("found").inc()
        detail = f"semantic; similarity={similar.similarity:.3f}"
        checked = similar.verdict == "check"
        return await self._replay(key, similar.similarity, detail, checked)

    async def _replay(self, key: RequestKey, similarity: float, detail: str, checked: bool) -> Ready | None:
        """The answer to a similar question; `checked`: compute one as well."""
        context = self._context
        now_ms = context.now_ms()
        entry = await context.entry(key, now_ms)
        answer = None if entry is None else await Stored(context).answer(key, entry, now_ms, detail)
        if entry is None or answer is None:
            return None
        if checked and not context.facts.wishes.only_if_cached:
            match = await self._match(key, similarity, entry)
            context.cache.checks.start(checks.compute_too(context, match))
        return answer

    async def _match(self, key: RequestKey, similarity: float, entry: StoredResponse) -> checks.ToCompare:
        said = await checks.text_of(self._context, entry.body)
        return checks.ToCompare(key, self._question, similarity, self._mode, said)
