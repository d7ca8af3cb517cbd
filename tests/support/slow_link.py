"""A TCP link on loopback whose speed a test controls: throttled, frozen or cut while bytes are in flight."""

import asyncio
import socket
import threading
import time
from contextlib import suppress

READ_BYTES = 16 * 1024  # at 1 MB/s a piece each 16 ms: the receiver sees a slow link, not one that stalls
BUFFER_BYTES = 64 * 1024  # the kernel's, towards the target: bytes in it still arrive after the target has died


class SlowLink:
    """Forwards connections on `port` to `target_port`; a context manager. Its methods may be called from any thread."""

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.rate_bytes_s = 0  # from the target to the client; 0: unlimited
        self.delivered_bytes = 0
        self.last_delivery_s = 0.0  # monotonic
        self._loop = asyncio.new_event_loop()
        self._open = asyncio.Event()
        self._open.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        server = asyncio.start_server(self._accept, "127.0.0.1", 0)
        self._server = self._loop.run_until_complete(server)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> "SlowLink":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def freeze(self) -> None:
        """Forward nothing more; connections stay open and new ones are accepted."""
        self._loop.call_soon_threadsafe(self._open.clear)

    def thaw(self) -> None:
        """Forward again, first the held-back bytes."""
        self._loop.call_soon_threadsafe(self._open.set)

    def cut(self) -> None:
        """Reset every connection; new ones are accepted."""
        self._loop.call_soon_threadsafe(self._abort)

    def _abort(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _end(self) -> None:
        self._server.close()
        self._abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target = socket.socket()
        target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        target.setblocking(False)
        try:
            await self._loop.sock_connect(target, ("127.0.0.1", self.target_port))
        except OSError:
            target.close()
            writer.transport.abort()
            return
        there_reader, there_writer = await asyncio.open_connection(sock=target)
        self._writers |= {writer, there_writer}
        for pump in (self._pump(reader, there_writer, inward=False), self._pump(there_reader, writer, inward=True)):
            task = self._loop.create_task(pump)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, inward: bool) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(READ_BYTES):
                await self._open.wait()
                if inward and self.rate_bytes_s:
                    await asyncio.sleep(len(data) / self.rate_bytes_s)
                    await self._open.wait()
                writer.write(data)
                await writer.drain()
                if inward:
                    self.delivered_bytes += len(data)
                    self.last_delivery_s = time.monotonic()
        # As on a real link: bytes that reached it before the end are delivered, then the connection ends.
        self._writers.discard(writer)
        writer.close()
