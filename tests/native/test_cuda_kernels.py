"""The GPU's kernels, run on the CPU: the same source, a block and a thread after the other.

Against the CPU's codec, galois, `cryptography`'s ChaCha20 and indexing in plain NumPy. What this can't show stands in
docs/benchmarks.md: the real memory model, divergence in a warp, and time. `make sanitize` adds ASan and UBSan.
"""

from __future__ import annotations

import importlib
import itertools
import random
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import gpu
from hyperspace_vllm import native, native_cuda
from hyperspace_vllm.core.records.manifest import chunk_bytes_for
from hyperspace_vllm.core.records.sealing import xor_stream
from hyperspace_vllm.daemon.kv.object_codec import chunk_digest, encode_row, open_row
from hyperspace_vllm.native_cuda import KVPages, LayerPages
from tests.native.galois_code import galois_parity

KEY, NONCE = bytes(range(32)), bytes(range(100, 112))
BLOCKS = 12
RFC_8439_2_4_2 = (
    "6e2e359a2568f98041ba0728dd0d6981e97e7aec1d4360c20a27afccfd9fae0bf91b65c5524733ab8f593dabcd62b357"
    "1639d624e65152ab8f530c359f0861d807ca0dbf500d6a6156a38e088a22b65e52bc514d16ccf806818ce91ab7793736"
    "5af90bbf74a35be6b40b8eedf2785e42874d"
)

host = importlib.import_module("hyperspace_vllm._native_cuda_host")


@pytest.fixture(autouse=True, params=["threads forward", "threads backward"])
def kernels_run_on_the_cpu(request, monkeypatch):
    """Every test in both orders: a phase in which threads depend on each other can't please both."""
    monkeypatch.setattr(native_cuda, "_cuda", host)
    host.run_threads_backward(request.param == "threads backward")


def on_16(bytes_: int) -> np.ndarray:
    """Zeros at an address that the device's allocators would give."""
    memory = np.zeros(bytes_ + 16, np.uint8)
    start = -memory.ctypes.data % 16
    return memory[start : start + bytes_]


def cache(shape: tuple[int, ...], order: tuple[int, ...] | None = None, shift: int = 0, seed: int = 0) -> np.ndarray:
    """A layer's random cache, `[BLOCKS, *shape]`, whose dimensions lie in memory in `order`, outermost first."""
    full = (BLOCKS, *shape)
    order = (0, *(1 + d for d in order)) if order else tuple(range(len(full)))
    memory = on_16(int(np.prod(full)) + shift)[shift:]
    memory[:] = np.random.default_rng(seed).integers(0, 256, memory.size, dtype=np.uint8)
    return memory.reshape([full[d] for d in order]).transpose(np.argsort(order))


def pages_of(layers: list[np.ndarray], tables: list[int]) -> KVPages:
    return KVPages(
        [
            LayerPages(layer.ctypes.data, table, layer.strides[0], layer.shape[1:], layer.strides[1:])
            for layer, table in zip(layers, tables, strict=True)
        ],
        BLOCKS,
        0,
    )


def expected_row(layers: list[np.ndarray], tables: list[int], ids: list[list[int]]) -> bytes:
    """The slow twin: kv_layout.py's loop, word for word."""
    row = b""
    for block in range(len(ids[0])):
        for layer, table in zip(layers, tables, strict=True):
            page = layer[ids[table][block]]
            row += page.tobytes() if ids[table][block] else bytes(page.size)
    return row


def gathered(layers, tables, ids) -> bytes:
    pages = pages_of(layers, tables)
    row = on_16(pages.block_row_bytes * len(ids[0]))
    native_cuda.gather(pages, ids, row.ctypes.data, row.size, 0)
    return row.tobytes()


