"""The registry: which peer announces which ids (of responses and of KV rows).

There is one document per owner, which only its owner can write. The registry is the union of all documents at read, so
a peer cannot delete or bloat another peer's entries. A document travels as a log of signed deltas
(records/registry_delta.py): the snapshot that began the owner's epoch and the updates since. This machine keeps the
logs as they came, because it passes them on. A worker process holds the loro documents (ImportDeltas) and can be
rebuilt from the logs. Only entries that the worker returns are the owner's; a fetch shows whether they are true.

The registry takes the next delta of the current epoch, or the snapshot of a higher one. A delta that is older, already
here, or after a gap is dropped without a charge, because a relay sends it in good faith; the next exchange of heads
brings the missing ones. Of two different deltas with the same number the first stays, and the owner, which signed both,
is charged once per epoch. A delta that does not decode or is not signed by its owner is charged to the relay, which
could have checked it.

All owners together are bounded (their number, bytes of logs, entries), and one source may have a quarter of that. Over
the bound the least known owner is evicted (eviction.py). It is ignored for a minute; an owner whose document was
refused, or lost the worker twice, until its next epoch. delta_intake.py and worker_time.py bound the time of the node.

"""

import random
from collections.abc import Callable, Iterable

from ..events.conduct import ChargePeer
from ..events.owner_documents import DeltasImported, DeltasRefused, ForgetOwner, ImportDeltas, OwnDeltaWritten
from ..events.vocabulary import NetworkEffect
from ..peers.eviction import select_evicted
from ..records.errors import ProtocolViolation, Refused
from ..records.ids import NetworkId, PeerId, peer_id, public_key_of
from ..records.limits import (
    REGISTRY_ENTRIES_MAX,
    REGISTRY_EPOCH_MS,
    REGISTRY_IMPORTS_MAX,
    REGISTRY_INDEX_MAX,
    REGISTRY_INDEX_OF_SOURCE_MAX,
    REGISTRY_LOG_BYTES_MAX,
    REGISTRY_LOG_DELTAS_MAX,
    REGISTRY_LOGS_BYTES_MAX,
    REGISTRY_LOGS_BYTES_OF_SOURCE_MAX,
    REGISTRY_OWNERS_MAX,
    REGISTRY_OWNERS_OF_SOURCE_MAX,
    REGISTRY_REPLY_BYTES_MAX,
    WORKER_LOST_MS,
    WORKER_LOST_TWICE_MS,
)
from ..records.now import Now
from ..records.peer_wire import DELTAS_MAX, Deltas, RegistryHead, WantDeltas
from ..records.rank import Acquaintance
from ..records.reason import Reason
from ..records.registry_delta import RegistryDelta, check_delta, decode_delta
from .delta_intake import DeltaIntake
from .registry_index import Owner, RegistryIndex, RegistryStats
from .registry_log import DeltaLog
from .registry_own import OwnEntries
from .worker_time import WorkerTime

_SWEEP_MS = 60_000
_RETRY_MS = 2_000  # after the worker failed, doubled for each time in a row
_RETRIES_MAX = 5  # then the document is given up
_LOSSES_MAX = 2  # in a row; the worker may have died of another cause once
_BLOCKED_MS = 500  # until hosts that have no worker time left are looked at again
_EPOCH_MAX = (1 << 63) - 1  # the largest in a RegistryHead


