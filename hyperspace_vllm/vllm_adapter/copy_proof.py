"""Checks the copier before a worker shares its KV: known bytes go into vLLM's KV cache and must come back.

When vLLM registers its KV caches every block is free, so the last ones may be written; their old content is put back.
"""

import threading
from collections.abc import Mapping

import numpy as np
import torch

from ..core.records.errors import Refused
from .kv_copy import BlockIds, Copier
from .kv_layout import KVPlan, PartPlan

COPY_S = 30.0  # a copy of one block takes milliseconds


def prove_copies(copier: Copier, plan: KVPlan, views: Mapping[str, torch.Tensor], num_blocks: int) -> None:
    """`Refused` where a row that was copied into the KV cache isn't in its layers' blocks, or doesn't come back."""
    for part in plan.parts:
        # Groups may share memory under the same block id, so each writes a block of its own. 0 is the null block.
        ids = {group: (num_blocks - 1 - place,) for place, group in enumerate(part.groups)}
        if num_blocks <= len(ids):
            raise Refused("layout", f"vLLM has {num_blocks} blocks of KV")
        before = _gathered(copier, part, ids)
        known = (np.arange(part.block_row_bytes, dtype=np.uint32) * 197 % 251).astype(np.uint8).tobytes()
        try:
            _scatter(copier, part, ids, known)
            there = all(
                views[layer.name][ids[layer.group][0]].contiguous().cpu().numpy().tobytes()
                == known[layer.offset : layer.offset + layer.page_bytes]
                for layer in part.layers
            )
            back = _gathered(copier, part, ids)
        finally:
            _scatter(copier, part, ids, before)
        if not there or back != known:
            raise Refused("layout", "what is copied into vLLM's KV cache isn't found there")


def _gathered(copier: Copier, part: PartPlan, ids: BlockIds) -> bytes:
    row, copied = bytearray(part.block_row_bytes), _Copied()
    copier.gather(part, ids, memoryview(row), copied)
    copied.wait()
    return bytes(row)


def _scatter(copier: Copier, part: PartPlan, ids: BlockIds, row: bytes) -> None:
    copied = _Copied()
    copier.scatter(part, ids, memoryview(row))
    copier.after_copies(copied)
    copied.wait()


class _Copied:
    """Receives the end of one copy."""

    def __init__(self) -> None:
        self._over, self._landed = threading.Event(), False

    def __call__(self, landed: bool) -> None:
        self._landed = landed
        self._over.set()

    def wait(self) -> None:
        if not self._over.wait(COPY_S) or not self._landed:
            raise Refused("layout", "the device doesn't copy KV")
