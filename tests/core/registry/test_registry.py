"""What others' deltas change in a registry: seeded, without loro, under loss, forgeries and floods."""

import itertools
import random
from collections.abc import Iterable

import pytest

from hyperspace_vllm.core.records.ids import NetworkId, PeerId
from hyperspace_vllm.core.records.limits import (
    REGISTRY_DELTAS_AT_ONCE,
    REGISTRY_DELTAS_PER_S,
    REGISTRY_ENTRIES_MAX,
    REGISTRY_EPOCH_MS,
    REGISTRY_INDEX_OF_SOURCE_MAX,
    REGISTRY_LOG_BYTES_MAX,
    REGISTRY_OWNERS_MAX,
    REGISTRY_OWNERS_OF_SOURCE_MAX,
    REGISTRY_REPLY_BYTES_MAX,
    REGISTRY_TTL_MS,
)
from hyperspace_vllm.core.records.peer_wire import Deltas, RegistryHead, WantDeltas, decode_answer, encode
from hyperspace_vllm.core.records.rank import Acquaintance, Rank
from hyperspace_vllm.core.records.registry_delta import RegistryDelta, check_delta, decode_delta, encode_delta
from hyperspace_vllm.core.registry import registry as registry_module
from hyperspace_vllm.core.registry.registry import Registry
from tests.support.machines.registry_node import (
    NETWORK,
    RELAY,
    SECOND_MS,
    START_MS,
    Known,
    Node,
    Owner,
    everybody,
    ids,
    union_of,
)
from tests.support.moments import dated


@pytest.mark.parametrize("seed", range(20))
def test_registries_converge_under_loss_random_order_and_a_partition(seed: int) -> None:
    rng = random.Random(seed)
    nodes = [Node(seed * 100 + n) for n in range(8)]
    every_id = ids(60)
    truth: dict[bytes, set[PeerId]] = {id: set() for id in every_id}
    now_ms = START_MS
    for step in range(120):
        now_ms += 100
        node, id = rng.choice(nodes), rng.choice(every_id)
        if rng.random() < 0.7:
            node.registry.note_stored(id, START_MS + REGISTRY_TTL_MS)
            truth[id].add(node.peer)
        else:
            node.registry.note_gone([id])
            truth[id].discard(node.peer)
        for each in nodes:
            each.tick(now_ms)
        a, b = rng.sample(range(8), 2)
        apart = 40 <= step < 90 and (a < 4) != (b < 4)
        if not apart and rng.random() < 0.7:
            nodes[a].pull(nodes[b], now_ms)
    for _ in range(6):
        now_ms += 1_000
        for each in nodes:
            each.tick(now_ms)
            each.pull(nodes[(nodes.index(each) + 1) % 8], now_ms)
            each.pull(nodes[(nodes.index(each) + 3) % 8], now_ms)
    for each in nodes:
        assert union_of(each, every_id, now_ms) == {id: frozenset(truth[id] - {each.peer}) for id in every_id}
        assert each.charged == []
        assert each.registry.entries == sum(len(truth[id] - {each.peer}) for id in every_id)


def test_a_gap_is_left_aside_and_filled_later() -> None:
    node, owner = Node(1), Owner(2)
    a, b, c = ids(3)
    until = START_MS + 1000
    raws = [owner.snapshot([(a, until)]), owner.update([(b, until)]), owner.update([(c, until)], [a])]
    node.take([raws[2], raws[0], raws[2]])
    assert node.registry.providers(a, START_MS) == (owner.peer,)
    node.take(raws)
    assert [node.registry.providers(id, START_MS) for id in (a, b, c)] == [(), (owner.peer,), (owner.peer,)]
    assert node.charged == []


