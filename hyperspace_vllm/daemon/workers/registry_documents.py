"""Registry documents: signs this node's own deltas and has loro, in a worker process, import those of others.

This process keeps no copy of the worker's documents. When the worker dies, every document is lost: an import that
continues one is answered `worker`, and the core sends the owner's log again from its snapshot; a write is answered
`worker` too, and the core begins a new epoch with all entries. So one rule covers a crash, a restart and an evicted
document.

Other owners' documents wait for each other; this node's own writes wait only for the job under way, so that peers'
documents do not delay this node's. A job is given up when it has used too much CPU time, or uses none: a document can
make loro wait for itself for ever. Wall time is no measure, because engines may leave the worker hardly any CPU.

An epoch is the wall clock's milliseconds at its first write, or one more than the last: a restarted node's first epoch
is higher than any that it had, unless its clock was put back.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

import msgspec
from nacl.signing import SigningKey

from ...core.events.owner_documents import DeltasImported, DeltasRefused, ImportDeltas, OwnDeltaWritten, WriteRegistry
from ...core.records.errors import Refused
from ...core.records.ids import NetworkId
from ...core.records.limits import REGISTRY_DELTA_BYTES_MAX, REGISTRY_ENTRIES_MAX, REGISTRY_TTL_MS, KiB
from ...core.records.registry_delta import DELTA_OVERHEAD_BYTES, RegistryDelta, encode_delta
from .registry_worker import (
    Begin,
    Change,
    Failed,
    Forget,
    Import,
    Imported,
    Reply,
    Request,
    Written,
)
from .worker_process import WorkerLost, WorkerProcess, WorkerProgram

START_S = 20.0  # 0.3 s on an idle machine
JOB_CPU_S = 1.0  # the largest log there may be takes 0.2 s
STALL_S = 1.0  # without any CPU time: a fortieth of a core gives a job 25 ms
_STALLED_CPU_S = 0.001
JOB_S = 10.0  # whatever it does
JOBS_MAX = 64  # waiting: the core has at most 8 imports and a write under way, the rest is Forget
# 20,000 entries of an id (34 B in msgpack) and an expiry (9 B) in a pair (1 B), and as many removed; or an export.
_REPLY_BYTES_MAX = REGISTRY_ENTRIES_MAX * (34 + 9 + 1 + 34) * 2 + 64 * KiB
_PROGRAM = WorkerProgram(
    module="hyperspace_vllm.daemon.workers.registry_worker",
    name="registry",
    start_s=START_S,
    job_s=JOB_S,
    reply_bytes_max=_REPLY_BYTES_MAX,
    without="other nodes do not learn what is here",
)

log = logging.getLogger(__name__)


class RegistryDocuments:
    """Performs WriteRegistry, ImportDeltas and ForgetOwner, one at a time, each with a deadline; writes go first."""

    def __init__(self, network: NetworkId, signing_key: SigningKey, clock: Callable[[], int], nice: int) -> None:
        self._network = network
        self._key = signing_key
        self._owner = signing_key.verify_key.encode()
        self._clock = clock
        self._worker = _Worker(nice)
        self._epoch = 0
        self._sequence = 0
        self._expires_at_ms = 0

    async def write(self, effect: WriteRegistry) -> OwnDeltaWritten | DeltasRefused:
        """Change the own document, sign what loro exports of the change."""
        try:
            reply, _ = await self._worker.ask(
                Begin(effect.added) if effect.compact else Change(effect.added, effect.removed)
            )
        except Refused:
            return DeltasRefused(self._owner, "worker")
        if not isinstance(reply, Written):
            return DeltasRefused(self._owner, "worker")
        if len(reply.payload) > REGISTRY_DELTA_BYTES_MAX - DELTA_OVERHEAD_BYTES:
            return DeltasRefused(self._owner, "too_large")
        if effect.compact:
            now_ms = self._clock()
            self._epoch = max(now_ms, self._epoch + 1)
            self._sequence = 0
            self._expires_at_ms = now_ms + REGISTRY_TTL_MS
        else:
            self._sequence += 1
        delta = RegistryDelta(
            self._network,
            self._owner,
            self._epoch,
            self._sequence,
            "snapshot" if effect.compact else "update",
            self._expires_at_ms,
            reply.payload,
        )
        return OwnDeltaWritten(delta, encode_delta(delta, self._key))

    async def import_deltas(self, effect: ImportDeltas) -> DeltasImported | DeltasRefused:
        """Import another owner's deltas."""
        try:
            reply, took_ms = await self._worker.ask(
                Import(effect.owner, effect.epoch, effect.payloads, effect.starts_with_snapshot)
            )
        except Refused:
            return DeltasRefused(effect.owner, "worker")
        if reply is None:
            return DeltasRefused(effect.owner, "lost", took_ms)
        if not isinstance(reply, Imported):
            return DeltasRefused(effect.owner, reply.reason if isinstance(reply, Failed) else "worker", took_ms)
        return DeltasImported(
            owner=effect.owner,
            epoch=effect.epoch,
            sequence=effect.sequence,
            added=reply.added,
            removed=reply.removed,
            cleared=effect.starts_with_snapshot,
            took_ms=took_ms,
        )

    async def forget(self, owner: bytes) -> None:
        """Drop an owner's document. A worker that is dead has none."""
        if self._worker.pid is not None:
            with contextlib.suppress(Refused):
                await self._worker.ask(Forget(owner))

    @property
    def worker_pid(self) -> int | None:
        """The worker process, while there is one: for metrics of its memory, and tests of its death."""
        return self._worker.pid

    async def close(self) -> None:
        """End the worker; what waits for it is refused."""
        await self._worker.close()


