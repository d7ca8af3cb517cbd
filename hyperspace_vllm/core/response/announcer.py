"""Gossip: batches that this node announces, and batches of peers that it takes.

Sent: at most one batch per topic every FLUSH_MS, and one of evidence every EVIDENCE_EVERY_MS. Taken: batches signed by
a known node, from the last minute, not seen before, and within ENTRIES_PER_S of their sender. The transport has
filtered them before (peers/gossip_gate.py).
"""

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from nacl.signing import SigningKey

from ..events.gossip import Publish
from ..events.vocabulary import NetworkEffect
from ..peers.allowance import Allowance
from ..records.announcement import (
    Announcement,
    Entries,
    EvidenceEntry,
    PrefixEntry,
    ResponseEntry,
    check_announcement,
    decode_announcement,
    encode_announcement,
)
from ..records.errors import ProtocolViolation, Refused
from ..records.ids import NetworkId
from ..records.limits import ANNOUNCEMENT_ENTRIES_MAX, EVIDENCE_ENTRIES_MAX, PEERS_KNOWN_MAX
from ..records.now import Now

FLUSH_MS = 100
QUEUED_MAX = 16 * ANNOUNCEMENT_ENTRIES_MAX  # older ones are left to the registry
ENTRIES_PER_S = 1_000
ENTRIES_BURST = 4 * ENTRIES_PER_S
EVIDENCE_EVERY_MS = 1_000 * EVIDENCE_ENTRIES_MAX  # one entry a second in the long run
EVIDENCE_QUEUED_MAX = 8 * EVIDENCE_ENTRIES_MAX  # older ones are dropped
EVIDENCE_WEIGHT = 100  # in entries of other kinds: ten a second, since each has a signature to check
ACCUSED_KEPT = 1_024  # lies that were announced, so that none is announced twice
SEQUENCES_KEPT = 1_024  # of one sender; at ten batches a second more than a minute's


class Outbox:
    """Entries to announce. Sequence numbers follow the wall clock, so that they grow over restarts."""

    def __init__(self, network: NetworkId, key: SigningKey, now: Now) -> None:
        self._network = network
        self._key = key
        self._public_key = key.verify_key.encode()
        self._sequence = now.wall_ms
        self._responses: deque[ResponseEntry] = deque(maxlen=QUEUED_MAX)
        self._prefixes: deque[PrefixEntry] = deque(maxlen=QUEUED_MAX)
        self._flush_at_ms = now.mono_ms
        self._evidence: deque[EvidenceEntry] = deque(maxlen=EVIDENCE_QUEUED_MAX)
        self._evidence_at_ms = now.mono_ms
        self._accused: OrderedDict[tuple[bytes, bytes], None] = OrderedDict()

    def add(self, entry: ResponseEntry | PrefixEntry) -> None:
        """Announce the entry with the next batch."""
        if isinstance(entry, ResponseEntry):
            self._responses.append(entry)
        else:
            self._prefixes.append(entry)

    def accuse(self, entry: EvidenceEntry) -> None:
        """Announce a lie, once, in one of the next batches."""
        name = entry.signer, entry.request_hash
        if name in self._accused:
            return
        self._evidence.append(entry)
        self._accused[name] = None
        if len(self._accused) > ACCUSED_KEPT:
            self._accused.popitem(last=False)

    def remove(self, names: frozenset[bytes]) -> None:
        """These responses are deleted: do not announce them any more."""
        if any(entry.request_hash in names for entry in self._responses):
            kept = [entry for entry in self._responses if entry.request_hash not in names]
            self._responses = deque(kept, maxlen=QUEUED_MAX)

    def next_deadline_ms(self) -> int | None:
        """When the next batch may go."""
        times = [self._flush_at_ms] if self._responses or self._prefixes else []
        times += [self._evidence_at_ms] if self._evidence else []
        return min(times, default=None)

    def flush(self, now: Now) -> list[NetworkEffect]:
        """The batches that are due."""
        batches: list[Entries] = []
        if now.mono_ms >= self._flush_at_ms and (self._responses or self._prefixes):
            self._flush_at_ms = now.mono_ms + FLUSH_MS
            batches += [_take(queue, ANNOUNCEMENT_ENTRIES_MAX) for queue in (self._responses, self._prefixes) if queue]
        if now.mono_ms >= self._evidence_at_ms and self._evidence:
            self._evidence_at_ms = now.mono_ms + EVIDENCE_EVERY_MS
            batches.append(_take(self._evidence, EVIDENCE_ENTRIES_MAX))
        effects: list[NetworkEffect] = []
        for entries in batches:
            self._sequence = max(self._sequence + 1, now.wall_ms)
            batch = Announcement(self._network, self._public_key, self._sequence, now.wall_ms, entries)
            effects.append(Publish(batch.topic, encode_announcement(batch, self._key)))
        return effects


@dataclass(slots=True)
class _Sender:
    """One sender: its recent sequence numbers, the greatest forgotten one, and how many entries it may still send."""

    seen: OrderedDict[int, None]
    floor: int
    entries: Allowance


class Inbox:
    """Batches of other nodes. `known(public key)`: whether this sender counts."""

    def __init__(self, network: NetworkId, own_key: bytes, known: Callable[[bytes], bool]) -> None:
        self._network = network
        self._own_key = own_key
        self._known = known
        self._senders: OrderedDict[bytes, _Sender] = OrderedDict()

    def open(self, topic: str, payload: bytes, now: Now) -> Announcement | Refused:
        """The batch if it counts, otherwise the reason (a metric label)."""
        try:
            batch = decode_announcement(payload)
        except ProtocolViolation as violation:
            return Refused("malformed", str(violation))
        if batch.topic != topic:
            return Refused("wrong_topic")
        if batch.sender == self._own_key:
            return Refused("own")
        if not self._known(batch.sender):
            return Refused("stranger")
        sender = self._senders.get(batch.sender)
        if sender is not None and (batch.sequence in sender.seen or batch.sequence <= sender.floor):
            return Refused("duplicate")
        try:
            check_announcement(payload, batch, self._network, now.wall_ms)
        except Refused as refused:
            return refused
        sender = self._remember(batch, now)
        weight = EVIDENCE_WEIGHT if isinstance(batch.entries[0], EvidenceEntry) else 1
        return batch if sender.entries.take(weight * len(batch.entries), now) else Refused("rate")

    def _remember(self, batch: Announcement, now: Now) -> _Sender:
        sender = self._senders.get(batch.sender)
        if sender is None:
            sender = self._senders[batch.sender] = _Sender(
                OrderedDict(), -1, Allowance(ENTRIES_PER_S, ENTRIES_BURST, now)
            )
        self._senders.move_to_end(batch.sender)
        sender.seen[batch.sequence] = None
        if len(sender.seen) > SEQUENCES_KEPT:
            forgotten, _ = sender.seen.popitem(last=False)
            sender.floor = max(sender.floor, forgotten)
        if len(self._senders) > PEERS_KNOWN_MAX:
            self._senders.popitem(last=False)
        return sender


def _take(queue: "deque[ResponseEntry] | deque[PrefixEntry] | deque[EvidenceEntry]", at_most: int) -> tuple:  # type: ignore[type-arg]
    return tuple(queue.popleft() for _ in range(min(len(queue), at_most)))


assert EVIDENCE_WEIGHT * EVIDENCE_ENTRIES_MAX < ENTRIES_BURST
