"""The two ways without an answer from the cache: the application answers, or the client gets an error."""

import json

from ...contained import report_error
from ..http_headers import RawHeaders
from ..request_body import with_content_length
from ..request_context import RequestContext
from ..stored_answer import json_headers


class Bypass:
    """The request bypasses the cache."""

    def __init__(self, context: RequestContext) -> None:
        self._context = context

    async def answer(self, why: str, reason: str) -> None:
        """Have vLLM answer, with the scope as the only change."""
        context, facts = self._context, self._context.facts
        try:
            body = await context.engine_body(add_usage=False)
        except Exception:
            report_error("the response cache: a scope is not signed")
            body = facts.raw
        send = context.cache.passing(context.client.send, why, reason)
        await context.engine(with_content_length(facts.scope, len(body)), context.client.again(body), send)


class NotCached:
    """`only-if-cached`, and there is no stored answer."""

    def __init__(self, context: RequestContext) -> None:
        self._context = context

    async def answer(self, why: str) -> None:
        """Answer with the status of RFC 9111 §5.2.1.7, in the shape of vLLM's errors."""
        self._context.count_lookup("miss", "only-if-cached")
        error = {
            "message": "The request asked for a cached response only, and there is none.",
            "type": "GatewayTimeoutError",
            "param": None,
            "code": 504,
        }
        body = json.dumps({"error": error}).encode()
        headers: RawHeaders = [*json_headers(body), (b"cache-status", f"hyperspace; detail={why}".encode())]
        await self._context.client.send({"type": "http.response.start", "status": 504, "headers": headers})
        await self._context.client.send({"type": "http.response.body", "body": body})
