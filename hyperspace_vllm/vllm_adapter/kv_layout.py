"""How vLLM's paged KV becomes rows: which layers form a part, and in which order a row holds their blocks.

A row is one segment of one part on one rank. With `blocks` = segment_tokens / block_tokens and the part's layers in
order (group by group, names sorted within a group):

    row = for block 0 .. blocks-1 of the segment:  for each layer of the part:  the layer's whole block

so that a load can start at any block inside a segment. A layer's block is the bytes of its view `[blocks, ...]` at one
block id, in the view's logical order whatever its strides are: groups alias one allocation, so a group is only ever
copied through its own layers. All groups of a part have one block size, otherwise L2 is off.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
    group_kernel_blocks,
)

from ..core.prefix.segment import segment_tokens
from ..core.records.errors import Refused
from ..core.records.layout import Layout, Part
from ..core.records.limits import PARTS_MAX, RANKS_MAX, ROW_BYTES_MAX
from .older_vllm import FAILED_LOADS_HAVE_NAMES, lies_in_host_memory, replayed_tokens


@dataclass(frozen=True, slots=True)
class LayerSlot:
    """The place of one layer's block within a block of the row: `page_bytes` at `offset`."""

    name: str
    group: int  # KV cache group, index into the block tables
    page_bytes: int
    offset: int


@dataclass(frozen=True, slots=True)
class PartPlan:
    """One part: `block_row_bytes` is the bytes of one block of `block_tokens` tokens, for all its layers."""

    window_tokens: int  # 0: full attention
    block_tokens: int
    layers: tuple[LayerSlot, ...]
    block_row_bytes: int

    @property
    def groups(self) -> tuple[int, ...]:
        """The KV cache groups of its layers, each once."""
        return tuple(sorted({layer.group for layer in self.layers}))

    def first_needed_block(self, end_token: int) -> int:
        """The first block inside the window of the token at `end_token`: vLLM frees the blocks before it."""
        if not self.window_tokens:
            return 0
        return max(end_token - (self.window_tokens - 1), 0) // self.block_tokens


