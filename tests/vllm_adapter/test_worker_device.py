"""A worker's half on a device: copies that end later, on a thread, or never."""

import weakref

import pytest
import torch

from hyperspace_vllm.core.local.kv_messages import RowStaged
from hyperspace_vllm.core.local.slab import Slab
from hyperspace_vllm.vllm_adapter.kv_copy import TorchPages
from hyperspace_vllm.vllm_adapter.metadata import PrefixLoad, SegmentSave
from tests.support.until import until
from tests.support.worker_bench import TABLES, Bench, DeviceBench


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
    until(lambda: all(reference() is None for reference in staged), 5)
