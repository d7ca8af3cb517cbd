"""The disk tier: what it keeps, what it gives back after a restart, and how it fails."""

import errno
import os
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import blake3
import msgspec
import pytest
from nacl.signing import SigningKey

from hyperspace_vllm.core.records.errors import Refused
from hyperspace_vllm.core.records.ids import RowId, RowKey, network_id, sha256
from hyperspace_vllm.core.records.limits import DATA_CHUNKS, MiB
from hyperspace_vllm.daemon.kv.chunk_store import SIDECAR_BYTES_MAX, ChunkStore
from hyperspace_vllm.daemon.kv.object_codec import (
    ObjectRecord,
    chunk_digest,
    encode_row,
    good_chunks,
    new_nonce,
    open_row,
    sign_anew,
    sign_record,
)

CHUNK = 256
ROW = DATA_CHUNKS * CHUNK - 100
OBJECT = 2 * 64 * CHUNK
NETWORK = network_id("test")
SIGNING_KEY = SigningKey(bytes(32))
KEYS = (b"k" * 32, b"l" * 32)


def store_object(store: ChunkStore, name: str, shareable: bool = True) -> tuple[ObjectRecord, list[bytes]]:
    rows = [secrets.token_bytes(ROW) for _ in KEYS]
    row_keys = tuple((RowKey(sha256(f"{name} {i}".encode())), ROW) for i in range(len(rows)))
    nonce = new_nonce()
    with store.new_object(2, CHUNK) as writer:
        digests = b"".join(
            encode_row(memoryview(row), KEYS[i], nonce, CHUNK, writer.row(i)) for i, row in enumerate(rows)
        )
        record = sign_record(SIGNING_KEY, NETWORK, bytes(32), CHUNK, nonce, row_keys, digests, bytes(48), bytes(48), 0)
        store.publish(writer, record, shareable)
    return record, rows


def load(store: ChunkStore, record: ObjectRecord, row: int, columns: range = range(64)) -> bytes:
    chunks = good_chunks(store.read_chunks(record.digest, row, columns), record.row_digests(row))
    target = bytearray(ROW)
    open_row(chunks, record.row_digests(row), CHUNK, KEYS[row], record.manifest.nonce, memoryview(target))
    return bytes(target)


def row_id(record: ObjectRecord, row: int) -> RowId:
    return record.manifest.rows[row].row_id


@pytest.fixture
def store(tmp_path: Path) -> ChunkStore:
    return ChunkStore(tmp_path, 8 * MiB)


@pytest.mark.parametrize("columns", [range(32), range(32, 64), range(16, 48)])
def test_a_row_comes_back_from_any_32_columns(store: ChunkStore, columns: range) -> None:
    record, rows = store_object(store, "a")
    assert [load(store, record, row, columns) for row in (0, 1)] == rows


def test_nothing_on_disk_shows_the_row_or_its_key(store: ChunkStore, tmp_path: Path) -> None:
    _, rows = store_object(store, "a")
    for path in tmp_path.iterdir():
        content = path.read_bytes()
        assert not any(key in content for key in KEYS)
        assert not any(row[at : at + 16] in content for row in rows for at in range(0, ROW - 16, 16))


def test_a_restart_finds_everything_again(store: ChunkStore, tmp_path: Path) -> None:
    record, rows = store_object(store, "a")
    again = ChunkStore(tmp_path, 8 * MiB)
    assert again.find(row_id(record, 1)) == (record, 1)
    assert load(again, record, 1) == rows[1]
    assert again.used_bytes == store.used_bytes


def test_private_objects_are_held_but_never_offered(store: ChunkStore, tmp_path: Path) -> None:
    record, _ = store_object(store, "private", shareable=False)
    for each in (store, ChunkStore(tmp_path, 8 * MiB)):
        assert each.holds(row_id(record, 0))
        assert each.offers([row_id(record, 0)]) == ()
        assert each.record(record.digest, for_peer=True) is None
        assert each.record(record.digest) is not None


def test_offers_name_position_row_and_columns(store: ChunkStore) -> None:
    record, _ = store_object(store, "a")
    (offer,) = store.offers([bytes(32), row_id(record, 1)])
    assert (offer.index, offer.manifest, offer.row, offer.columns) == (1, record.digest, 1, b"\xff" * 8)