def encoded(layers, tables, ids, chunk_bytes: int | None = None) -> np.ndarray:
    pages = pages_of(layers, tables)
    size = chunk_bytes or chunk_bytes_for(pages.block_row_bytes * len(ids[0]))
    chunks = on_16(64 * size)
    chunks[:] = 0xEE  # a staging buffer that was used before
    native_cuda.encode(pages, ids, KEY, NONCE, size, chunks.ctypes.data, chunks.size, 0)
    return chunks.reshape(64, size)


def decoded(chunks: np.ndarray, lost: set[int], row_bytes: int) -> bytes:
    row = on_16(row_bytes)
    held = [on_16(chunks.shape[1]) for _ in range(64)]
    for i in range(64):
        held[i][:] = chunks[i]
    pointers = [None if i in lost else held[i].ctypes.data for i in range(64)]
    native_cuda.decode(pointers, chunks.shape[1], KEY, NONCE, row.ctypes.data, row_bytes, 0, 0)
    return row.tobytes()


def a_row(row_bytes: int, seed: int = 0) -> tuple[list[np.ndarray], list[int], list[list[int]]]:
    """A cache of one layer and one block: rows of any length."""
    return [cache((row_bytes,), seed=seed)], [0], [[7]]


# ---- Gather and scatter. Heads x tokens x bytes, in the orders that attention backends use.

