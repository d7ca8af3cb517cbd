"""This node's own registry document: the entries that it should hold, those that it holds, and when to write.

A write is an update, or (`compact`, with every entry) a new epoch that begins with a shallow snapshot. A new epoch
begins with the first write of a run, even without entries, because only this node can withdraw the entries of an
earlier run; when the updates have outgrown the snapshot; half-way to the snapshot's expiry; and after a failed write,
because the contents of the document are unknown then.
"""

from ..events.owner_documents import WriteRegistry
from ..records.limits import (
    CLOCK_SKEW_MS,
    REGISTRY_CHANGES_MAX,
    REGISTRY_COMPACT_MS,
    REGISTRY_ENTRIES_MAX,
    REGISTRY_LOG_DELTAS_MAX,
    REGISTRY_TTL_MS,
    REGISTRY_WRITE_MS,
    KiB,
)
from ..records.now import Now
from ..records.registry_delta import RegistryDelta
from .registry_log import DeltaLog

_UPDATE_BYTES_MIN = 64 * KiB  # about 200 updates of one entry: a smaller document needs no compaction for its size
_UPDATES_MAX = REGISTRY_LOG_DELTAS_MAX * 3 // 4
_RETRY_MS = 2_000


class OwnEntries:
    """At most one write is under way, at most one in REGISTRY_WRITE_MS."""

    def __init__(self) -> None:
        self.log: DeltaLog | None = None
        self._entries: dict[bytes, int] = {}  # oldest first
        self._written: dict[bytes, int] = {}  # what the document holds
        self._changed: dict[bytes, None] = {}  # ids that may differ between the two
        self._writing: WriteRegistry | None = None
        self._write_at_ms = 0
        self._compacted_at_ms: int | None = None  # None: the next write must begin an epoch
        self._compact_by_ms = 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, id: bytes, expires_at_ms: int) -> None:
        """Hold `id`. At the bound the oldest is dropped: the newest is most likely to be requested."""
        if self._entries.get(id) == expires_at_ms:
            return
        self._entries.pop(id, None)
        if len(self._entries) >= REGISTRY_ENTRIES_MAX:
            self.remove(next(iter(self._entries)))
        self._entries[id] = expires_at_ms
        self._changed[id] = None

    def remove(self, id: bytes) -> None:
        """Hold `id` no longer."""
        if self._entries.pop(id, None) is not None:
            self._changed[id] = None

    def next_deadline_ms(self) -> int | None:
        """When `next_write` may return a write; None while a write is under way."""
        if self._writing is not None:
            return None
        if self._compacted_at_ms is None or self._changed:
            return self._write_at_ms
        return self._compact_by_ms

    def next_write(self, now: Now) -> WriteRegistry | None:
        """The write that is due."""
        due = self.next_deadline_ms()
        if due is None or now.mono_ms < due:
            return None
        self._writing = self._snapshot(now) if self._must_compact(now) else self._update()
        if self._writing is not None:
            self._write_at_ms = now.mono_ms + REGISTRY_WRITE_MS
        return self._writing

    def on_written(self, delta: RegistryDelta, raw: bytes, now: Now) -> None:
        """The write is part of the document."""
        assert self._writing is not None
        write, self._writing = self._writing, None
        if delta.kind == "snapshot":
            self.log = DeltaLog(raw, delta)
            self._compacted_at_ms = now.mono_ms
            self._compact_by_ms = now.mono_ms + (delta.expires_at_ms - now.wall_ms) // 2
        else:
            assert self.log is not None
            self.log.append(raw, delta)
        self._written.update(write.added)
        for id in write.removed:
            self._written.pop(id, None)

    def on_failed(self, now: Now) -> None:
        """The write may or may not be part of the document: begin a new epoch."""
        if self._writing is not None:
            self._written.update(self._writing.added)
        self._writing = None
        self._compacted_at_ms = None
        self._write_at_ms = now.mono_ms + _RETRY_MS

    def is_misdated(self, now: Now) -> bool:
        """Whether the clock was set, so that the snapshot's date is impossible."""
        if self.log is None or self._compacted_at_ms is None or self._writing is not None:
            return False
        left_ms = self.log.expires_at_ms - now.wall_ms
        return not REGISTRY_TTL_MS // 2 - CLOCK_SKEW_MS <= left_ms <= REGISTRY_TTL_MS + CLOCK_SKEW_MS

    def check_date(self, now: Now) -> None:
        """Begin a new epoch if the clock was set: peers refuse a snapshot whose date is too far off."""
        if self.is_misdated(now):
            self._compacted_at_ms = None

    def _must_compact(self, now: Now) -> bool:
        if self._compacted_at_ms is None or self.log is None or now.mono_ms >= self._compact_by_ms:
            return True
        if now.mono_ms < self._compacted_at_ms + REGISTRY_COMPACT_MS:
            return False
        return (
            len(self._changed) > REGISTRY_CHANGES_MAX
            or len(self.log) > _UPDATES_MAX
            or self.log.update_bytes > max(_UPDATE_BYTES_MIN, self.log.size // 2)
        )

    def _snapshot(self, now: Now) -> WriteRegistry:
        self._entries = {id: at for id, at in self._entries.items() if at > now.wall_ms}
        self._changed = {}
        removed = tuple(id for id in self._written if id not in self._entries)
        return WriteRegistry(tuple(self._entries.items()), removed, compact=True)

    def _update(self) -> WriteRegistry | None:
        # Removals first: then the document never has more entries than it may.
        removed = [id for id in self._changed if id in self._written and id not in self._entries]
        added = [
            (id, self._entries[id])
            for id in self._changed
            if id in self._entries and self._written.get(id) != self._entries[id]
        ]
        removed = removed[:REGISTRY_CHANGES_MAX]
        added = added[: REGISTRY_CHANGES_MAX - len(removed)]
        if not removed and not added:
            self._changed = {}
            return None
        if len(removed) + len(added) < REGISTRY_CHANGES_MAX:
            self._changed = {}
        else:
            for id in (*removed, *(id for id, _ in added)):
                del self._changed[id]
        return WriteRegistry(tuple(added), tuple(removed), compact=False)