def test_fetched_columns_are_served_and_survive_a_restart_under_the_original_manifest(
    store: ChunkStore, tmp_path: Path
) -> None:
    record, rows = store_object(store, "a")
    fetcher = ChunkStore(tmp_path / "fetcher", 8 * MiB)
    fetcher.put_columns(record, 1, dict(store.read_chunks(record.digest, 1, range(20))))
    assert not fetcher.holds(row_id(record, 1))
    fetcher.put_columns(record, 1, dict(store.read_chunks(record.digest, 1, range(16, 40))))
    fetcher.flush(record.digest)
    again = ChunkStore(tmp_path / "fetcher", 8 * MiB)
    assert again.record(record.digest) == record
    assert again.columns(record.digest, 1) == (1 << 40) - 1
    assert again.offers([row_id(record, 0)]) == ()
    assert load(again, record, 1) == rows[1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda obj, meta: meta.write_bytes(meta.read_bytes()[:-1]),
        lambda obj, meta: meta.write_bytes(b""),
        lambda obj, meta: meta.write_bytes(bytes(SIDECAR_BYTES_MAX + 1)),
        lambda obj, meta: meta.write_bytes(b"\x00" + meta.read_bytes()[1:]),
        lambda obj, meta: os.truncate(obj, 100),
        lambda obj, meta: obj.unlink(),
        lambda obj, meta: meta.unlink(),
        lambda obj, meta: meta.rename(meta.with_suffix(".tmp")),
        lambda obj, meta: meta.rename(meta.with_name("00" * 32 + ".meta")),
    ],
)
def test_torn_files_are_dropped_at_start(
    store: ChunkStore, tmp_path: Path, damage: Callable[[Path, Path], object]
) -> None:
    torn, _ = store_object(store, "torn")
    whole, rows = store_object(store, "whole")
    damage(tmp_path / f"{torn.digest.hex()}.obj", tmp_path / f"{torn.digest.hex()}.meta")
    again = ChunkStore(tmp_path, 8 * MiB)
    assert not again.holds(row_id(torn, 0))
    assert load(again, whole, 0) == rows[0]
    assert len(list(tmp_path.iterdir())) == 2


def test_an_object_of_the_first_manifest_version_is_deleted_at_start(store: ChunkStore, tmp_path: Path) -> None:
    record, _ = store_object(store, "old")
    whole, rows = store_object(store, "whole")
    meta = tmp_path / f"{record.digest.hex()}.meta"
    fields = msgspec.msgpack.decode(meta.read_bytes()[:-32])
    head, entries, signature = record.raw[:169], (record.raw[169:258], record.raw[258:347]), record.raw[347:]
    fields[1] = b"".join((head, *(entry[:73] for entry in entries), signature))  # its rows had no tags
    body = msgspec.msgpack.encode(fields)
    old = tmp_path / sha256(fields[1]).hex()
    meta.unlink()
    old.with_suffix(".meta").write_bytes(body + blake3.blake3(body).digest())
    (tmp_path / f"{record.digest.hex()}.obj").rename(old.with_suffix(".obj"))
    again = ChunkStore(tmp_path, 8 * MiB)
    assert not again.holds(row_id(record, 0))
    assert load(again, whole, 0) == rows[0]
    assert {path.stem for path in tmp_path.iterdir()} == {whole.digest.hex()}


def test_the_least_recently_read_object_makes_room(tmp_path: Path) -> None:
    store = ChunkStore(tmp_path, 2 * (OBJECT + SIDECAR_BYTES_MAX))
    first, _ = store_object(store, "first")
    second, _ = store_object(store, "second")
    store.read_chunks(first.digest, 0, [0])
    store_object(store, "third")
    assert store.holds(row_id(first, 0))
    assert not store.holds(row_id(second, 0))
    assert store.used_bytes <= 2 * (OBJECT + SIDECAR_BYTES_MAX)
    with pytest.raises(Refused, match="evicted"):
        store.read_chunks(second.digest, 0, [0])


