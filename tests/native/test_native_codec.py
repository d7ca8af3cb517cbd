"""The erasure code against galois, against itself on every instruction set, and against bad arguments.

The vectors in `vectors/rs32_64.json` were made by galois alone: `python -m tests.native.galois_code` makes them again.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import random
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperspace_vllm import native
from tests.native.galois_code import BASIS, POLYNOMIAL, galois_field, galois_parity, point, random_data
from tests.support.paths import VECTORS


def available_isas() -> list[str]:
    return native.isas()


def codeword(data: np.ndarray, isa: str | None = None) -> np.ndarray:
    """All 64 chunks, as rows."""
    parity = np.empty_like(data)
    native.encode(data, parity, data.shape[1], isa=isa)
    return np.concatenate([data, parity])


def rebuilt(chunks: np.ndarray, lost: set[int], isa: str | None = None) -> np.ndarray:
    out = np.zeros((32, chunks.shape[1]), np.uint8)
    present = [None if i in lost else chunks[i] for i in range(64)]
    native.decode(present, chunks.shape[1], out, isa=isa)
    return out


# ---- Wrong arguments are refused by name.


@pytest.mark.parametrize("decode", [native.decode, native.decode_and_check])
@pytest.mark.parametrize("present", [0, 1, 31])
def test_more_than_32_losses_are_refused_with_the_number_present(decode, present):
    chunks = [bytes(5)] * present + [None] * (64 - present)
    with pytest.raises(ValueError, match=f"chunks has {present} present, decoding needs 32"):
        decode(chunks, 5, bytearray(160))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: native.encode(bytes(319), bytearray(320), 10), ValueError, "data has 319 bytes, expected 320"),
        (lambda: native.encode(bytes(320), bytearray(321), 10), ValueError, "parity has 321 bytes, expected 320"),
        (lambda: native.encode([0] * 320, bytearray(320), 10), TypeError, "data must be a buffer .* not list"),
        (lambda: native.encode(bytes(320), None, 10), TypeError, "parity must be a buffer .* not NoneType"),
        (lambda: native.encode(bytes(320), bytes(320), 10), ValueError, "parity is read-only"),
        (lambda: native.encode(b"", bytearray(), 0), ValueError, "chunk_bytes is 0"),
        (lambda: native.encode(b"", bytearray(), -1), ValueError, "chunk_bytes is -1"),
        (lambda: native.encode(b"", bytearray(), 2**62), ValueError, "chunk_bytes is 4611686018427387904"),
        (lambda: native.encode(b"", bytearray(), 2**80), TypeError, "chunk_bytes"),
        (
            lambda: native.encode(memoryview(bytes(640))[::2], bytearray(320), 10),
            ValueError,
            "data is not contiguous",
        ),
        (
            lambda: native.encode(bytes(320), memoryview(bytearray(640))[::2], 10),
            ValueError,
            "parity is not contiguous",
        ),
        (lambda: native.encode(bytes(320), bytearray(320), 10, isa="mmx"), ValueError, "isa 'mmx'"),
        (
            lambda: native.encode_rows(bytes(320), bytearray(20), 10, [0, 32]),
            ValueError,
            r"rows\[1\] is 32, expected 0 to 31",
        ),
        (lambda: native.encode_rows(bytes(320), bytearray(10), 10, [-1]), ValueError, r"rows\[0\] is -1"),
        (lambda: native.encode_rows(bytes(320), bytearray(20), 10, [7, 7]), ValueError, r"rows\[1\] is 7, as an"),
        (lambda: native.encode_rows(bytes(320), bytearray(10), 10, [1, 2]), ValueError, "parity has 10 bytes"),
        (lambda: native.decode([None] * 63, 10, bytearray(320)), ValueError, "chunks has 63 entries"),
        (lambda: native.decode(None, 10, bytearray(320)), TypeError, "chunks"),
        (
            lambda: native.decode([bytes(10)] * 40 + [bytes(11)] * 24, 10, bytearray(320)),
            ValueError,
            r"chunks\[40\] has 11 bytes, expected 10",
        ),
        (
            lambda: native.decode([bytes(10)] * 3 + [5] * 61, 10, bytearray(320)),
            TypeError,
            r"chunks\[3\] must be a buffer .* not int",
        ),
        (lambda: native.decode([bytes(10)] * 64, 10, bytearray(1)), ValueError, "out has 1 bytes, expected 320"),
        (lambda: native.decode([bytes(10)] * 64, 10, bytes(320)), ValueError, "out is read-only"),
    ],
)
def test_a_wrong_argument_is_refused_by_its_name(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_overlapping_buffers_are_refused_unless_a_data_chunk_lies_in_its_place():
    memory = bytearray(640)
    view = memoryview(memory)
    with pytest.raises(ValueError, match="data and parity overlap"):
        native.encode(view[:320], view[319:639], 10)
    chunks = [bytes(10)] * 64
    native.decode([view[:10], *chunks[1:]], 10, view[:320])
    with pytest.raises(ValueError, match=r"chunks\[0\] overlaps out"):
        native.decode([view[1:11], *chunks[1:]], 10, view[:320])
    with pytest.raises(ValueError, match=r"chunks\[32\] overlaps out"):
        native.decode([*chunks[:32], view[:10], *chunks[33:]], 10, view[:320])


def test_a_refused_buffer_is_let_go():
    memory = bytearray(319)
    with pytest.raises(ValueError, match="data has 319"):
        native.encode(memory, bytearray(320), 10)
    memory.append(0)  # a bytearray that is still exported can't grow
    native.encode(memory, bytearray(320), 10)
    memory.append(0)


# ---- The code is the pinned one.


@pytest.mark.parametrize("isa", available_isas())
def test_parity_equals_the_pinned_vectors(isa):
    for vector in json.loads((VECTORS / "rs32_64.json").read_text())["vectors"]:
        data, parity = bytes.fromhex(vector["data"]), bytearray(len(vector["data"]) // 2)
        native.encode(data, parity, vector["chunk_bytes"], isa=isa)
        assert parity.hex() == vector["parity"], vector["name"]


@pytest.mark.parametrize("isa", available_isas())
def test_parity_equals_galois_lagrange_interpolation(isa):
    data = random_data(64)
    assert np.array_equal(codeword(data, isa)[32:], galois_parity(data))


def test_the_basis_in_the_vectors_is_cantors():
    pinned = json.loads((VECTORS / "rs32_64.json").read_text())
    assert pinned["polynomial"] == POLYNOMIAL
    assert tuple(bytes.fromhex(pinned["basis"])) == BASIS
    field = galois_field()
    for previous, element in itertools.pairwise(BASIS):
        assert int(field(element) ** 2 + field(element)) == previous


# ---- Any 32 of 64 rebuild the data, on every instruction set.


@pytest.mark.parametrize("isa", available_isas())
def test_every_single_loss_is_rebuilt(isa):
    chunks = codeword(random_data(100), isa)
    for lost in range(64):
        assert np.array_equal(rebuilt(chunks, {lost}, isa), chunks[:32]), lost


@pytest.mark.parametrize("isa", available_isas())
def test_every_double_loss_is_rebuilt(isa):
    chunks = codeword(random_data(67), isa)
    for lost in itertools.combinations(range(64), 2):
        assert np.array_equal(rebuilt(chunks, set(lost), isa), chunks[:32]), lost


@pytest.mark.parametrize("isa", available_isas())
def test_10_000_random_patterns_of_up_to_32_losses_are_rebuilt(isa):
    chunks = codeword(random_data(131), isa)
    rng = random.Random(1)
    for _ in range(10_000):
        lost = set(rng.sample(range(64), rng.randint(0, 32)))
        assert np.array_equal(rebuilt(chunks, lost, isa), chunks[:32]), sorted(lost)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("data_lost", range(33))
def test_any_number_of_lost_data_chunks_is_rebuilt_from_all_and_from_just_enough_parity(isa, data_lost):
    chunks = codeword(random_data(256 + 9), isa)
    lost = set(random.Random(data_lost).sample(range(32), data_lost))
    assert np.array_equal(rebuilt(chunks, lost, isa), chunks[:32])
    unneeded_parity = set(random.Random(data_lost).sample(range(32, 64), 32 - data_lost))
    assert np.array_equal(rebuilt(chunks, lost | unneeded_parity, isa), chunks[:32])


@settings(max_examples=100, deadline=None)
@given(
    chunk_bytes=st.integers(1, 1100),
    lost=st.sets(st.integers(0, 63), max_size=32),
    seed=st.integers(0, 2**32),
    isa=st.sampled_from(available_isas()),
)
def test_any_size_with_any_losses_is_rebuilt(chunk_bytes, lost, seed, isa):
    chunks = codeword(random_data(chunk_bytes, seed), isa)
    assert np.array_equal(rebuilt(chunks, lost, isa), chunks[:32])


# ---- Sizes, alignment, rows and places.


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 255, 256, 257, 33 * 256, 65537])
def test_every_instruction_set_gives_the_same_bytes(chunk_bytes):
    first, *others = [codeword(random_data(chunk_bytes), isa) for isa in available_isas()]
    for other in others:
        assert np.array_equal(first, other)


@pytest.mark.parametrize("isa", available_isas())
def test_every_remainder_codes_as_part_of_a_longer_chunk(isa):
    data = random_data(256 + 64)
    whole = codeword(data, isa)
    for chunk_bytes in [*range(1, 65), *range(256, 256 + 65)]:
        part = codeword(np.ascontiguousarray(data[:, :chunk_bytes]), isa)
        assert np.array_equal(part, whole[:, :chunk_bytes]), chunk_bytes


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("base", [64, 1024, 4096, 66_560])
def test_every_remainder_of_larger_chunks_is_coded_and_rebuilt(base, isa):
    data = random_data(base + 63)
    whole = codeword(data, isa)
    for chunk_bytes in range(base, base + 64):
        part = np.ascontiguousarray(whole[:, :chunk_bytes])
        assert np.array_equal(codeword(part[:32], isa), part), chunk_bytes
        assert np.array_equal(rebuilt(part, set(range(7, 39)), isa), part[:32]), chunk_bytes


def test_chunks_of_16_mib_are_coded_and_rebuilt_in_place():
    chunk_bytes = 16 << 20
    with mmap.mmap(-1, 32 * chunk_bytes) as memory:
        data = np.frombuffer(memory, np.uint8).reshape(32, chunk_bytes)
        block = random_data(1 << 16)
        for at in range(0, chunk_bytes, 1 << 16):
            data[:, at : at + (1 << 16)] = block
        parity = np.empty((2, chunk_bytes), np.uint8)
        native.encode_rows(data, parity, chunk_bytes, [31, 4], threads=2)
        assert np.array_equal(
            parity.reshape(2, -1, 1 << 16), np.broadcast_to(codeword(block)[[63, 36], None], (2, 256, 1 << 16))
        )
        data[[3, 17]] = 0
        chunks = [None if i in (3, 17) else data[i] for i in range(32)] + [None] * 32
        chunks[63], chunks[36] = parity
        native.decode(chunks, chunk_bytes, data, threads=2)
        assert np.array_equal(
            data[[3, 17]].reshape(2, -1, 1 << 16), np.broadcast_to(block[[3, 17], None], (2, 256, 1 << 16))
        )
        del data, chunks


@pytest.mark.parametrize("isa", available_isas())
def test_unaligned_buffers_are_coded_and_rebuilt(isa):
    chunk_bytes = 33 * 1024  # large enough for streaming stores, were it aligned
    chunks = codeword(random_data(chunk_bytes), isa)
    for shift in (1, 7, 16, 31):
        memory = np.zeros(96 * chunk_bytes + shift, np.uint8)[shift:]
        data, parity, out = np.split(memory, 3)
        data[:] = chunks[:32].ravel()
        native.encode(data, parity, chunk_bytes, isa=isa)
        assert np.array_equal(parity, chunks[32:].ravel())
        pieces = [None] * 20 + [memory[i * chunk_bytes :][:chunk_bytes] for i in range(20, 64)]
        native.decode(pieces, chunk_bytes, out, isa=isa)
        assert np.array_equal(out, data)


@pytest.mark.parametrize("isa", available_isas())
def test_selected_rows_equal_those_of_the_whole_encoding(isa):
    data = random_data(300)
    parity = codeword(data, isa)[32:]
    rng = random.Random(2)
    for count in [*range(1, 9), 31, 32]:
        rows = rng.sample(range(32), count)
        some = np.empty((count, 300), np.uint8)
        native.encode_rows(data, some, 300, rows, isa=isa)
        assert np.array_equal(some, parity[rows]), rows


def test_no_rows_are_no_work():
    native.encode_rows(bytes(320), bytearray(), 10, [])


@pytest.mark.parametrize("data_lost", [0, 3, 20, 32])
def test_data_chunks_that_lie_in_their_place_are_rebuilt_around(data_lost):
    chunk_bytes = 700
    chunks = codeword(random_data(chunk_bytes))
    out = chunks[:32].copy()
    out[:data_lost] = 0
    native.decode([*[None] * data_lost, *out[data_lost:], *chunks[32:]], chunk_bytes, out)
    assert np.array_equal(out, chunks[:32])


# ---- Threads share a call's columns.


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("threads", [2, 3, 64])
def test_threads_give_the_same_bytes(threads, isa):
    for chunk_bytes in (1, 2048, 2304, 4097, 66_000):
        data = random_data(chunk_bytes)
        chunks, shared = codeword(data, isa), np.empty_like(data)
        native.encode(data, shared, chunk_bytes, threads=threads, isa=isa)
        assert np.array_equal(shared, chunks[32:]), chunk_bytes
        for lost in (range(0), range(5), range(8, 40), range(32)):
            present, out = [None if i in lost else chunks[i] for i in range(64)], np.empty_like(data)
            native.decode(present, chunk_bytes, out, threads=threads, isa=isa)
            assert np.array_equal(out, data), (chunk_bytes, lost)


def test_a_number_of_threads_out_of_range_is_refused():
    for threads in (0, -1, 65):
        with pytest.raises(ValueError, match=f"threads is {threads}, expected 1 to 64"):
            native.encode(bytes(320), bytearray(320), 10, threads=threads)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_codes_with_threads_of_its_own():
    data = random_data(66_000)
    expected, parity = codeword(data)[32:], np.zeros_like(data)
    native.encode(data, parity, 66_000, threads=2)
    child = os.fork()
    if child == 0:
        parity[:] = 0
        native.encode(data, parity, 66_000, threads=2)
        os._exit(0 if np.array_equal(parity, expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


# ---- Re-encoding finds what doesn't belong to the codeword.


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("lost", [range(0), range(3), range(8, 28), range(31)])
def test_a_wrong_surplus_chunk_is_named_and_the_data_is_right(lost, threads, isa):
    chunk_bytes = 5000
    chunks, out = codeword(random_data(chunk_bytes), isa), np.empty((32, chunk_bytes), np.uint8)
    present = [None if i in lost else chunks[i].copy() for i in range(64)]
    assert native.decode_and_check(present, chunk_bytes, out, threads=threads, isa=isa) == []
    assert np.array_equal(out, chunks[:32])
    present[63][chunk_bytes - 1] ^= 1
    assert native.decode_and_check(present, chunk_bytes, out, threads=threads, isa=isa) == [63]
    assert np.array_equal(out, chunks[:32])


@pytest.mark.parametrize("isa", available_isas())
def test_a_wrong_chunk_among_those_used_contradicts_every_surplus_one(isa):
    chunks, out = codeword(random_data(700), isa), np.empty((32, 700), np.uint8)
    chunks[9, 3] ^= 0x80
    present = [None if i in (2, 40) else chunks[i] for i in range(64)]
    # Chunk 2 is rebuilt from the others and the first parity chunk, which therefore agrees.
    assert native.decode_and_check(present, 700, out, isa=isa) == [i for i in range(33, 64) if i != 40]


# ---- Buffers, and calls at the same time.


def test_bytes_bytearray_memoryview_mmap_and_numpy_are_all_taken():
    data = random_data(96).tobytes()
    expected = codeword(np.frombuffer(data, np.uint8).reshape(32, 96))[32:].tobytes()
    with mmap.mmap(-1, len(data)) as mapped_in, mmap.mmap(-1, len(data)) as mapped_out:
        mapped_in[:] = data
        as_words = np.frombuffer(data, "<u4").reshape(16, 48)  # any item type, any shape
        for source in (data, bytearray(data), memoryview(data), mapped_in, as_words):
            native.encode(source, mapped_out, 96)
            assert mapped_out[:] == expected


def test_threads_code_at_the_same_time_without_disturbing_each_other():
    data = [random_data(5 * 256, seed) for seed in range(4)]
    expected = [codeword(each) for each in data]
    wrong: list[int] = []

    def work(which: int) -> None:
        for _ in range(20):
            chunks = codeword(data[which])
            same = np.array_equal(chunks, expected[which])
            if not (same and np.array_equal(rebuilt(chunks, set(range(9, 41))), chunks[:32])):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("isa", available_isas())
def test_more_than_a_mebibyte_a_chunk_is_coded_and_rebuilt(isa):
    chunk_bytes = (1 << 20) + 256 + 17
    chunks = codeword(random_data(chunk_bytes), isa)
    parity_of_last_column = codeword(np.ascontiguousarray(chunks[:32, -1:]))[32:]
    assert np.array_equal(chunks[32:, -1:], parity_of_last_column)
    for lost in (range(1), range(8, 40), range(32)):
        assert np.array_equal(rebuilt(chunks, set(lost), isa), chunks[:32])


# ---- The slow twin, galois, has small codes too.


@pytest.mark.parametrize(("k", "m"), [(1, 1), (1, 5), (2, 3), (3, 2), (3, 3), (4, 2), (5, 0), (5, 1), (2, 6)])
def test_in_small_codes_of_the_twin_every_k_chunks_rebuild_the_data(k, m):
    import galois

    field = galois_field()
    data = np.random.default_rng(k).integers(0, 256, (k, 2), dtype=np.uint8)
    chunks = np.concatenate([data, galois_parity(data, m)])
    for present in itertools.combinations(range(k + m), k):
        points = field([point(i) for i in present])
        polynomials = [galois.lagrange_poly(points, field(column)) for column in chunks[list(present)].T]
        rebuilt = np.array([poly(field([point(j) for j in range(k)])) for poly in polynomials], np.uint8).T
        assert np.array_equal(rebuilt, data), present
