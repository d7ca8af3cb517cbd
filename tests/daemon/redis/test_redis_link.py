"""What a server that only poses as Redis can make a node read, whichever command it answers so."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from redis.exceptions import InvalidResponse

from hyperspace_vllm.core.records.ids import PeerId, network_id
from hyperspace_vllm.core.records.limits import REDIS_REPLY_BYTES_MAX, REDIS_REPLY_ITEMS_MAX, MiB
from hyperspace_vllm.daemon.redis.redis_link import AWAY, BoundedParser, RedisLink
from hyperspace_vllm.daemon.redis.redis_registry import RedisRegistry
from tests.support.until import until_async


async def parse(data: bytes) -> object:
    """What the parser makes of a reply that has come whole."""
    parser = BoundedParser(65536)
    parser._stream = asyncio.StreamReader()
    parser._stream.feed_data(data)
    parser._stream.feed_eof()
    parser._connected = True
    return await parser.read_response(disable_decoding=True)


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        (b"+OK\r\n", b"OK"),
        (b":-2\r\n", -2),
        (b"$-1\r\n", None),
        (b"*-1\r\n", None),
        (b"$0\r\n\r\n", b""),
        (b"*2\r\n$1\r\na\r\n:1\r\n", [b"a", 1]),
        (b"$%d\r\n%b\r\n" % (MiB, bytes(MiB)), bytes(MiB)),
    ],
)
async def test_what_a_redis_says_is_read_as_before(reply: bytes, value: object) -> None:
    assert await parse(reply) == value


@pytest.mark.parametrize(
    "reply",
    [
        b"$%d\r\n" % (REDIS_REPLY_BYTES_MAX + 1),
        b"$8000000000\r\n",
        b"*%d\r\n" % (REDIS_REPLY_ITEMS_MAX + 1) + b":1\r\n" * (REDIS_REPLY_ITEMS_MAX + 1),
        b"*1\r\n" * (REDIS_REPLY_ITEMS_MAX + 1) + b":1\r\n",
        b"*3\r\n" + b"$%d\r\n%b\r\n" % (REDIS_REPLY_BYTES_MAX // 2, bytes(REDIS_REPLY_BYTES_MAX // 2)) * 3,
        b"*2\r\n$-%d\r\n$%d\r\n" % (10**12, REDIS_REPLY_BYTES_MAX + 1),
        b"+" + b"x" * 100_000 + b"\r\n",
        b"$" + b"9" * 10_000 + b"\r\n",
    ],
)
async def test_a_reply_beyond_a_bound_is_an_error_before_it_is_read(reply: bytes) -> None:
    with pytest.raises((InvalidResponse, ValueError)):
        await parse(reply)


Ask = Callable[[Any], Awaitable[object]]
COMMANDS: dict[str, Ask] = {
    "GETRANGE": lambda redis: redis.execute_command("GETRANGE", "key", 0, 100),
    "PTTL": lambda redis: redis.execute_command("PTTL", "key"),
    "SET": lambda redis: redis.set("key", b"", nx=True, px=1_000),
    "DEL": lambda redis: redis.execute_command("DEL", "key"),
    "ZREVRANGEBYSCORE": lambda redis: redis.zrevrangebyscore("key", 10, 1, start=0, num=64),
    "ZADD": lambda redis: redis.pipeline(transaction=False).zadd("key", {"peer": 1}).execute(),
    "AUTH": lambda redis: redis.execute_command("PTTL", "key"),  # before the first command
}
ENDLESS = {
    "bulk": (b"$8000000000\r\n", bytes(1 << 16)),
    "array": (b"*100000000\r\n", b":1\r\n" * (1 << 14)),
    "nested": (b"", b"*1\r\n" * (1 << 14)),
    "line": (b"+", b"x" * (1 << 16)),
    "error": (b"-ERR ", b"x" * (1 << 16)),
}


class Poser:
    """Answers every command with OK but one, and that one without an end; counts what the node takes of it."""

    def __init__(self, command: str, head: bytes, more: bytes) -> None:
        self._command, self._head, self._more = command.encode(), head, more
        self.taken_bytes = 0
        self.url = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with await asyncio.start_server(self._serve, "127.0.0.1", 0) as listener:
            self.url = f"redis://:password@127.0.0.1:{listener.sockets[0].getsockname()[1]}/0"
            yield

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while asked := await reader.read(65536):
                if self._command not in asked:
                    writer.write(b"+OK\r\n" * asked.count(b"*"))
                    continue
                writer.write(self._head)
                while True:
                    writer.write(self._more)
                    await writer.drain()
                    self.taken_bytes += len(self._more)
        writer.close()


@pytest.mark.io
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ENDLESS)
async def test_a_reply_without_an_end_is_cut_off_whatever_was_asked(command: str, kind: str) -> None:
    poser = Poser(command, *ENDLESS[kind])
    async with poser.running():
        link = RedisLink(poser.url)
        began = time.monotonic()
        with pytest.raises(AWAY):
            await link.within(5.0, COMMANDS[command](link.redis))
        assert time.monotonic() - began < 4  # it doesn't last until the deadline
        await link.close()
    assert poser.taken_bytes < 16 * MiB  # what lies in the kernel's buffers


class Odd:
    """Answers every command with `reply`, or as Redis does once that is None; the names of what it was asked."""

    def __init__(self, reply: bytes) -> None:
        self.reply: bytes | None = reply
        self.asked: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while count := (await reader.readline())[1:]:
                words = [await reader.readexactly(int((await reader.readline())[1:]) + 2) for _ in range(int(count))]
                self.asked.append(words[0].strip().upper())
                is_handshake = self.asked[-1] in (b"CLIENT", b"SELECT")
                right = (
                    b"*0\r\n" if self.asked[-1] == b"ZREVRANGEBYSCORE" else b"+OK\r\n" if is_handshake else b":1\r\n"
                )
                writer.write(right if is_handshake or self.reply is None else self.reply)
        writer.close()


@pytest.mark.io
@pytest.mark.parametrize(
    "reply",
    [
        b":5\r\n",
        b"$3\r\nfoo\r\n",
        b"$-1\r\n",
        b"*-1\r\n",
        b"*2\r\n$1\r\na\r\n:1\r\n",
        b"*1\r\n*1\r\n*0\r\n",
        b"-ERR\r\n",
    ],
)
async def test_replies_of_another_type_are_misses_and_what_was_to_be_written_is_written_once_they_end(
    reply: bytes,
) -> None:
    odd, id = Odd(reply), bytes(32)
    async with await asyncio.start_server(odd.serve, "127.0.0.1", 0) as listener:
        url = f"redis://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        registry = RedisRegistry(url, network_id("test"), PeerId("peer"), lambda: 1)
        registry.note_stored(id, 1_000)
        await until_async(lambda: bool(odd.asked))
        for _ in range(5):
            assert await registry.providers(id) == ()
        odd.reply = None
        await until_async(lambda: b"ZADD" in odd.asked and not registry._queue)
        await registry.close()
