"""A worker process with a program that does as it is told: how it starts, answers, is given up and ends."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from hyperspace_vllm.daemon.workers import worker_process
from hyperspace_vllm.daemon.workers.worker_frames import READY, framed
from hyperspace_vllm.daemon.workers.worker_process import (
    RESTART_S,
    RESTART_S_MAX,
    WorkerLost,
    WorkerProcess,
    WorkerProgram,
    restart_pause_s,
)

pytestmark = pytest.mark.io
CHILD = WorkerProgram("tests.support.worker_child", "test", 60.0, 60.0, 1000, "nothing else fails")


@pytest.fixture
async def worker() -> AsyncIterator[WorkerProcess]:
    worker = WorkerProcess(CHILD, 0)
    yield worker
    await worker.end()


def runs(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_the_pause_doubles_with_each_start_that_failed_up_to_its_maximum() -> None:
    assert [restart_pause_s(failures) for failures in (0, 1, 2, 3)] == [RESTART_S, RESTART_S, 4.0, 8.0]
    assert restart_pause_s(2000) == RESTART_S_MAX


async def test_requests_are_answered_by_one_process_at_its_niceness() -> None:
    worker = WorkerProcess(CHILD, 7)
    try:
        assert (worker.pid, worker.is_ready) == (None, False)
        pid = await worker.start()
        assert (worker.pid, worker.is_ready, await worker.start()) == (pid, True, pid)
        assert await worker.ask(b"a" * 1000) == b"a" * 1000
        assert int(await worker.ask(b"niceness")) == max(os.getpriority(os.PRIO_PROCESS, 0), 7)
    finally:
        await worker.end()
    assert (worker.pid, worker.is_ready, runs(pid)) == (None, False, False)


async def test_a_process_that_dies_over_a_request_is_replaced_at_once(worker: WorkerProcess) -> None:
    first = await worker.start()
    with pytest.raises(WorkerLost, match="IncompleteReadError"):
        await worker.ask(b"exit")
    assert worker.pid is None
    assert await worker.start() != first
    assert await worker.ask(b"again") == b"again"


async def test_a_request_to_a_process_that_was_ended_is_lost(worker: WorkerProcess) -> None:
    pid = await worker.start()
    asking = asyncio.create_task(worker.ask(b"sleep 60"))
    await asyncio.sleep(0)
    await worker.end()
    for lost in (asking, worker.ask(b"hello")):
        with pytest.raises(WorkerLost):
            await lost
    assert not runs(pid)


async def test_a_process_that_is_killed_between_requests_has_ended(worker: WorkerProcess) -> None:
    first = await worker.start()
    ended = asyncio.create_task(worker.ended())
    os.kill(first, signal.SIGKILL)
    async with asyncio.timeout(10):
        await ended
    assert not worker.is_ready
    assert await worker.start() != first


async def test_a_request_is_given_up_at_its_deadline() -> None:
    worker = WorkerProcess(replace(CHILD, job_s=0.3), 0)
    pid = await worker.start()
    with pytest.raises(WorkerLost, match="TimeoutError"):
        await worker.ask(b"sleep 60")
    assert not runs(pid)


async def test_a_request_is_given_up_when_its_check_says_so(worker: WorkerProcess) -> None:
    checks = []

    def check() -> None:
        checks.append(1)
        if len(checks) == 3:
            raise TimeoutError

    pid = await worker.start()
    with pytest.raises(WorkerLost, match="TimeoutError"):
        await worker.ask(b"sleep 60", check, 0.05)
    assert (len(checks), runs(pid)) == (3, False)


async def test_a_reply_beyond_its_bound_costs_the_process(worker: WorkerProcess) -> None:
    pid = await worker.start()
    assert len(await worker.ask(b"long 1000")) == 1000
    with pytest.raises(WorkerLost, match="OSError"):
        await worker.ask(b"long 1001")
    assert not runs(pid)


async def test_a_cancelled_request_ends_the_process_so_that_no_reply_is_taken_for_the_next(
    worker: WorkerProcess,
) -> None:
    pid = await worker.start()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await worker.ask(b"sleep 60")
    assert not runs(pid)
    await worker.start()
    assert await worker.ask(b"next") == b"next"


@pytest.mark.parametrize("program", ["json.tool", "no_such_module"])
async def test_a_program_that_never_gets_ready_is_not_started_again_at_once(
    program: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """json.tool waits for its input to end."""
    monkeypatch.setattr(worker_process, "RESTART_S", 0.2)
    worker = WorkerProcess(replace(CHILD, module=program, start_s=1.0), 0)
    for pause_s in (0.2, 0.4):
        with pytest.raises(WorkerLost, match="did not start"):
            await worker.start()
        with pytest.raises(WorkerLost, match="restarts later"):
            await worker.start()
        assert (worker.pid, worker.pause_s) == (None, pause_s)
        await asyncio.sleep(pause_s)
    said = [record.getMessage() for record in caplog.records if record.name == worker_process.__name__]
    assert [text.partition(": ")[2] for text in said] == ["nothing else fails"]


@pytest.mark.parametrize("heard", [b"", framed(b"hello")[:6]])
def test_a_worker_ends_with_its_input_also_in_the_middle_of_a_request(heard: bytes) -> None:
    command = [sys.executable, "-m", CHILD.module, "0"]
    ended = subprocess.run(command, input=heard, capture_output=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, READY, b"")
