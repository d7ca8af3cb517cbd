"""The registry: which peer says that it can serve which ids (of responses and of KV rows).

One document per owner, written by its owner alone; the registry is their union at read, so nobody can delete or bloat
another's entries. A document travels as a log of signed deltas (records/registry_delta.py): the snapshot that began
the owner's epoch and the updates since. This machine keeps the logs as they came, because it passes them on; a worker
process holds what loro makes of them (ImportDeltas) and can be rebuilt from the logs at any time. Only entries that
came back from there are the owner's word; whether they are true, a fetch has to show.

Which deltas are taken: the next of the epoch at hand, or the snapshot of a higher one. What is older, already here, or
after a gap is left aside without blame, because a relay sends it in good faith; the next exchange of heads brings what
is missing. Of two different deltas with the same number the first to come stays, and the owner, who signed both, is
charged. What doesn't decode or isn't signed by its owner is charged to the relay, who could have checked.

Under a bound on all owners together (their number, bytes of logs, entries), and under the quarter of it that is one
source's, the least known owner goes (eviction.py): what one peer invents pushes out its own inventions. An owner that
went is ignored for a minute, one whose document was refused until its next epoch.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ..node.network_effects import ChargePeer, ForgetOwner, ImportDeltas, NetworkEffect
from ..node.network_events import DeltasImported, DeltasRefused, OwnDeltaWritten
from ..records.errors import ProtocolViolation, Refused
from ..records.ids import NetworkId, PeerId, peer_id
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
)
from ..records.peer_wire import Deltas, RegistryHead, WantDeltas
from ..records.registry_delta import RegistryDelta, check_delta, decode_delta
from ..records.standing import Standing
from .eviction import who_goes
from .registry_log import DeltaLog
from .registry_own import OwnEntries

_SWEEP_MS = 60_000
_RETRY_MS = 2_000  # after the worker failed, doubled for each time in a row
_RETRIES_MAX = 5  # then the document is taken for one that no worker survives
_EPOCH_MAX = (1 << 63) - 1  # what a RegistryHead can say
_DELTAS_MAX = 4096  # of one answer (peer_wire.Deltas)


@dataclass(slots=True, eq=False)
class _Owner:
    key: bytes
    peer: PeerId
    log: DeltaLog
    taken_at_ms: int  # when the epoch began here
    standing: Standing  # when it was last known
    imported: int | None = None  # sequence up to which `entries` has the log; None: nothing of this epoch
    entries: dict[bytes, int] = field(default_factory=dict)
    ignored: bool = False  # until the next epoch
    crowded_out: bool = False  # ignored for want of room, until the next sweep
    failures: int = 0


@dataclass(frozen=True, slots=True)
class RegistryStats:
    """Sizes, for status and metrics."""

    owners: int
    entries: int
    own_entries: int
    log_bytes: int
    ignored_owners: int


class Registry:
    """The union of all owners' documents, of owners that have a `standing(public key)`.

    The owner of none of the methods' arguments is believed before its checks.
    """

    def __init__(
        self, network: NetworkId, own_key: bytes, standing: Callable[[bytes], Standing | None], rng: random.Random
    ) -> None:
        self._network = network
        self._own_key = own_key
        self._standing = standing
        self._rng = rng
        self._own = OwnEntries()
        self._owners: dict[bytes, _Owner] = {}
        self._providers: dict[bytes, tuple[_Owner, ...]] = {}
        self._entries = 0
        self._log_bytes = 0
        self._due: dict[bytes, None] = {}  # owners whose log has more than their entries
        self._importing: dict[bytes, tuple[_Owner, int]] = {}  # and the epoch
        self._retries: dict[bytes, int] = {}  # owner -> when
        self._effects: list[NetworkEffect] = []  # of events that return none
        self._heads: tuple[RegistryHead, ...] | None = None
        self._sweep_at_ms: int | None = None
        self._now_ms = 0  # of the latest call that told

    # --- this node's own entries ----------------------------------------------------------------

    def note_stored(self, id: bytes, expires_at_ms: int) -> None:
        """This node can serve `id` (a request hash or row id) until `expires_at_ms`."""
        self._own.put(id, expires_at_ms)

    def note_gone(self, ids: Iterable[bytes]) -> None:
        """This node can't serve them any more."""
        for gone in ids:
            self._own.remove(gone)

    def on_own_delta(self, event: OwnDeltaWritten, now_ms: int) -> list[NetworkEffect]:
        """The own document has changed: others can have the delta from now on."""
        assert event.delta.owner == self._own_key
        self._now_ms = now_ms
        self._own.on_written(event.delta, event.raw, now_ms)
        self._heads = None
        return []

    # --- time -----------------------------------------------------------------------------------

    def next_deadline_ms(self) -> int | None:
        """When `on_tick` has something to do; None: when something else happens first."""
        if self._effects or (self._due and len(self._importing) < REGISTRY_IMPORTS_MAX):
            return self._now_ms
        times = [self._own.next_deadline_ms(), self._sweep_at_ms, min(self._retries.values(), default=None)]
        return min((at for at in times if at is not None), default=None)

    def on_tick(self, now_ms: int) -> list[NetworkEffect]:
        """Write, retry, import and forget whatever is due."""
        self._now_ms = now_ms
        effects, self._effects = self._effects, []
        for key in [key for key, at in self._retries.items() if at <= now_ms]:
            del self._retries[key]
            self._queue(self._owners[key])
        if self._sweep_at_ms is None or now_ms >= self._sweep_at_ms:
            self._sweep_at_ms = now_ms + _SWEEP_MS
            effects += self._sweep(now_ms)
        write = self._own.next_write(now_ms)
        return effects + ([write] if write else []) + self._start_imports()

    def shift(self, by_ms: int) -> None:
        """The clock was set."""
        self._now_ms += by_ms
        self._own.shift(by_ms)
        self._retries = {key: at + by_ms for key, at in self._retries.items()}
        if self._sweep_at_ms is not None:
            self._sweep_at_ms += by_ms

    def _sweep(self, now_ms: int) -> list[NetworkEffect]:
        effects: list[NetworkEffect] = []
        for owner in list(self._owners.values()):
            if owner.log.expires_at_ms <= now_ms or owner.crowded_out:
                effects += self._forget(owner)
            else:
                self._unlist(owner, [id for id, at in owner.entries.items() if at <= now_ms])
        return effects

    # --- exchange with peers --------------------------------------------------------------------

    def want(self) -> WantDeltas:
        """How far this node has every owner's log, its own included. Ignored owners count as had."""
        return WantDeltas(self._all_heads())

    def answer(self, want: WantDeltas, now_ms: int) -> Deltas:
        """What the sender of `want` lacks, up to the bound of one answer; `more` if that was not all."""
        theirs = {head.owner: (head.epoch, head.sequence) for head in want.heads}
        logs = [(owner.key, owner.log) for owner in self._owners.values() if not owner.ignored]
        if self._own.log is not None:
            logs.append((self._own_key, self._own.log))
        # Several neighbours answer the same node: each begins elsewhere.
        self._rng.shuffle(logs)
        chosen: list[bytes] = []
        room = REGISTRY_REPLY_BYTES_MAX
        for key, log in logs:
            if log.expires_at_ms <= now_ms:
                continue
            for raw in log.after(*theirs.get(key, (-1, 0))):
                room -= len(raw)
                if room < 0 or len(chosen) == _DELTAS_MAX:
                    return Deltas(tuple(chosen), self._held_heads(), more=True)
                chosen.append(raw)
        return Deltas(tuple(chosen), self._held_heads())

    def on_deltas(self, peer: PeerId, deltas: Deltas, now_ms: int) -> list[NetworkEffect]:
        """Take what continues the logs; `peer` only passed it on (unless it is the owner)."""
        self._now_ms = now_ms
        effects: list[NetworkEffect] = []
        for raw in deltas.deltas:
            try:
                effects += self._on_delta(raw, decode_delta(raw), now_ms)
            except ProtocolViolation:
                effects.append(ChargePeer(peer, "registry_malformed"))
                break
            except Refused as refused:
                if refused.reason in ("bad_signature", "other_network"):
                    effects.append(ChargePeer(peer, f"registry_{refused.reason}"))
                    break
        if len(self._owners) > REGISTRY_OWNERS_OF_SOURCE_MAX:
            effects += self._crowd_out(lambda owner: 1, REGISTRY_OWNERS_MAX - 1, REGISTRY_OWNERS_OF_SOURCE_MAX)
        if self._log_bytes > REGISTRY_LOGS_BYTES_OF_SOURCE_MAX:
            effects += self._crowd_out(
                lambda owner: owner.log.size, REGISTRY_LOGS_BYTES_MAX, REGISTRY_LOGS_BYTES_OF_SOURCE_MAX
            )
        return effects + self._start_imports()

    def _on_delta(self, raw: bytes, delta: RegistryDelta, now_ms: int) -> list[NetworkEffect]:
        if delta.owner == self._own_key:
            return []  # of an earlier run: the first write of this run has a higher epoch
        if delta.network != self._network:
            raise Refused("other_network")
        if delta.epoch > _EPOCH_MAX:
            raise ProtocolViolation(f"registry delta epoch {delta.epoch}: at most {_EPOCH_MAX}")
        owner = self._owners.get(delta.owner)
        if owner is None or delta.epoch > owner.log.epoch:
            return self._on_epoch(owner, raw, delta, now_ms)
        if delta.epoch < owner.log.epoch or owner.ignored or delta.sequence > owner.log.sequence + 1:
            return []
        if delta.sequence <= owner.log.sequence:
            return self._on_known(owner, raw, delta, now_ms)
        check_delta(raw, delta, self._network, now_ms)
        if len(owner.log) >= REGISTRY_LOG_DELTAS_MAX or owner.log.size + len(raw) > REGISTRY_LOG_BYTES_MAX:
            return [*self._ignore(owner), ChargePeer(owner.peer, "registry_too_large")]
        owner.log.append(raw, delta)
        self._on_grown(owner, len(raw))
        return []

    def _on_epoch(self, owner: _Owner | None, raw: bytes, delta: RegistryDelta, now_ms: int) -> list[NetworkEffect]:
        standing = self._standing(delta.owner)
        if delta.kind != "snapshot" or standing is None or (owner is not None and owner.crowded_out):
            return []
        if owner is not None and 0 <= now_ms - owner.taken_at_ms < REGISTRY_EPOCH_MS:
            return []  # an owner that begins anew all the time is heard now and then
        check_delta(raw, delta, self._network, now_ms)
        if owner is None:
            owner = self._owners[delta.owner] = _Owner(
                delta.owner, peer_id(delta.owner), DeltaLog(raw, delta), taken_at_ms=now_ms, standing=standing
            )
        else:
            self._log_bytes -= owner.log.size
            owner.log = DeltaLog(raw, delta)
            owner.taken_at_ms = now_ms
            owner.imported = None  # its entries stay until the new ones are there
            owner.ignored = False
            owner.failures = 0
            self._retries.pop(owner.key, None)
        self._on_grown(owner, len(raw))
        return []

    def _on_known(self, owner: _Owner, raw: bytes, delta: RegistryDelta, now_ms: int) -> list[NetworkEffect]:
        if raw == owner.log[delta.sequence]:
            return []
        check_delta(raw, delta, self._network, now_ms)
        return [ChargePeer(owner.peer, "registry_equivocation")]

    def _on_grown(self, owner: _Owner, size: int) -> None:
        self._heads = None
        self._log_bytes += size
        self._queue(owner)

    # --- imports --------------------------------------------------------------------------------

    def _queue(self, owner: _Owner) -> None:
        busy = owner.key in self._importing or owner.key in self._retries
        if not busy and not owner.ignored and owner.imported != owner.log.sequence:
            self._due[owner.key] = None

    def _start_imports(self) -> list[NetworkEffect]:
        effects: list[NetworkEffect] = []
        while self._due and len(self._importing) < REGISTRY_IMPORTS_MAX:
            key = next(iter(self._due))
            del self._due[key]
            owner = self._owners[key]
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
        """The owner's entries are these now. Of an epoch that is over by now they count until the next import."""
        owner = self._finished(event.owner)
        if owner is None:
            return
        if event.cleared:
            self._unlist(owner, list(owner.entries))
        self._unlist(owner, event.removed)
        self._list(owner, event.added)
        if event.epoch == owner.log.epoch:
            owner.imported = event.sequence
            owner.failures = 0
        self._queue(owner)
        if len(owner.entries) > REGISTRY_ENTRIES_MAX:
            self._effects += [*self._ignore(owner), ChargePeer(owner.peer, "registry_too_large")]
        if self._entries > REGISTRY_INDEX_OF_SOURCE_MAX:
            self._effects += self._crowd_out(
                lambda owner: len(owner.entries), REGISTRY_INDEX_MAX, REGISTRY_INDEX_OF_SOURCE_MAX
            )

    def on_refused(self, event: DeltasRefused) -> list[NetworkEffect]:
        """The worker failed: rebuild the document from its log. Otherwise the owner wrote what isn't a document."""
        if event.owner == self._own_key:
            self._own.on_failed(self._now_ms)
            return []
        epoch = self._importing.get(event.owner, (None, -1))[1]
        owner = self._finished(event.owner)
        if owner is None:
            return self._start_imports()
        if epoch != owner.log.epoch:
            owner.imported = None
            self._queue(owner)
            return self._start_imports()
        if event.reason != "worker":
            charge = ChargePeer(owner.peer, f"registry_{event.reason}")
            return [*self._ignore(owner), charge, *self._start_imports()]
        return self._rebuild(owner) + self._start_imports()

    def _rebuild(self, owner: _Owner) -> list[NetworkEffect]:
        if owner.imported is not None:
            owner.imported = None  # perhaps only its document is gone
            self._queue(owner)
            return []
        if owner.failures >= _RETRIES_MAX:
            return self._ignore(owner)
        self._retries[owner.key] = self._now_ms + (_RETRY_MS << owner.failures)
        owner.failures += 1
        return []

    def _finished(self, key: bytes) -> _Owner | None:
        """The owner whose import has ended, unless it was forgotten or is ignored by now."""
        imported, _ = self._importing.pop(key, (None, 0))
        owner = self._owners.get(key)
        if owner is None or owner.ignored:
            return None
        if owner is not imported:  # forgotten and come back meanwhile
            self._queue(owner)
            return None
        return owner

    # --- the union ------------------------------------------------------------------------------

    def providers(self, id: bytes, now_ms: int) -> tuple[PeerId, ...]:
        """Peers other than this node that say they can serve `id` now: hints, in no particular order."""
        return tuple(
            owner.peer
            for owner in self._providers.get(id, ())
            if owner.entries[id] > now_ms and owner.log.expires_at_ms > now_ms
        )

    @property
    def entries(self) -> int:
        """Entries of others, some of which may have expired within the last minute."""
        return self._entries

    def stats(self) -> RegistryStats:
        """Sizes as of now."""
        return RegistryStats(
            owners=len(self._owners),
            entries=self._entries,
            own_entries=len(self._own),
            log_bytes=self._log_bytes + (self._own.log.size if self._own.log else 0),
            ignored_owners=sum(owner.ignored for owner in self._owners.values()),
        )

    def _list(self, owner: _Owner, added: Iterable[tuple[bytes, int]]) -> None:
        for id, expires_at_ms in added:
            if id not in owner.entries:
                self._entries += 1
                self._providers[id] = (*self._providers.get(id, ()), owner)
            owner.entries[id] = expires_at_ms

    def _unlist(self, owner: _Owner, ids: Iterable[bytes]) -> None:
        for id in ids:
            if owner.entries.pop(id, None) is None:
                continue
            self._entries -= 1
            others = tuple(other for other in self._providers[id] if other is not owner)
            if others:
                self._providers[id] = others
            else:
                del self._providers[id]

    def _ignore(self, owner: _Owner) -> list[NetworkEffect]:
        """Keep nothing of the owner but its epoch, so that nobody has to send it again."""
        self._drop(owner)
        owner.ignored = True
        owner.imported = None
        owner.log.clear()
        return [ForgetOwner(owner.key)]

    def _crowd_out(self, size: Callable[[_Owner], int], room: int, source_room: int) -> list[NetworkEffect]:
        """Ignore the least known owners until all fit; of owners that are ignored only so many stay."""
        heard = [owner for owner in self._owners.values() if not owner.ignored]
        for owner in heard:
            owner.standing = self._standing(owner.key) or owner.standing
        effects: list[NetworkEffect] = []
        for owner in who_goes(((owner, owner.standing, size(owner)) for owner in heard), room, source_room):
            effects += self._ignore(owner)
            owner.crowded_out = True
        too_many = len(self._owners) - (REGISTRY_OWNERS_MAX - 1)
        if too_many > 0:
            for owner in [owner for owner in self._owners.values() if owner.ignored][:too_many]:
                effects += self._forget(owner)
        return effects

    def _forget(self, owner: _Owner) -> list[NetworkEffect]:
        self._drop(owner)
        del self._owners[owner.key]
        return [] if owner.ignored else [ForgetOwner(owner.key)]

    def _drop(self, owner: _Owner) -> None:
        self._unlist(owner, list(owner.entries))
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
