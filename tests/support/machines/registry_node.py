"""Registries without loro: a document is a msgpack of the changes that a delta makes."""

import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import msgspec
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
from hyperspace_vllm.core.records.ids import PeerId, network_id, peer_id, sha256
from hyperspace_vllm.core.records.limits import REGISTRY_REPLY_BYTES_MAX, REGISTRY_TTL_MS
from hyperspace_vllm.core.records.now import Now
from hyperspace_vllm.core.records.peer_wire import Deltas
from hyperspace_vllm.core.records.rank import Acquaintance, Rank
from hyperspace_vllm.core.records.registry_delta import RegistryDelta, decode_delta, encode_delta
from hyperspace_vllm.core.registry.registry import Registry
from tests.support.moments import dated

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
        kind: Literal["update", "snapshot"] = "update" if self.sequence else "snapshot"
        delta = RegistryDelta(
            NETWORK,
            self.public,
            self.epoch,
            self.sequence,
            kind,
            now_ms + REGISTRY_TTL_MS,
            payload,
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
