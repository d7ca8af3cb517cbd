"""The document that a node writes itself: batched, bounded, compacted and begun anew."""

import random
from collections import deque

import pytest

from hyperspace_vllm.core.events.owner_documents import DeltasRefused, WriteRegistry
from hyperspace_vllm.core.records.limits import (
    REGISTRY_COMPACT_MS,
    REGISTRY_ENTRIES_MAX,
    REGISTRY_TTL_MS,
    REGISTRY_WRITE_MS,
)
from hyperspace_vllm.core.registry.registry import Registry
from tests.support.machines.registry_node import NETWORK, START_MS, Node, Owner, everybody, ids
from tests.support.moments import dated


def test_the_first_write_begins_an_epoch_even_of_nothing() -> None:
    registry = Registry(NETWORK, Owner(1).public, everybody, random.Random(1), dated(START_MS))
    assert registry.next_deadline_ms() == 0
    assert registry.on_tick(dated(START_MS)) == [WriteRegistry((), (), compact=True)]
    assert registry.on_tick(dated(START_MS + 9000)) == []


def test_changes_are_batched() -> None:
    node = Node(1)
    node.tick(START_MS)
    for n, id in enumerate(ids(500)):
        node.registry.note_stored(id, START_MS + REGISTRY_TTL_MS)
        node.tick(START_MS + n)
    assert len(node.writes) == 1 + 1
    node.tick(START_MS + 2 * REGISTRY_WRITE_MS)
    assert sum(len(write.added) for write in node.writes) == 500
    assert len(node.writes) == 3


def test_what_came_and_went_between_two_writes_is_not_written() -> None:
    node = Node(1)
    node.tick(START_MS)
    (a,) = ids(1)
    node.registry.note_stored(a, START_MS + 9000)
    node.registry.note_gone([a])
    node.tick(START_MS + 1000)
    assert len(node.writes) == 1


def test_the_own_log_stays_bounded_and_compacts_before_it_expires() -> None:
    node, rng = Node(1), random.Random(5)
    now_ms, largest, held = START_MS, 0, deque(ids(300))
    for id in held:
        node.registry.note_stored(id, START_MS + REGISTRY_TTL_MS)
    for n in range(3000):
        now_ms += REGISTRY_WRITE_MS
        held.append(rng.randbytes(32))
        node.registry.note_stored(held[-1], now_ms + REGISTRY_TTL_MS)
        node.registry.note_gone([held.popleft()])
        node.tick(now_ms)
        largest = max(largest, node.registry.stats().log_bytes)
        assert len(node.writes) == n + 1
    assert largest < 200_000
    epochs = sum(write.compact for write in node.writes)
    assert 5 < epochs < 30
    node.tick(now_ms + REGISTRY_TTL_MS * 2 // 3)
    assert sum(write.compact for write in node.writes) == epochs + 1


def test_compaction_leaves_expired_entries_out() -> None:
    node = Node(1)
    a, b = ids(2)
    node.registry.note_stored(a, START_MS + 1000)
    node.registry.note_stored(b, START_MS + REGISTRY_TTL_MS)
    node.tick(START_MS)
    node.tick(START_MS + REGISTRY_TTL_MS // 2)
    assert node.writes[-1] == WriteRegistry(((b, START_MS + REGISTRY_TTL_MS),), (a,), compact=True)


def test_a_flood_of_own_entries_keeps_the_newest_and_stays_within_what_others_take() -> None:
    node, other = Node(1), Node(2)
    node.tick(START_MS)
    every = ids(REGISTRY_ENTRIES_MAX + 5000)
    now_ms = START_MS
    for at in range(0, len(every), 500):
        for id in every[at : at + 500]:
            node.registry.note_stored(id, START_MS + REGISTRY_TTL_MS)
        now_ms += 20
        node.tick(now_ms)
    for _ in range(40):
        now_ms += REGISTRY_COMPACT_MS // 10
        node.tick(now_ms)
        while other.pull(node, now_ms):
            pass
    assert other.charged == []
    assert other.registry.entries == REGISTRY_ENTRIES_MAX
    assert other.registry.providers(every[-1], now_ms) == (node.peer,)
    assert other.registry.providers(every[0], now_ms) == ()


def test_a_write_that_failed_is_made_good_by_a_new_epoch() -> None:
    registry = Registry(NETWORK, Owner(1).public, everybody, random.Random(1), dated(START_MS))
    a, b = ids(2)
    registry.note_stored(a, START_MS + REGISTRY_TTL_MS)
    registry.on_tick(dated(START_MS))
    assert registry.on_refused(DeltasRefused(Owner(1).public, "worker")) == []
    registry.note_gone([a])
    registry.note_stored(b, START_MS + REGISTRY_TTL_MS)
    assert registry.on_tick(dated(START_MS + 100)) == []
    assert registry.on_tick(dated(START_MS + 2000)) == [
        WriteRegistry(((b, START_MS + REGISTRY_TTL_MS),), (a,), compact=True)
    ]


def test_a_restarted_node_replaces_what_its_earlier_run_said() -> None:
    old, other = Node(1), Node(2)
    a, b = ids(2)
    old.registry.note_stored(a, START_MS + REGISTRY_TTL_MS)
    old.tick(START_MS)
    other.pull(old, START_MS)
    new = Node(1)
    new.registry.note_stored(b, START_MS + REGISTRY_TTL_MS)
    later = START_MS + 5000
    new.pull(other, later)  # its own earlier document, which it doesn't take for another's
    new.tick(later)
    other.pull(new, later)
    assert other.registry.providers(a, later) == ()
    assert other.registry.providers(b, later) == (new.peer,)
    assert new.registry.providers(b, later) == ()
    assert new.charged == other.charged == []


@pytest.mark.parametrize(("back_ms", "anew"), [(1_000, False), (3_600_000, True)])
def test_a_clock_that_is_set_back_stops_no_write_and_dates_the_document_anew(back_ms: int, anew: bool) -> None:
    node = Node(1)
    node.tick(START_MS)
    now_ms = START_MS - back_ms
    node.set_by_ms = -back_ms
    (a,) = ids(1)
    node.registry.note_stored(a, now_ms + REGISTRY_TTL_MS)
    node.tick(START_MS + REGISTRY_WRITE_MS)
    assert len(node.writes) == 2
    assert node.writes[-1] == WriteRegistry(((a, now_ms + REGISTRY_TTL_MS),), (), compact=anew)