def test_a_forged_delta_is_charged_to_the_relay() -> None:
    node, owner, thief = Node(1), Owner(2), Owner(3)
    a, b = ids(2)
    node.take([owner.snapshot([(a, START_MS + 1000)])])
    forged = RegistryDelta(NETWORK, owner.public, owner.epoch, 1, "update", START_MS + 9, b"")
    node.take([encode_delta(forged, thief.key)])
    node.take([b"x" * 200])
    assert [(charge.peer, charge.reason) for charge in node.charged] == [
        (RELAY, "registry_bad_signature"),
        (RELAY, "registry_malformed"),
    ]
    assert node.registry.providers(a, START_MS) == (owner.peer,)
    assert node.registry.providers(b, START_MS) == ()


def test_of_two_deltas_with_one_number_the_first_stays_and_the_owner_is_charged() -> None:
    node, owner = Node(1), Owner(2)
    a, b, c = ids(3)
    node.take([owner.snapshot([(a, START_MS + 1000)]), owner.update([(b, START_MS + 1000)])])
    owner.sequence = 0
    node.take([owner.update([(c, START_MS + 1000)])])
    assert [(charge.peer, charge.reason) for charge in node.charged] == [(owner.peer, "registry_equivocation")]
    assert node.registry.providers(b, START_MS) == (owner.peer,)
    assert node.registry.providers(c, START_MS) == ()


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[RegistryDelta]:
    """Deltas whose signature was checked."""
    checked: list[RegistryDelta] = []

    def counted(raw: bytes, delta: RegistryDelta, network: NetworkId, now_ms: int) -> None:
        checked.append(delta)
        check_delta(raw, delta, network, now_ms)

    monkeypatch.setattr(registry_module, "check_delta", counted)
    return checked


def test_any_number_of_other_deltas_with_one_number_cost_one_check_an_epoch(checks: list[RegistryDelta]) -> None:
    node, owner = Node(1), Owner(2)
    first, other = owner.snapshot([]), owner.delta(b"other", START_MS)
    for _ in range(3):
        node.take([first, *[other] * 4095])
    assert len(checks) == 2
    assert [charge.reason for charge in node.charged] == ["registry_equivocation"]
    later = START_MS + REGISTRY_EPOCH_MS
    first, other = owner.snapshot([], later), owner.delta(b"other", later)
    node.take([first, *[other] * 4095], later)
    assert len(checks) == 4
    assert len(node.charged) == 2


def test_a_turn_checks_a_few_deltas_of_each_host_and_a_second_a_bounded_number(checks: list[RegistryDelta]) -> None:
    registry = Registry(NETWORK, Owner(1).public, everybody, random.Random(1), dated(START_MS))
    owners = [Owner(n) for n in range(100, 100 + REGISTRY_OWNERS_OF_SOURCE_MAX)]
    flood = [raw for owner in owners for raw in (owner.snapshot([]), *(owner.update() for _ in range(15)))]
    honest = Owner(2)
    registry.on_deltas(owners[0].peer, Deltas(tuple(flood), (), more=True), dated(START_MS))
    registry.on_deltas(honest.peer, Deltas((honest.snapshot([]),), ()), dated(START_MS))
    assert len(checks) == REGISTRY_DELTAS_AT_ONCE
    turns = [len(checks)]
    for now_ms in range(START_MS, START_MS + SECOND_MS, 10):
        if (due_ms := registry._intake.next_deadline_ms()) is not None and due_ms <= dated(now_ms).mono_ms:
            registry.on_tick(dated(now_ms))
            turns.append(len(checks))
    assert honest.public in [delta.owner for delta in checks[: 2 * REGISTRY_DELTAS_AT_ONCE]]
    assert max(after - before for before, after in itertools.pairwise(turns)) <= REGISTRY_DELTAS_AT_ONCE
    assert 0.8 * REGISTRY_DELTAS_PER_S < len(checks) <= REGISTRY_DELTAS_PER_S + REGISTRY_DELTAS_AT_ONCE


