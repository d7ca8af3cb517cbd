"""A worker's half with real tensors and a node that answers, refuses, dies or takes its memory back."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hyperspace_vllm.core.local.kv_messages import NO_ENGINE, RegisterLayout, RowStaged, WantStaging
from hyperspace_vllm.core.local.slab import LoadedRow, Slab
from hyperspace_vllm.session_lock import SessionLock, look
from hyperspace_vllm.vllm_adapter.kv_layout import KVPlan, plan_kv
from hyperspace_vllm.vllm_adapter.metadata import IDLE, PrefixLoad, SegmentSave, StepMetadata
from hyperspace_vllm.vllm_adapter.worker_side import SEGMENTS_STAGED_MAX, WorkerSide
from tests.support.worker_bench import ENGINE, FINGERPRINT, TABLES, Bench, NodePeer
from tests.vllm_adapter.test_kv_layout import BLOCKS, engine, hybrid_cache


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

    def close(self) -> None: ...


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