class _Worker:
    """The order of requests to one process, which is started by the first that finds none."""

    def __init__(self, nice: int) -> None:
        self._process = WorkerProcess(_PROGRAM, nice)
        self._turn = asyncio.Lock()
        self._turn_of_others = asyncio.Lock()  # of their documents' jobs one at most waits for the turn, behind writes
        self._waiting = 0
        self._closed = False
        self._replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)

    @property
    def pid(self) -> int | None:
        return self._process.pid

    async def ask(self, request: Request) -> tuple[Reply | None, int]:
        """The worker's reply, None if it died or hung, and its CPU time in ms; `Refused("worker")` if there is none."""
        others = isinstance(request, Import | Forget)
        if others and self._waiting >= JOBS_MAX:
            raise Refused("worker", "busy")
        self._waiting += 1
        try:
            async with self._turn_of_others if others else contextlib.nullcontext(), self._turn:
                if self._closed:
                    raise Refused("worker", "closed")
                return await self._ask(request)
        finally:
            self._waiting -= 1

    async def close(self) -> None:
        self._closed = True
        await self._process.end()
        async with self._turn:  # one may be starting
            await self._process.end()

    async def _ask(self, request: Request) -> tuple[Reply | None, int]:
        try:
            watch = _CpuWatch(await self._process.start())
        except WorkerLost as lost:
            raise Refused("worker", str(lost)) from lost
        try:
            reply = await self._process.ask(msgspec.msgpack.encode(request), watch.check, STALL_S)
            return self._replies.decode(reply), watch.took_ms()
        except (WorkerLost, msgspec.DecodeError) as error:
            await self._process.end()
            log.warning("the registry worker was lost (%s); its documents will be rebuilt", error)
            return None, watch.took_ms()


class _CpuWatch:
    """What CPU time a process has taken since the watch began."""

    def __init__(self, pid: int) -> None:
        self._clock = (~pid << 3) | 2  # clock_getcpuclockid(3): all threads of the process
        self._began_s = self._seen_s = self._now_s()

    def check(self) -> None:
        """TimeoutError: it took too much, or none since the last time."""
        before, self._seen_s = self._seen_s, self._now_s()
        if self._seen_s - self._began_s > JOB_CPU_S or self._seen_s - before < _STALLED_CPU_S:
            raise TimeoutError

    def took_ms(self) -> int:
        """So far; of a process that has ended, as far as it was seen."""
        return round(((self._now_s() or self._seen_s) - self._began_s) * 1000)

    def _now_s(self) -> float:
        try:
            return time.clock_gettime(self._clock)
        except OSError:  # it has ended
            return 0.0