def test_a_neighbour_that_has_more_is_asked_again_once_its_answer_is_taken_in_and_was_of_use() -> None:
    registry, owner = Registry(NETWORK, Owner(1).public, everybody, random.Random(1), dated(START_MS)), Owner(2)
    raws = (owner.snapshot([]), *(owner.update() for _ in range(REGISTRY_DELTAS_AT_ONCE)))
    registry.on_deltas(RELAY, Deltas(raws, (), more=True), dated(START_MS))
    assert registry.whom_to_ask_again() == []
    registry.on_tick(dated(START_MS + SECOND_MS))
    assert registry.whom_to_ask_again() == [RELAY]
    assert registry.whom_to_ask_again() == []
    registry.on_deltas(RELAY, Deltas(raws, (), more=True), dated(START_MS + SECOND_MS))
    registry.on_tick(dated(START_MS + 2 * SECOND_MS))
    assert registry.whom_to_ask_again() == []


def test_a_new_epoch_replaces_everything_and_an_old_one_is_ignored() -> None:
    node, owner = Node(1), Owner(2)
    a, b = ids(2)
    old = owner.snapshot([(a, START_MS + 9000)])
    node.take([old])
    later = START_MS + REGISTRY_EPOCH_MS
    new = owner.snapshot([(b, START_MS + 9000)], later)
    node.take([new], later)
    node.take([old], later + REGISTRY_EPOCH_MS)
    assert node.registry.providers(a, later) == ()
    assert node.registry.providers(b, later) == (owner.peer,)
    assert node.charged == []


def test_an_owner_that_begins_anew_all_the_time_is_heard_now_and_then() -> None:
    node, owner = Node(1), Owner(2)
    taken = []
    for at in range(START_MS, START_MS + 10_000, 100):
        node.take([owner.snapshot([(ids(1)[0], START_MS + 99_000)], at)], at)
        taken += [head.epoch for head in node.registry.want().heads if head.owner == owner.public]
    assert len(set(taken)) == 5


def test_strangers_have_no_document_here() -> None:
    node, owner = Node(1, acquaintance=lambda key: None), Owner(2)
    raw = owner.snapshot([(ids(1)[0], START_MS + 1000)])
    assert node.registry.on_deltas(RELAY, Deltas((raw,), ()), dated(START_MS)) == []
    assert node.registry.stats().owners == 0


def test_a_refused_document_is_ignored_until_its_next_epoch() -> None:
    node, owner, other = Node(1), Owner(2), Node(3)
    (a,) = ids(1)
    owner.epoch = START_MS
    bad = owner.delta(b"\xc1", START_MS)
    node.take([bad])
    assert [(charge.peer, charge.reason) for charge in node.charged] == [(owner.peer, "registry_malformed")]
    assert node.forgotten == [owner.public]
    node.take([bad, owner.update([(a, START_MS + 1000)])])
    assert len(node.charged) == 1
    # Others aren't told that it is here, nor asked for it.
    other.pull(node, START_MS)
    assert other.registry.stats().ignored_owners == 0
    assert other.registry.stats().owners == 1
    assert [head.owner for head in node.registry.want().heads] == [owner.public, node.owner.public]
    assert owner.public not in [head.owner for head in node.registry.answer(WantDeltas(()), dated(START_MS)).heads]
    later = START_MS + REGISTRY_EPOCH_MS
    node.take([owner.snapshot([(a, later + 1000)], later)], later)
    assert node.registry.providers(a, later) == (owner.peer,)


