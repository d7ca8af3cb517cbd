"""The disk tier: one sparse file of chunks and one small sidecar per object, with a quota.

    <directory>/<hex manifest digest>.obj     row r, chunk c at (r * 64 + c) * chunk_bytes; columns not held are holes
    <directory>/<hex manifest digest>.meta    msgpack of `_Sidecar` | its BLAKE3

Chunks are sealed and looked up by row id: no key is ever on disk, and a stolen disk reveals nothing. A sidecar is
written after its chunks (temporary file, fsync, rename). The chunks themselves are not fsynced: every load checks their
digests, and a cache isn't worth a disk flush for each prefix. Files that fail their checks at start are deleted.

Methods block on the disk and may be called from any thread; `holds`, `record` and the other lookups only take a lock.
Disk errors become `Refused` with a metric label: disk_full | io_error | evicted.
"""

import contextlib
import errno
import os
import secrets
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import blake3
import msgspec
from msgspec import Meta

from ...core.records.errors import ProtocolViolation, Refused
from ...core.records.ids import ManifestDigest, RowId
from ...core.records.limits import (
    DATA_CHUNKS,
    DIGEST_TABLE_BYTES_MAX,
    MANIFEST_BYTES_MAX,
    OBJECT_ROWS_MAX,
    TOTAL_CHUNKS,
)
from ...core.records.signing import NO_MEMBER_TAG
from ...core.records.wire import Bytes32, Offer
from ...regular_files import read_regular
from ..disk_complaint import DiskComplaint
from .object_codec import ObjectRecord, good_chunks, open_row, read_record
from .object_writer import ObjectWriter

SIDECAR_BYTES_MAX = MANIFEST_BYTES_MAX + DIGEST_TABLE_BYTES_MAX + 4096
ALL_COLUMNS = (1 << TOTAL_CHUNKS) - 1

Mask = Annotated[bytes, Meta(min_length=8, max_length=8)]  # big-endian, as in wire.Offer


class _Sidecar(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    version: Annotated[int, Meta(ge=1, le=1)]
    manifest: bytes
    digests: bytes
    proof: bytes
    shareable: bool
    columns: Annotated[tuple[Mask, ...], Meta(min_length=1, max_length=OBJECT_ROWS_MAX)]
    member: Bytes32 = NO_MEMBER_TAG


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Sidecar)


@dataclass(slots=True)
class _Entry:
    record: ObjectRecord
    shareable: bool
    columns: list[int]  # bit mask per row
    dirty: bool = False  # its sidecar doesn't list all columns yet

    @property
    def bytes_held(self) -> int:
        held = sum(mask.bit_count() for mask in self.columns)
        return held * self.record.manifest.chunk_bytes + SIDECAR_BYTES_MAX


