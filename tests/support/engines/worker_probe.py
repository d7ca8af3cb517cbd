"""Runs inside vLLM's workers: keeps the raw bytes of every saved or loaded block, read by the test's own code.

It reads the tensors that vLLM registered, block by block and layer by layer, and shares nothing with the adapter's
copiers: a mistake in the payload order would otherwise cancel itself out.
"""

from typing import Any

import torch
from vllm.distributed.kv_transfer import get_kv_transfer_group


class Probe:
    """What one worker saved and loaded since the last `take`: {(layer, block of the prompt): bytes of the block}."""

    def __init__(self, connector: Any) -> None:
        self.saved: dict[tuple[str, int], bytes] = {}
        self.loaded: dict[tuple[str, int], bytes] = {}
        self._side = connector._worker
        self._groups = {
            name: index
            for index, group in enumerate(connector._kv_cache_config.kv_cache_groups)
            for name in group.layer_names
        }
        self._caches: dict[str, torch.Tensor] = {}
        context = connector._vllm_config.compilation_config.static_forward_context
        for name in self._groups:
            cache = context[name].kv_cache
            self._caches[name] = cache[0] if isinstance(cache, list) else cache
        self._save, self._load = self._side.save, self._side.load
        self._side.save, self._side.load = self.save, self.load

    def save(self, metadata: Any) -> None:
        for save in metadata.saves:
            plan = self._side._plan
            for number in save.parts:
                part = plan.parts[number]
                first = save.segment * plan.segment_tokens // part.block_tokens
                for layer in part.layers:
                    for index, block in enumerate(save.blocks[layer.group]):
                        self.saved[layer.name, first + index] = self._bytes(layer.name, block)
        self._save(metadata)

    def load(self, metadata: Any) -> None:
        self._load(metadata)
        for load in metadata.loads:
            for part in self._side._plan.parts:
                for layer in part.layers:
                    for index in range(load.start_token // part.block_tokens, load.end_token // part.block_tokens):
                        block = load.blocks[layer.group][index]
                        if block:
                            self.loaded[layer.name, index] = self._bytes(layer.name, block)

    def _bytes(self, layer: str, block: int) -> bytes:
        raw: bytes = self._caches[layer][block].clone().contiguous().view(torch.uint8).numpy().tobytes()
        return raw

    def take(self) -> dict[str, dict[tuple[str, int], bytes]]:
        taken = {"saved": self.saved, "loaded": self.loaded}
        self.saved, self.loaded = {}, {}
        return taken


def install(worker: Any) -> None:
    """Watch this worker's connector."""
    worker.hyperspace_probe = Probe(get_kv_transfer_group())


def take(worker: Any) -> dict[str, dict[tuple[str, int], bytes]]:
    """What this worker copied since the last call."""
    result: dict[str, dict[tuple[str, int], bytes]] = worker.hyperspace_probe.take()
    return result
