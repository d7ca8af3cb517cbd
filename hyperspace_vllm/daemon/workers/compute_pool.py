"""Where slow work runs: threads for what releases the GIL, worker processes for KZG.

Of each one kind for what a request waits for, and one, at a lower priority, for what nobody waits for: a verification
behind somebody's commitment, or behind engines that spin on every core, would come too late to be of use.

Every job has a deadline and every queue a bound; what can't be done in time is `Refused`. A thread can't be stopped, so
whoever lends it memory keeps that memory until `run` has really ended: `run` is never abandoned half-way.
"""

import asyncio
import contextlib
import logging
import os
import sys
import threading
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from ...core.records.errors import Refused
from .kzg_worker import COMMIT, GROUP_BYTES, READY, REPLY_BYTES, VERIFY

THREADS = 2
THREAD_JOBS_MAX = 512  # queued or running; a job holds at most a row's chunks
KZG_JOBS_MAX = 64  # 128 KiB each = 8 MiB
KZG_START_S = 60.0  # loading the setup takes 1.5 to 6 s of one core
KZG_JOB_S = 10.0  # a commitment and its proof take 0.1 to 0.3 s
KZG_RESTART_S = 2.0  # doubled for every start that failed: without ckzg there is nothing to hurry for
KZG_RESTART_S_MAX = 60.0
COMMIT_WAIT_S = 90.0  # the worker may still be starting: nobody waits for a commitment

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class ComputePool:
    """`run` for functions that release the GIL, `commit` and `verify` for KZG.

    `nice` is the niceness of `run_in_background` and `commit`.
    """

    def __init__(self, nice: int = 0) -> None:
        self._threads = ThreadPoolExecutor(THREADS, "hyperspace-compute")
        self._background = ThreadPoolExecutor(THREADS, "hyperspace-encode", _lower_priority, (nice,))
        self._jobs = 0
        self._verifier = _KzgClient(0)
        self._committer = _KzgClient(nice)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`function(*args)` in a thread. Cancelling waits for the thread; `Refused("compute_busy")` when swamped."""
        return await self._run(self._threads, lambda: function(*args, **kwargs))

    async def run_in_background(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As `run`, for what no request waits for."""
        return await self._run(self._background, lambda: function(*args, **kwargs))

    async def _run(self, threads: ThreadPoolExecutor, function: Callable[[], T]) -> T:
        if self._jobs >= THREAD_JOBS_MAX:
            raise Refused("compute_busy")
        self._jobs += 1
        job = asyncio.get_running_loop().run_in_executor(threads, function)
        try:
            return await asyncio.shield(job)
        except asyncio.CancelledError:
            while not job.done():  # whatever else is cancelled meanwhile
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([job])
            raise
        finally:
            self._jobs -= 1

    async def commit(self, blob: bytes) -> tuple[bytes, bytes]:
        """KZG commitment and proof (48 bytes each) of a digest blob; `Refused("kzg_worker" | "kzg_busy")`."""
        reply = await self._committer.ask(COMMIT + blob + bytes(2 * GROUP_BYTES), COMMIT_WAIT_S)
        return reply[1 : 1 + GROUP_BYTES], reply[1 + GROUP_BYTES :]

    async def verify(self, blob: bytes, commitment: bytes, proof: bytes, timeout_s: float = KZG_JOB_S) -> bool:
        """Whether `blob` is what `commitment` commits to; `Refused("kzg_worker" | "kzg_busy")`."""
        reply = await self._verifier.ask(VERIFY + blob + commitment + proof, timeout_s)
        return bool(reply[0])

    @property
    def can_verify(self) -> bool:
        """Whether the KZG worker has started; until then a verification waits for seconds."""
        return self._verifier.ready

    def kill_worker(self) -> None:
        """For tests of what follows: the KZG processes die now."""
        self._verifier.kill()
        self._committer.kill()

    async def close(self) -> None:
        """End the workers and the threads, after the jobs that run."""
        await self._verifier.close()
        await self._committer.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._background.shutdown(wait=False, cancel_futures=True)


def _lower_priority(nice: int) -> None:
    # On Linux a thread has a niceness of its own; one that the process was started with may not be undercut.
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), max(nice, os.getpriority(os.PRIO_PROCESS, 0)))


@dataclass(frozen=True, slots=True)
class _Job:
    request: bytes
    reply: asyncio.Future[bytes]


class _KzgClient:
    """One job at a time to one process. Callers give up by their own clock without disturbing the process."""

    def __init__(self, nice: int) -> None:
        self.ready = False
        self._nice = nice
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue(KZG_JOBS_MAX)
        self._process: Process | None = None
        self._runner: asyncio.Task[None] = asyncio.create_task(self._run(), name="kzg-worker")

    async def ask(self, request: bytes, timeout_s: float) -> bytes:
        reply: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        try:
            self._jobs.put_nowait(_Job(request, reply))
            async with asyncio.timeout(timeout_s):
                return await reply
        except asyncio.QueueFull:
            raise Refused("kzg_busy") from None
        except TimeoutError:
            raise Refused("kzg_worker", "too slow") from None

    def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def close(self) -> None:
        self._runner.cancel()
        await asyncio.wait([self._runner])

    async def _run(self) -> None:
        pause_s = KZG_RESTART_S
        while True:
            try:
                if await self._run_worker():
                    pause_s = KZG_RESTART_S
                elif pause_s == KZG_RESTART_S:
                    log.error(
                        "the KZG worker ended, or took more than %.0f s to start: until one starts, KV is neither "
                        "published nor taken from other nodes",
                        KZG_START_S,
                    )
            except OSError as error:  # no process to be had just now
                log.error("the KZG worker does not start: %s", error)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, KZG_RESTART_S_MAX)

    async def _run_worker(self) -> bool:
        """Start one and give it jobs until it dies; whether it ever was ready."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "hyperspace_vllm.daemon.workers.kzg_worker", str(self._nice)),
            stdin=PIPE,
            stdout=PIPE,
            process_group=0,  # a Ctrl-C is for the node; the worker ends with its input
        )
        self._process = process
        try:
            ready = await self._is_ready(process)
            if ready:
                self.ready = True
                await self._serve(process)
        finally:
            self.ready = False
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        return ready

    async def _is_ready(self, process: Process) -> bool:
        assert process.stdout is not None
        try:
            async with asyncio.timeout(KZG_START_S):
                return await process.stdout.readexactly(len(READY)) == READY
        except (TimeoutError, asyncio.IncompleteReadError):
            return False

    async def _serve(self, process: Process) -> None:
        ended = asyncio.create_task(process.wait())
        taken = asyncio.create_task(self._jobs.get())
        try:
            while not ended.done():
                await asyncio.wait([taken, ended], return_when=asyncio.FIRST_COMPLETED)
                if taken.done():
                    job = taken.result()
                    if not job.reply.done() and not await self._answer(process, job):
                        return
                    taken = asyncio.create_task(self._jobs.get())
        finally:
            taken.cancel()
            ended.cancel()

    async def _answer(self, process: Process, job: _Job) -> bool:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            async with asyncio.timeout(KZG_JOB_S):
                process.stdin.write(job.request)
                await process.stdin.drain()
                reply = await process.stdout.readexactly(REPLY_BYTES)
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError) as error:
            if not job.reply.done():
                job.reply.set_exception(Refused("kzg_worker", type(error).__name__))
            return False
        if not job.reply.done():
            job.reply.set_result(reply)
        return True
