"""Rows from paged KV and back: order, aliasing, null blocks, and what L2 refuses to carry."""

import contextlib
import importlib
import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    MambaSpec,
    SlidingWindowSpec,
    create_kv_cache_views,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from hyperspace_vllm import native_cuda
from hyperspace_vllm.core.records.errors import Refused
from hyperspace_vllm.vllm_adapter.kv_copy import (
    DeviceCopier,
    HostCopier,
    KernelPages,
    Lane,
    Pages,
    TorchPages,
    copier_for,
)
from hyperspace_vllm.vllm_adapter.kv_layout import KVPlan, block_views, plan_kv

BLOCKS = 12
SHAPE: dict[str, Any] = {"num_kv_heads": 2, "head_size": 8, "dtype": torch.bfloat16}


def full(block_size: int = 128) -> FullAttentionSpec:
    return FullAttentionSpec(block_size=block_size, **SHAPE)


def window(tokens: int, block_size: int = 128) -> SlidingWindowSpec:
    return SlidingWindowSpec(block_size=block_size, sliding_window=tokens, **SHAPE)


def engine(block_size: int = 128, ranks: int = 1) -> SimpleNamespace:
    """As much of a VllmConfig as a plan reads (its constructor wants a model)."""
    return SimpleNamespace(
        cache_config=SimpleNamespace(block_size=block_size, prefix_match_unit=None, enable_prefix_caching=True),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks, decode_context_parallel_size=1),
        kv_transfer_config=object(),
    )


def hybrid_cache() -> KVCacheConfig:
    """Gemma's shape in small: two window groups and a full one, one layer of each sharing an allocation."""
    groups = [
        KVCacheGroupSpec(["w.1", "w.0"], window(512)),
        KVCacheGroupSpec(["w.2", "w.3"], window(512)),
        KVCacheGroupSpec(["f.0", "f.1"], full()),
    ]
    page = full().page_size_bytes
    tensors = [KVCacheTensor(2 * page * BLOCKS, group.layer_names, page * BLOCKS, page) for group in groups]
    return KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=tensors, kv_cache_groups=groups)


