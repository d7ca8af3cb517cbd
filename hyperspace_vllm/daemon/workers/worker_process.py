"""A process of the node's own that answers one request at a time: its start, its deadlines and its end.

Not multiprocessing: its spawn re-imports the node's main module, and frames on two pipes (worker_frames.py) are shorter
than its restart handling. A process that dies, or takes too long over a request, is killed and its request lost; the
next `start` begins a new one. One that does not start is tried again after a pause, which doubles.

The caller decides the order of requests, and whether a process is started before the first of them.
"""

import asyncio
import contextlib
import logging
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from dataclasses import dataclass

from .worker_frames import LENGTH_BYTES, READY, framed

RESTART_S = 2.0
RESTART_S_MAX = 60.0

log = logging.getLogger(__name__)


class WorkerLost(Exception):
    """The process does not start, or ended over a request."""


@dataclass(frozen=True, slots=True)
class WorkerProgram:
    """The program of the process, and its bounds.

    `start_s` until it is ready, `job_s` for any request. `without` names what fails while it does not start.
    """

    module: str
    name: str
    start_s: float
    job_s: float
    reply_bytes_max: int
    without: str


def restart_pause_s(failures: int) -> float:
    """The pause before the next start, after so many in a row that failed: without a library there is no hurry."""
    doublings = min(max(failures - 1, 0), 100)  # a float has room for a thousand
    return min(RESTART_S * 2.0**doublings, RESTART_S_MAX)


class WorkerProcess:
    """At most one process of a program, at a niceness of at least `nice`. Its methods but `kill` never run together."""

    def __init__(self, program: WorkerProgram, nice: int) -> None:
        self._program = program
        self._nice = nice
        self._process: Process | None = None
        self._is_ready = False
        self._failures = 0
        self._start_at_s = 0.0  # monotonic; not before

    @property
    def pid(self) -> int | None:
        """Of the process, while it runs."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    @property
    def is_ready(self) -> bool:
        """Whether it runs and can work."""
        return self._is_ready and self.pid is not None

    @property
    def pause_s(self) -> float:
        """How long to wait before the next start."""
        return restart_pause_s(self._failures)

    async def start(self) -> int:
        """Start the process unless it runs; its id. `WorkerLost` if it does not start, or did not just now."""
        if self._is_ready and (pid := self.pid) is not None:
            return pid
        if time.monotonic() < self._start_at_s:
            raise WorkerLost("restarts later")
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", self._program.module, str(self._nice)),
                stdin=PIPE,
                stdout=PIPE,
                process_group=0,  # a Ctrl-C is for the node; the worker ends with its input
            )
            pid, says = self._process.pid, self._process.stdout
            assert says is not None
            async with asyncio.timeout(self._program.start_s):
                if await says.readexactly(len(READY)) != READY:
                    raise OSError("something else writes to its standard output")
        except (TimeoutError, OSError, asyncio.IncompleteReadError) as error:
            await self.end()
            self._failed(error)
            raise WorkerLost("did not start") from error
        except BaseException:
            await self.end()
            raise
        self._failures = 0
        self._is_ready = True
        return pid

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        self._start_at_s = time.monotonic() + self.pause_s
        if self._failures == 1:
            program = self._program
            log.error("the %s worker does not start (%s): %s", program.name, type(error).__name__, program.without)

    async def ask(
        self, request: bytes, check: Callable[[], None] | None = None, check_every_s: float | None = None
    ) -> bytes:
        """The reply of a process that was started; `WorkerLost` if there is none in time. Cancelling ends the process.

        `check` is called while the process works; it raises TimeoutError to give the request up.
        """
        process = self._process
        if process is None:
            raise WorkerLost("ended")  # while its caller came to this
        job = asyncio.create_task(self._exchange(process, request))
        try:
            async with asyncio.timeout(self._program.job_s):
                while not (await asyncio.wait({job}, timeout=check_every_s))[0]:
                    if check is not None:
                        check()
            return job.result()
        except (TimeoutError, OSError, asyncio.IncompleteReadError) as error:
            job.cancel()
            await self.end()
            raise WorkerLost(type(error).__name__) from error
        except BaseException:
            job.cancel()
            await self.end()  # half a reply may still be on its way
            raise

    async def _exchange(self, process: Process, request: bytes) -> bytes:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(framed(request))
        await process.stdin.drain()
        size = int.from_bytes(await process.stdout.readexactly(LENGTH_BYTES), "big")
        if size > self._program.reply_bytes_max:
            raise OSError(f"a reply of {size} bytes")
        return await process.stdout.readexactly(size)

    async def ended(self) -> None:
        """Wait for the end of the process, if there is one."""
        if self._process is not None:
            await self._process.wait()

    def kill(self) -> None:
        """Kill the process, whatever it does."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def end(self) -> None:
        """Kill the process, and wait for its end."""
        self.kill()
        process, self._process, self._is_ready = self._process, None, False
        if process is not None:
            await process.wait()
