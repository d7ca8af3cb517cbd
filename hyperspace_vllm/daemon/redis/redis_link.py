"""A fleet's Redis, which may be away or absent: each command has a deadline, each reply a bound.

After a failure no command is sent for a while.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable
from typing import Any, TypeVar

from redis._parsers import _AsyncRESP2Parser
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import InvalidResponse, RedisError

from ...core.records.limits import REDIS_REPLY_BYTES_MAX, REDIS_REPLY_ITEMS_MAX

READ_S = 0.1  # connecting included
WRITE_S = 2.0
BACKOFF_S = 0.25  # after a failure, doubled for each in a row
BACKOFF_S_MAX = 10.0
CONNECTIONS_MAX = 16
# What a command raises when Redis is away, or sends an invalid answer: redis-py parses it with int() and recursion.
AWAY = (RedisError, OSError, ValueError, RecursionError)

log = logging.getLogger(__name__)

T = TypeVar("T")

if not hasattr(_AsyncRESP2Parser, "_readline"):
    raise ImportError("redis-py has changed: its replies can't be bounded")


class BoundedParser(_AsyncRESP2Parser):
    """redis-py's parser, which by itself accepts any length that a reply announces.

    Lengths are in lines: those of a bulk string and of an array, nested ones too. asyncio bounds the line itself.
    """

    async def read_response(self, disable_decoding: bool = False) -> Any:
        """One command's reply; InvalidResponse if it has more than REDIS_REPLY_BYTES_MAX or REDIS_REPLY_ITEMS_MAX."""
        self._bytes_left = REDIS_REPLY_BYTES_MAX
        self._items_left = REDIS_REPLY_ITEMS_MAX
        return await super().read_response(disable_decoding)

    async def _readline(self) -> bytes:
        line: bytes = await super()._readline()
        if line[:1] == b"$":
            self._bytes_left -= max(int(line[1:]), 0)
        elif line[:1] == b"*":
            self._items_left -= max(int(line[1:]), 0)
        self._bytes_left -= len(line)
        if self._bytes_left < 0 or self._items_left < 0:
            raise InvalidResponse("a reply that is larger than any that was asked for")
        return line


class RedisLink:
    """Connections to the Redis at `url`, or `ValueError`; `redis` makes the commands that `within` awaits."""

    def __init__(self, url: str) -> None:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS_MAX,
            timeout=READ_S,
            socket_connect_timeout=READ_S,
            socket_timeout=WRITE_S,
            protocol=2,  # every Redis speaks it
            parser_class=BoundedParser,
            retry=Retry(NoBackoff(), 0),  # the backoff is our own
        )
        try:
            pool.connection_class(**pool.connection_kwargs)  # it connects later
        except (TypeError, RedisError) as error:  # an unknown option in the URL, or an invalid value
            raise ValueError(str(error)) from error
        self.redis = Redis.from_pool(pool)
        self._commands: set[asyncio.Future[Any]] = set()  # in progress, abandoned ones included
        self._failures = 0
        self._away_until_s = 0.0  # the loop's time

    @property
    def failing(self) -> bool:
        """Whether the last command failed."""
        return self._failures > 0

    @property
    def away_s(self) -> float:
        """How long no command is sent, because one has just failed; at most 0 if commands are sent."""
        return self._away_until_s - asyncio.get_running_loop().time()

    async def within(self, timeout_s: float, answer: Awaitable[T]) -> T:
        """The result of the command `answer` in time; otherwise it raises one of `AWAY`, and `away_s` begins."""
        try:
            value = await self._by_deadline(timeout_s, answer)
        except AWAY as error:
            self._on_failure(type(error).__name__)
            raise
        except Exception as error:  # redis-py casts a reply without looking at its type
            self._on_failure(type(error).__name__)
            raise InvalidResponse(repr(error)) from error
        if self._failures:
            log.info("Redis is back")
        self._failures = 0
        self._away_until_s = 0.0
        return value

    async def close(self) -> None:
        """Close the connections; commands in progress are cancelled."""
        for command in self._commands:
            command.cancel()
        if self._commands:
            await asyncio.wait(self._commands, timeout=WRITE_S)
        with contextlib.suppress(RedisError, OSError):
            await self.redis.aclose()
            await self.redis.connection_pool.disconnect()

    async def _by_deadline(self, timeout_s: float, answer: Awaitable[T]) -> T:
        # Not asyncio.timeout: redis 8.1 sometimes swallows the cancellation of a command that is still connecting,
        # which then lasts until its socket times out.
        command = asyncio.ensure_future(answer)
        self._commands.add(command)
        command.add_done_callback(self._on_ended)
        try:
            await asyncio.wait([command], timeout=timeout_s)
            if not command.done():
                raise TimeoutError
            return command.result()
        finally:
            command.cancel()

    def _on_ended(self, command: asyncio.Future[T]) -> None:
        self._commands.discard(command)
        if not command.cancelled():
            command.exception()  # its caller may have gone

    def _on_failure(self, reason: str) -> None:
        if self.away_s > 0:
            return  # another command has just reported it
        if not self._failures:
            log.warning("Redis is away (%s): whatever it would be asked is a miss", reason)
        pause_s = min(BACKOFF_S * 2.0**self._failures, BACKOFF_S_MAX)
        self._failures = min(self._failures + 1, 16)
        self._away_until_s = asyncio.get_running_loop().time() + pause_s
