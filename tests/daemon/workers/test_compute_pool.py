"""The compute pool with its real worker process: deadlines, bounds, and a worker that dies."""

import asyncio
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

from hyperspace_vllm.core.records.errors import Refused
from hyperspace_vllm.core.records.manifest import digest_blob
from hyperspace_vllm.daemon.workers import compute_pool, worker_process
from hyperspace_vllm.daemon.workers.compute_pool import ComputePool
from tests.support.until import until_async

pytestmark = pytest.mark.io
BLOB = digest_blob(secrets.token_bytes(2 * 64 * 32), 2)


@pytest.fixture
async def pool() -> AsyncIterator[ComputePool]:
    pool = ComputePool()
    yield pool
    await pool.close()


async def commit(pool: ComputePool) -> tuple[bytes, bytes]:
    async def committed() -> tuple[bytes, bytes] | None:
        with suppress(Refused):
            return await pool.commit(BLOB)
        return None

    return await until_async(committed)


async def test_a_proof_verifies_and_only_for_its_blob(pool: ComputePool) -> None:
    commitment, proof = await pool.commit(BLOB)
    assert await pool.verify(BLOB, commitment, proof)
    changed = bytearray(BLOB)
    changed[31] ^= 1
    assert not await pool.verify(bytes(changed), commitment, proof)
    assert not await pool.verify(BLOB, proof, commitment)
    assert not await pool.verify(BLOB, bytes(48), bytes(48))
    assert not await pool.verify(b"\xff" * len(BLOB), commitment, proof)


def test_a_worker_whose_node_has_ended_ends_without_a_word() -> None:
    command = [sys.executable, "-m", "hyperspace_vllm.daemon.workers.kzg_worker", "0"]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert worker.stdout is not None
    worker.stdout.close()
    worker.stdout = None
    _, errors = worker.communicate(timeout=60)
    assert (worker.returncode, errors) == (0, b"")


async def test_a_dead_worker_fails_its_job_and_is_replaced(pool: ComputePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "RESTART_S", 0.0)
    commitment, proof = await pool.commit(BLOB)
    job = asyncio.create_task(pool.commit(BLOB))
    await asyncio.sleep(0)  # the job is queued
    pool.kill_worker()
    with pytest.raises(Refused, match="kzg_worker"):
        await job
    assert await commit(pool) == (commitment, proof)


async def test_a_worker_that_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "RESTART_S", 0.01)
    with monkeypatch.context() as broken:
        broken.setattr(sys, "executable", "/nonexistent/python")
        pool = ComputePool()
        await asyncio.sleep(0)
        with pytest.raises(Refused, match="kzg_worker"):
            await pool.verify(BLOB, bytes(48), bytes(48), timeout_s=0.05)
    await pool.commit(BLOB)
    await pool.close()


async def test_a_caller_that_gives_up_costs_nobody_else_anything(pool: ComputePool) -> None:
    with pytest.raises(Refused, match="kzg_worker"):  # the worker is still loading its setup
        await pool.verify(BLOB, bytes(48), bytes(48), timeout_s=0.01)
    commitment, proof = await pool.commit(BLOB)
    impatient = asyncio.create_task(pool.commit(BLOB))
    await asyncio.sleep(0.01)
    impatient.cancel()
    assert await pool.verify(BLOB, commitment, proof)


async def test_a_verification_waits_for_no_commitment(pool: ComputePool) -> None:
    assert not pool.can_verify
    commitment, proof = await pool.commit(BLOB)
    assert await pool.verify(BLOB, commitment, proof)
    assert pool.can_verify
    commits = [asyncio.create_task(pool.commit(BLOB)) for _ in range(6)]
    await asyncio.sleep(0)
    assert await pool.verify(BLOB, commitment, proof)
    assert not all(task.done() for task in commits)
    await asyncio.gather(*commits)


def kzg_priorities() -> list[int]:
    """Niceness of the KZG workers that this process has started."""
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
    workers = [int(pid) for pid in children if b"kzg_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return sorted(os.getpriority(os.PRIO_PROCESS, pid) for pid in workers)


async def test_what_nobody_waits_for_runs_at_its_own_niceness() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    pool, own = ComputePool(nice=7), niceness()
    assert (await pool.run(niceness), await pool.run_in_background(niceness)) == (own, max(own, 7))
    assert await pool.verify(BLOB, *await pool.commit(BLOB))
    assert kzg_priorities() == [max(own, 0), max(own, 7)]
    await pool.close()


async def test_the_worker_queue_is_bounded(pool: ComputePool) -> None:
    waiting = [asyncio.create_task(pool.commit(BLOB)) for _ in range(compute_pool.KZG_JOBS_MAX + 2)]
    await asyncio.sleep(0)
    done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=60)
    assert {str(task.exception()) for task in done} == {"kzg_busy"}
    for task in waiting:
        task.cancel()


async def test_a_cancelled_thread_job_has_ended_before_its_caller_goes_on(pool: ComputePool) -> None:
    started, ended = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        time.sleep(0.2)
        ended.set()

    task = asyncio.create_task(pool.run(work))
    await asyncio.to_thread(started.wait)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert ended.is_set()
