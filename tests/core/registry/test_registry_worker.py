"""The worker that imports documents: one import of an owner at a time, and documents that it does not survive."""

import random
from collections import deque

import pytest

from hyperspace_vllm.core.events.conduct import ChargePeer
from hyperspace_vllm.core.events.owner_documents import DeltasImported, DeltasRefused, ForgetOwner, ImportDeltas
from hyperspace_vllm.core.events.vocabulary import NetworkEffect
from hyperspace_vllm.core.records.limits import REGISTRY_EPOCH_MS
from hyperspace_vllm.core.records.peer_wire import Deltas
from hyperspace_vllm.core.records.rank import Acquaintance, Rank
from hyperspace_vllm.core.registry.registry import Registry
from tests.support.machines.registry_node import NETWORK, RELAY, SECOND_MS, START_MS, Node, Owner, everybody, ids
from tests.support.moments import BOOTED_MS, dated


def imports_of(effects: list[NetworkEffect]) -> list[ImportDeltas]:
    return [effect for effect in effects if isinstance(effect, ImportDeltas)]


def test_one_import_of_an_owner_is_under_way_and_the_next_takes_all_that_came_meanwhile() -> None:
    registry, owner = Registry(NETWORK, Owner(1).public, everybody, random.Random(1), dated(START_MS)), Owner(2)
    raws = [owner.snapshot([])] + [owner.update([(id, START_MS + 9)]) for id in ids(3)]
    (first,) = imports_of(registry.on_deltas(RELAY, Deltas((raws[0],), ()), dated(START_MS)))
    for raw in raws[1:]:
        assert registry.on_deltas(RELAY, Deltas((raw,), ()), dated(START_MS)) == []
    registry.on_imported(DeltasImported(owner.public, first.epoch, 0, (), (), True))
    assert registry.next_deadline_ms() is not None
    (second,) = imports_of(registry.on_tick(dated(START_MS)))
    assert (second.starts_with_snapshot, second.sequence, len(second.payloads)) == (False, 3, 3)


def test_a_worker_that_lost_its_documents_gets_them_again_from_the_logs() -> None:
    node, owner = Node(1), Owner(2)
    a, b = ids(2)
    node.take([owner.snapshot([(a, START_MS + 1000)])])
    node.documents.documents.clear()
    node.take([owner.update([(b, START_MS + 1000)])])
    assert node.registry.providers(a, START_MS) == node.registry.providers(b, START_MS) == (owner.peer,)
    assert node.charged == []


def test_a_document_that_no_worker_survives_is_given_up_without_blame() -> None:
    registry, owner = Registry(NETWORK, Owner(1).public, everybody, random.Random(1), dated(START_MS)), Owner(2)
    effects = registry.on_deltas(RELAY, Deltas((owner.snapshot([]),), ()), dated(START_MS))
    now_ms, tries = START_MS, 0
    while not any(isinstance(effect, ForgetOwner) for effect in effects):
        if imports_of(effects):
            tries += 1
            effects = registry.on_refused(DeltasRefused(owner.public, "worker"))
        else:
            now_ms += 500
            effects = registry.on_tick(dated(now_ms))
        assert not any(isinstance(effect, ChargePeer) for effect in effects)
    assert tries == 6
    assert 60_000 < now_ms - START_MS < 70_000


def test_a_document_that_loses_the_worker_twice_is_ignored_until_its_next_epoch() -> None:
    registry, owner = Registry(NETWORK, Owner(1).public, everybody, random.Random(1), dated(START_MS)), Owner(2)
    now_ms, effects = START_MS, registry.on_deltas(RELAY, Deltas((owner.snapshot([]),), ()), dated(START_MS))
    tries = 0
    while now_ms < START_MS + 600 * SECOND_MS:
        now_ms += SECOND_MS
        if imports_of(effects):
            tries += 1
            effects = registry.on_refused(DeltasRefused(owner.public, "lost", 1000))
        else:
            effects = registry.on_tick(dated(now_ms))
    assert tries == 2
    assert registry.stats().ignored_owners == 1
    assert imports_of(registry.on_deltas(RELAY, Deltas((owner.snapshot([], now_ms),), ()), dated(now_ms)))
    # The next epoch is its last try, not its first.
    assert ForgetOwner(owner.public) in registry.on_refused(DeltasRefused(owner.public, "lost", 1000))


def test_a_worker_that_is_lost_now_and_then_costs_no_owner_its_document() -> None:
    registry, owner = Registry(NETWORK, Owner(1).public, everybody, random.Random(1), dated(START_MS)), Owner(2)
    effects = registry.on_deltas(RELAY, Deltas((owner.snapshot([]),), ()), dated(START_MS))
    for now_ms in range(START_MS, START_MS + 600 * SECOND_MS, 100 * SECOND_MS):
        assert imports_of(effects)
        retried = registry.on_refused(DeltasRefused(owner.public, "lost", 10))
        (again,) = imports_of(retried + registry.on_tick(dated(now_ms + 90 * SECOND_MS)))
        registry.on_imported(DeltasImported(owner.public, again.epoch, again.sequence, (), (), True))
        effects = registry.on_deltas(RELAY, Deltas((owner.update(),), ()), dated(now_ms + 100 * SECOND_MS))


