"""The registry machine: seeded, without loro. A document is a msgpack of the changes that a delta makes."""

import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec
import pytest
from nacl.signing import SigningKey

from hyperspace_vllm.core.events.conduct import ChargePeer
from hyperspace_vllm.core.events.owner_documents import (
    DeltasImported,
    DeltasRefused,
    ForgetOwner,
    ImportDeltas,
    OwnDeltaWritten,
    WriteRegistry,
)
from hyperspace_vllm.core.events.vocabulary import NetworkEffect
from hyperspace_vllm.core.records.ids import NetworkId, PeerId, network_id, peer_id, sha256
from hyperspace_vllm.core.records.limits import (
    REGISTRY_COMPACT_MS,
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
    REGISTRY_WRITE_MS,
)
from hyperspace_vllm.core.records.now import Now
from hyperspace_vllm.core.records.peer_wire import Deltas, RegistryHead, WantDeltas, decode_answer, encode
from hyperspace_vllm.core.records.rank import Acquaintance, Rank
from hyperspace_vllm.core.records.registry_delta import RegistryDelta, decode_delta, encode_delta
from hyperspace_vllm.core.registry import registry as registry_module
from hyperspace_vllm.core.registry.registry import Registry
from tests.support.moments import BOOTED_MS, dated

NETWORK = network_id("test")
START_MS = 1_790_000_000_000
SECOND_MS = 1_000
RELAY = peer_id(SigningKey(bytes(32)).verify_key.encode())


Known = Callable[[bytes], Acquaintance | None]


def everybody(owner: bytes) -> Acquaintance:
    """All owners are met, each at a host of its own."""
    return Acquaintance(Rank.MET, owner.hex())


def ids(count: int, first: int = 0) -> list[bytes]:
    return [sha256(b"id", n.to_bytes(4, "big")) for n in range(first, first + count)]


