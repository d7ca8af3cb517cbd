import fcntl
import os
import random
import stat
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperspace_vllm.core.local.messages import PAGE_BYTES, Slab
from hyperspace_vllm.core.records.limits import MiB
from hyperspace_vllm.daemon.kv.arena import Arena, ArenaFull

SIZE = 4 * MiB  # 64 pages, the first of them the header


@pytest.fixture
def arena(tmp_path: Path) -> Arena:
    return Arena(tmp_path / "arena", SIZE)


def generation(arena: Arena, slab: Slab) -> int:
    """As a client reads it: from the file."""
    with arena.path.open("rb") as file:
        file.seek(8 * slab.slot)
        return int.from_bytes(file.read(8), "little")


def test_a_slab_is_aligned_writable_and_seen_through_the_file(arena: Arena) -> None:
    slab = arena.allocate(100_000)
    assert slab is not None
    assert slab.offset % 4096 == 0
    arena.view(slab)[:5] = b"bytes"
    assert arena.path.read_bytes()[slab.offset : slab.offset + 5] == b"bytes"
    assert generation(arena, slab) == slab.generation


def test_freeing_advances_the_generation_before_the_pages_are_reused(arena: Arena) -> None:
    slab = arena.allocate(PAGE_BYTES)
    assert slab is not None
    arena.free(slab)
    assert generation(arena, slab) == slab.generation + 1
    again = arena.allocate(PAGE_BYTES)
    assert again is not None
    assert (again.slot, again.generation) == (slab.slot, slab.generation + 1)


def test_a_new_owner_inside_a_freed_slab_does_not_make_it_current(arena: Arena) -> None:
    old = arena.allocate(4 * PAGE_BYTES)
    assert old is not None
    arena.free(old)
    for _ in range(4):
        arena.allocate(PAGE_BYTES)
    assert generation(arena, old) != old.generation


def test_quarantined_pages_are_handed_out_only_once_they_are_released(arena: Arena) -> None:
    lost = arena.allocate(3 * PAGE_BYTES)
    assert lost is not None
    arena.quarantine(lost)
    assert generation(arena, lost) != lost.generation
    assert arena.quarantined_bytes == 3 * PAGE_BYTES
    while (slab := arena.allocate(PAGE_BYTES)) is not None:
        assert not lost.offset <= slab.offset < lost.offset + 3 * PAGE_BYTES
    assert arena.free_bytes == 0
    arena.release(lost)
    assert (arena.quarantined_bytes, arena.free_bytes) == (0, 3 * PAGE_BYTES)
    again = arena.allocate(3 * PAGE_BYTES)
    assert again is not None
    assert (again.offset, again.generation) == (lost.offset, lost.generation + 1)


def test_slabs_of_two_arenas_never_look_alike(tmp_path: Path) -> None:
    slabs = [Arena(tmp_path / name, SIZE).allocate(PAGE_BYTES) for name in ("a", "b")]
    assert slabs[0] is not None
    assert slabs[1] is not None
    assert slabs[0].slot == slabs[1].slot
    assert slabs[0].generation != slabs[1].generation


def test_freeing_twice_is_our_own_bug(arena: Arena) -> None:
    slab = arena.allocate(1)
    assert slab is not None
    arena.free(slab)
    with pytest.raises(AssertionError):
        arena.free(slab)


@given(st.randoms(use_true_random=False), st.integers(1, 120))
@settings(max_examples=40, deadline=None)
def test_any_order_of_allocating_and_freeing_keeps_slabs_apart_and_loses_nothing(
    tmp_path_factory: pytest.TempPathFactory, rng: random.Random, steps: int
) -> None:
    arena = Arena(tmp_path_factory.mktemp("arena") / "arena", SIZE)
    live: list[Slab] = []
    for _ in range(steps):
        if live and rng.random() < 0.5:
            arena.free(live.pop(rng.randrange(len(live))))
        elif (slab := arena.allocate(rng.randint(1, 12 * PAGE_BYTES))) is not None:
            live.append(slab)
        spans = sorted((slab.offset, slab.offset + slab.length) for slab in live)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    for slab in live:
        arena.free(slab)
    assert arena.free_bytes == arena.capacity_bytes
    assert arena.allocate(arena.capacity_bytes) is not None, "the gaps were joined"


def test_an_arena_is_private_and_leaves_with_its_node(tmp_path: Path) -> None:
    (tmp_path / "shm").mkdir()
    arena = Arena.create(tmp_path, SIZE, shared_memory=tmp_path / "shm")
    assert arena.path.parent == tmp_path / "shm"
    assert stat.S_IMODE(arena.path.stat().st_mode) == 0o600
    assert (tmp_path / "arena.path").read_text() == str(arena.path)
    assert arena.path.stat().st_blocks * 512 >= SIZE, "the space is reserved, not promised"
    arena.close()
    assert not list((tmp_path / "shm").iterdir())


