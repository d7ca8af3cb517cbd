"""The process that runs loro on peers' documents: a crash, a hang or a bomb affects only this process.

It holds this node's own document and those of other owners. All of them can be rebuilt (others from their signed logs,
the own one by a new epoch), so the process may die, or drop documents that were not used recently, at any time.
Requests and replies are msgpack of the messages below.

A document is one loro map, "entries": id (64 hex digits) → expires at (ms). A new epoch is a new document: a deleted
key costs 69 bytes in every later shallow snapshot of the same one (100,000 deletions: 6.9 MB), in a new one nothing.
"""

import ctypes
import gc
import os
import resource
import sys
from collections import OrderedDict
from collections.abc import Iterable

import msgspec

from ...core.records.limits import REGISTRY_ENTRIES_MAX, MiB
from .worker_frames import lower_priority, next_request, reply, say_ready

MEMORY_BYTES_MAX = 120 * MiB  # resident, between two jobs; 500 B an entry and 12 MiB for Python and loro
ADDRESS_SPACE_BYTES = 320 * MiB  # then an allocation of a bomb fails and the process dies
_ENTRIES_MAX = 80_000  # of the documents held: 40 MiB

_MAP = "entries"


class Begin(msgspec.Struct, tag="begin", frozen=True):
    """A new own document with just these entries. Written (a shallow snapshot)."""

    entries: tuple[tuple[bytes, int], ...]


class Change(msgspec.Struct, tag="change", frozen=True):
    """Change the own document. Written (an update), or Failed if there is none."""

    added: tuple[tuple[bytes, int], ...]
    removed: tuple[bytes, ...]


class Import(msgspec.Struct, tag="import", frozen=True):
    """Import what another owner exported; a snapshot begins its document anew. Imported or Failed."""

    owner: bytes
    epoch: int
    payloads: tuple[bytes, ...]
    starts_with_snapshot: bool


class Forget(msgspec.Struct, tag="forget", frozen=True):
    """Drop an owner's document. Done."""

    owner: bytes


class Written(msgspec.Struct, tag="written", frozen=True):
    """What loro exported."""

    payload: bytes


class Imported(msgspec.Struct, tag="imported", frozen=True):
    """What has changed; after a snapshot `added` is everything."""

    added: tuple[tuple[bytes, int], ...]
    removed: tuple[bytes, ...]


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """`worker`: the document is not here. Other reasons: the owner's export is not a document; it is dropped."""

    reason: str  # worker | malformed | too_large


class Done(msgspec.Struct, tag="done", frozen=True):
    """Done."""


Request = Begin | Change | Import | Forget
Reply = Written | Imported | Failed | Done


class _Malformed(Exception):
    pass


class _TooLarge(Exception):
    pass


def main() -> None:
    """Serve requests on stdin until it closes."""
    lower_priority()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    documents = _Documents()
    say_ready()
    # Rust prints a page for each panic: hostile documents must not fill the node's log.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    decoder = msgspec.msgpack.Decoder[Request](Request)
    while (request := next_request()) is not None:
        reply(msgspec.msgpack.encode(documents.perform(decoder.decode(request))))
        del request
        if resident_bytes() > MEMORY_BYTES_MAX:
            documents.drop_all()
        if resident_bytes() > MEMORY_BYTES_MAX:
            return  # fragmented: the next process starts with nothing


def resident_bytes(pid: str = "self") -> int:
    """Resident memory of a process."""
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