@pytest.mark.parametrize("outcome", ["lost", "slow"])
def test_documents_that_keep_the_worker_busy_delay_each_other_and_none_of_other_hosts(outcome: str) -> None:
    """One host tells of 24 owners; the worker does one import after another."""
    attackers, honest = [Owner(n) for n in range(100, 124)], [Owner(n) for n in range(10, 14)]
    hosts = {owner.public: Acquaintance(Rank.TOLD, "attacker") for owner in attackers}
    registry = Registry(
        NETWORK, Owner(1).public, lambda key: hosts.get(key, everybody(key)), random.Random(1), dated(START_MS)
    )
    queue: deque[ImportDeltas] = deque()
    taken_ms: dict[bytes, int] = dict.fromkeys(hosts, 0)
    imported_at_ms: dict[bytes, int] = {}
    for owner in (*attackers, *honest):
        queue += imports_of(registry.on_deltas(owner.peer, Deltas((owner.snapshot([]),), ()), dated(START_MS)))
    now_ms = START_MS
    while now_ms < START_MS + 60 * SECOND_MS:
        if not queue:
            now_ms = max(now_ms + 1, (registry.next_deadline_ms() or 0) + BOOTED_MS)
        elif (done := queue.popleft()).owner in hosts:
            now_ms += 1_000
            taken_ms[done.owner] += 1_000
            if outcome == "lost":
                queue += imports_of(registry.on_refused(DeltasRefused(done.owner, "lost", 1_000)))
            else:
                registry.on_imported(DeltasImported(done.owner, done.epoch, 0, (), (), True, 1_000))
        else:
            imported_at_ms[done.owner] = now_ms
            registry.on_imported(DeltasImported(done.owner, done.epoch, 0, (), (), True, 10))
        queue += imports_of(registry.on_tick(dated(now_ms)))
    assert max(imported_at_ms.values()) <= START_MS + 2 * SECOND_MS
    assert len(imported_at_ms) == len(honest)
    busy_ms = sum(taken_ms.values())
    assert 2_000 <= busy_ms <= 5_000 if outcome == "lost" else 15_000 <= busy_ms <= 21_000


def test_owners_on_this_nodes_own_lists_are_in_no_hosts_share_of_the_worker() -> None:
    registry = Registry(
        NETWORK, Owner(1).public, lambda key: Acquaintance(Rank.LISTED, "host"), random.Random(1), dated(START_MS)
    )
    owners = [Owner(n) for n in range(10, 14)]
    raws = tuple(owner.snapshot([]) for owner in owners)
    assert len(imports_of(registry.on_deltas(RELAY, Deltas(raws, ()), dated(START_MS)))) == len(owners)


def test_a_new_epoch_during_an_import_is_imported_next() -> None:
    registry, owner = Registry(NETWORK, Owner(1).public, everybody, random.Random(1), dated(START_MS)), Owner(2)
    a, b = ids(2)
    later = START_MS + REGISTRY_EPOCH_MS
    (first,) = imports_of(registry.on_deltas(RELAY, Deltas((owner.snapshot([]),), ()), dated(START_MS)))
    new = owner.snapshot([], later)
    assert registry.on_deltas(RELAY, Deltas((new,), ()), dated(later)) == []
    registry.on_imported(DeltasImported(owner.public, first.epoch, 0, ((a, later + 9),), (), True))
    assert registry.providers(a, later) == (owner.peer,)
    (second,) = imports_of(registry.on_tick(dated(later)))
    assert second.starts_with_snapshot
    registry.on_imported(DeltasImported(owner.public, second.epoch, 0, ((b, later + 9),), (), True))
    assert (registry.providers(a, later), registry.providers(b, later)) == ((), (owner.peer,))


def test_the_refusal_of_an_epoch_that_is_over_says_nothing_of_the_next() -> None:
    registry, owner = Registry(NETWORK, Owner(1).public, everybody, random.Random(1), dated(START_MS)), Owner(2)
    later = START_MS + REGISTRY_EPOCH_MS
    registry.on_deltas(RELAY, Deltas((owner.snapshot([]),), ()), dated(START_MS))
    registry.on_deltas(RELAY, Deltas((owner.snapshot([], later),), ()), dated(later))
    effects = registry.on_refused(DeltasRefused(owner.public, "malformed"))
    assert [type(effect) for effect in effects] == [ImportDeltas]
