"""A request of the cache to the application, on behalf of a client's request."""

import asyncio

from starlette.types import ASGIApp, Message, Scope

from ..core.records.limits import RESPONSE_BYTES_MAX
from .request_body import with_content_length


async def ask(app: ASGIApp, scope: Scope, body: bytes, gone: asyncio.Event) -> bytes | None:
    """The body of a 200 with at most RESPONSE_BYTES_MAX; None for any other answer. `gone`: it is not needed any more.

    The scope is that of the client's request, so the application sees the client.
    """
    requests: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    status = 0
    parts = bytearray()

    async def receive() -> Message:
        if requests:
            return requests.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        elif status == 200 and len(parts) <= RESPONSE_BYTES_MAX:
            parts.extend(message.get("body", b""))

    await app(with_content_length(scope, len(body)), receive, send)
    return bytes(parts) if status == 200 and len(parts) <= RESPONSE_BYTES_MAX else None