def test_an_update_that_bloats_the_log_ends_the_epoch_and_is_charged() -> None:
    node, owner = Node(1), Owner(2)
    (a,) = ids(1)
    raws = [owner.snapshot([(a, START_MS + 1000)])]
    raws += [owner.update(padding=1 << 20) for _ in range(REGISTRY_LOG_BYTES_MAX // (1 << 20) + 1)]
    node.take(raws)
    assert [charge.reason for charge in node.charged] == ["registry_too_large"]
    assert node.registry.providers(a, START_MS) == ()
    assert node.registry.stats().log_bytes < 1000


def test_too_many_deltas_end_the_epoch() -> None:
    node, owner = Node(1), Owner(2)
    node.take([owner.snapshot([])] + [owner.update() for _ in range(1100)])
    assert {charge.reason for charge in node.charged} == {"registry_too_large"}


def test_too_many_entries_end_the_epoch() -> None:
    node, owner = Node(1), Owner(2)
    many = [(id, START_MS + 1000) for id in ids(REGISTRY_ENTRIES_MAX + 1)]
    node.take([owner.snapshot(many[:15_000]), owner.update(many[15_000:])])
    assert [charge.reason for charge in node.charged] == ["registry_too_large"]
    assert node.registry.entries == 0


def test_the_largest_owner_makes_room_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REGISTRY_LOGS_BYTES_MAX", "REGISTRY_LOGS_BYTES_OF_SOURCE_MAX"):
        monkeypatch.setattr(registry_module, name, 2_000_000)
    for name in ("REGISTRY_INDEX_MAX", "REGISTRY_INDEX_OF_SOURCE_MAX"):
        monkeypatch.setattr(registry_module, name, 100)
    node = Node(1)
    until = START_MS + 1000
    honest = [Owner(n) for n in range(10, 30)]
    (a,) = ids(1)
    for owner in honest:
        node.take([owner.snapshot([(a, until)])])
    for owner in (Owner(2), Owner(3)):
        node.take([owner.snapshot([(a, until)], padding=1_200_000)])
    assert set(node.registry.providers(a, START_MS)) >= {owner.peer for owner in honest}
    assert node.registry.stats().log_bytes < 2_000_000
    node.take([Owner(4).snapshot([(id, until) for id in ids(99)])])
    assert set(node.registry.providers(a, START_MS)) >= {owner.peer for owner in honest}
    assert node.registry.entries <= 100
    assert node.charged == []


def told_by_one(honest: Iterable[Owner], rank: Rank = Rank.MET) -> Known:
    """The honest have `rank`, each at its own host; everybody else was told of from one host."""
    hosts = {owner.public: Acquaintance(rank, f"honest {owner.seed}") for owner in honest}
    return lambda key: hosts.get(key, Acquaintance(Rank.TOLD, "inventor"))


@pytest.mark.parametrize("rank", list(Rank))
def test_owners_that_one_peer_invents_push_out_no_honest_one_and_hold_a_quarter_at_most(rank: Rank) -> None:
    honest = [Owner(n) for n in range(10, 13)]
    late = Owner(13)
    node = Node(1, told_by_one([*honest, late], rank))
    until = START_MS + REGISTRY_TTL_MS
    (a,) = ids(1, first=1_000_000)
    node.take(owner.snapshot([(a, until), *((id, until) for id in ids(1_000, 1_000 * owner.seed))]) for owner in honest)
    for n in range(1_000, 1_000 + REGISTRY_OWNERS_MAX, 100):
        invented = [Owner(seed) for seed in range(n, n + 100)]
        node.take(owner.snapshot([(id, until) for id in ids(199, owner.seed * 199)]) for owner in invented)
        assert set(node.registry.providers(a, START_MS)) == {owner.peer for owner in honest}
    node.take([late.snapshot([(a, until)])])
    assert late.peer in node.registry.providers(a, START_MS)
    assert node.registry.entries <= REGISTRY_INDEX_OF_SOURCE_MAX + 3 * 1_001 + 1
    stats = node.registry.stats()
    assert stats.owners - stats.ignored_owners <= REGISTRY_OWNERS_OF_SOURCE_MAX + 4
    encode(node.registry.want())


def test_whose_document_found_no_room_is_heard_again_within_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "REGISTRY_INDEX_OF_SOURCE_MAX", 10)
    known: dict[bytes, Acquaintance] = {}
    node, owner = Node(1, lambda key: known.get(key, Acquaintance(Rank.TOLD, "host"))), Owner(2)
    snapshot = owner.snapshot([(id, START_MS + REGISTRY_TTL_MS) for id in ids(11)])
    node.take([snapshot])
    assert node.registry.entries == 0
    node.take([snapshot, owner.snapshot([(ids(1)[0], START_MS + REGISTRY_TTL_MS)], START_MS + 3_000)], START_MS + 3_000)
    assert node.registry.entries == 0
    known[owner.public] = Acquaintance(Rank.LISTED, "")
    node.tick(START_MS + 61_000)
    node.take([snapshot], START_MS + 61_000)
    assert node.registry.entries == 11


def test_a_document_without_end_costs_a_source_its_own_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "REGISTRY_LOGS_BYTES_OF_SOURCE_MAX", 1_000_000)
    honest = Owner(10)
    node = Node(1, told_by_one([honest], Rank.TOLD))
    (a,) = ids(1)
    node.take([honest.snapshot([(a, START_MS + 1_000)], padding=600_000)])
    for n in range(20, 25):
        node.take([Owner(n).snapshot([(a, START_MS + 1_000)], padding=400_000)])
    assert honest.peer in node.registry.providers(a, START_MS)
    assert node.registry.stats().log_bytes <= 1_700_000