LAYOUTS = {
    "heads first": ((2, 16, 256), None),
    "tokens first in memory": ((2, 16, 256), (1, 0, 2)),
    "K and V apart, kernel blocks": ((2, 2, 4, 3, 32), (1, 0, 3, 2, 4)),
    "single bytes apart": ((6, 8), (1, 0)),
    "pages that no piece of 16 bytes fits": ((3, 35), None),
    "runs of 4 bytes": ((4, 5, 4), (1, 0, 2)),
}
IDS = [[3, 1, 11, 0, 7], [2, 0, 0, 9, 10]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shift", [0, 1, 8])
def test_a_gather_is_the_rows_definition(layout, shift):
    shape, order = LAYOUTS[layout]
    layers = [cache(shape, order, shift, seed) for seed in range(3)]
    assert gathered(layers, [0, 1, 0], IDS) == expected_row(layers, [0, 1, 0], IDS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shift", [0, 1, 8])
def test_a_scatter_writes_the_rows_blocks_and_nothing_else(layout, shift):
    shape, order = LAYOUTS[layout]
    layers = [cache(shape, order, shift, seed) for seed in range(3)]
    tables, pages = [0, 1, 0], pages_of(layers, [0, 1, 0])
    row = on_16(pages.block_row_bytes * 5)
    row[:] = np.random.default_rng(9).integers(0, 256, row.size, dtype=np.uint8)
    expected = [layer.copy() for layer in layers]
    at = 0
    for block, (layer, table) in itertools.product(range(5), zip(expected, tables, strict=True)):
        size = layer[0].size
        if IDS[table][block]:
            layer[IDS[table][block]] = row[at : at + size].reshape(layer.shape[1:])
        at += size
    native_cuda.scatter(pages, IDS, row.ctypes.data, row.size, 0)
    for layer, wanted in zip(layers, expected, strict=True):
        assert np.array_equal(layer, wanted)


@pytest.mark.parametrize("sizes", [(64, 128, 64), (48, 16, 1024), (5, 64, 32)])
def test_layers_of_different_sizes_are_found_in_the_row(sizes):
    layers = [cache((size,), seed=size) for size in sizes]
    assert gathered(layers, [0, 1, 1], IDS) == expected_row(layers, [0, 1, 1], IDS)
    chunks = encoded(layers, [0, 1, 1], IDS)
    assert decoded(chunks, set(range(32)), sum(sizes) * 5) == expected_row(layers, [0, 1, 1], IDS)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.sampled_from([1, 2, 3, 4, 7, 16]), min_size=1, max_size=4).map(tuple),
    unit=st.sampled_from([1, 3, 16, 32]),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_any_shape_in_any_order_is_gathered_and_comes_back(shape, unit, seed, data):
    shape = (*shape, unit)
    order = (*data.draw(st.permutations(range(len(shape) - 1))), len(shape) - 1)
    tables = data.draw(
        st.lists(st.sampled_from([0, 1]), min_size=1, max_size=3).filter(lambda t: max(t) + 1 == len({*t}))
    )
    layers = [cache(shape, order, seed=seed + i) for i in range(len(tables))]
    ids = [random.Random(seed + t).sample(range(BLOCKS), 4) for t in range(max(tables) + 1)]
    row = gathered(layers, tables, ids)
    assert row == expected_row(layers, tables, ids)
    for layer in layers:
        layer[:] = 0
    memory = on_16(len(row))
    memory[:] = np.frombuffer(row, np.uint8)
    native_cuda.scatter(pages_of(layers, tables), ids, memory.ctypes.data, len(row), 0)
    assert gathered(layers, tables, ids) == row


# ---- Sealing and coding.


@pytest.mark.parametrize("row_bytes", [1, 15, 16, 17, 63, 64, 65, 8191, 8192, 8193, 3 * 8192 + 500, 300_000])
def test_chunks_are_the_nodes_own_to_the_byte(row_bytes):
    layers, tables, ids = a_row(row_bytes)
    chunks = encoded(layers, tables, ids)
    row = memoryview(expected_row(layers, tables, ids))
    wanted = memoryview(bytearray(chunks.size))
    digests = encode_row(row, KEY, NONCE, chunks.shape[1], wanted)
    assert chunks.tobytes() == wanted
    opened = memoryview(bytearray(row_bytes))
    held = {i: memoryview(chunks[i].tobytes()) for i in random.Random(row_bytes).sample(range(64), 32)}
    assert all(chunk_digest(chunk) == digests[32 * i : 32 * i + 32] for i, chunk in held.items())
    open_row(held, digests, chunks.shape[1], KEY, NONCE, opened)
    assert opened == row


def test_parity_equals_galois_lagrange_interpolation():
    chunks = encoded(*a_row(32 * 256 - 40))
    assert np.array_equal(chunks[32:, ::16], galois_parity(np.ascontiguousarray(chunks[:32, ::16])))


def test_the_key_stream_is_rfc_8439s():
    """Section 2.4.2: its counter starts at 1, so the text stands in the row's second 64 bytes."""
    text = (
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, sunscreen would "
        b"be it."
    )
    key, nonce = bytes(range(32)), bytes.fromhex("000000000000004a00000000")
    layer = cache((64 + len(text),))
    layer[7, 64:] = np.frombuffer(text, np.uint8)
    pages, chunks = pages_of([layer], [0]), on_16(64 * 256)
    native_cuda.encode(pages, [[7]], key, nonce, 256, chunks.ctypes.data, chunks.size, 0)
    assert chunks[64 : 64 + len(text)].tobytes().hex() == RFC_8439_2_4_2
    assert not chunks[64 + len(text) : 256].any()


def test_what_lies_beyond_the_rows_end_is_zero_and_not_sealed():
    chunks = encoded(*a_row(1000))
    assert not chunks[:32].reshape(-1)[1000:].any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_coding_reads_any_cache_that_a_gather_reads(layout):
    shape, order = LAYOUTS[layout]
    for shift in (0, 4):
        layers = [cache(shape, order, shift, seed) for seed in range(3)]
        row = memoryview(expected_row(layers, [0, 1, 0], IDS))
        sealed = memoryview(bytearray(len(row)))
        xor_stream(KEY, NONCE, row, sealed)
        chunks = encoded(layers, [0, 1, 0], IDS)
        assert chunks[:32].reshape(-1)[: len(row)].tobytes() == sealed


@pytest.mark.parametrize("chunk_bytes", [256, 512, 768, 1024, 1280, 2048, 2304, 33 * 256])
def test_any_multiple_of_256_is_a_chunk(chunk_bytes):
    """Also those that end within a tile of 1,024 columns."""
    layers, tables, ids = a_row(32 * chunk_bytes - 7)
    chunks = encoded(layers, tables, ids, chunk_bytes)
    parity = np.empty((32, chunk_bytes), np.uint8)
    native.encode(np.ascontiguousarray(chunks[:32]), parity, chunk_bytes)
    assert np.array_equal(chunks[32:], parity)


# ---- Decoding and opening.


def test_a_row_with_nothing_lost_is_only_opened():
    layers, tables, ids = a_row(5000)
    chunks = encoded(layers, tables, ids)
    chunks[32:] = 0  # nobody looks at them
    assert decoded(chunks, set(), 5000) == expected_row(layers, tables, ids)
    assert decoded(chunks, set(range(32, 64)), 5000) == expected_row(layers, tables, ids)


def test_every_single_loss_is_rebuilt():
    layers, tables, ids = a_row(8192)
    chunks, row = encoded(layers, tables, ids), expected_row(layers, tables, ids)
    for lost in range(64):
        assert decoded(chunks, {lost}, 8192) == row, lost


def test_300_random_loss_patterns_are_rebuilt():
    layers, tables, ids = a_row(8000)
    chunks, row = encoded(layers, tables, ids), expected_row(layers, tables, ids)
    rng = random.Random(1)
    for _ in range(300):
        lost = set(rng.sample(range(64), rng.randint(0, 32)))
        assert decoded(chunks, lost, 8000) == row, sorted(lost)


@pytest.mark.parametrize("row_bytes", [1, 255, 8192 * 5, 8192 * 9 + 33])
def test_rows_of_any_length_are_rebuilt_from_parity_alone(row_bytes):
    layers, tables, ids = a_row(row_bytes)
    chunks = encoded(layers, tables, ids)
    assert decoded(chunks, set(range(32)), row_bytes) == expected_row(layers, tables, ids)


# ---- Wrong arguments are refused by name.


def call_gather(ids=([1], [2]), row=64, row_bytes=64, **layer):
    one = {"pointer": 4096, "table": 0, "block_stride": 32, "shape": (32,), "strides": (1,)} | layer
    layers = [LayerPages(**one), LayerPages(8192, 1, 32, (32,), (1,))]
    native_cuda.gather(KVPages(layers, BLOCKS, 0), ids, row, row_bytes, 0)


def call_encode(key=KEY, nonce=NONCE, chunk_bytes=256, chunks=64, chunks_bytes=64 * 256):
    pages = pages_of([cache((32,))], [0])
    native_cuda.encode(pages, [[1]], key, nonce, chunk_bytes, chunks, chunks_bytes, 0)


def call_decode(chunks=(4096,) * 64, chunk_bytes=256, row=16, row_bytes=100):
    native_cuda.decode(list(chunks), chunk_bytes, KEY, NONCE, row, row_bytes, 0, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: call_gather(row_bytes=63), "row has 63 bytes, expected 64"),
        (lambda: call_gather(row=72), "row is not 16-byte aligned"),
        (lambda: call_gather(row=0), "row is not memory of device 0"),
        (lambda: call_gather(ids=([1],)), "block_ids has 1 lists, expected 2"),
        (lambda: call_gather(ids=([], [])), r"block_ids\[0\] is empty"),
        (lambda: call_gather(ids=([1], [2, 3])), r"block_ids\[1\] has 2 ids, expected 1"),
        (lambda: call_gather(ids=([1], [12])), r"block_ids\[1\]\[0\] is 12, expected 0 to 11"),
        (lambda: call_gather(ids=([-1], [2])), r"block_ids\[0\]\[0\] is -1, expected"),
        (lambda: call_gather(ids=([1] * 385, [2] * 385)), "block_ids has 770 ids, expected at most 768"),
        (lambda: call_gather(pointer=0), r"layers\[0\] has no pointer"),
        (lambda: call_gather(shape=(32, 1)), r"layers\[0\] has 2 dimensions and 1 strides"),
        (lambda: call_gather(shape=(0,)), r"layers\[0\] has a dimension of 0"),
        (
            lambda: call_gather(shape=(2,) * 5, strides=(100, 7, 50, 3, 20)),
            r"layers\[0\] is strided in 5 dimensions, expected at most 4",
        ),
        (lambda: call_gather(shape=(2**16, 2**16), strides=(2**16, 1)), r"layers\[0\] has blocks of 2 GiB"),
        (lambda: KVPages([], BLOCKS, 0), "layers is empty"),
        (lambda: KVPages([LayerPages(16, 0, 1, (1,), (1,))], 0, 0), "num_blocks is 0"),
        (lambda: call_encode(key=b"k"), "key has 1 bytes, expected 32"),
        (lambda: call_encode(nonce=bytes(8)), "nonce has 8 bytes, expected 12"),
        (lambda: call_encode(chunk_bytes=255), "chunk_bytes is 255, expected a multiple of 256"),
        (lambda: call_encode(chunk_bytes=0), "chunk_bytes is 0, expected"),
        (lambda: call_encode(chunk_bytes=2**26), "chunk_bytes is 67108864, expected less than 64 MiB"),
        (lambda: call_encode(chunks_bytes=64 * 256 - 1), "chunks has 16383 bytes, expected 16384"),
        (lambda: call_encode(chunks=65), "chunks is not 16-byte aligned"),
        (lambda: call_decode(chunks=(4096,) * 63), "chunks has 63 entries, expected 64"),
        (lambda: call_decode(chunks=(None,) * 33 + (4096,) * 31), "chunks has 31 present, decoding needs 32"),
        (lambda: call_decode(chunks=(4096,) * 63 + (4097,)), r"chunks\[63\] is not 16-byte aligned"),
        (lambda: call_decode(row_bytes=8193), "32 of them don't hold a row of 8193 bytes"),
        (lambda: call_decode(row_bytes=0), "row has 0 bytes"),
        (lambda: call_decode(row=4096), r"chunks\[0\] overlaps row"),
    ],
)
def test_a_wrong_argument_is_refused_by_its_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_more_than_four_kinds_of_layer_are_refused():
    with pytest.raises(ValueError, match="more than 4 different shapes"):
        pages_of([cache((16 * size,)) for size in range(1, 6)], [0] * 5)


