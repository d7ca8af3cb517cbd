"""A worker's half with real tensors and a node that answers, refuses, dies or takes its memory back."""

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from hyperspace_vllm.core.local.messages import (
    NO_ENGINE,
    ClientMessage,
    LoadedRow,
    NodeMessage,
    RegisterLayout,
    RowStaged,
    Slab,
    StagingGranted,
    WantStaging,
)
from hyperspace_vllm.session_lock import SessionLock, look
from hyperspace_vllm.vllm_adapter.kv_copy import DeviceCopier, TorchPages
from hyperspace_vllm.vllm_adapter.kv_layout import KVPlan, block_views, plan_kv
from hyperspace_vllm.vllm_adapter.metadata import IDLE, PrefixLoad, SegmentSave, StepMetadata
from hyperspace_vllm.vllm_adapter.worker_side import SEGMENTS_STAGED_MAX, WorkerSide
from tests.vllm_adapter.test_kv_layout import BLOCKS, caches, engine, hybrid_cache

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

    def of(self, kind: type) -> list:
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
        return self.tensors[name][block].contiguous().view(torch.uint8).numpy().tobytes()

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


def test_a_loaded_prefix_is_in_its_blocks_and_reported_once(plan: KVPlan) -> None:
    bench = Bench(plan)
    bench.work(loads=(PrefixLoad("r", 0, 512, TABLES, bench.rows(2)),))
    assert bench.bytes_of("f.0", 9) == bytes([1]) * 8192
    assert bench.bytes_of("w.3", 8) == bytes([18]) * 8192
    assert bench.results() == ({"r"}, set())
    assert bench.results() == (set(), set())


def test_only_blocks_of_the_promised_tokens_are_written(plan: KVPlan) -> None:
    bench = Bench(plan)
    before = bench.bytes_of("f.0", 9)
    bench.work(loads=(PrefixLoad("r", 128, 256, TABLES, bench.rows(1)),))
    assert bench.bytes_of("f.0", 9) == before
    assert bench.bytes_of("f.0", 10) == bytes([1]) * 8192
    assert bench.results() == ({"r"}, set())


def test_blocks_outside_the_window_need_no_rows(plan: KVPlan) -> None:
    bench = Bench(plan)
    # At 1024 tokens the window of 512 starts in block 4, segment 2.
    rows = tuple(row for row in bench.rows(4) if row.part == 0 or row.segment >= 2)
    full, window = tuple(range(1, 9)), (0, 0, 0, 0, 9, 10, 11, 8)
    bench.work(loads=(PrefixLoad("r", 0, 1024, (window, window, full), rows),))
    assert bench.results() == ({"r"}, set())


@pytest.mark.parametrize("fault", ["no_node", "row_missing", "wrong_length", "taken_back", "other_rank"])
def test_whatever_goes_wrong_the_receive_is_reported_once_and_as_failed(plan: KVPlan, fault: str) -> None:
    bench = Bench(plan)
    rows = bench.rows(2)
    if fault == "no_node":
        bench.node.connected = False
    elif fault == "row_missing":
        rows = rows[:-1]
    elif fault == "wrong_length":
        rows = (*rows[:-1], LoadedRow(1, 1, 0, Slab(rows[-1].slab.slot, 0, 64, 7)))
    elif fault == "taken_back":
        bench.node.generations[rows[0].slab.slot] += 1
    else:
        rows = tuple(LoadedRow(row.segment, row.part, 1, row.slab) for row in rows)
    bench.work(loads=(PrefixLoad("r", 0, 512, TABLES, rows),))
    assert bench.results() == ({"r"}, {"r"})
    assert bench.results() == (set(), set())


