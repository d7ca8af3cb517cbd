"""KV rows on an NVIDIA GPU: gather, scatter, seal + erasure-code, decode + open, in native code.

Only a build with nvcc contains it, and only a machine with a GPU can run it: call `why_unavailable()` first. Nothing
else in this module may be called unless that returns None; importing the module is always safe.

How to use it (device pointers are `tensor.data_ptr()`, a stream is `torch.cuda.Stream.cuda_stream`, all plain ints, so
that this module doesn't depend on torch):

    pages = KVPages([LayerPages(view.data_ptr(), table, view.stride(0), tuple(view.shape[1:]), tuple(view.stride()[1:]))
                     for each layer of the part, in the row's order], num_blocks, device_index)   # once per part
    gather(pages, block_ids, row.data_ptr(), row_bytes, stream)
    scatter(pages, block_ids, row.data_ptr(), row_bytes, stream)
    encode(pages, block_ids, key, nonce, chunk_bytes, chunks.data_ptr(), 64 * chunk_bytes, stream)
    decode(chunk_pointers, chunk_bytes, key, nonce, row.data_ptr(), row_bytes, device_index, stream)

* A `view` is the layer's cache as bytes (`torch.uint8`), blocks first, any strides: a result of
  `kv_layout.block_views`. `table` says which of `block_ids` lists that layer's blocks: one list per KV cache group of
  the part, one id per block of the run, all lists equally long. Id 0 is the null block: gathered and coded as zeros,
  skipped by a scatter.
* Every call only enqueues on `stream`; block ids, key and nonce are taken by value. Nothing waits, allocates or copies:
  the memory behind the pointers must stay valid until the stream has passed the call. The kernels read the cache in
  stream order, so the stream must run after the forward pass that wrote the blocks (wait for its event), and anything
  that overwrites them must run after the kernel (the engine's stream waits for an event, on the device; the host waits
  for nothing).
* Up to `BLOCK_IDS_MAX` ids per call, all lists together (they are passed as kernel arguments). ValueError for
  detectable errors: sizes, alignment (16 bytes for rows and chunks), ids, pointers that aren't this device's memory;
  RuntimeError for errors that CUDA reports when a kernel is launched.
* Row, chunks, key, nonce and padding are exactly object_codec's: `encode` leaves 32 sealed data chunks and 32 parity
  chunks at `chunks + column * chunk_bytes`, for one copy to the host.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

_cuda: ModuleType | None
try:
    _cuda = importlib.import_module("hyperspace_vllm._native_cuda")
except ImportError:  # built without nvcc
    _cuda = None

BLOCK_IDS_MAX = 768
"""Block ids in one call: 256 tokens in blocks of 16 are 16 ids for every KV cache group of the part."""


class LayerPages(NamedTuple):
    """One layer's paged KV, in bytes: `pointer + id * block_stride` starts a block of `shape` and `strides`."""

    pointer: int
    table: int
    block_stride: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def why_unavailable() -> str | None:
    """Why there is no GPU code to call, in words for a log; None when there is."""
    if _cuda is None:
        return "built without CUDA: nvcc was not there or did not work"
    problem: str | None = _cuda.why_unavailable()
    return problem


class KVPages:
    """The layers of one part of the paged cache on device number `device`; holds a small table in its memory."""

    def __init__(self, layers: Sequence[LayerPages], num_blocks: int, device: int) -> None:
        self._native = _module().KVPages([tuple(layer) for layer in layers], num_blocks, device)

    @property
    def block_row_bytes(self) -> int:
        """Bytes of one block of all layers: a row has a multiple of it."""
        return int(self._native.block_row_bytes)


BlockIds = Sequence[Sequence[int]]


def gather(pages: KVPages, block_ids: BlockIds, row: int, row_bytes: int, stream: int) -> None:
    """Fill `row` with the blocks' bytes, in the row's order (block, layer)."""
    _module().gather(pages._native, block_ids, row, row_bytes, stream)


def scatter(pages: KVPages, block_ids: BlockIds, row: int, row_bytes: int, stream: int) -> None:
    """Write `row` into the blocks: the reverse of `gather`. No id except 0 may occur twice in a list."""
    _module().scatter(pages._native, block_ids, row, row_bytes, stream)


def encode(
    pages: KVPages,
    block_ids: BlockIds,
    key: bytes,
    nonce: bytes,
    chunk_bytes: int,
    chunks: int,
    chunks_bytes: int,
    stream: int,
) -> None:
    """Gather a row, seal it (ChaCha20) and code it into 64 chunks, reading the cache once."""
    _module().encode(pages._native, block_ids, key, nonce, chunk_bytes, chunks, chunks_bytes, stream)


def decode(
    chunks: Sequence[int | None],
    chunk_bytes: int,
    key: bytes,
    nonce: bytes,
    row: int,
    row_bytes: int,
    device: int,
    stream: int,
) -> None:
    """Rebuild and open a row from any 32 of 64 *verified* chunks; `None` is lost."""
    _module().decode(chunks, chunk_bytes, key, nonce, row, row_bytes, device, stream)


def _module() -> ModuleType:
    if _cuda is None:
        raise RuntimeError(f"no GPU code here: {why_unavailable()}")
    return _cuda