def test_the_limit_that_callers_see_is_the_kernels():
    assert native_cuda.BLOCK_IDS_MAX == host.BLOCK_IDS_MAX


# ---- Where there is no GPU.


def test_without_cuda_the_module_loads_and_says_why_nothing_can_be_called(monkeypatch):
    monkeypatch.setitem(sys.modules, "hyperspace_vllm._native_cuda", None)
    monkeypatch.delitem(sys.modules, "hyperspace_vllm.native_cuda")
    alone = importlib.import_module("hyperspace_vllm.native_cuda")
    assert "built without CUDA" in alone.why_unavailable()
    with pytest.raises(RuntimeError, match="built without CUDA"):
        alone.KVPages([], 1, 0)


def test_built_with_cuda_but_without_a_gpu_it_says_so(monkeypatch):
    try:
        built = importlib.import_module("hyperspace_vllm._native_cuda")
    except ImportError:
        pytest.skip("no nvcc here")
    monkeypatch.setattr(native_cuda, "_cuda", built)
    reason = native_cuda.why_unavailable()
    if reason is None:
        pytest.skip("a GPU is here: make bench-gpu checks the real kernels")
    with pytest.raises((ValueError, RuntimeError)):
        pages_of([cache((32,))], [0])


def test_the_gpu_bench_says_that_there_is_nothing_to_measure(monkeypatch, capsys):
    monkeypatch.setattr(native_cuda, "_cuda", None)
    assert gpu.main(["--model", "none"]) == 2
    assert "Nothing was measured: no CUDA kernels to run here" in capsys.readouterr().err
