from pathlib import Path

import pytest

from hyperspace_vllm.core.local.messages import PAGE_BYTES, Slab
from hyperspace_vllm.core.records.ids import RowKey
from hyperspace_vllm.daemon.kv.arena import Arena
from hyperspace_vllm.daemon.kv.row_cache import RowCache

A, B, C, D = (RowKey(bytes([i]) * 32) for i in range(4))


@pytest.fixture
def cache(tmp_path: Path) -> RowCache:
    return RowCache(Arena(tmp_path / "arena", 5 * PAGE_BYTES))  # a header and room for four rows of a page


def put(cache: RowCache, row_key: RowKey, length: int = PAGE_BYTES) -> Slab:
    slab = cache.allocate(length)
    assert slab is not None
    assert cache.keep(row_key, slab)
    return slab


def test_a_kept_row_is_found_by_its_key(cache: RowCache) -> None:
    slab = put(cache, A)
    cache.view(slab)[:3] = b"row"
    leased = cache.lease(A, holder=1)
    assert A in cache
    assert leased == slab
    assert bytes(cache.view(leased)[:3]) == b"row"
    assert cache.lease(B, holder=1) is None


def test_the_least_recently_leased_row_leaves_first(cache: RowCache) -> None:
    for row in (A, B, C, D):
        put(cache, row)
    cache.lease(A, holder=1)
    cache.end_leases(1)
    assert cache.allocate(PAGE_BYTES) is not None
    assert (A in cache, B in cache) == (True, False)


def test_leased_rows_stay_even_when_nothing_else_fits(cache: RowCache) -> None:
    for row in (A, B, C, D):
        put(cache, row)
        cache.lease(row, holder=1)
    assert cache.allocate(PAGE_BYTES) is None
    cache.end_leases(1, keep=frozenset({A}))
    assert cache.allocate(3 * PAGE_BYTES) is not None
    assert A in cache
    cache.end_leases(1)
    assert cache.allocate(PAGE_BYTES) is not None
    assert A not in cache


def test_a_row_with_two_holders_stays_until_both_have_ended(cache: RowCache) -> None:
    put(cache, A, 4 * PAGE_BYTES)
    cache.lease(A, holder=1)
    cache.lease(A, holder=2)
    cache.lease(A, holder=2)  # twice by one holder counts once
    cache.end_leases(1)
    assert cache.allocate(PAGE_BYTES) is None
    cache.end_leases(2)
    assert cache.allocate(PAGE_BYTES) is not None


def test_a_known_row_is_not_kept_twice(cache: RowCache) -> None:
    first = put(cache, A)
    second = cache.allocate(PAGE_BYTES)
    assert second is not None
    assert not cache.keep(A, second)
    assert cache.lease(A, holder=1) == first
    assert cache.arena.free_bytes == 3 * PAGE_BYTES


def test_what_can_never_fit_evicts_nothing(cache: RowCache) -> None:
    put(cache, A)
    assert cache.allocate(5 * PAGE_BYTES) is None
    assert A in cache


def test_ending_the_leases_of_an_unknown_holder_does_nothing(cache: RowCache) -> None:
    cache.end_leases("nobody")