def caches(config: KVCacheConfig, layout: KVCacheLayout = KVCacheLayout.LBHNC) -> dict[str, torch.Tensor]:
    """The views that vLLM makes: all groups over one allocation of random bytes."""
    generator = torch.Generator().manual_seed(7)
    size = config.kv_cache_tensors[0].size
    raw = torch.randint(-128, 128, (size,), dtype=torch.int8, generator=generator)
    views = {}
    for group, tensor in zip(config.kv_cache_groups, config.kv_cache_tensors, strict=True):
        if layout is KVCacheLayout.LHBNC:  # a block's heads lie apart, one head of all blocks after the other
            tensor = replace(tensor, block_stride=tensor.block_stride // SHAPE["num_kv_heads"])
        made = create_kv_cache_views(raw, group.kv_cache_spec, BLOCKS, layout, tensor)
        views.update(dict(zip(tensor.layers, made, strict=True)))
    return views


@pytest.fixture
def plan() -> KVPlan:
    return plan_kv(engine(), hybrid_cache())


class NoLane:
    """Host memory has no streams: whatever was enqueued is done."""

    def enter(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def record(self) -> Callable[[], None]:
        return lambda: None


def device_copier(pages: Pages, lane: Lane | None = None) -> DeviceCopier:
    return DeviceCopier(pages, lane or NoLane(), torch.device("cpu"), pin=False)


def by_torch(plan: KVPlan, views: dict[str, torch.Tensor]) -> DeviceCopier:
    return device_copier(TorchPages(views, pin=False))


def by_kernels(plan: KVPlan, views: dict[str, torch.Tensor]) -> DeviceCopier:
    return device_copier(KernelPages(plan, views, lambda: 0))


def by_host(plan: KVPlan, views: dict[str, torch.Tensor]) -> HostCopier:
    return HostCopier(views)


@pytest.fixture(autouse=True)
def kernels_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their host build takes tensors in host memory."""
    monkeypatch.setattr(native_cuda, "_cuda", importlib.import_module("hyperspace_vllm._native_cuda_host"))


MakeCopier = Callable[..., HostCopier | DeviceCopier]
COPIERS: list[MakeCopier] = [by_host, by_torch, by_kernels]


def gather(copier: HostCopier | DeviceCopier, part: object, ids: dict[int, list[int]], size: int) -> bytes:
    row, done = bytearray(b"\xee" * size), threading.Event()
    copier.gather(part, ids, memoryview(row), lambda landed: done.set() if landed else None)  # type: ignore[arg-type]
    assert done.wait(5)
    return bytes(row)


def test_parts_follow_attention_reach_and_layers_follow_group_then_name(plan: KVPlan) -> None:
    assert [(p.window_tokens, [layer.name for layer in p.layers]) for p in plan.parts] == [
        (0, ["f.0", "f.1"]),
        (512, ["w.0", "w.1", "w.2", "w.3"]),
    ]
    assert plan.segment_tokens == 256
    assert [plan.row_bytes(0), plan.row_bytes(1)] == [2 * 2 * 8192, 2 * 4 * 8192]


@pytest.mark.parametrize("make", COPIERS)
@pytest.mark.parametrize("layout", [KVCacheLayout.LBHNC, KVCacheLayout.LBNHC, KVCacheLayout.LHBNC])
def test_a_row_is_block_by_block_and_layer_by_layer(make: MakeCopier, layout: KVCacheLayout, plan: KVPlan) -> None:
    tensors = caches(hybrid_cache(), layout)
    copier = make(plan, block_views(plan, tensors, BLOCKS))
    ids = {0: [3, 9], 1: [4, 1]}

    row = gather(copier, plan.parts[1], ids, plan.row_bytes(1))

    expected = b"".join(
        tensors[name][ids[group][block]].contiguous().view(torch.uint8).numpy().tobytes()
        for block in (0, 1)
        for name, group in (("w.0", 0), ("w.1", 0), ("w.2", 1), ("w.3", 1))
    )
    assert row == expected
    copier.close()


@pytest.mark.parametrize("make", COPIERS)
def test_a_row_scattered_into_other_blocks_leaves_the_rest_alone(make: MakeCopier, plan: KVPlan) -> None:
    source, target = caches(hybrid_cache()), caches(hybrid_cache())
    for view in target.values():
        view.view(torch.uint8).fill_(0x55)
    part = plan.parts[1]
    with contextlib.closing(make(plan, block_views(plan, source, BLOCKS))) as copier:
        row = gather(copier, part, {0: [3, 9], 1: [4, 1]}, plan.row_bytes(1))

    copier = make(plan, block_views(plan, target, BLOCKS))
    done = threading.Event()
    copier.scatter(part, {0: [7, 2], 1: [5, 6]}, memoryview(row))
    copier.after_copies(lambda landed: done.set() if landed else None)
    assert done.wait(5)

    assert gather(copier, part, {0: [7, 2], 1: [5, 6]}, plan.row_bytes(1)) == row
    untouched = [target["w.0"].view(torch.uint8)[block] for block in (0, 1, 3, 4, 8, 9, 10, 11)]
    assert all(bool((view == 0x55).all()) for view in untouched)
    copier.close()


@pytest.mark.parametrize("make", COPIERS)
def test_the_null_block_is_gathered_as_zeros_and_never_written(make: MakeCopier, plan: KVPlan) -> None:
    tensors = caches(hybrid_cache())
    copier, part = make(plan, block_views(plan, tensors, BLOCKS)), plan.parts[1]
    row = gather(copier, part, {0: [0, 9], 1: [0, 1]}, plan.row_bytes(1))
    assert row[: part.block_row_bytes] == bytes(part.block_row_bytes)
    assert row[part.block_row_bytes :] == gather(copier, part, {0: [9], 1: [1]}, part.block_row_bytes)

    null = tensors["w.0"][0].clone()
    done = threading.Event()
    copier.scatter(part, {0: [0, 9], 1: [0, 1]}, memoryview(b"\x33" * len(row)))
    copier.after_copies(lambda landed: done.set() if landed else None)
    assert done.wait(5)
    assert torch.equal(tensors["w.0"][0].view(torch.uint8), null.view(torch.uint8))
    copier.close()


def test_a_load_may_start_at_any_block_of_a_segment(plan: KVPlan) -> None:
    source, target = caches(hybrid_cache()), caches(hybrid_cache())
    part = plan.parts[0]
    row = gather(HostCopier(block_views(plan, source, BLOCKS)), part, {2: [3, 9]}, plan.row_bytes(0))
    copier = HostCopier(block_views(plan, target, BLOCKS))
    copier.scatter(part, {2: [8]}, memoryview(row)[part.block_row_bytes :])
    for name in ("f.0", "f.1"):
        assert torch.equal(target[name][8].view(torch.uint8), source[name][9].view(torch.uint8))


def test_kernel_blocks_that_split_a_block_are_copied_together(plan: KVPlan) -> None:
    config = hybrid_cache()
    whole = caches(config)
    # vLLM shows a backend 32-token kernel blocks as four times as many blocks of a quarter of the size.
    split = {
        name: view.view(torch.uint8).reshape(BLOCKS, -1).reshape(BLOCKS * 4, 1, 1, -1) for name, view in whole.items()
    }
    ids = {2: [3, 9]}
    rows = [
        gather(HostCopier(block_views(plan, views, BLOCKS)), plan.parts[0], ids, plan.row_bytes(0))
        for views in (whole, split)
    ]
    assert rows[0] == rows[1]


def test_blocks_before_the_window_of_the_end_are_not_needed(plan: KVPlan) -> None:
    full_part, window_part = plan.parts
    assert [full_part.first_needed_block(end) for end in (256, 1024)] == [0, 0]
    # The token at 1024 sees 513..1024: 511 tokens before it.
    assert [window_part.first_needed_block(end) for end in (256, 512, 640, 1024)] == [0, 0, 1, 4]


@pytest.mark.parametrize(
    ("groups", "reason"),
    [
        ([KVCacheGroupSpec(["m"], MambaSpec(block_size=128, shapes=((4,),), dtypes=(torch.float32,)))], "MambaSpec"),
        ([KVCacheGroupSpec(["a"], window(64, 16)), KVCacheGroupSpec(["b"], window(64, 32))], "block sizes"),
        ([KVCacheGroupSpec(["a"], full(), enable_kv_transfer=False)], "doesn't let connectors"),
    ],
)
def test_what_l2_cant_carry_is_refused_by_name(groups: list[KVCacheGroupSpec], reason: str) -> None:
    config = KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=groups)
    with pytest.raises(Refused, match=reason):
        plan_kv(engine(), config)


def test_a_worker_whose_tensors_differ_from_the_plan_refuses_them(plan: KVPlan) -> None:
    tensors = caches(hybrid_cache())
    with pytest.raises(Refused, match=r"f\.1 has no KV cache"):
        block_views(plan, {name: view for name, view in tensors.items() if name != "f.1"}, BLOCKS)
    tensors["w.2"] = torch.zeros(BLOCKS, 2, 128, 24, dtype=torch.bfloat16)
    with pytest.raises(Refused, match=r"w\.2: 12288 bytes a block, planned 8192"):
        block_views(plan, tensors, BLOCKS)


def test_an_old_style_cache_with_k_and_v_outermost_is_copied_by_its_block_dimension(plan: KVPlan) -> None:
    tensors = caches(hybrid_cache())
    tensors["f.0"] = torch.arange(2 * BLOCKS * 2048, dtype=torch.int32).to(torch.bfloat16).reshape(2, BLOCKS, 128, 16)
    row = gather(HostCopier(block_views(plan, tensors, BLOCKS)), plan.parts[0], {2: [5, 6]}, plan.row_bytes(0))
    first = np.frombuffer(row, np.uint8)[:8192]
    assert first.tobytes() == tensors["f.0"][:, 5].contiguous().view(torch.uint8).numpy().tobytes()


def test_kernels_are_used_only_where_the_kv_is_on_a_gpu_and_demanded_only_there(plan: KVPlan) -> None:
    views = block_views(plan, caches(hybrid_cache()), BLOCKS)
    assert all(isinstance(copier_for(plan, views, choice), HostCopier) for choice in ("auto", "cpu"))
    with pytest.raises(Refused, match="KV is in host memory"):
        copier_for(plan, views, "cuda")


def test_kernels_that_cant_carry_a_plan_are_refused_by_value_error(plan: KVPlan) -> None:
    views = block_views(plan, caches(hybrid_cache()), BLOCKS)
    with pytest.raises(ValueError, match="1001 block ids, at most 768"):
        by_kernels(replace(plan, segment_tokens=1001 * 128), views)
