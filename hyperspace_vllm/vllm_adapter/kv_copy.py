"""Copies whole blocks between vLLM's paged KV and rows (the payload order is kv_layout.py's).

Both copiers move a run of a segment's blocks for all layers of one part. `ids` are block ids by KV cache group, one per
block of the run; `row` is the run's bytes. A gather zeroes what stands for the null block (id 0), a scatter skips it.
"""

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from .. import native
from .kv_layout import LayerSlot, PartPlan

BlockIds = Mapping[int, Sequence[int]]
Done = Callable[[], None]


class Copier(Protocol):
    """Where the KV lives decides how it is copied."""

    def gather(self, part: PartPlan, ids: BlockIds, row: memoryview, done: Done) -> None:
        """Fill `row`, then call `done`, perhaps later and on another thread; KV may change once this returns."""

    def scatter(self, part: PartPlan, ids: BlockIds, row: memoryview) -> None:
        """Start writing `row` into the blocks; `row` has been read when this returns."""

    def after_copies(self, done: Done) -> None:
        """Call `done` once the copies so far have landed, perhaps later and on another thread."""

    def close(self) -> None:
        """Finish what was started."""


class HostCopier:
    """KV in host memory: copied by one native call, nothing in flight when a call returns."""

    def __init__(self, views: Mapping[str, torch.Tensor]) -> None:
        self._views = {name: view.numpy() for name, view in views.items()}

    def gather(self, part: PartPlan, ids: BlockIds, row: memoryview, done: Done) -> None:
        """Fill `row` and call `done`."""
        native.gather_blocks([self._views[layer.name] for layer in part.layers], _by_layer(part, ids), row)
        done()

    def scatter(self, part: PartPlan, ids: BlockIds, row: memoryview) -> None:
        """Write `row` into the blocks."""
        native.scatter_blocks([self._views[layer.name] for layer in part.layers], _by_layer(part, ids), row)

    def after_copies(self, done: Done) -> None:
        """Call `done`."""
        done()

    def close(self) -> None:
        """Nothing is ever in flight."""


def _by_layer(part: PartPlan, ids: BlockIds) -> list[Sequence[int]]:
    return [ids[layer.group] for layer in part.layers]


class DeviceCopier:
    """KV on an accelerator: one gather kernel per layer into a device row, one asynchronous copy through pinned memory.

    Everything is enqueued on the model's own stream, so blocks are read after this step's forward and written before
    the next one's without any waiting of the host. `record` marks that point and returns what waits for it; one thread
    waits, so that rows are staged while the engine runs on or goes idle.
    """

    def __init__(self, views: Mapping[str, torch.Tensor], record: Callable[[], Callable[[], None]], pin: bool) -> None:
        # Eight bytes at a time where every dimension allows: moving single bytes wastes most of each access.
        wide = all(_in_eights(view) for view in views.values())
        self._unit = torch.int64 if wide else torch.uint8
        self._views = {name: view.view(self._unit) for name, view in views.items()}
        self._device = next(iter(self._views.values())).device
        self._record, self._pin = record, pin
        self._work: queue.SimpleQueue[tuple[Callable[[], None], Done] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._finish, name="hyperspace-kv-copy", daemon=True)
        self._thread.start()

    def gather(self, part: PartPlan, ids: BlockIds, row: memoryview, done: Done) -> None:
        """Enqueue the gather; `row` is filled and `done` called on the copy thread."""
        shape = (len(row) // part.block_row_bytes, part.block_row_bytes // self._unit.itemsize)
        device_row = torch.zeros(shape, dtype=self._unit, device=self._device)
        live = self._live(part, ids)
        for layer in part.layers:
            positions, blocks = live[layer.group]
            pages = self._views[layer.name].index_select(0, blocks).flatten(1)
            device_row[:, self._columns(layer)].index_copy_(0, positions, pages)
        staged = torch.empty(shape, dtype=self._unit, pin_memory=self._pin)
        staged.copy_(device_row, non_blocking=True)

        def finish() -> None:
            np.copyto(np.frombuffer(row, np.uint8), staged.view(torch.uint8).numpy().reshape(-1))
            done()

        self._work.put((self._record(), finish))

    def scatter(self, part: PartPlan, ids: BlockIds, row: memoryview) -> None:
        """Copy `row` to pinned memory, then enqueue its way into the blocks."""
        shape = (len(row) // part.block_row_bytes, part.block_row_bytes // self._unit.itemsize)
        staged = torch.empty(shape, dtype=self._unit, pin_memory=self._pin)
        np.copyto(staged.view(torch.uint8).numpy().reshape(-1), np.frombuffer(row, np.uint8))
        device_row = staged.to(self._device, non_blocking=True)
        live = self._live(part, ids)
        for layer in part.layers:
            positions, blocks = live[layer.group]
            view = self._views[layer.name]
            pages = device_row[:, self._columns(layer)].index_select(0, positions)
            view.index_copy_(0, blocks, pages.unflatten(1, view.shape[1:]))

    def after_copies(self, done: Done) -> None:
        """Call `done` on the copy thread once the stream has come this far."""
        self._work.put((self._record(), done))

    def close(self) -> None:
        """Finish what was started."""
        self._work.put(None)
        self._thread.join(timeout=5)

    def _columns(self, layer: LayerSlot) -> slice:
        size = self._unit.itemsize
        return slice(layer.offset // size, (layer.offset + layer.page_bytes) // size)

    def _live(self, part: PartPlan, ids: BlockIds) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """By group: positions in the run and ids of the blocks that aren't null, on the device."""
        live = {}
        for group in {layer.group for layer in part.layers}:
            pairs = [(position, block) for position, block in enumerate(ids[group]) if block]
            both = torch.tensor(pairs, dtype=torch.int64, pin_memory=self._pin).reshape(-1, 2)
            on_device = both.to(self._device, non_blocking=True)
            live[group] = (on_device[:, 0].contiguous(), on_device[:, 1].contiguous())
        return live

    def _finish(self) -> None:
        while (work := self._work.get()) is not None:
            wait, done = work
            wait()
            done()


def _in_eights(view: torch.Tensor) -> bool:
    """Whether a byte view can be seen as 64-bit words."""
    return (
        all(n % 8 == 0 for n in (view.shape[-1], view.storage_offset(), *view.stride()[:-1])) and view.stride(-1) == 1
    )


def copier_for(views: Mapping[str, torch.Tensor]) -> Copier:
    """The copier for the device that the KV is on."""
    device = next(iter(views.values())).device
    if device.type == "cpu":
        return HostCopier(views)

    def record() -> Callable[[], None]:
        event = torch.Event(device)
        event.record()
        wait: Callable[[], None] = event.synchronize
        return wait

    return DeviceCopier(views, record, pin=True)
