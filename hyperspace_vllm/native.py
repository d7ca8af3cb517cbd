"""Native code: the erasure code (any 32 of 64 chunks rebuild a row), and copies between paged KV and rows.

Systematic Reed–Solomon over GF(2⁸), pinned in ``docs/protocol.md``. Every buffer is any contiguous object with the
buffer protocol (bytes, bytearray, memoryview, mmap, NumPy array); outputs must be writable. Calls release the GIL;
``threads`` is how many may work on one call, the caller's included. ``isa`` forces an instruction set by name, for
tests; ``None`` selects the fastest that works.
"""

from collections.abc import Sequence
from typing import Protocol

try:
    from hyperspace_vllm._native import CHUNK_ALIGN_BYTES as _CHUNK_ALIGN_BYTES
    from hyperspace_vllm._native import decode as _decode
    from hyperspace_vllm._native import decode_and_check as _decode_and_check
    from hyperspace_vllm._native import encode as _encode
    from hyperspace_vllm._native import encode_rows as _encode_rows
    from hyperspace_vllm._native import gather_blocks as _gather_blocks
    from hyperspace_vllm._native import isa as _isa
    from hyperspace_vllm._native import isas as _isas
    from hyperspace_vllm._native import scatter_blocks as _scatter_blocks
except ImportError as error:
    raise ImportError(
        "Hyperspace's native code is not built for this Python: run `pip install .` in its source tree"
    ) from error

DATA_CHUNKS = 32
PARITY_CHUNKS = 32
TOTAL_CHUNKS = 64
CHUNK_ALIGN_BYTES: int = _CHUNK_ALIGN_BYTES
"""Chunks of a multiple of this many bytes (an odd one, ideally) are coded without a staged tail.

Large outputs are fastest at 64-byte aligned addresses (mmap's are; NumPy's often aren't): only there can stores
bypass the caches.
"""


class Buffer(Protocol):
    """An object with the buffer protocol (collections.abc.Buffer, from Python 3.12 on)."""

    def __buffer__(self, flags: int, /) -> memoryview:
        """Its memory; called by C code only."""


def encode(
    data: Buffer,
    parity: Buffer,
    chunk_bytes: int,
    *,
    threads: int = 1,
    isa: str | None = None,
) -> None:
    """Fill ``parity`` with the parity chunks of ``data``; each holds its chunks one after the other.

    Raises ValueError for a wrong size, an overlap or a read-only buffer, TypeError for an argument that is no buffer.
    """
    _encode(data, parity, chunk_bytes, threads, isa)


def encode_rows(
    data: Buffer,
    parity: Buffer,
    chunk_bytes: int,
    rows: Sequence[int],
    *,
    threads: int = 1,
    isa: str | None = None,
) -> None:
    """Fill ``parity`` with the parity chunks that ``rows`` names (0 to 31, each once), in its order.

    Raises what ``encode`` raises.
    """
    _encode_rows(data, parity, chunk_bytes, rows, threads, isa)


def decode(
    chunks: Sequence[Buffer | None],
    chunk_bytes: int,
    out: Buffer,
    *,
    threads: int = 1,
    isa: str | None = None,
) -> None:
    """Fill ``out`` with the data chunks, from any 32 of all 64 ``chunks``; ``None`` is a lost one.

    Data chunk j may already be at its place in ``out``: then it isn't copied. Raises ValueError when too few are
    present, and what ``encode`` raises.
    """
    _decode(chunks, chunk_bytes, out, threads, isa)


def decode_and_check(
    chunks: Sequence[Buffer | None], chunk_bytes: int, out: Buffer, *, threads: int = 1, isa: str | None = None
) -> list[int]:
    """Decode from the first 32 of 64 chunks present, encode again, and name the others that contradict them.

    An empty list: all that are present belong to one codeword. Otherwise at least one of those present is wrong, not
    necessarily a named one. Costs less than the two steps in sequence: the data stays in the cache.
    """
    return _decode_and_check(chunks, chunk_bytes, out, threads, isa)


def isa() -> str:
    """Name the instruction set in use: the first of ``isas()``."""
    return _isa()


def isas() -> list[str]:
    """Name the sets that this machine has and that pass the known-answer test, fastest first.

    Of ``"avx512"`` (with GFNI), ``"avx2"``, ``"neon"`` and ``"portable"``, which every machine has.
    """
    return _isas()


def gather_blocks(views: Sequence[Buffer], ids: Sequence[Sequence[int]], row: Buffer) -> None:
    """Fill ``row``, block by block and layer by layer (``vllm_adapter/kv_layout.py``), from paged KV.

    ``views`` are the layers' caches, bytes ``[blocks, ...]`` with any strides; ``ids[i]`` the blocks of ``views[i]``,
    equally many for each. Block 0, vLLM's null block, is copied as zeros. Raises ValueError for a wrong size or id, or
    an overlap.
    """
    _gather_blocks(views, ids, row)


def scatter_blocks(views: Sequence[Buffer], ids: Sequence[Sequence[int]], row: Buffer) -> None:
    """Write ``row`` back into blocks; nothing is written to block 0.

    Raises what ``gather_blocks`` raises.
    """
    _scatter_blocks(views, ids, row)