def test_owners_are_bounded() -> None:
    node = Node(1)
    raws = [Owner(n).snapshot([]) for n in range(10, 10 + REGISTRY_OWNERS_MAX + 20)]
    node.take(raws)
    assert len(node.registry.want().heads) <= REGISTRY_OWNERS_MAX
    encode(node.registry.want())


def test_an_epoch_that_no_head_can_say_is_malformed() -> None:
    node, owner = Node(1), Owner(2)
    owner.epoch = 1 << 63
    node.take([owner.delta(b"", START_MS)])
    assert [charge.reason for charge in node.charged] == ["registry_malformed"]


def test_entries_and_owners_expire() -> None:
    node, owner = Node(1), Owner(2)
    a, b = ids(2)
    node.take([owner.snapshot([(a, START_MS + 1000), (b, START_MS + 10 * REGISTRY_TTL_MS)])])
    assert node.registry.providers(a, START_MS + 999) == (owner.peer,)
    assert node.registry.providers(a, START_MS + 1000) == ()
    node.tick(START_MS + 120_000)
    assert node.registry.entries == 1
    # The document ends with its snapshot, whatever its entries say.
    assert node.registry.providers(b, START_MS + REGISTRY_TTL_MS) == ()
    node.tick(START_MS + REGISTRY_TTL_MS + 60_000)
    assert node.registry.entries == 0
    assert node.forgotten == [owner.public]


def test_an_answer_stays_within_its_bound_and_says_that_there_is_more() -> None:
    node, fresh = Node(1), Node(2)
    (a,) = ids(1)
    for n in range(10, 15):
        node.take([Owner(n).snapshot([(a, START_MS + 9000)], padding=900_000)])
    rounds = 1
    while fresh.pull(node, START_MS):
        rounds += 1
    assert rounds == 3
    assert len(fresh.registry.providers(a, START_MS)) == 5
    answer = node.registry.answer(WantDeltas(()), dated(START_MS))
    assert sum(map(len, answer.deltas)) <= REGISTRY_REPLY_BYTES_MAX
    assert decode_answer(encode(answer)) == answer


def test_a_node_that_is_ahead_is_sent_nothing() -> None:
    node, owner = Node(1), Owner(2)
    node.take([owner.snapshot([])])
    for ahead in (RegistryHead(owner.public, owner.epoch + 1, 0), RegistryHead(owner.public, owner.epoch, 5)):
        (own,) = node.registry.answer(WantDeltas((ahead,)), dated(START_MS)).deltas
        assert decode_delta(own).owner == node.owner.public
