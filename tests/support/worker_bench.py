"""A worker's half of the connector with tensors of its own, against a node that the test plays."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import pytest
import torch

from hyperspace_vllm.core.local.kv_messages import RegisterLayout, StagingGranted, WantStaging
from hyperspace_vllm.core.local.messages import ClientMessage, NodeMessage
from hyperspace_vllm.core.local.slab import LoadedRow, Slab
from hyperspace_vllm.session_lock import SessionLock
from hyperspace_vllm.vllm_adapter.kv_copy import DeviceCopier, TorchPages
from hyperspace_vllm.vllm_adapter.kv_layout import KVPlan, block_views, plan_kv
from hyperspace_vllm.vllm_adapter.metadata import PrefixLoad, SegmentSave, StepMetadata
from hyperspace_vllm.vllm_adapter.worker_side import WorkerSide
from tests.vllm_adapter.test_kv_layout import BLOCKS, caches, engine, hybrid_cache

M = TypeVar("M")

FINGERPRINT, ENGINE = b"\x01" * 32, b"\x02" * 16


@dataclass
class NodePeer:
    """A node with one MiB of arena; `generations` moves when it takes a slab back."""

    connected: bool = True
    epoch: int = 1
    sent: list[ClientMessage] = field(default_factory=list)
    inbox: list[NodeMessage] = field(default_factory=list)
    arena: bytearray = field(default_factory=lambda: bytearray(1 << 20))
    generations: dict[int, int] = field(default_factory=dict)
    grants: bool = True
    earlier_locks: list[SessionLock] = field(default_factory=list)

    def take_earlier_locks(self) -> list[SessionLock]:
        taken, self.earlier_locks = self.earlier_locks, []
        return taken

    def send(self, message: ClientMessage) -> bool:
        if not self.connected:
            return False
        self.sent.append(message)
        if isinstance(message, WantStaging) and self.grants:
            self.inbox.append(StagingGranted(message.row_bytes, tuple(self.slab(message.row_bytes) for _ in range(2))))
        return True

    def receive(self) -> list[NodeMessage]:
        messages, self.inbox = self.inbox, []
        return messages

    def slab(self, length: int) -> Slab:
        slot = len(self.generations)
        self.generations[slot] = 7
        return Slab(slot, slot << 16, length, 7)

    def view(self, slab: Slab) -> memoryview:
        if not self.connected:
            raise LookupError("no arena")
        return memoryview(self.arena)[slab.offset : slab.offset + slab.length]

    def is_current(self, slab: Slab) -> bool:
        return self.generations.get(slab.slot) == slab.generation

    def wait_connected(self, timeout_s: float) -> bool:
        return self.connected

    def of(self, kind: type[M]) -> list[M]:
        return [message for message in self.sent if isinstance(message, kind)]


@pytest.fixture
def plan() -> KVPlan:
    return plan_kv(engine(), hybrid_cache())


class Bench:
    def __init__(self, plan: KVPlan, node: NodePeer | None = None) -> None:
        self.node, self.plan, self.tensors = node or NodePeer(), plan, caches(hybrid_cache())
        self.side = WorkerSide(self.node, plan, 0, 8, "auto")  # type: ignore[arg-type]
        self.side.register(self.tensors, BLOCKS)

    def bytes_of(self, name: str, block: int) -> bytes:
        raw: bytes = self.tensors[name][block].contiguous().view(torch.uint8).numpy().tobytes()
        return raw

    def rows(self, segments: int) -> tuple[LoadedRow, ...]:
        """Rows of the first segments, each filled with a byte of its own."""
        rows = []
        for segment in range(segments):
            for part in range(len(self.plan.parts)):
                slab = self.node.slab(self.plan.row_bytes(part))
                self.node.view(slab)[:] = bytes([16 * segment + part + 1]) * slab.length
                rows.append(LoadedRow(segment, part, 0, slab))
        return tuple(rows)

    def work(self, *, loads: tuple[PrefixLoad, ...] = (), saves: tuple[SegmentSave, ...] = ()) -> StepMetadata:
        metadata = StepMetadata(RegisterLayout(self.plan.layout(FINGERPRINT), ENGINE), loads, saves)
        self.side.load(metadata)
        self.side.save(metadata)
        return metadata

    def results(self) -> tuple[set[str], set[str]]:
        results = self.side.transfer_results()
        assert not results.finished_sending
        return results.finished_recving, results.failed_recving


TABLES = ((1, 2, 3, 4), (5, 6, 7, 8), (9, 10, 11, 3))


class SlowLane:
    """A device's stream whose copies end when `open` is set, or fail."""

    def __init__(self) -> None:
        self.open, self.broken, self.marks = threading.Event(), False, 0
        self.open.set()
        self.record_fails = False

    def enter(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def record(self) -> Callable[[], None]:
        if self.record_fails:
            raise RuntimeError("CUDA error: device-side assert triggered")
        self.marks += 1
        return self._wait

    def _wait(self) -> None:
        assert self.open.wait(10)
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


class DeviceBench(Bench):
    """A worker whose KV is copied as a device's is; `settled` waits for the copy thread."""

    def __init__(self, plan: KVPlan) -> None:
        super().__init__(plan)
        self.lane = SlowLane()
        views = block_views(plan, self.tensors, BLOCKS)
        self.copier = DeviceCopier(TorchPages(views, pin=False), self.lane, torch.device("cpu"), pin=False)
        self.side._copier = self.copier

    def settled(self) -> tuple[set[str], set[str]]:
        ended = threading.Event()
        self.copier.after_copies(lambda _: ended.set())
        assert ended.wait(10)
        return self.results()


@pytest.fixture
def device(plan: KVPlan) -> Iterator[DeviceBench]:
    bench = DeviceBench(plan)
    yield bench
    bench.lane.open.set()
    bench.copier.close()
    assert not bench.copier._thread.is_alive()