def abandoned(path: Path, age_s: float = 3600) -> Path:
    """As a killed node leaves its arena: locked by no process."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(SIZE))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def name(number: int) -> str:
    return f"hyperspace-{number:032x}.arena"


def test_the_next_node_of_a_directory_removes_at_once_what_a_killed_one_left(tmp_path: Path) -> None:
    (tmp_path / "arena.path").write_text(str(abandoned(tmp_path / "shm" / name(1), age_s=-10)))
    survivor = Arena.create(tmp_path, SIZE, shared_memory=tmp_path / "shm")
    assert list((tmp_path / "shm").iterdir()) == [survivor.path]


def test_what_killed_nodes_of_other_directories_left_a_while_ago_is_removed_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        abandoned(tmp_path / "shm" / name(number))
    young = abandoned(tmp_path / "shm" / name(7), age_s=50)
    mine = Arena.create(tmp_path, SIZE, shared_memory=tmp_path / "shm")
    assert set((tmp_path / "shm").iterdir()) == {young, mine.path}
    assert [record.getMessage() for record in caplog.records] == [
        f"arenas of killed nodes removed from {tmp_path / 'shm'}: 3, 12 MiB"
    ]


def test_the_arena_of_a_living_node_stays_however_old_and_whoever_names_it(tmp_path: Path) -> None:
    (tmp_path / "shm").mkdir()
    living = Arena.create(tmp_path, SIZE, shared_memory=tmp_path / "shm")
    os.utime(living.path, (0, 0))
    copy = tmp_path / "copy of its data directory"
    copy.mkdir()
    (copy / "arena.path").write_text((tmp_path / "arena.path").read_text())
    Arena.create(copy, SIZE, shared_memory=tmp_path / "shm")
    assert living.path.exists()


def test_an_arena_that_was_removed_before_its_node_could_lock_it_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shm").mkdir()
    lock = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        for path in (tmp_path / "shm").iterdir():
            path.unlink()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    arena = Arena.create(tmp_path, SIZE, shared_memory=tmp_path / "shm")
    assert arena.path == tmp_path / "arena"
    assert arena.path.exists()


@pytest.mark.parametrize("kind", ["link", "pipe", "of another user", "of another name"])
def test_only_regular_files_of_this_user_that_are_named_as_arenas_are_removed(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, target = tmp_path / "shm" / name(1), abandoned(tmp_path / name(2))
    path.parent.mkdir()
    match kind:
        case "link":
            path.symlink_to(target)
        case "pipe":
            os.mkfifo(path)
            os.utime(path, (0, 0))
        case "of another user":
            abandoned(path)
            own = os.geteuid()
            monkeypatch.setattr(os, "geteuid", lambda: own + 1)
        case "of another name":
            path = abandoned(path.with_name(f"x{path.name}"))
    Arena.create(tmp_path, SIZE, shared_memory=tmp_path / "shm")
    assert target.exists()
    assert os.path.lexists(path)


@pytest.mark.parametrize("victim", ["shm/somebody-elses", "precious", "shm/hyperspace-1.arena"])
def test_a_file_that_is_no_arena_is_never_removed(tmp_path: Path, victim: str) -> None:
    (tmp_path / "shm").mkdir()
    (tmp_path / victim).write_text("mine")
    (tmp_path / "arena.path").write_text(str(tmp_path / victim))
    Arena.create(tmp_path, SIZE, shared_memory=tmp_path / "shm")
    assert (tmp_path / victim).read_text() == "mine"


def test_without_shared_memory_the_arena_lies_in_the_data_directory(tmp_path: Path) -> None:
    for _ in range(2):  # the second finds what a killed node left
        arena = Arena.create(tmp_path, SIZE, shared_memory=tmp_path / "no such directory")
        assert arena.path == tmp_path / "arena"


def test_without_room_anywhere_there_is_no_arena(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperspace_vllm.daemon.kv.arena._free_bytes", lambda directory: 0)
    with pytest.raises(ArenaFull, match="no room"):
        Arena.create(tmp_path, SIZE, shared_memory=tmp_path)


def test_space_that_vanishes_while_reserving_falls_back_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shm").mkdir()
    reserve = os.posix_fallocate

    def full_in_shared_memory(descriptor: int, offset: int, size: int) -> None:
        if "/shm/" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        reserve(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", full_in_shared_memory)
    assert Arena.create(tmp_path, SIZE, shared_memory=tmp_path / "shm").path == tmp_path / "arena"
    assert not list((tmp_path / "shm").iterdir())
