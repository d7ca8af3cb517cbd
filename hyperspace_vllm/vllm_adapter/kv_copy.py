"""Copies whole blocks between vLLM's paged KV and rows (kv_layout.py defines the payload order).

Both copiers move a run of a segment's blocks for all layers of one part. `ids` are block ids by KV cache group, one per
block of the run; `row` is the run's bytes. A gather writes zeros for the null block (id 0), a scatter skips it.

On a GPU our own kernels gather and scatter where they were built (native_cuda), torch's operations elsewhere. The node
seals and codes rows on the CPU, although the kernels could: a row's key comes from tokens that the worker hasn't seen
when it gathers, the nonce comes from the object that the node later makes of the row, and the arena serves rows
unsealed, so both the row and its 64 chunks would have to cross the bus: three bytes where it is one now.
"""

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch

from .. import native, native_cuda
from ..core.records.errors import Refused
from .kv_layout import KVPlan, LayerSlot, PartPlan

logger = logging.getLogger("vllm.hyperspace")

BlockIds = Mapping[int, Sequence[int]]
Done = Callable[[bool], None]  # whether the copies completed
EncodeDevice = Literal["auto", "cuda", "cpu"]  # the setting `encode_device`


class Copier(Protocol):
    """Copies KV; the implementation depends on where the KV is."""

    def gather(self, part: PartPlan, ids: BlockIds, row: memoryview, done: Done) -> None:
        """Fill `row`, then call `done`, perhaps later and on another thread; the next step may change the KV."""

    def scatter(self, part: PartPlan, ids: BlockIds, row: memoryview) -> None:
        """Start writing `row` into the blocks; `row` has been read when this returns."""

    def after_copies(self, done: Done) -> None:
        """Call `done` exactly once, whatever happens, when all copies so far have ended; perhaps on another thread."""

    def close(self) -> None:
        """Finish what was started."""


class HostCopier:
    """KV in host memory: one native call copies it, and no copy is in flight when a call returns."""

    def __init__(self, views: Mapping[str, torch.Tensor]) -> None:
        self._views = {name: view.numpy() for name, view in views.items()}

    def gather(self, part: PartPlan, ids: BlockIds, row: memoryview, done: Done) -> None:
        """Fill `row` and call `done`."""
        native.gather_blocks([self._views[layer.name] for layer in part.layers], _by_layer(part, ids), row)
        done(True)

    def scatter(self, part: PartPlan, ids: BlockIds, row: memoryview) -> None:
        """Write `row` into the blocks."""
        native.scatter_blocks([self._views[layer.name] for layer in part.layers], _by_layer(part, ids), row)

    def after_copies(self, done: Done) -> None:
        """Call `done`."""
        done(True)

    def close(self) -> None:
        """Do nothing: no copy is ever in flight."""


def _by_layer(part: PartPlan, ids: BlockIds) -> list[Sequence[int]]:
    return [ids[layer.group] for layer in part.layers]


class Pages(Protocol):
    """The paged KV on a device. Calls enqueue on the current stream; `row` is device memory, as bytes."""

    def gather(self, part: PartPlan, ids: BlockIds, row: torch.Tensor) -> None:
        """Fill `row`."""

    def scatter(self, part: PartPlan, ids: BlockIds, row: torch.Tensor) -> None:
        """Write `row` into the blocks."""


class Lane(Protocol):
    """A stream of our own beside the model's."""

    def enter(self) -> AbstractContextManager[object]:
        """Work enqueued inside runs after everything that the current stream was given so far."""

    def record(self) -> Callable[[], None]:
        """Mark what the lane was given so far; the result waits for it."""


@dataclass(frozen=True, slots=True)
class _Copies:
    """Work for the copy thread: wait, finish, report. `keep` is what the device still reads or writes until then."""

    wait: Callable[[], None]
    finish: Callable[[], None]
    done: Done
    keep: tuple[torch.Tensor, ...] = ()


