"""Slow work: in threads if it releases the GIL, in worker processes for KZG.

There are two of each: one for work that a request waits for, and one, at a lower priority, for work that no request
waits for. A verification behind a commitment, or behind engines that spin on every core, would come too late.

Every job has a deadline and every queue a bound; a job that cannot be done in time is `Refused`. A thread cannot be
stopped, so a caller keeps the memory that it lends until `run` has ended: `run` is never abandoned half-way.
"""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from ...core.records.errors import Refused
from .kzg_worker import COMMIT, GROUP_BYTES, REPLY_BYTES, VERIFY
from .worker_process import WorkerLost, WorkerProcess, WorkerProgram

THREADS = 2
THREAD_JOBS_MAX = 512  # queued or running; a job holds at most a row's chunks
KZG_JOBS_MAX = 64  # 128 KiB each = 8 MiB
KZG_START_S = 60.0  # loading the setup takes 1.5 to 6 s of one core
KZG_JOB_S = 10.0  # a commitment and its proof take 0.1 to 0.3 s
COMMIT_WAIT_S = 90.0  # the worker may still be starting: no request waits for a commitment
_KZG = WorkerProgram(
    module="hyperspace_vllm.daemon.workers.kzg_worker",
    name="KZG",
    start_s=KZG_START_S,
    job_s=KZG_JOB_S,
    reply_bytes_max=REPLY_BYTES,
    without="until one starts, KV is neither published nor taken from other nodes",
)

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
        """As `run`, for work that no request waits for."""
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
        return self._verifier.is_ready

    def kill_worker(self) -> None:
        """Kill the KZG processes, for tests of the recovery."""
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
        self._worker = WorkerProcess(_KZG, nice)
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue(KZG_JOBS_MAX)
        self._runner: asyncio.Task[None] = asyncio.create_task(self._run(), name="kzg-worker")

    @property
    def is_ready(self) -> bool:
        return self._worker.is_ready

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
        self._worker.kill()

    async def close(self) -> None:
        self._runner.cancel()
        await asyncio.wait([self._runner])

    async def _run(self) -> None:
        try:
            while True:
                with contextlib.suppress(WorkerLost):
                    await self._worker.start()
                    await self._serve()
                await asyncio.sleep(self._worker.pause_s)
        finally:
            await self._worker.end()

    async def _serve(self) -> None:
        """Give the process jobs until it ends; `WorkerLost` if it did over a job."""
        ended = asyncio.create_task(self._worker.ended())
        taken = asyncio.create_task(self._jobs.get())
        try:
            while not ended.done():
                await asyncio.wait([taken, ended], return_when=asyncio.FIRST_COMPLETED)
                if taken.done():
                    job = taken.result()
                    if not job.reply.done():
                        await self._answer(job)
                    taken = asyncio.create_task(self._jobs.get())
        finally:
            taken.cancel()
            ended.cancel()

    async def _answer(self, job: _Job) -> None:
        try:
            reply = await self._worker.ask(job.request)
        except WorkerLost as lost:
            if not job.reply.done():
                job.reply.set_exception(Refused("kzg_worker", str(lost)))
            raise
        if not job.reply.done():
            job.reply.set_result(reply)