class ChunkStore:
    """Objects on disk by manifest digest and by row id; the least recently used are evicted at the quota."""

    def __init__(self, directory: Path, quota_bytes: int) -> None:
        self._directory = directory
        self._quota_bytes = quota_bytes
        self._lock = threading.RLock()  # the index; held for microseconds
        self._writing = threading.RLock()  # files and the index together; always taken before _lock
        self._objects: OrderedDict[ManifestDigest, _Entry] = OrderedDict()  # least recently used first
        self._places: dict[RowId, dict[ManifestDigest, int]] = {}
        self._reserved_bytes = 0
        self._used_bytes = 0
        self._latest_ms = 0  # no manifest here has a later date
        self._complaint = DiskComplaint(directory)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._read_index()

    # --- looking up -----------------------------------------------------------------------------

    def holds(self, row_id: RowId) -> bool:
        """Whether the row can be rebuilt from this disk."""
        return self.find(row_id) is not None

    def find(self, row_id: RowId) -> tuple[ObjectRecord, int] | None:
        """An object that has 32 or more chunks of the row here, and the row's number in it."""
        with self._lock:
            for digest, row in self._places.get(row_id, {}).items():
                entry = self._objects[digest]
                if entry.columns[row].bit_count() >= DATA_CHUNKS:
                    return entry.record, row
        return None

    def columns(self, digest: ManifestDigest, row: int) -> int:
        """Bit mask of the chunks held of a row; 0 for unknown objects and rows."""
        with self._lock:
            entry = self._objects.get(digest)
            return entry.columns[row] if entry and row < len(entry.columns) else 0

    def record(self, digest: ManifestDigest, for_peer: bool = False) -> ObjectRecord | None:
        """The verified record of an object held here; with `for_peer`, only if it may leave this node."""
        with self._lock:
            entry = self._objects.get(digest)
            return entry.record if entry and (entry.shareable or not for_peer) else None

    def offers(self, row_ids: Sequence[bytes]) -> tuple[Offer, ...]:
        """What a peer may fetch of these rows: for each, the shareable object with the most chunks of it."""
        offers = []
        with self._lock:
            for index, row_id in enumerate(row_ids):
                places = [
                    (self._objects[digest].columns[row], digest, row)
                    for digest, row in self._places.get(RowId(row_id), {}).items()
                    if self._objects[digest].shareable
                ]
                mask, digest, row = max(places, key=lambda place: place[0].bit_count(), default=(0, b"", 0))
                if mask:
                    offers.append(Offer(index, digest, row, mask.to_bytes(8, "big")))
        return tuple(offers)

    def shareable(self) -> list[tuple[ObjectRecord, tuple[int, ...]]]:
        """Objects that may leave this node, least recently used first, with the rows that can be rebuilt from here."""
        with self._lock:
            held = [
                (entry.record, tuple(r for r, mask in enumerate(entry.columns) if mask.bit_count() >= DATA_CHUNKS))
                for entry in self._objects.values()
                if entry.shareable
            ]
        return [(record, rows) for record, rows in held if rows]

    def dated_after(self, at_ms: int) -> list[ObjectRecord]:
        """Objects whose manifests were signed after `at_ms`; cheap in the usual case, where there are none."""
        if self._latest_ms <= at_ms:
            return []
        with self._lock:
            records = [entry.record for entry in self._objects.values()]
            self._latest_ms = max((record.manifest.created_at_ms for record in records), default=0)
        return [record for record in records if record.manifest.created_at_ms > at_ms]

    @property
    def used_bytes(self) -> int:
        """Bytes that count towards the quota."""
        return self._used_bytes + self._reserved_bytes

    @property
    def rows(self) -> int:
        """The number of different rows with chunks here."""
        return len(self._places)

    # --- reading --------------------------------------------------------------------------------

    def read_chunks(self, digest: ManifestDigest, row: int, columns: Sequence[int]) -> list[tuple[int, memoryview]]:
        """(column, bytes) of those of `columns` that are held, unchecked. A concurrent eviction is harmless."""
        with self._lock:
            entry = self._objects.get(digest)
            if entry is None or row >= len(entry.columns):
                raise Refused("evicted")
            self._objects.move_to_end(digest)
            mask, chunk_bytes = entry.columns[row], entry.record.manifest.chunk_bytes
        with _disk_errors(), _open(self._object_path(digest), os.O_RDONLY) as fd:
            held = [column for column in columns if mask >> column & 1]
            chunks = [(c, memoryview(os.pread(fd, chunk_bytes, (row * TOTAL_CHUNKS + c) * chunk_bytes))) for c in held]
        if any(len(chunk) != chunk_bytes for _, chunk in chunks):
            raise Refused("io_error", f"{self._object_path(digest)} is too short")
        return chunks

    def load_row(self, record: ObjectRecord, row: int, key: bytes, target: memoryview) -> None:
        """Open a row into `target` (its true length); `Refused("damaged")` if fewer than 32 good chunks are left."""
        digests, chunks = record.row_digests(row), dict[int, memoryview]()
        for columns in (range(DATA_CHUNKS), range(DATA_CHUNKS, TOTAL_CHUNKS)):
            chunks |= good_chunks(self.read_chunks(record.digest, row, columns), digests)
            if len(chunks) >= DATA_CHUNKS:
                open_row(chunks, digests, record.manifest.chunk_bytes, key, record.manifest.nonce, target)
                return
        raise Refused("damaged")

    # --- writing --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def new_object(self, rows: int, chunk_bytes: int) -> Iterator[ObjectWriter]:
        """A file to encode into; it is removed unless `publish` was called for it."""
        with self._writing:
            self._make_room(rows * TOTAL_CHUNKS * chunk_bytes + SIDECAR_BYTES_MAX)
            writer = self._create(rows, chunk_bytes)
            with self._lock:
                self._reserved_bytes += writer.size
        try:
            yield writer
        finally:
            writer.close()
            with contextlib.suppress(OSError):  # published, or the disk can't be written: the next start removes it
                writer.path.unlink()
            with self._lock:
                self._reserved_bytes -= writer.size

    def publish(self, writer: ObjectWriter, record: ObjectRecord, shareable: bool) -> None:
        """Index and keep a complete object that was encoded into `writer`."""
        assert record.object_bytes == writer.size
        with self._writing:
            entry = _Entry(record, shareable, [ALL_COLUMNS] * len(record.manifest.rows))
            try:
                with self._disk_writes():
                    writer.path.rename(self._object_path(record.digest))
                self._write_sidecar(entry)
            except Refused:
                self.discard(record.digest)
                raise
            self._index(entry)

    def replace(self, digest: ManifestDigest, record: ObjectRecord) -> bool:
        """Keep an object's chunks under another manifest of the same content; False if the object is gone."""
        with self._writing:
            entry = self._objects.get(digest)
            if entry is None:
                return False
            signed = _Entry(record, entry.shareable, entry.columns)
            try:
                with self._disk_writes():
                    self._object_path(digest).rename(self._object_path(record.digest))
                self._write_sidecar(signed)
            except Refused:
                self.discard(record.digest)
                raise
            finally:
                self.discard(digest)
            self._index(signed)
            return True

    def put_columns(self, record: ObjectRecord, row: int, chunks: Mapping[int, memoryview]) -> None:
        """Keep verified chunks of a fetched row under its producer's manifest; only flushed ones survive a restart."""
        chunk_bytes = record.manifest.chunk_bytes
        with self._writing:
            held = self.columns(record.digest, row)
            new = {column: chunk for column, chunk in chunks.items() if not held >> column & 1}
            self._make_room(len(new) * chunk_bytes + SIDECAR_BYTES_MAX, keep=record.digest)
            path = self._object_path(record.digest)
            try:
                with self._disk_writes(), _open(path, os.O_WRONLY | os.O_CREAT) as fd:
                    os.ftruncate(fd, record.object_bytes)
                    for column, chunk in new.items():
                        _write_all(fd, chunk, (row * TOTAL_CHUNKS + column) * chunk_bytes)
            except Refused:
                if record.digest not in self._objects:
                    self.discard(record.digest)
                raise
            with self._lock:
                entry = self._objects.get(record.digest) or _Entry(record, True, [0] * len(record.manifest.rows))
                self._unindex(record.digest)
                for column in new:
                    entry.columns[row] |= 1 << column
                entry.dirty = True
                self._index(entry)

    def flush(self, digest: ManifestDigest) -> None:
        """Write the object's sidecar if it has gained columns."""
        with self._writing:
            entry = self._objects.get(digest)
            if entry is not None and entry.dirty:
                self._write_sidecar(entry)
                entry.dirty = False

    def discard(self, digest: ManifestDigest) -> None:
        """Remove an object: evicted, condemned or damaged."""
        with self._writing:
            self._unindex(digest)
            for path in (self._sidecar_path(digest), self._object_path(digest)):  # without a sidecar it is garbage
                with contextlib.suppress(OSError):
                    path.unlink()

    def forget_others(self, counts: Callable[[ObjectRecord], bool]) -> None:
        """Keep only objects that still count: those of a peer removed from the list no longer do."""
        with self._lock:
            others = [d for d, entry in self._objects.items() if not counts(entry.record)]
        for digest in others:
            self.discard(digest)

    # --- inside ---------------------------------------------------------------------------------

    def _object_path(self, digest: ManifestDigest) -> Path:
        return self._directory / f"{digest.hex()}.obj"

    def _sidecar_path(self, digest: ManifestDigest) -> Path:
        return self._directory / f"{digest.hex()}.meta"

    def _create(self, rows: int, chunk_bytes: int) -> ObjectWriter:
        for attempt in range(2):
            try:
                return ObjectWriter(self._directory / f"{secrets.token_hex(16)}.tmp", rows, chunk_bytes)
            except OSError as error:
                if attempt or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    self._complaint.failed(error)
                    raise _refusal(error) from error
                self._evict(
                    rows * TOTAL_CHUNKS * chunk_bytes
                )  # the disk is smaller than the quota: use the space there is
        raise AssertionError("unreachable")

    def _make_room(self, size: int, keep: ManifestDigest | None = None) -> None:
        if size > self._quota_bytes:
            raise Refused("disk_full", f"{size} bytes are more than the quota")
        self._evict(self.used_bytes + size - self._quota_bytes, keep)
        if self.used_bytes + size > self._quota_bytes:
            raise Refused("disk_full", "everything else is in use")

    def _evict(self, size: int, keep: ManifestDigest | None = None) -> None:
        while size > 0:
            digest = next((digest for digest in self._objects if digest != keep), None)
            if digest is None:
                return
            with self._disk_writes():  # where nothing can be deleted, no entry is dropped to make room
                self._sidecar_path(digest).unlink(missing_ok=True)
            size -= self._objects[digest].bytes_held
            self.discard(digest)

    def _index(self, entry: _Entry) -> None:
        with self._lock:
            digest = entry.record.digest
            self._objects[digest] = entry
            self._used_bytes += entry.bytes_held
            self._latest_ms = max(self._latest_ms, entry.record.manifest.created_at_ms)
            for row, described in enumerate(entry.record.manifest.rows):
                if entry.columns[row]:
                    self._places.setdefault(described.row_id, {})[digest] = row

    def _unindex(self, digest: ManifestDigest) -> None:
        with self._lock:
            entry = self._objects.pop(digest, None)
            if entry is None:
                return
            self._used_bytes -= entry.bytes_held
            for described in entry.record.manifest.rows:
                places = self._places.get(described.row_id, {})
                places.pop(digest, None)
                if not places:
                    self._places.pop(described.row_id, None)

    def _write_sidecar(self, entry: _Entry) -> None:
        record = entry.record
        masks = tuple(mask.to_bytes(8, "big") for mask in entry.columns)
        body = _encoder.encode(
            _Sidecar(1, record.raw, record.digests, record.proof, entry.shareable, masks, record.member)
        )
        path = self._sidecar_path(record.digest)
        new = path.with_suffix(".tmp")
        with self._disk_writes():
            with _open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
                _write_all(fd, memoryview(body + blake3.blake3(body).digest()), 0)
                os.fsync(fd)
            new.rename(path)
        self._complaint.works()

    @contextlib.contextmanager
    def _disk_writes(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._complaint.failed(error)
            raise _refusal(error) from error

    def _read_index(self) -> None:
        sidecars = []
        for path in self._directory.iterdir():
            with contextlib.suppress(OSError):
                if path.suffix == ".tmp":
                    path.unlink()
                elif path.suffix == ".meta":
                    sidecars.append((path.stat().st_mtime_ns, path))
        for _, path in sorted(sidecars):
            entry = _read_sidecar(path)
            if entry is None:
                path.unlink(missing_ok=True)
            else:
                self._index(entry)
        for path in self._directory.glob("*.obj"):
            if not path.with_suffix(".meta").exists():
                path.unlink(missing_ok=True)
        with contextlib.suppress(Refused):
            self._evict(self.used_bytes - self._quota_bytes)


def _read_sidecar(path: Path) -> _Entry | None:
    try:
        if path.stat().st_size > SIDECAR_BYTES_MAX:
            return None
        raw = read_regular(path, SIDECAR_BYTES_MAX)
        if blake3.blake3(raw[:-32]).digest() != raw[-32:]:
            return None
        sidecar = _decoder.decode(raw[:-32])
        record = read_record(sidecar.manifest, sidecar.digests, sidecar.proof, sidecar.member)
        whole = path.with_suffix(".obj").stat().st_size == record.object_bytes
    except (OSError, msgspec.MsgspecError, ProtocolViolation):
        return None
    if not whole or record.digest.hex() != path.stem or len(sidecar.columns) != len(record.manifest.rows):
        return None
    return _Entry(record, sidecar.shareable, [int.from_bytes(mask, "big") for mask in sidecar.columns])


@contextlib.contextmanager
def _open(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)  # a pipe would block the only thread that serves
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        yield fd
    finally:
        os.close(fd)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _refusal(error) from error


def _refusal(error: OSError) -> Refused:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return Refused("disk_full", str(error))
    return Refused("evicted" if error.errno == errno.ENOENT else "io_error", str(error))