@dataclass
class Owner:
    """Writes signed deltas as a shell does; a payload is the msgpack of (added, removed)."""

    seed: int
    epoch: int = 0
    sequence: int = 0
    entries: dict[bytes, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.key = SigningKey(sha256(b"owner", self.seed.to_bytes(4, "big")))
        self.public = self.key.verify_key.encode()
        self.peer = peer_id(self.public)

    def snapshot(self, added: Iterable[tuple[bytes, int]], now_ms: int = START_MS, padding: int = 0) -> bytes:
        self.epoch = max(now_ms, self.epoch + 1)
        self.sequence = 0
        return self.delta(msgspec.msgpack.encode((list(added), [], bytes(padding))), now_ms)

    def update(self, added: Iterable[tuple[bytes, int]] = (), removed: Iterable[bytes] = (), padding: int = 0) -> bytes:
        self.sequence += 1
        return self.delta(msgspec.msgpack.encode((list(added), list(removed), bytes(padding))), START_MS)

    def delta(self, payload: bytes, now_ms: int) -> bytes:
        kind = "update" if self.sequence else "snapshot"
        delta = RegistryDelta(
            NETWORK,
            self.public,
            self.epoch,
            self.sequence,
            kind,
            now_ms + REGISTRY_TTL_MS,
            payload,  # type: ignore[arg-type]
        )
        return encode_delta(delta, self.key)


class Documents:
    """What daemon/registry_documents does, without loro."""

    def __init__(self) -> None:
        self.documents: dict[bytes, tuple[int, dict[bytes, int]]] = {}

    def import_deltas(self, effect: ImportDeltas) -> DeltasImported | DeltasRefused:
        if effect.starts_with_snapshot:
            self.documents[effect.owner] = (effect.epoch, {})
        epoch, entries = self.documents.get(effect.owner, (-1, {}))
        if epoch != effect.epoch:
            return DeltasRefused(effect.owner, "worker")
        before = {} if effect.starts_with_snapshot else dict(entries)
        for payload in effect.payloads:
            try:
                added, removed, _ = msgspec.msgpack.decode(payload)
            except msgspec.DecodeError:
                return DeltasRefused(effect.owner, "malformed")
            entries.update(dict(added))
            for id in removed:
                entries.pop(id, None)
        return DeltasImported(
            effect.owner,
            effect.epoch,
            effect.sequence,
            tuple((id, at) for id, at in entries.items() if before.get(id) != at),
            tuple(id for id in before if id not in entries),
            effect.starts_with_snapshot,
        )


class Node:
    """A registry with its shell; effects are performed at once unless `held`."""

    def __init__(self, seed: int, acquaintance: Known = everybody) -> None:
        self.owner = Owner(seed)
        self.peer = self.owner.peer
        self.registry = Registry(NETWORK, self.owner.public, acquaintance, random.Random(seed), dated(START_MS))
        self.documents = Documents()
        self.charged: list[ChargePeer] = []
        self.forgotten: list[bytes] = []
        self.writes: list[WriteRegistry] = []
        self.set_by_ms = 0  # the wall clock, forward or back

    def now(self, now_ms: int) -> Now:
        return Now(dated(now_ms).mono_ms, now_ms + self.set_by_ms)

    def perform(self, effects: list[NetworkEffect], now_ms: int) -> None:
        queue = deque(effects)
        while queue:
            effect = queue.popleft()
            if isinstance(effect, WriteRegistry):
                self.writes.append(effect)
                write = self.owner.snapshot(effect.added, now_ms + self.set_by_ms) if effect.compact else None
                raw = write or self.owner.update(effect.added, effect.removed)
                event = OwnDeltaWritten(decode_delta(raw), raw)
                queue.extend(self.registry.on_own_delta(event, self.now(now_ms)))
            elif isinstance(effect, ImportDeltas):
                done = self.documents.import_deltas(effect)
                if isinstance(done, DeltasImported):
                    self.registry.on_imported(done)
                else:
                    queue.extend(self.registry.on_refused(done))
            elif isinstance(effect, ForgetOwner):
                self.documents.documents.pop(effect.owner, None)
                self.forgotten.append(effect.owner)
            else:
                assert isinstance(effect, ChargePeer)
                self.charged.append(effect)

    def tick(self, now_ms: int) -> None:
        for _ in range(1000):
            now, due = self.now(now_ms), self.registry.next_deadline_ms()
            if (due is None or due > now.mono_ms) and not self.registry.is_misdated(now):
                return
            self.perform(self.registry.on_tick(now), now_ms)
        raise AssertionError("a registry that is never done")

    def take(self, raws: Iterable[bytes], now_ms: int = START_MS, relay: PeerId = RELAY) -> None:
        for answer in answers_of(raws):
            self.answered(relay, answer, now_ms)

    def answered(self, relay: PeerId, answer: Deltas, now_ms: int) -> None:
        """An answer, taken in whole, however many turns that takes."""
        self.perform(self.registry.on_deltas(relay, answer, dated(now_ms)), now_ms)
        self.tick(now_ms)
        while self.registry._intake.next_deadline_ms() is not None:
            now_ms += 10
            self.tick(now_ms)

    def pull(self, other: "Node", now_ms: int) -> bool:
        answer = other.registry.answer(self.registry.want(), dated(now_ms))
        self.answered(other.peer, answer, now_ms)
        return answer.more


def answers_of(raws: Iterable[bytes]) -> list[Deltas]:
    """As many as an honest node would give."""
    answers: list[list[bytes]] = [[]]
    for raw in raws:
        if sum(map(len, answers[-1])) + len(raw) > REGISTRY_REPLY_BYTES_MAX:
            answers.append([])
        answers[-1].append(raw)
    return [Deltas(tuple(answer), ()) for answer in answers]


def union_of(node: Node, every_id: Iterable[bytes], now_ms: int) -> dict[bytes, frozenset[PeerId]]:
    return {id: frozenset(node.registry.providers(id, now_ms)) for id in every_id}


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
    check = registry_module.check_delta

    def counted(raw: bytes, delta: RegistryDelta, network: NetworkId, now_ms: int) -> None:
        checked.append(delta)
        check(raw, delta, network, now_ms)

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


# ------------------------------------------------------------------------------------------ the worker


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


# ------------------------------------------------------------------------------------- the own document


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