def test_a_worker_whose_tensors_differ_fails_every_receive_and_saves_nothing(plan: KVPlan) -> None:
    node = NodePeer()
    side = WorkerSide(node, plan, 0, 8, "auto")  # type: ignore[arg-type]
    side.register({}, BLOCKS)
    save = SegmentSave("s", 0, (0, 1), ((1, 2), (3, 4), (5, 6)))
    load = PrefixLoad("r", 0, 256, TABLES, ())
    metadata = StepMetadata(RegisterLayout(plan.layout(FINGERPRINT), ENGINE), (load,), (save,))
    side.load(metadata)
    side.save(metadata)
    results = side.transfer_results()
    assert (results.finished_recving, results.failed_recving) == ({"r"}, {"r"})
    assert not node.of(RowStaged)


def test_a_filled_segment_is_staged_part_by_part(plan: KVPlan) -> None:
    bench = Bench(plan)
    bench.work(saves=(SegmentSave("r", 3, (0, 1), ((1, 2), (3, 4), (5, 6))),))
    full, window = bench.node.of(RowStaged)
    assert [(m.request_id, m.segment, m.part, m.rank) for m in (full, window)] == [("r", 3, 0, 0), ("r", 3, 1, 0)]
    row = bytes(bench.node.view(full.slab))
    assert row == b"".join(bench.bytes_of(name, block) for block in (5, 6) for name in ("f.0", "f.1"))


def test_the_node_knows_layout_and_engine_of_the_scheduler_before_the_first_row(plan: KVPlan) -> None:
    bench = Bench(plan)
    bench.work(saves=(SegmentSave("r", 0, (0,), ((1, 2), (3, 4), (5, 6))),))
    kinds = [type(message) for message in bench.node.sent]
    assert kinds.index(RegisterLayout) < kinds.index(WantStaging) < kinds.index(RowStaged)
    assert [message.engine for message in bench.node.of(RegisterLayout)] == [NO_ENGINE, ENGINE]
    assert bench.node.of(RegisterLayout)[-1].layout == plan.layout(FINGERPRINT)
    assert kinds.index(RowStaged) > max(i for i, kind in enumerate(kinds) if kind is RegisterLayout)


def test_without_slabs_a_segment_is_skipped_and_counted(plan: KVPlan) -> None:
    bench = Bench(plan, NodePeer(grants=False))
    bench.work(saves=(SegmentSave("r", 0, (0, 1), ((1, 2), (3, 4), (5, 6))),))
    assert not bench.node.of(RowStaged)
    assert bench.side.stats.data["hyperspace_l2_saves_total"] == {"skipped|no_slab": 2}


def test_a_device_without_room_for_a_row_costs_a_miss_and_no_slab(plan: KVPlan) -> None:
    bench = Bench(plan)
    bench.side._copier = FullDevice()
    load = PrefixLoad("r", 0, 512, TABLES, bench.rows(2))
    save = SegmentSave("r", 0, (0, 1), ((1, 2), (3, 4), (5, 6)))
    for _ in range(20):
        bench.work(loads=(load,), saves=(save,))
        assert bench.results() == ({"r"}, {"r"})
    assert bench.side.stats.data["hyperspace_l2_saves_total"] == {"skipped|no_memory": 40}