class DeviceCopier:
    """KV on an accelerator: a row is assembled there and crosses the bus in one copy, through pinned memory.

    A gather is enqueued on the model's own stream: it reads what this step's forward pass wrote, and the next step may
    write the same blocks. Everything else is enqueued on a lane beside it, so that no step waits for the bus; the
    blocks of a load belong to that load alone until `after_copies` has reported it. One thread waits for the lane, so
    that rows are staged while the engine continues or goes idle.
    """

    def __init__(self, pages: Pages, lane: Lane, device: torch.device, pin: bool) -> None:
        self._pages, self._lane, self._device, self._pin = pages, lane, device, pin
        self._failed = False
        self._work: queue.SimpleQueue[_Copies | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._finish, name="hyperspace-kv-copy", daemon=True)
        self._thread.start()

    def gather(self, part: PartPlan, ids: BlockIds, row: memoryview, done: Done) -> None:
        """Enqueue the gather; the copy thread fills `row` and calls `done`."""
        device_row = torch.empty(len(row), dtype=torch.uint8, device=self._device)
        self._pages.gather(part, ids, device_row)
        staged = self._staging(row)
        with self._lane.enter():
            staged.copy_(device_row, non_blocking=True)

        def finish() -> None:
            np.copyto(np.frombuffer(row, np.uint8), staged.numpy())

        self._work.put(_Copies(self._lane.record(), finish, done, (device_row,)))

    def scatter(self, part: PartPlan, ids: BlockIds, row: memoryview) -> None:
        """Copy `row` to pinned memory, then enqueue the copy into the blocks."""
        staged = self._staging(row)
        np.copyto(staged.numpy(), np.frombuffer(row, np.uint8))
        with self._lane.enter():
            device_row = staged.to(self._device, non_blocking=True)
            self._pages.scatter(part, ids, device_row)
        self._work.put(_Copies(self._lane.record(), _nothing, _ignored, (staged, device_row)))

    def after_copies(self, done: Done) -> None:
        """Call `done` on the copy thread once the lane has reached this point."""
        try:
            wait = self._lane.record()
        except RuntimeError as error:  # CUDA's errors persist: the thread will meet it, after the copies before this
            wait = _raising(error)
        self._work.put(_Copies(wait, _nothing, done))

    def close(self) -> None:
        """Finish what was started."""
        self._work.put(None)
        self._thread.join(timeout=5)

    def _staging(self, row: memoryview) -> torch.Tensor:
        return torch.empty(len(row), dtype=torch.uint8, pin_memory=self._pin)

    def _finish(self) -> None:
        while (copies := self._work.get()) is not None:
            landed = self._has_landed(copies)
            try:
                copies.done(landed)
            except Exception:  # any caller's error: the other callers still need their reports
                logger.exception("hyperspace: a finished KV copy couldn't be reported")
            del copies  # while idle, the thread would keep a row of device memory

    def _has_landed(self, copies: _Copies) -> bool:
        # Never raises: a load that is never reported hangs its request for ever, and a dead thread reports none. After
        # one device failure, no copy that went through the device counts as completed.
        try:
            copies.wait()
            if not self._failed:
                copies.finish()
        except Exception:
            if not self._failed:
                logger.exception("hyperspace: the device failed a KV copy; this worker loads and saves no more KV")
            self._failed = True
        return not self._failed


def _nothing() -> None:
    pass


def _ignored(landed: bool) -> None:
    pass  # reported by `after_copies`


def _raising(error: Exception) -> Callable[[], None]:
    def wait() -> None:
        raise error

    return wait