@dataclass(frozen=True, slots=True)
class KVPlan:
    """The whole model's KV as rows, the same on scheduler and workers; `ranks` is the tensor-parallel size."""

    segment_tokens: int
    scheduler_block_tokens: int
    parts: tuple[PartPlan, ...]
    ranks: int

    def row_bytes(self, part: int) -> int:
        """Bytes of one rank's row of a part."""
        plan = self.parts[part]
        return plan.block_row_bytes * (self.segment_tokens // plan.block_tokens)

    def layout(self, fingerprint: bytes) -> Layout:
        """The layout as the node is told it."""
        parts = tuple(Part(plan.window_tokens, self.row_bytes(i)) for i, plan in enumerate(self.parts))
        return Layout(fingerprint, self.segment_tokens, parts, self.ranks)


def plan_kv(config: VllmConfig, kv_cache: KVCacheConfig) -> KVPlan:
    """The plan for this engine; `Refused` names what L2 can't carry (the caller turns L2 off and logs it)."""
    scheduler_block_tokens, _ = resolve_kv_cache_block_sizes(kv_cache, config)
    ranks = config.parallel_config.tensor_parallel_size
    if len(kv_cache.kv_cache_groups) > 1 and not FAILED_LOADS_HAVE_NAMES:
        raise Refused("unsupported", "several KV cache groups: a load that fails would stop this vLLM, 0.30 goes on")
    by_window: dict[int, list[int]] = {}
    for index, group in enumerate(kv_cache.kv_cache_groups):
        if not group.enable_kv_transfer or lies_in_host_memory(group):
            raise Refused("kv_group", f"group {index} holds KV that vLLM doesn't let connectors move")
        by_window.setdefault(window_of(group.kv_cache_spec), []).append(index)
    if not 1 <= len(by_window) <= PARTS_MAX or ranks > RANKS_MAX:
        raise Refused("kv_group", f"{len(by_window)} attention reaches on {ranks} ranks")
    parts = tuple(_part(kv_cache, window, by_window[window]) for window in sorted(by_window))
    tokens = segment_tokens([part.block_tokens for part in parts], scheduler_block_tokens)
    plan = KVPlan(tokens, scheduler_block_tokens, parts, ranks)
    for number in range(len(parts)):
        if plan.row_bytes(number) > ROW_BYTES_MAX:
            raise Refused("row_bytes", f"a row of {plan.row_bytes(number)} bytes, at most {ROW_BYTES_MAX}")
    return plan


def estimate_prompt_bytes(config: VllmConfig) -> int:
    """Estimate the KV bytes of a max_model_len prompt on all ranks before vLLM plans; every layer counts all of it."""
    model, parallel = config.model_config, config.parallel_config
    value = kv_cache_dtype_str_to_dtype(config.cache_config.cache_dtype, model).itemsize
    heads = model.get_num_kv_heads(parallel) * parallel.tensor_parallel_size
    layer_bytes = (1 if model.use_mla else 2) * heads * model.get_head_size() * value
    return int(model.get_num_layers(parallel) * layer_bytes * model.max_model_len)


def window_of(spec: KVCacheSpec) -> int:
    """Attention reach in tokens, 0 for full attention; `Refused` for state that isn't one entry per token."""
    specs = list(spec.kv_cache_specs.values()) if isinstance(spec, UniformTypeKVCacheSpecs) else [spec]
    windows = set()
    for one in specs:
        # Exact types: subclasses (ring buffers, sinks, hidden states, replayed windows) keep other state too.
        exact = type(one)
        if (
            isinstance(one, SlidingWindowSpec)
            and exact in (SlidingWindowSpec, SlidingWindowMLASpec)
            and not replayed_tokens(one)
        ):
            windows.add(one.sliding_window)
        elif exact in (FullAttentionSpec, MLAAttentionSpec) and not getattr(one, "non_causal", False):
            windows.add(0)
        else:
            raise Refused("kv_group", f"{type(one).__name__} layers")
    if len(windows) != 1:
        raise Refused("kv_group", f"one group with the windows {sorted(windows)}")
    return int(windows.pop())


def block_views(plan: KVPlan, kv_caches: Mapping[str, torch.Tensor], num_blocks: int) -> dict[str, torch.Tensor]:
    """Each planned layer's cache as bytes `[num_blocks, ..., page bytes]`; `Refused` where the worker's differ."""
    views = {}
    for part in plan.parts:
        for layer in part.layers:
            cache = kv_caches.get(layer.name)
            if cache is None:
                raise Refused("layout", f"{layer.name} has no KV cache here")
            view = _blocks_first(layer.name, cache, num_blocks).view(torch.uint8)
            if view[0].numel() != layer.page_bytes:
                raise Refused("layout", f"{layer.name}: {view[0].numel()} bytes a block, planned {layer.page_bytes}")
            views[layer.name] = view
    return views


def _blocks_first(name: str, cache: torch.Tensor, num_blocks: int) -> torch.Tensor:
    if cache.shape[0] % num_blocks == 0:
        return group_kernel_blocks(cache, num_blocks)
    if cache.dim() > 1 and cache.shape[1] == num_blocks:  # [K and V, blocks, ...]
        return cache.movedim(1, 0)
    raise Refused("layout", f"{name}: no dimension of {tuple(cache.shape)} counts {num_blocks} blocks")


def _part(kv_cache: KVCacheConfig, window: int, groups: Sequence[int]) -> PartPlan:
    specs = {index: kv_cache.kv_cache_groups[index].kv_cache_spec for index in groups}
    block_sizes = {spec.block_size for spec in specs.values()}
    if len(block_sizes) != 1:
        raise Refused("kv_group", f"block sizes {sorted(block_sizes)} in one part")
    layers, offset = [], 0
    for index in groups:
        for name in sorted(kv_cache.kv_cache_groups[index].layer_names):
            size = page_bytes(specs[index], name)
            layers.append(LayerSlot(name, index, size, offset))
            offset += size
    return PartPlan(window, block_sizes.pop(), tuple(layers), offset)


def page_bytes(spec: KVCacheSpec, layer: str) -> int:
    """Bytes of one block of one layer on one rank, without vLLM's padding."""
    if isinstance(spec, UniformTypeKVCacheSpecs):
        # The scheduler's copy keeps one representative spec; a worker whose layers differ refuses the plan.
        spec = spec.kv_cache_specs.get(layer, spec.first_spec)
    assert isinstance(spec, AttentionSpec)  # `window_of` accepted no other
    return int(spec.unpadded_page_size_bytes)


def describe_group(spec: KVCacheSpec) -> dict[str, Any]:
    """The spec as JSON values, for the KV fingerprint."""
    specs = spec.kv_cache_specs if isinstance(spec, UniformTypeKVCacheSpecs) else {"": spec}
    return {name: repr(one) for name, one in sorted(specs.items())}