def test_an_object_larger_than_the_quota_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    store = ChunkStore(tmp_path, OBJECT // 2)
    with pytest.raises(Refused, match="disk_full"):
        store_object(store, "a")
    assert list(tmp_path.iterdir()) == []
    assert store.used_bytes == 0


def test_a_full_disk_costs_old_objects_first_and_then_refuses(
    store: ChunkStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, _ = store_object(store, "old")

    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(Refused, match="disk_full"):
        store_object(store, "new")
    assert not store.holds(row_id(old, 0))
    assert list(tmp_path.iterdir()) == []


def test_a_shortened_file_is_a_typed_failure(store: ChunkStore, tmp_path: Path) -> None:
    record, _ = store_object(store, "a")
    os.truncate(tmp_path / f"{record.digest.hex()}.obj", 10)
    with pytest.raises(Refused, match="io_error"):
        store.read_chunks(record.digest, 0, [0])


@pytest.mark.parametrize("kind", ["pipe", "directory", "device"])
def test_what_is_no_regular_file_is_an_io_error_and_blocks_no_thread(
    store: ChunkStore, tmp_path: Path, kind: str
) -> None:
    record, _ = store_object(store, "first")
    path = tmp_path / f"{record.digest.hex()}.obj"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(store.read_chunks, record.digest, 0, [0])
        try:
            assert isinstance(reading.exception(5), Refused)
        finally:
            if kind == "pipe":
                os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))  # lets go of a reader that waits
        with pytest.raises(Refused, match="io_error"):
            reading.result()


def test_an_abandoned_encoding_leaves_nothing(store: ChunkStore, tmp_path: Path) -> None:
    with store.new_object(2, CHUNK):
        assert store.used_bytes >= OBJECT
    assert store.used_bytes == 0
    assert list(tmp_path.iterdir()) == []


def test_chunks_that_are_no_codeword_condemn_the_object() -> None:
    chunks = [secrets.token_bytes(CHUNK) for _ in range(64)]
    digests = b"".join(chunk_digest(chunk) for chunk in chunks)
    good = good_chunks([(c, memoryview(chunks[c])) for c in range(1, 40)], digests)
    assert set(good) == set(range(1, 40))
    with pytest.raises(Refused, match="condemned"):
        open_row(good, digests, CHUNK, KEYS[0], bytes(12), memoryview(bytearray(ROW)))


def test_padding_is_zero_sealed_or_not(store: ChunkStore) -> None:
    record, _ = store_object(store, "a")
    ((_, last),) = store.read_chunks(record.digest, 0, [DATA_CHUNKS - 1])
    assert last[-100:] == bytes(100)


def test_objects_of_producers_that_are_trusted_no_longer_are_forgotten_for_good(
    store: ChunkStore, tmp_path: Path
) -> None:
    record, _ = store_object(store, "a")
    producer = record.manifest.producer
    store.forget_others(lambda kept: kept.manifest.producer == producer)
    assert store.record(record.digest) is record
    store.forget_others(lambda kept: False)
    assert not store.holds(row_id(record, 0))
    assert not ChunkStore(tmp_path, 8 * MiB).holds(row_id(record, 0))


def test_an_object_signed_anew_keeps_its_chunks_and_forgets_its_old_name(store: ChunkStore, tmp_path: Path) -> None:
    old, rows = store_object(store, "a", shareable=False)
    other, _ = store_object(store, "b")
    used = store.used_bytes
    assert store.dated_after(-1) == [old, other]
    new = sign_anew(old, SIGNING_KEY, 7)
    assert store.replace(old.digest, new)
    for each in (store, ChunkStore(tmp_path, 8 * MiB)):
        assert each.used_bytes == used
        assert each.record(old.digest) is None
        assert each.record(new.digest) == new
        assert each.record(new.digest, for_peer=True) is None
        assert [load(each, new, row) for row in (0, 1)] == rows
        assert each.dated_after(6) == [new]
        assert each.dated_after(7) == []
    assert not store.replace(old.digest, new)
    assert len(list(tmp_path.iterdir())) == 4


def test_an_object_whose_new_signature_finds_no_disk_is_gone_as_a_whole(store: ChunkStore, tmp_path: Path) -> None:
    old, _ = store_object(store, "a")
    new = sign_anew(old, SIGNING_KEY, 7)
    (tmp_path / f"{new.digest.hex()}.meta").mkdir()  # a file can't take its place
    with pytest.raises(Refused):
        store.replace(old.digest, new)
    assert store.rows == store.used_bytes == 0
    assert not list(tmp_path.glob("*.obj"))