class PeerDocument:
    """Another owner's document. loro raises BaseException itself, and Rust's panics are no Exceptions either."""

    def __init__(self, epoch: int) -> None:
        import loro

        self.epoch = epoch
        self.ids: set[str] = set()
        self._loro = loro
        self._document = loro.LoroDoc()  # type: ignore[no-untyped-call]
        self._events: list[loro.DiffEvent] = []
        self._subscription: object | None = None

    def import_(self, payloads: tuple[bytes, ...], with_snapshot: bool) -> Imported:
        added: dict[str, int] = {}
        removed: dict[str, None] = {}
        if with_snapshot:
            self._import(payloads[0])
            added = _checked(self._document.get_map(_MAP).get_value())
            self._subscription = self._document.subscribe_root(self._events.append)
            self._count(added, ())
        for payload in payloads[1:] if with_snapshot else payloads:
            self._import(payload)
            for id, expires_at_ms in self._changes():
                if expires_at_ms is None:
                    added.pop(id, None)
                    removed[id] = None
                else:
                    added[id] = expires_at_ms
                    removed.pop(id, None)
            self._count(added, removed)
        return Imported(
            tuple((bytes.fromhex(id), at) for id, at in added.items()),
            () if with_snapshot else tuple(bytes.fromhex(id) for id in removed),
        )

    def _import(self, payload: bytes) -> None:
        try:
            status = self._document.import_(payload)
            roots = self._document.get_value()
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:
            raise _Malformed from error
        # Pending: an update that doesn't continue what came before, though its owner signed that it does.
        if (
            status.pending is not None
            or not isinstance(roots, dict)
            or not all(self._is_map(id) for id in roots.values())
        ):
            raise _Malformed

    def _is_map(self, container: object) -> bool:
        return (
            isinstance(container, self._loro.ContainerID.Root)
            and container.name == _MAP
            and container.container_type == self._loro.ContainerType.Map()
        )

    def _changes(self) -> list[tuple[str, int | None]]:
        changes: list[tuple[str, int | None]] = []
        for event in self._events:
            for part in event.events:
                target, diff = part.target, part.diff
                if not self._is_map(target) or not isinstance(diff, self._loro.Diff.Map):
                    raise _Malformed
                updated = diff.diff.updated
                changes += [(id, None) for id, value in updated.items() if value is None and id in self.ids]
                changes += _checked(
                    {id: getattr(value, "value", None) for id, value in updated.items() if value is not None}
                ).items()
        self._events.clear()
        return changes

    def _count(self, added: Iterable[str], removed: Iterable[str]) -> None:
        self.ids.difference_update(removed)
        self.ids.update(added)
        if len(self.ids) > REGISTRY_ENTRIES_MAX:
            raise _TooLarge


def _checked(entries: object) -> dict[str, int]:
    if not isinstance(entries, dict):
        raise _Malformed
    if len(entries) > REGISTRY_ENTRIES_MAX:
        raise _TooLarge
    for id, at in entries.items():
        if len(id) != 64 or not _is_hex(id) or type(at) is not int or at < 0:
            raise _Malformed
    return entries


def _is_hex(text: str) -> bool:
    return not text.strip("0123456789abcdef")


class OwnDocument:
    """What this node exports: a snapshot to begin with, then an update for each change."""

    def __init__(self, entries: Iterable[tuple[bytes, int]]) -> None:
        import loro

        self._loro = loro
        self._document = loro.LoroDoc()  # type: ignore[no-untyped-call]  # with a loro peer id of its own
        self._put(entries)

    def snapshot(self) -> bytes:
        """Everything, without history."""
        return self._document.export(self._loro.ExportMode.ShallowSnapshot(self._document.state_frontiers))

    def change(self, added: Iterable[tuple[bytes, int]], removed: Iterable[bytes]) -> bytes:
        """Make the change and export just it."""
        before = self._document.oplog_vv
        entries = self._document.get_map(_MAP)
        for id in removed:
            entries.delete(id.hex())
        self._put(added)
        return self._document.export(self._loro.ExportMode.Updates(before))

    def _put(self, added: Iterable[tuple[bytes, int]]) -> None:
        entries = self._document.get_map(_MAP)
        for id, expires_at_ms in added:
            entries.insert(id.hex(), expires_at_ms)
        self._document.commit()


class _Documents:
    def __init__(self) -> None:
        import loro  # noqa: F401  # before READY: loading takes a while

        self._own: OwnDocument | None = None
        self._others: OrderedDict[bytes, PeerDocument] = OrderedDict()  # least recently used first

    def perform(self, request: Request) -> Reply:
        match request:
            case Begin():
                self._own = OwnDocument(request.entries)
                return Written(self._own.snapshot())
            case Change():
                return Written(self._own.change(request.added, request.removed)) if self._own else Failed("worker")
            case Forget():
                self._others.pop(request.owner, None)
                return Done()
            case Import():
                return self._import(request)

    def _import(self, request: Import) -> Imported | Failed:
        document = self._others.pop(request.owner, None)
        if request.starts_with_snapshot:
            document = PeerDocument(request.epoch)
        if document is None or document.epoch != request.epoch:
            return Failed("worker")
        try:
            imported = document.import_(request.payloads, request.starts_with_snapshot)
        except _Malformed:
            return Failed("malformed")
        except _TooLarge:
            return Failed("too_large")
        self._others[request.owner] = document
        held = sum(len(other.ids) for other in self._others.values())
        while held > _ENTRIES_MAX:
            held -= len(self._others.popitem(last=False)[1].ids)
        return imported

    def drop_all(self) -> None:
        """Give the memory of others' documents back."""
        self._others.clear()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    main()
