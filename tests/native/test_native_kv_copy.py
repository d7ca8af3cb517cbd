"""Copies between paged KV and rows against loops in NumPy, and against bad arguments."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperspace_vllm import native
from tests.support import other_threads

BLOCKS = 7


def random_view(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """A cache `[blocks, *shape]` whose dimensions lie in memory in any order, inside a larger allocation."""
    full = (BLOCKS, *shape)
    order = rng.permutation(len(full))
    padded = [full[axis] + int(rng.integers(0, 2)) for axis in order]
    memory = rng.integers(0, 256, padded, dtype=np.uint8).transpose(np.argsort(order))
    return memory[tuple(slice(0, n) for n in full)]


def row_of(views: list[np.ndarray], ids: list[list[int]]) -> bytes:
    """The slow twin of gather_blocks."""
    blocks = zip(*ids, strict=True)
    return b"".join(
        view[block].tobytes() if block else bytes(view[0].size)
        for place in blocks
        for view, block in zip(views, place, strict=True)
    )


shapes = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(shapes=shapes, blocks=st.integers(0, 5), seed=st.integers(0, 2**32))
def test_a_gathered_row_is_the_slow_twins(shapes: list[tuple[int, ...]], blocks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    views = [random_view(rng, shape) for shape in shapes]
    ids = [rng.integers(0, BLOCKS, blocks).tolist() for _ in views]
    expected = row_of(views, ids)
    row = bytearray(rng.bytes(len(expected)))
    native.gather_blocks(views, ids, row)
    assert row == expected


@settings(max_examples=200, deadline=None)
@given(shapes=shapes, blocks=st.integers(0, BLOCKS), seed=st.integers(0, 2**32))
def test_a_scattered_row_is_gathered_again_and_nothing_else_has_changed(
    shapes: list[tuple[int, ...]], blocks: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    views = [random_view(rng, shape) for shape in shapes]
    before = [view.copy() for view in views]
    ids = [rng.permutation(BLOCKS)[:blocks].tolist() for _ in views]
    row = rng.bytes(len(row_of(views, ids)))
    native.scatter_blocks(views, ids, row)
    places = zip(*ids, strict=True)
    at = 0
    for place in places:
        for old, block in zip(before, place, strict=True):
            if block:
                old[block] = np.frombuffer(row, np.uint8)[at : at + old[0].size].reshape(old.shape[1:])
            at += old[0].size
    assert all(np.array_equal(view, old) for view, old in zip(views, before, strict=True))


VIEW = np.zeros((4, 8), np.uint8)
READ_ONLY = np.zeros((4, 8), np.uint8)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize("copy", [native.gather_blocks, native.scatter_blocks])
@pytest.mark.parametrize(
    ("views", "ids", "row", "message"),
    [
        ([VIEW], [[4]], bytearray(8), r"ids\[0\] names block 4 of 4"),
        ([VIEW], [[-1]], bytearray(8), r"ids\[0\] names block -1 of 4"),
        ([VIEW], [[1, 2]], bytearray(8), "row has 8 bytes, expected 16"),
        ([VIEW, VIEW], [[1, 2], [3]], bytearray(32), r"ids\[1\] has 1 blocks, ids\[0\] has 2"),
        ([VIEW, VIEW], [[1]], bytearray(8), "ids has 1 lists for 2 views"),
        ([], [], bytearray(0), "views is empty"),
        ([VIEW[:, 0]], [[1]], bytearray(1), "has 1 dimensions"),
        ([VIEW[:, :0]], [[1]], bytearray(0), r"views\[0\] is empty"),
        ([VIEW[:, ::-1]], [[1]], bytearray(8), "strided backwards"),
        ([VIEW.view(np.int64)], [[1]], bytearray(8), "not of single bytes"),
        ([VIEW], [[1]], VIEW[2], r"row overlaps views\[0\]"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(copy, views, ids, row, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        copy(views, ids, row)


def test_only_what_is_written_must_be_writable() -> None:
    native.gather_blocks([READ_ONLY], [[1]], bytearray(8))
    native.scatter_blocks([VIEW], [[1]], bytes(8))
    with pytest.raises(ValueError, match="row is read-only"):
        native.gather_blocks([VIEW], [[1]], bytes(8))
    with pytest.raises(ValueError, match="read-only"):
        native.scatter_blocks([READ_ONLY], [[1]], bytes(8))


@pytest.mark.parametrize("wrong", [([3], [[1]]), ([VIEW], [["a"]]), ([VIEW], 1), (None, [[1]])])
def test_what_is_no_buffer_or_no_list_of_ids_is_a_type_error(wrong: tuple) -> None:
    with pytest.raises(TypeError):
        native.gather_blocks(*wrong, bytearray(8))


def test_other_threads_run_during_a_copy() -> None:
    view, row, ids = np.zeros((9, 1 << 24), np.uint8), bytearray(8 << 24), [list(range(1, 9))]
    assert other_threads.run_during(lambda: native.gather_blocks([view], ids, row))
    assert other_threads.run_during(lambda: native.scatter_blocks([view], ids, row))
