"""The same request at another API server of this node: one of them computes, the others wait for its answer."""

import asyncio

from ...core.records.ids import RequestKey
from ..http_headers import forward_status
from ..large_bodies import Busy
from ..request_context import RequestContext
from ..stored_answer import StoredAnswer

_COMMIT_LOOKS, _COMMIT_LOOK_S = 20, 0.005  # the node commits within milliseconds, or is busy


class OtherServer:
    """The computation of another server."""

    def __init__(self, context: RequestContext, key: RequestKey) -> None:
        self._context = context
        self._key = key

    async def answer(self) -> StoredAnswer | None:
        """Its answer; None once this server leads.

        A stream does not wait: the other server's frames are not available here, and its end comes later than this
        server's own first frame.
        """
        context = self._context
        if context.facts.streams:
            context.cache.node.lead(self._key)
            return None
        if await context.cache.node.lead_or_wait(self._key, context.options.follow_deadline_s):
            return None
        if (answer := await self._committed()) is None:
            context.cache.node.lead(self._key)
        return answer

    async def _committed(self) -> StoredAnswer | None:
        """The answer that another API server has just sent to the node, once the database has it."""
        context = self._context
        for _ in range(_COMMIT_LOOKS):
            now_ms = context.now_ms()
            if (entry := await context.entry(self._key, now_ms)) is not None:
                try:
                    answer = await context.rendered(entry, context.facts.wants_usage, now_ms, "exact")
                except Busy:
                    return None
                return answer and answer.with_status(forward_status("uri-miss", collapsed=True))
            await asyncio.sleep(_COMMIT_LOOK_S)
        return None
