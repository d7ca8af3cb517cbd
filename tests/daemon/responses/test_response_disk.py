"""The response database on a disk that fails, fills, is replaced or is of another version."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hyperspace_vllm.core.records.limits import RESPONSE_TTL_MS
from hyperspace_vllm.core.response.cache_proof import make_proof
from hyperspace_vllm.daemon.responses.response_store import ResponseStore
from hyperspace_vllm.response_db import ResponseReader
from tests.support.daemons.response_stores import MODEL, NETWORK, Clock, Heard, Open, Signer, key, response


@pytest.mark.parametrize("gone", [("", "-wal", "-shm"), ("",)])
def test_a_database_that_is_deleted_under_its_writer_is_made_anew(
    open_store: Open, path: Path, clock: Clock, gone: tuple[str, ...]
) -> None:
    store, reader = open_store(), ResponseReader(path)
    store.store(response(1))
    assert store.flush(60)
    assert reader.get(key(1), clock()) is not None
    for suffix in gone:
        os.unlink(f"{path}{suffix}")
    for number in (2, 3):
        store.store(response(number))
        assert store.flush(60)
        assert reader.get(key(number), clock()) is not None
    assert reader.get(key(1), clock()) is None
    assert store.stats() | {"entries": 2, "stored": 3, "failed": 0, "moved_aside": 0} == store.stats()
    store.close()
    assert reader.get(key(3), clock()) is not None


def test_a_database_that_is_replaced_under_its_writer_is_used_and_told_of(
    open_store: Open, path: Path, tmp_path: Path, clock: Clock
) -> None:
    copy, heard = tmp_path / "copy", Heard()
    store = open_store()
    store.store(response(1))
    assert store.flush(60)
    store.close()
    os.rename(path, copy)
    store = open_store(listener=heard)
    store.store(response(2))
    assert store.flush(60)
    os.rename(copy, path)
    store.store(response(3))
    assert store.flush(60)
    reader = ResponseReader(path)
    assert [reader.get(key(number), clock()) is not None for number in (1, 2, 3)] == [True, False, True]
    deadline_s = time.monotonic() + 60
    while heard.numbers() != [1, 2, 3] and time.monotonic() < deadline_s:  # who asks for 2 hears that it is gone
        store.touch([])
        store.flush(60)
    assert heard.numbers() == [1, 2, 3]
    assert store.stats() | {"entries": 2, "failed": 0} == store.stats()


def test_what_is_written_into_a_file_that_goes_meanwhile_counts_as_failed(path: Path) -> None:
    class Deletes(Clock):
        """A clock that is read in the middle of a transaction."""

        at_next_reading = False

        def __call__(self) -> int:
            if self.at_next_reading:
                path.unlink()
                self.at_next_reading = False
            return self.now_ms

    clock, heard = Deletes(), Heard()
    store = ResponseStore(path, 1 << 30, RESPONSE_TTL_MS, Signer(), NETWORK, clock)
    store.start(heard)
    assert store.flush(60)
    clock.at_next_reading = True
    store.store(response(1))
    assert store.flush(60)
    assert store.stats() | {"stored": 0, "failed": 1} == store.stats()
    assert heard.numbers() == []
    store.store(response(2))
    assert store.flush(60)
    assert store.stats() | {"stored": 1, "failed": 1, "entries": 1} == store.stats()
    assert ResponseReader(path).get(key(2), clock()) is not None
    store.close()


@pytest.mark.parametrize("damage", ["garbage", "short", "header", "page", "foreign"])
def test_a_damaged_database_is_moved_aside_and_a_fresh_one_serves(
    open_store: Open, path: Path, clock: Clock, damage: str
) -> None:
    store = open_store()
    for number in range(50):
        store.store(response(number, bytes(3000)))
    assert store.flush(60)
    store.close()
    reader = ResponseReader(path)
    assert reader.get(key(1), clock()) is not None
    if damage == "foreign":
        with sqlite3.connect(path) as database:
            database.execute("PRAGMA user_version = 99")
        database.close()
    else:
        raw = bytearray(path.read_bytes())
        if damage == "garbage":
            raw = bytearray(b"not a database" * 1000)
        elif damage == "short":
            del raw[len(raw) // 2 :]
        elif damage == "header":
            raw[:16] = bytes(16)
        else:
            raw[4096 : 4096 * 12] = b"\xff" * (4096 * 11)
        path.write_bytes(raw)
        assert ResponseReader(path).get(key(40), clock()) is None
    store = open_store()
    store.store(response(100, b"fresh"))
    assert store.flush(60)
    assert store.stats()["moved_aside"] == 1
    assert path.with_suffix(".damaged").exists()
    entry = reader.get(key(100), clock())  # the reader notices the new file by itself
    assert entry is not None
    assert entry.body == b"fresh"


def test_a_flipped_byte_in_a_body_is_a_miss(open_store: Open, path: Path, clock: Clock) -> None:
    store = open_store()
    store.store(response(1, b"The sky is blue."))
    assert store.flush(60)
    store.close()
    raw = path.read_bytes()
    assert raw.count(b"The sky is blue.") == 1
    path.write_bytes(raw.replace(b"The sky is blue.", b"The sky is glue."))
    assert ResponseReader(path).get(key(1), clock()) is None


def test_a_reader_outlives_a_missing_locked_and_replaced_file(open_store: Open, path: Path, clock: Clock) -> None:
    reader = ResponseReader(path)
    assert reader.get(key(1), clock()) is None
    path.mkdir()
    assert reader.get(key(1), clock()) is None
    path.rmdir()
    store = open_store()
    store.store(response(1))
    assert store.flush(60)
    assert reader.get(key(1), clock()) is not None
    store.close()
    assert reader.get(key(1), clock()) is not None  # nobody writes any more
    os.rename(path, path.with_suffix(".gone"))
    assert reader.get(key(1), clock()) is None


def test_a_directory_that_cannot_be_written_costs_entries_and_nothing_else(tmp_path: Path, clock: Clock) -> None:
    store = ResponseStore(tmp_path / "missing" / "r.sqlite", 1 << 20, RESPONSE_TTL_MS, Signer(), NETWORK, clock)
    store.start()
    store.store(response(1))
    deadline = time.monotonic() + 10
    while store.stats()["failed"] == 0 and time.monotonic() < deadline:
        store.touch([])
    assert store.stats()["failed"] >= 1
    (tmp_path / "missing").mkdir()
    while store.stats()["stored"] == 0 and time.monotonic() < deadline:
        store.store(response(2))
        store.flush(1)
    assert store.stats()["stored"] >= 1
    store.close()


def test_a_database_of_the_first_version_is_taken_over(open_store: Open, path: Path, clock: Clock) -> None:
    proof = make_proof(Signer().signing_key, NETWORK, key(1), b"kept", MODEL, "vllm 0.32.0", clock())
    database = sqlite3.connect(path)
    database.executescript(SCHEMA_1)
    database.execute(
        "INSERT INTO entries VALUES (1, ?, ?, ?, ?, 1028, ?, 0, 'network')",
        (key(1), proof.encode(), clock(), clock() + RESPONSE_TTL_MS, clock()),
    )
    database.execute("INSERT INTO bodies VALUES (1, ?)", (b"kept",))
    database.commit()
    database.close()
    reader = ResponseReader(path)
    assert reader.find_by_hash(proof.request_hash, clock()) is None  # and no error
    heard = Heard()
    store = open_store(listener=heard)
    store.store(response(2))
    assert store.flush(60)
    found = reader.find_by_hash(proof.request_hash, clock())
    assert found is not None
    assert found.response.body == b"kept"
    assert heard.numbers() == [1, 2]
    assert store.stats() | {"entries": 2, "moved_aside": 0} == store.stats()


SCHEMA_1 = """
CREATE TABLE entries (
    id INTEGER PRIMARY KEY,
    request_key BLOB NOT NULL UNIQUE,
    proof BLOB NOT NULL,
    computed_at_ms INTEGER NOT NULL,
    expires_at_ms INTEGER NOT NULL,
    size INTEGER NOT NULL,
    last_used_ms INTEGER NOT NULL,
    hits INTEGER NOT NULL,
    scope TEXT NOT NULL
);
CREATE INDEX entries_by_use ON entries (last_used_ms);
CREATE INDEX entries_by_expiry ON entries (expires_at_ms);
CREATE TABLE bodies (id INTEGER PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE totals (entries INTEGER NOT NULL, bytes INTEGER NOT NULL);
INSERT INTO totals VALUES (0, 0);
CREATE TRIGGER entry_added AFTER INSERT ON entries
BEGIN UPDATE totals SET entries = entries + 1, bytes = bytes + new.size; END;
CREATE TRIGGER entry_removed AFTER DELETE ON entries
BEGIN
    UPDATE totals SET entries = entries - 1, bytes = bytes - old.size;
    DELETE FROM bodies WHERE id = old.id;
END;
PRAGMA user_version = 1;
"""


_WRITER_HEAD = """
import os, resource, sys
from pathlib import Path
from nacl.signing import SigningKey
from hyperspace_vllm.core.records.ids import network_id
from hyperspace_vllm.core.local.response_cache_messages import StoreResponse
from hyperspace_vllm.daemon.responses.response_store import ResponseStore

class Signer:
    signing_key = SigningKey(bytes(32))

def response(number, size):
    return StoreResponse(number.to_bytes(32, "big"), "network", bytes(32), "v", 86_400_000, os.urandom(size))

store = ResponseStore(Path(sys.argv[1]), 1 << 30, 86_400_000, Signer(), network_id("test"))
store.start()
"""


_FULL_DISK = """
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # write() fails beyond, as on a full disk
for number, size in enumerate((1000, 2_000_000, 1000), 1):
    store.store(response(number, size))
    assert store.flush(60)
assert (store.stats()["stored"], store.stats()["failed"]) == (2, 1), store.stats()
store.close()
"""


@pytest.mark.io
def test_a_full_disk_costs_the_entry_and_the_store_goes_on(path: Path) -> None:
    subprocess.run([sys.executable, "-c", _WRITER_HEAD + _FULL_DISK, str(path)], check=True, timeout=60)
    reader, now_ms = ResponseReader(path), time.time_ns() // 1_000_000
    assert [reader.get(key(number), now_ms) is not None for number in (1, 2, 3)] == [True, False, True]


_ENDLESS = """
number = 0
while True:
    number += 1
    store.store(response(number, 20_000))
    if number % 20 == 0:
        store.flush(60)
        print(number, flush=True)
"""


@pytest.mark.io
def test_kill_9_while_writing_loses_nothing_that_was_committed(open_store: Open, path: Path, clock: Clock) -> None:
    command = [sys.executable, "-c", _WRITER_HEAD + _ENDLESS, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        committed = [int(writer.stdout.readline()) for _ in range(5)][-1]
        writer.send_signal(signal.SIGKILL)
    clock.now_ms = time.time_ns() // 1_000_000
    reader = ResponseReader(path)
    assert all(reader.get(key(number), clock()) is not None for number in range(1, committed + 1))
    store = open_store()
    assert store.flush(60)
    assert store.stats()["moved_aside"] == 0
    assert store.stats()["entries"] >= committed