class FullDevice:
    """A copier on a device whose memory is all vLLM's."""

    def gather(self, *_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    scatter = gather

    def after_copies(self, done: Callable[[bool], None]) -> None:
        done(True)


def test_slabs_asked_for_are_bounded_and_not_asked_for_twice(plan: KVPlan) -> None:
    bench = Bench(plan, NodePeer(grants=False))
    for _ in range(3):
        bench.work(saves=(SegmentSave("r", 0, (0,), ((1, 2), (3, 4), (5, 6))),))
    assert [m.count for m in bench.node.of(WantStaging)] == [16, 16]
    assert WorkerSide(NodePeer(), plan, 0, 1000, "auto")._slabs_wanted == SEGMENTS_STAGED_MAX  # type: ignore[arg-type]


def test_slabs_of_a_lost_session_are_never_staged(plan: KVPlan) -> None:
    bench = Bench(plan)
    bench.side._take_grants()
    assert any(bench.side._slabs.values())
    bench.node.epoch, bench.node.grants = 2, False
    bench.work(saves=(SegmentSave("r", 0, (0, 1), ((1, 2), (3, 4), (5, 6))),))
    assert not bench.node.of(RowStaged)


def test_a_worker_says_that_it_has_left_the_slabs_of_a_lost_session_alone(plan: KVPlan, tmp_path: Path) -> None:
    bench, session = Bench(plan), bytes(16)
    bench.node.earlier_locks = [SessionLock(tmp_path, session)]
    assert look(tmp_path, session) == "held"
    bench.node.epoch = 2
    bench.work(saves=(SegmentSave("r", 0, (0, 1), ((1, 2), (3, 4), (5, 6))),))
    assert look(tmp_path, session) == "over"
    assert look(tmp_path, session) == "unknown"


def test_a_slab_that_the_node_took_back_while_we_wrote_is_not_staged(plan: KVPlan) -> None:
    bench = Bench(plan)
    bench.side._take_grants()
    for slot in bench.node.generations:
        bench.node.generations[slot] = 8
    bench.work(saves=(SegmentSave("r", 0, (0,), ((1, 2), (3, 4), (5, 6))),))
    assert not bench.node.of(RowStaged)


def test_a_layout_other_than_the_schedulers_turns_saving_off(plan: KVPlan) -> None:
    bench = Bench(plan)
    other = StepMetadata(
        RegisterLayout(plan_kv(engine(ranks=2), hybrid_cache()).layout(FINGERPRINT), ENGINE),
        (),
        (SegmentSave("r", 0, (0,), ((1, 2), (3, 4), (5, 6))),),
    )
    bench.side.save(other)
    assert not bench.node.of(RowStaged)
    bench.work(loads=(PrefixLoad("r", 0, 256, TABLES, bench.rows(1)),))
    assert bench.results() == ({"r"}, {"r"})


def test_steps_without_work_talk_to_nobody(plan: KVPlan) -> None:
    bench = Bench(plan)
    sent = len(bench.node.sent)
    for _ in range(100):
        bench.side.load(IDLE)
        bench.side.save(IDLE)
        assert bench.results() == (set(), set())
    assert len(bench.node.sent) == sent


def test_a_step_without_work_costs_less_than_50_microseconds(plan: KVPlan) -> None:
    bench = Bench(plan)

    def steps() -> float:
        start = time.perf_counter()
        for _ in range(200):
            bench.side.load(IDLE)
            bench.side.save(IDLE)
            bench.side.transfer_results()
        return (time.perf_counter() - start) / 200

    assert min(steps() for _ in range(20)) < 50e-6  # the least disturbed of them: the machine has other work too


# ---- On a device: copies that end later, on a thread, or never.


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


def load_of(bench: Bench, request_id: str) -> PrefixLoad:
    return PrefixLoad(request_id, 0, 512, TABLES, bench.rows(2))


SAVE = SegmentSave("s", 0, (0, 1), ((1, 2), (3, 4), (5, 6)))


def test_a_load_is_reported_when_its_copies_have_ended_and_not_before(device: DeviceBench) -> None:
    device.lane.open.clear()
    device.work(loads=(load_of(device, "r"),))
    assert device.results() == (set(), set())
    device.lane.open.set()
    assert device.settled() == ({"r"}, set())
    assert device.bytes_of("f.0", 9) == bytes([1]) * 8192
    assert device.settled() == (set(), set())


def test_copies_that_the_device_fails_are_reported_once_each_and_as_failed(device: DeviceBench) -> None:
    device.lane.open.clear()
    device.lane.broken = True
    device.work(loads=(load_of(device, "a"), load_of(device, "b")))
    assert device.results() == (set(), set())
    device.lane.open.set()
    assert device.settled() == ({"a", "b"}, {"a", "b"})
    assert device.settled() == (set(), set())
    assert device.side.stats.data["hyperspace_l2_loads_total"] == {"copy_failed": 2}


def test_after_the_device_has_failed_once_nothing_of_it_is_believed(device: DeviceBench) -> None:
    device.lane.broken = True
    device.work(loads=(load_of(device, "a"),))
    assert device.settled() == ({"a"}, {"a"})
    device.lane.broken = False
    device.work(loads=(load_of(device, "b"),), saves=(SAVE,))
    assert device.settled() == ({"b"}, {"b"})
    assert not device.node.of(RowStaged)


def test_a_row_that_the_device_fails_to_hand_over_is_not_staged_and_costs_no_slab(device: DeviceBench) -> None:
    device.lane.broken = True
    device.work(saves=(SAVE,))
    device.settled()
    slabs = {size: len(slabs) for size, slabs in device.side._slabs.items()}
    for _ in range(20):
        device.work(saves=(SAVE,))
        device.settled()
    assert not device.node.of(RowStaged)
    assert all(len(device.side._slabs[size]) >= count for size, count in slabs.items())


def test_a_device_that_cant_even_mark_its_stream_fails_the_load_after_the_copies_before_it(device: DeviceBench) -> None:
    device.lane.open.clear()
    device.work(loads=(load_of(device, "a"),))
    device.lane.record_fails = True
    device.work(loads=(load_of(device, "b"),))
    assert device.results() == (set(), set())
    device.lane.open.set()
    device.lane.record_fails = False
    assert device.settled() == ({"a", "b"}, {"b"})


def test_a_load_that_fails_half_way_is_reported_when_its_first_copies_have_ended(device: DeviceBench) -> None:
    """vLLM gives the blocks of a failed load to others at once."""
    load = load_of(device, "r")
    device.lane.open.clear()
    device.work(loads=(PrefixLoad("r", 0, 512, TABLES, load.rows[:-1]),))
    assert device.lane.marks > 1  # copies, and the mark after them
    assert device.results() == (set(), set())
    device.lane.open.set()
    assert device.settled() == ({"r"}, {"r"})
    assert device.side.stats.data["hyperspace_l2_loads_total"] == {"row_missing": 1}


def test_a_copy_that_the_device_refuses_at_once_is_a_failed_load_and_a_skipped_save(
    device: DeviceBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("CUDA error: invalid configuration argument")

    monkeypatch.setattr(TorchPages, "scatter", refuse)
    monkeypatch.setattr(TorchPages, "gather", refuse)
    device.work(loads=(load_of(device, "r"),), saves=(SAVE,))
    assert device.settled() == ({"r"}, {"r"})
    assert device.side.stats.data["hyperspace_l2_saves_total"] == {"skipped|copy_failed": 2}
    assert not device.node.of(RowStaged)


def test_a_report_that_fails_leaves_the_copy_thread_alive(device: DeviceBench, monkeypatch: pytest.MonkeyPatch) -> None:
    device.side._take_grants()

    def explode(slab: Slab) -> bool:
        raise OSError("no such slab")

    monkeypatch.setattr(device.node, "is_current", explode)
    device.side._stage(SAVE, 0)
    monkeypatch.undo()
    device.work(loads=(load_of(device, "r"),))
    assert device.settled() == ({"r"}, set())


def test_a_loads_memory_is_kept_while_the_device_reads_it_and_let_go_when_idle(
    device: DeviceBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged: list[weakref.ref[torch.Tensor]] = []
    original = device.copier._staging

    def staging(row: memoryview) -> torch.Tensor:
        tensor = original(row)
        staged.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(device.copier, "_staging", staging)
    device.lane.open.clear()
    device.work(loads=(load_of(device, "r"),))
    assert staged
    assert all(reference() is not None for reference in staged)
    device.lane.open.set()
    device.settled()
    deadline = time.monotonic() + 5
    while any(reference() is not None for reference in staged) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert all(reference() is None for reference in staged)