class Registry:
    """The union of the documents of all owners that have an `acquaintance(public key)`.

    No method trusts the owner that its arguments name before its checks.
    """

    def __init__(
        self,
        network: NetworkId,
        own_key: bytes,
        acquaintance: Callable[[bytes], Acquaintance | None],
        rng: random.Random,
        now: Now,
    ) -> None:
        self._network = network
        self._own_key = own_key
        self._acquaintance = acquaintance
        self._rng = rng
        self._own = OwnEntries()
        self._owners: dict[bytes, Owner] = {}
        self._index = RegistryIndex()
        self._log_bytes = 0
        self._intake = DeltaIntake(now)
        self._worker_time = WorkerTime()
        self._due: dict[bytes, None] = {}  # owners whose log has more than their entries
        self._imports_at_ms = 0  # when to look at `_due`
        self._importing: dict[bytes, tuple[Owner, int]] = {}  # and the epoch
        self._retries: dict[bytes, int] = {}  # owner -> when
        self._effects: list[NetworkEffect] = []  # of events that return none
        self._heads: tuple[RegistryHead, ...] | None = None
        self._sweep_at_ms: int | None = None
        self._now = now  # of the latest call that told

    # --- this node's own entries ----------------------------------------------------------------

    def note_stored(self, id: bytes, expires_at_ms: int) -> None:
        """This node can serve `id` (a request hash or row id) until `expires_at_ms`."""
        self._own.put(id, expires_at_ms)

    def note_gone(self, ids: Iterable[bytes]) -> None:
        """This node can't serve them any more."""
        for gone in ids:
            self._own.remove(gone)

    def on_own_delta(self, event: OwnDeltaWritten, now: Now) -> list[NetworkEffect]:
        """This node's document has changed: neighbours can get the delta from now on."""
        assert event.delta.owner == self._own_key
        self._now = now
        self._own.on_written(event.delta, event.raw, now)
        self._heads = None
        return []

    # --- time -----------------------------------------------------------------------------------

    def next_deadline_ms(self) -> int | None:
        """When `on_tick` has something to do; None: when something else happens first."""
        if self._effects:
            return self._now.mono_ms
        imports_at_ms = self._imports_at_ms if self._due and len(self._importing) < REGISTRY_IMPORTS_MAX else None
        times = [self._own.next_deadline_ms(), self._sweep_at_ms, min(self._retries.values(), default=None)]
        times += [imports_at_ms, self._intake.next_deadline_ms()]
        return min((at for at in times if at is not None), default=None)

    def is_misdated(self, now: Now) -> bool:
        """Whether the clock was set, so that peers may refuse this node's document: `on_tick` dates it anew."""
        return self._own.is_misdated(now)

    def on_tick(self, now: Now) -> list[NetworkEffect]:
        """Write, retry, import and forget whatever is due."""
        self._now = now
        effects, self._effects = self._effects, []
        for key in [key for key, at in self._retries.items() if at <= now.mono_ms]:
            del self._retries[key]
            self._queue(self._owners[key])
            if key in self._due:
                self._due = {key: None, **self._due}  # first: a document that loses the worker again is given up
        if self._sweep_at_ms is None or now.mono_ms >= self._sweep_at_ms:
            self._sweep_at_ms = now.mono_ms + _SWEEP_MS
            effects += self._sweep(now)
        self._own.check_date(now)
        write = self._own.next_write(now)
        return effects + ([write] if write else []) + self._take_in(now)

    def _sweep(self, now: Now) -> list[NetworkEffect]:
        effects: list[NetworkEffect] = []
        for owner in list(self._owners.values()):
            if owner.log.expires_at_ms <= now.wall_ms or owner.crowded_out:
                effects += self._forget(owner)
            else:
                owner.acquaintance = self._acquaintance(owner.key) or owner.acquaintance
                self._index.remove(owner, [id for id, at in owner.entries.items() if at <= now.wall_ms])
        return effects

    # --- exchange with peers --------------------------------------------------------------------

    def want(self) -> WantDeltas:
        """How far this node has every owner's log, its own included. Ignored owners count as had."""
        return WantDeltas(self._all_heads())

    def answer(self, want: WantDeltas, now: Now) -> Deltas:
        """The deltas that the sender of `want` lacks, up to the bound of one answer; `more` if that was not all."""
        theirs = {head.owner: (head.epoch, head.sequence) for head in want.heads}
        logs = [(owner.key, owner.log) for owner in self._owners.values() if not owner.ignored]
        if self._own.log is not None:
            logs.append((self._own_key, self._own.log))
        # Several neighbours answer the same node: each begins at a different owner.
        self._rng.shuffle(logs)
        chosen: list[bytes] = []
        room = REGISTRY_REPLY_BYTES_MAX
        for key, log in logs:
            if log.expires_at_ms <= now.wall_ms:
                continue
            for raw in log.after(*theirs.get(key, (-1, 0))):
                room -= len(raw)
                if room < 0 or len(chosen) == DELTAS_MAX:
                    return Deltas(tuple(chosen), self._held_heads(), more=True)
                chosen.append(raw)
        return Deltas(tuple(chosen), self._held_heads())

    def on_deltas(self, peer: PeerId, deltas: Deltas, now: Now) -> list[NetworkEffect]:
        """Take the deltas that continue the logs, now and in later turns; `peer` is their relay, or the owner."""
        self._now = now
        acquaintance = self._acquaintance(public_key_of(peer))
        self._intake.put(acquaintance.source if acquaintance is not None else peer, peer, deltas)
        return self._take_in(now)

    def whom_to_ask_again(self) -> list[PeerId]:
        """Neighbours whose last answer was useful and is taken in, and that have more."""
        finished, self._intake.finished = self._intake.finished, []
        return finished

    def _take_in(self, now: Now) -> list[NetworkEffect]:
        effects: list[NetworkEffect] = []
        has_grown = False
        for answer, raw in self._intake.turn(now):
            before = self._log_bytes
            try:
                effects += self._on_delta(raw, decode_delta(raw), now)
            except ProtocolViolation:
                effects.append(ChargePeer(answer.peer, Reason.REGISTRY_MALFORMED))
                answer.drop()
            except Refused as refused:
                if refused.reason in ("bad_signature", "other_network"):
                    effects.append(ChargePeer(answer.peer, Reason(f"registry_{refused.reason}")))
                    answer.drop()
            if self._log_bytes != before:
                answer.was_of_use = has_grown = True
        if has_grown and len(self._owners) > REGISTRY_OWNERS_OF_SOURCE_MAX:
            effects += self._crowd_out(lambda owner: 1, REGISTRY_OWNERS_MAX - 1, REGISTRY_OWNERS_OF_SOURCE_MAX)
        if has_grown and self._log_bytes > REGISTRY_LOGS_BYTES_OF_SOURCE_MAX:
            effects += self._crowd_out(
                lambda owner: owner.log.size, REGISTRY_LOGS_BYTES_MAX, REGISTRY_LOGS_BYTES_OF_SOURCE_MAX
            )
        return effects + self._start_imports(now)

    def _on_delta(self, raw: bytes, delta: RegistryDelta, now: Now) -> list[NetworkEffect]:
        if delta.owner == self._own_key:
            return []  # of an earlier run: the first write of this run has a higher epoch
        if delta.network != self._network:
            raise Refused("other_network")
        if delta.epoch > _EPOCH_MAX:
            raise ProtocolViolation(f"registry delta epoch {delta.epoch}: at most {_EPOCH_MAX}")
        owner = self._owners.get(delta.owner)
        if owner is None or delta.epoch > owner.log.epoch:
            return self._on_epoch(owner, raw, delta, now)
        if delta.epoch < owner.log.epoch or owner.ignored or delta.sequence > owner.log.sequence + 1:
            return []
        if delta.sequence <= owner.log.sequence:
            return self._on_known(owner, raw, delta, now)
        check_delta(raw, delta, self._network, now.wall_ms)
        if len(owner.log) >= REGISTRY_LOG_DELTAS_MAX or owner.log.size + len(raw) > REGISTRY_LOG_BYTES_MAX:
            return [*self._ignore(owner), ChargePeer(owner.peer, Reason.REGISTRY_TOO_LARGE)]
        owner.log.append(raw, delta)
        self._on_grown(owner, len(raw))
        return []

    def _on_epoch(self, owner: Owner | None, raw: bytes, delta: RegistryDelta, now: Now) -> list[NetworkEffect]:
        acquaintance = self._acquaintance(delta.owner)
        if delta.kind != "snapshot" or acquaintance is None or (owner is not None and owner.crowded_out):
            return []
        if owner is not None and now.mono_ms - owner.taken_at_ms < REGISTRY_EPOCH_MS:
            return []  # an owner that keeps beginning new epochs is taken only now and then
        check_delta(raw, delta, self._network, now.wall_ms)
        if owner is None:
            owner = self._owners[delta.owner] = Owner(
                delta.owner,
                peer_id(delta.owner),
                DeltaLog(raw, delta),
                taken_at_ms=now.mono_ms,
                acquaintance=acquaintance,
            )
        else:
            self._log_bytes -= owner.log.size
            owner.log = DeltaLog(raw, delta)
            owner.taken_at_ms = now.mono_ms
            owner.acquaintance = acquaintance
            owner.imported = None  # its entries stay until the new ones are there
            owner.ignored = owner.equivocated = False
            owner.failures = 0
            self._retries.pop(owner.key, None)
        self._on_grown(owner, len(raw))
        return []

    def _on_known(self, owner: Owner, raw: bytes, delta: RegistryDelta, now: Now) -> list[NetworkEffect]:
        if owner.equivocated or raw == owner.log[delta.sequence]:
            return []
        check_delta(raw, delta, self._network, now.wall_ms)
        owner.equivocated = True
        return [ChargePeer(owner.peer, Reason.REGISTRY_EQUIVOCATION)]

    def _on_grown(self, owner: Owner, size: int) -> None:
        self._heads = None
        self._log_bytes += size
        self._queue(owner)

    # --- imports --------------------------------------------------------------------------------

    def _queue(self, owner: Owner) -> None:
        busy = owner.key in self._importing or owner.key in self._retries
        if not busy and not owner.ignored and owner.imported != owner.log.sequence:
            self._due[owner.key] = None
            self._imports_at_ms = self._now.mono_ms

    def _start_imports(self, now: Now) -> list[NetworkEffect]:
        effects: list[NetworkEffect] = []
        self._imports_at_ms = now.mono_ms + _BLOCKED_MS
        for key in list(self._due):
            owner = self._owners[key]
            if len(self._importing) >= REGISTRY_IMPORTS_MAX:
                break
            if not self._worker_time.begin(key, owner.acquaintance, now):
                continue
            del self._due[key]
            self._importing[key] = (owner, owner.log.epoch)
            effects.append(
                ImportDeltas(
                    owner=key,
                    epoch=owner.log.epoch,
                    payloads=owner.log.payloads(0 if owner.imported is None else owner.imported + 1),
                    starts_with_snapshot=owner.imported is None,
                    sequence=owner.log.sequence,
                )
            )
        return effects

    def on_imported(self, event: DeltasImported) -> None:
        """The owner's entries are these now. Entries of an epoch that has ended count until the next import."""
        owner = self._finished(event.owner, event.took_ms)
        if owner is None:
            return
        if event.cleared:
            self._index.remove(owner, list(owner.entries))
        self._index.remove(owner, event.removed)
        self._index.add(owner, event.added)
        if event.epoch == owner.log.epoch:
            owner.imported = event.sequence
            owner.failures = owner.losses = 0
        self._queue(owner)
        if len(owner.entries) > REGISTRY_ENTRIES_MAX:
            self._effects += [*self._ignore(owner), ChargePeer(owner.peer, Reason.REGISTRY_TOO_LARGE)]
        if self._index.entries > REGISTRY_INDEX_OF_SOURCE_MAX:
            self._effects += self._crowd_out(
                lambda owner: len(owner.entries), REGISTRY_INDEX_MAX, REGISTRY_INDEX_OF_SOURCE_MAX
            )

    def on_refused(self, event: DeltasRefused) -> list[NetworkEffect]:
        """The worker failed: rebuild the document from its log. Otherwise the owner's deltas are not a document."""
        if event.owner == self._own_key:
            self._own.on_failed(self._now)
            return []
        epoch = self._importing.get(event.owner, (None, -1))[1]
        is_lost = event.reason == "lost"
        owner = self._finished(event.owner, event.took_ms + (WORKER_LOST_MS if is_lost else 0))
        effects: list[NetworkEffect] = []
        if owner is not None and epoch != owner.log.epoch:
            owner.imported = None
            self._queue(owner)
        elif owner is not None and (is_lost or event.reason == "worker"):
            effects = self._rebuild(owner, is_lost)
        elif owner is not None:
            effects = [*self._ignore(owner), ChargePeer(owner.peer, Reason(f"registry_{event.reason}"))]
        return effects + self._start_imports(self._now)

    def _rebuild(self, owner: Owner, lost: bool) -> list[NetworkEffect]:
        owner.losses += lost
        if owner.losses >= _LOSSES_MAX:
            self._worker_time.pay(owner.acquaintance.source, WORKER_LOST_TWICE_MS, self._now)
            return self._ignore(owner)
        if owner.imported is not None:
            owner.imported = None  # perhaps only its document is gone
            self._queue(owner)
            return []
        if owner.failures >= _RETRIES_MAX:
            return self._ignore(owner)
        self._retries[owner.key] = self._now.mono_ms + (_RETRY_MS << owner.failures)
        owner.failures += 1
        return []

    def _finished(self, key: bytes, took_ms: int) -> Owner | None:
        """The owner whose import has ended, unless it was forgotten or is ignored by now."""
        self._worker_time.ended(key, took_ms, self._now)
        self._imports_at_ms = self._now.mono_ms
        imported, _ = self._importing.pop(key, (None, 0))
        owner = self._owners.get(key)
        if owner is None or owner.ignored:
            return None
        if owner is not imported:  # forgotten and come back meanwhile
            self._queue(owner)
            return None
        return owner

    # --- the union ------------------------------------------------------------------------------

    def providers(self, id: bytes, wall_ms: int) -> tuple[PeerId, ...]:
        """Other peers that announce `id` now: hints, in no particular order."""
        return tuple(
            owner.peer
            for owner in self._index.owners_of(id)
            if owner.entries[id] > wall_ms and owner.log.expires_at_ms > wall_ms
        )

    @property
    def entries(self) -> int:
        """Other owners' entries, some of which may have expired within the last minute."""
        return self._index.entries

    def stats(self) -> RegistryStats:
        """Sizes as of now."""
        return RegistryStats(
            owners=len(self._owners),
            entries=self._index.entries,
            own_entries=len(self._own),
            log_bytes=self._log_bytes + (self._own.log.size if self._own.log else 0),
            ignored_owners=sum(owner.ignored for owner in self._owners.values()),
        )

    def _ignore(self, owner: Owner) -> list[NetworkEffect]:
        """Keep only the owner's epoch, so that neighbours do not send the log again."""
        self._drop(owner)
        owner.ignored = True
        owner.imported = None
        owner.log.clear()
        return [ForgetOwner(owner.key)]

    def _crowd_out(self, size: Callable[[Owner], int], room: int, source_room: int) -> list[NetworkEffect]:
        """Ignore the least known owners until the others fit; forget ignored owners beyond a number."""
        heard = [owner for owner in self._owners.values() if not owner.ignored]
        for owner in heard:
            owner.acquaintance = self._acquaintance(owner.key) or owner.acquaintance
        effects: list[NetworkEffect] = []
        for owner in select_evicted(((owner, owner.acquaintance, size(owner)) for owner in heard), room, source_room):
            effects += self._ignore(owner)
            owner.crowded_out = True
        too_many = len(self._owners) - (REGISTRY_OWNERS_MAX - 1)
        if too_many > 0:
            for owner in [owner for owner in self._owners.values() if owner.ignored][:too_many]:
                effects += self._forget(owner)
        return effects

    def _forget(self, owner: Owner) -> list[NetworkEffect]:
        self._drop(owner)
        del self._owners[owner.key]
        return [] if owner.ignored else [ForgetOwner(owner.key)]

    def _drop(self, owner: Owner) -> None:
        self._index.remove(owner, list(owner.entries))
        self._log_bytes -= owner.log.size
        self._due.pop(owner.key, None)
        self._retries.pop(owner.key, None)
        self._heads = None

    def _all_heads(self) -> tuple[RegistryHead, ...]:
        if self._heads is None:
            heads = [RegistryHead(owner.key, owner.log.epoch, owner.log.sequence) for owner in self._owners.values()]
            if self._own.log is not None:
                heads.append(RegistryHead(self._own_key, self._own.log.epoch, self._own.log.sequence))
            self._heads = tuple(heads)
        return self._heads

    def _held_heads(self) -> tuple[RegistryHead, ...]:
        if not any(owner.ignored for owner in self._owners.values()):
            return self._all_heads()
        return tuple(
            head for head in self._all_heads() if head.owner == self._own_key or not self._owners[head.owner].ignored
        )
