"""One request to the response cache: which way it takes to its answer (middleware.py lists them)."""

from functools import partial

from ..contained import report_error
from ..core.response.request_key import Uncacheable
from . import checks
from .embed_inputs import Inputs, NoneStored, PassedBy
from .large_bodies import Busy
from .naming import Names
from .ready_answer import Ready
from .request_context import RequestContext
from .states.from_engine import Computed, Miss
from .states.from_others import Awaited
from .states.from_store import Similar, Stored
from .states.refusals import Bypass, NotCached
from .stored_answer import StoredAnswer


class Exchange:
    """One request whose body has been read."""

    def __init__(self, context: RequestContext) -> None:
        self._context = context

    async def answer(self) -> Ready | None:
        """Answer the request in any case: an error of Hyperspace is a bypass. What is returned has to be sent."""
        context = self._context
        try:
            return await self._choose()
        except Busy:  # there was no time to read the request
            if context.client.committed:
                raise
            if context.facts.wishes.only_if_cached:
                await NotCached(context).answer("busy")
            else:
                await Bypass(context).answer("bypass", "busy")
        except Exception:
            if context.client.committed:
                raise
            report_error("the response cache: a request passes by it")
            await Bypass(context).answer("bypass", "error")
        return None

    async def _choose(self) -> Ready | None:
        context, wishes = self._context, self._context.facts.wishes
        names = context.naming.names()
        key = names if isinstance(names, Uncacheable) else await context.read(partial(context.naming.key, names))
        if isinstance(names, Uncacheable) or isinstance(key, Uncacheable) or wishes.no_store:
            reason = key.reason if isinstance(key, Uncacheable) else "no-store"
            if wishes.only_if_cached and context.cache.lookup is not None:
                await NotCached(context).answer(reason)
            else:
                await Bypass(context).answer("request" if wishes.no_store else "bypass", reason)
            return None
        if context.facts.endpoint == "embeddings":
            return await self._choose_inputs(names)
        why, kept = "request" if wishes.no_cache else "uri-miss", False
        if not wishes.no_cache or context.facts.first_sample_stays:
            exists, answer = await Stored(context).find(key)
            if answer is not None:
                return answer
            kept = context.facts.first_sample_stays and exists
            if exists and not wishes.no_cache:
                if await context.is_refused():
                    await Bypass(context).answer("bypass", "refused")
                    return None
                why = "stale"
        question = await context.read(partial(context.naming.question, names)) if context.facts.mode else None
        doubted: checks.ToCompare | None = None
        if why == "uri-miss" and question is not None and context.facts.mode is not None:
            found = await Similar(context, question, context.facts.mode).answer()
            if isinstance(found, Ready):
                return found
            doubted = found
        if wishes.only_if_cached:
            return await Awaited(context, key, question).answer(why)
        miss = Miss(key, names, why, kept, question, doubted)
        return await Computed(context, miss).answer()

    async def _choose_inputs(self, names: Names) -> Ready | None:
        context = self._context
        match await Inputs(context, names).answer():
            case PassedBy(why, reason):
                await Bypass(context).answer(why, reason)
            case NoneStored(why):
                await NotCached(context).answer(why)
            case StoredAnswer() as answer:
                return context.ready(answer)
        return None
