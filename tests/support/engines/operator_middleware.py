"""A middleware as an operator would add with `--middleware`: it must see hits as it sees misses."""

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response


async def stamp(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """Mark every response."""
    response = await call_next(request)
    response.headers["X-Operator"] = "was here"
    return response