class TorchPages:
    """Copies with torch's operations on any accelerator: one kernel per layer to or from the row."""

    def __init__(self, views: Mapping[str, torch.Tensor], pin: bool) -> None:
        # Eight bytes at a time where every dimension allows it: moving single bytes wastes most of each access.
        wide = all(_in_eights(view) for view in views.values())
        self._unit = torch.int64 if wide else torch.uint8
        self._views = {name: view.view(self._unit) for name, view in views.items()}
        self._device = next(iter(self._views.values())).device
        self._pin = pin

    def gather(self, part: PartPlan, ids: BlockIds, row: torch.Tensor) -> None:
        """Fill `row`."""
        rows = self._by_block(part, row.zero_())
        live = self._live(part, ids)
        for layer in part.layers:
            positions, blocks = live[layer.group]
            pages = self._views[layer.name].index_select(0, blocks).flatten(1)
            rows[:, self._columns(layer)].index_copy_(0, positions, pages)

    def scatter(self, part: PartPlan, ids: BlockIds, row: torch.Tensor) -> None:
        """Write `row` into the blocks."""
        rows = self._by_block(part, row)
        live = self._live(part, ids)
        for layer in part.layers:
            positions, blocks = live[layer.group]
            view = self._views[layer.name]
            pages = rows[:, self._columns(layer)].index_select(0, positions)
            view.index_copy_(0, blocks, pages.unflatten(1, view.shape[1:]))

    def _by_block(self, part: PartPlan, row: torch.Tensor) -> torch.Tensor:
        return row.view(self._unit).view(-1, part.block_row_bytes // self._unit.itemsize)

    def _columns(self, layer: LayerSlot) -> slice:
        size = self._unit.itemsize
        return slice(layer.offset // size, (layer.offset + layer.page_bytes) // size)

    def _live(self, part: PartPlan, ids: BlockIds) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """By group: positions in the run and ids of the blocks that aren't null, on the device."""
        live = {}
        for group in part.groups:
            pairs = [(position, block) for position, block in enumerate(ids[group]) if block]
            both = torch.tensor(pairs, dtype=torch.int64, pin_memory=self._pin).reshape(-1, 2)
            on_device = both.to(self._device, non_blocking=True)
            live[group] = (on_device[:, 0].contiguous(), on_device[:, 1].contiguous())
        return live


def _in_eights(view: torch.Tensor) -> bool:
    """Whether a byte view can be seen as 64-bit words."""
    return (
        all(n % 8 == 0 for n in (view.shape[-1], view.storage_offset(), *view.stride()[:-1])) and view.stride(-1) == 1
    )


class KernelPages:
    """Copies with our CUDA kernels: one launch for all layers. `ValueError` for a plan that they can't carry."""

    def __init__(self, plan: KVPlan, views: Mapping[str, torch.Tensor], stream: Callable[[], int]) -> None:
        self._stream = stream
        self._pages = {part: _kernel_pages(part, views) for part in plan.parts}
        for part in plan.parts:
            ids = len(part.groups) * (plan.segment_tokens // part.block_tokens)
            if ids > native_cuda.BLOCK_IDS_MAX:
                raise ValueError(f"a row has {ids} block ids, at most {native_cuda.BLOCK_IDS_MAX}")

    def gather(self, part: PartPlan, ids: BlockIds, row: torch.Tensor) -> None:
        """Fill `row`."""
        tables = [ids[group] for group in part.groups]
        native_cuda.gather(self._pages[part], tables, row.data_ptr(), row.numel(), self._stream())

    def scatter(self, part: PartPlan, ids: BlockIds, row: torch.Tensor) -> None:
        """Write `row` into the blocks."""
        tables = [ids[group] for group in part.groups]
        native_cuda.scatter(self._pages[part], tables, row.data_ptr(), row.numel(), self._stream())


def _kernel_pages(part: PartPlan, views: Mapping[str, torch.Tensor]) -> native_cuda.KVPages:
    layers = []
    for layer in part.layers:
        view = views[layer.name]
        shape, strides = tuple(view.shape[1:]), tuple(view.stride()[1:])
        table = part.groups.index(layer.group)
        layers.append(native_cuda.LayerPages(view.data_ptr(), table, view.stride(0), shape, strides))
    return native_cuda.KVPages(layers, view.shape[0], view.device.index or 0)


class _DeviceLane:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.Stream(device)

    def enter(self) -> AbstractContextManager[object]:
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        entered: AbstractContextManager[object] = self._stream
        return entered

    def record(self) -> Callable[[], None]:
        wait: Callable[[], None] = self._stream.record_event().synchronize
        return wait


def copier_for(plan: KVPlan, views: Mapping[str, torch.Tensor], encode_device: EncodeDevice) -> Copier:
    """The copier for the device that holds the KV; `Refused` if `encode_device` is "cuda" and that is impossible."""
    device = next(iter(views.values())).device
    if device.type == "cpu":
        if encode_device == "cuda":
            raise Refused("encode_device", "it is `cuda`, but this engine's KV is in host memory")
        return HostCopier(views)
    pages = _kernels_for(plan, views, device, encode_device) or TorchPages(views, pin=True)
    return DeviceCopier(pages, _DeviceLane(device), device, pin=True)


def _kernels_for(
    plan: KVPlan, views: Mapping[str, torch.Tensor], device: torch.device, encode_device: EncodeDevice
) -> KernelPages | None:
    if encode_device == "cpu":
        return None
    missing = native_cuda.why_unavailable() if device.type == "cuda" else f"no kernels for {device.type}"
    if missing is None:
        try:
            return KernelPages(plan, views, lambda: int(torch.cuda.current_stream(device).cuda_stream))
        except (ValueError, RuntimeError) as error:
            missing = str(error)
    if encode_device == "cuda":
        raise Refused("encode_device", f"it is `cuda`, but {missing}")
    logger.warning("hyperspace: torch copies KV rows on this GPU, our kernels can't: %s", missing)
    return None
