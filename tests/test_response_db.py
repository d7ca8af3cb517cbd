"""The response database survives its writer, its disk and its age; a reader never sees an error."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from nacl.signing import SigningKey

from hyperspace_vllm.core.records.ids import RequestKey, network_id
from hyperspace_vllm.core.records.limits import RESPONSE_TTL_MS
from hyperspace_vllm.core.records.local import Scope, StoreResponse
from hyperspace_vllm.core.response.cache_proof import check_proof, decode_proof, request_hash
from hyperspace_vllm.daemon.response_store import ResponseStore
from hyperspace_vllm.response_db import ResponseReader

NETWORK = network_id("test")
MODEL = bytes([8]) * 32


@dataclass(frozen=True)
class Signer:
    signing_key: SigningKey = field(default_factory=lambda: SigningKey(bytes(32)))


@dataclass
class Clock:
    now_ms: int = 1_800_000_000_000

    def __call__(self) -> int:
        return self.now_ms


Open = Callable[..., ResponseStore]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "responses.sqlite"


@pytest.fixture
def open_store(path: Path, clock: Clock) -> Iterator[Open]:
    opened: list[ResponseStore] = []

    def open_one(quota_bytes: int = 1 << 30, ttl_ms: int = RESPONSE_TTL_MS) -> ResponseStore:
        opened.append(ResponseStore(path, quota_bytes, ttl_ms, Signer(), NETWORK, clock))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


def key(number: int) -> RequestKey:
    return RequestKey(number.to_bytes(32, "big"))


def response(
    number: int, body: bytes = b"{}", ttl_ms: int = RESPONSE_TTL_MS, scope: Scope = "network"
) -> StoreResponse:
    return StoreResponse(key(number), scope, MODEL, "vllm 0.32.0", ttl_ms, body)


def test_what_was_stored_is_read_in_place_with_its_proof(open_store: Open, path: Path, clock: Clock) -> None:
    store, reader = open_store(), ResponseReader(path)
    assert reader.get(key(1), clock()) is None
    assert store.store(response(1, b'{"a":1}'))
    assert store.flush(10)
    entry = reader.get(key(1), clock())
    assert entry is not None
    assert entry.body == b'{"a":1}'
    signer = Signer().signing_key.verify_key.encode()
    proof = decode_proof(entry.proof)
    check_proof(proof, request_hash(NETWORK, key(1)), entry.body, MODEL, signer.__eq__, clock())
    assert reader.get(key(2), clock()) is None
    assert os.stat(path).st_mode & 0o077 == 0


def test_a_newer_answer_replaces_the_older(open_store: Open, path: Path, clock: Clock) -> None:
    store = open_store()
    for body in (b"old", b"new"):
        store.store(response(1, body))
        assert store.flush(10)
    entry = ResponseReader(path).get(key(1), clock())
    assert entry is not None
    assert entry.body == b"new"
    assert store.stats()["entries"] == 1


@pytest.mark.parametrize(
    ("store_ttl_ms", "message_ttl_ms", "lives_ms"),
    [(5_000, RESPONSE_TTL_MS, 5_000), (RESPONSE_TTL_MS, 3_000, 3_000), (1 << 50, 1 << 62, RESPONSE_TTL_MS)],
)
def test_an_entry_ends_with_the_shortest_of_its_lives(
    open_store: Open, path: Path, clock: Clock, store_ttl_ms: int, message_ttl_ms: int, lives_ms: int
) -> None:
    store, reader = open_store(ttl_ms=store_ttl_ms), ResponseReader(path)
    store.store(response(1, ttl_ms=message_ttl_ms))
    assert store.flush(10)
    assert reader.get(key(1), clock() + lives_ms - 1) is not None
    assert reader.get(key(1), clock() + lives_ms) is None
    clock.now_ms += lives_ms + 60_000
    store.touch([key(9)])  # any work brings the expiry along
    assert store.flush(10)
    assert store.stats() | {"entries": 0, "bytes": 0, "expired": 1} == store.stats()


def test_over_its_quota_the_store_drops_what_was_used_longest_ago(open_store: Open, path: Path, clock: Clock) -> None:
    store, reader = open_store(quota_bytes=5 * 2048), ResponseReader(path)
    for number in range(5):
        clock.now_ms += 1
        store.store(response(number, bytes(1024)))
        assert store.flush(10)
    clock.now_ms += 1
    store.touch([key(0)])
    assert store.flush(10)
    store.store(response(5, bytes(1024)))
    assert store.flush(10)
    assert [reader.get(key(number), clock()) is not None for number in range(6)] == [
        True,
        False,
        True,
        True,
        True,
        True,
    ]
    assert store.stats()["evicted"] == 1
    assert store.stats()["hits"] == 1
    assert not store.store(response(6, bytes(6 * 2048)))


def test_a_writer_that_is_behind_drops_and_never_blocks(open_store: Open, path: Path, clock: Clock) -> None:
    store = open_store()
    assert store.flush(10)
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")  # the writer waits for this lock, up to its timeout
    try:
        taken = [store.store(response(number, bytes(4 << 20))) for number in range(40)]
    finally:
        blocker.execute("ROLLBACK")
        blocker.close()
    assert taken[0]
    assert not taken[-1]
    assert store.flush(30)
    assert store.stats()["stored"] == sum(taken)
    assert store.stats()["dropped"] == len(taken) - sum(taken)


@pytest.mark.parametrize("damage", ["garbage", "short", "header", "page", "foreign"])
def test_a_damaged_database_is_moved_aside_and_a_fresh_one_serves(
    open_store: Open, path: Path, clock: Clock, damage: str
) -> None:
    store = open_store()
    for number in range(50):
        store.store(response(number, bytes(3000)))
    assert store.flush(10)
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
    assert store.flush(10)
    assert store.stats()["moved_aside"] == 1
    assert path.with_suffix(".damaged").exists()
    entry = reader.get(key(100), clock())  # the reader notices the new file by itself
    assert entry is not None
    assert entry.body == b"fresh"


def test_a_flipped_byte_in_a_body_is_a_miss(open_store: Open, path: Path, clock: Clock) -> None:
    store = open_store()
    store.store(response(1, b"The sky is blue."))
    assert store.flush(10)
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
    assert store.flush(10)
    assert reader.get(key(1), clock()) is not None
    store.close()
    assert reader.get(key(1), clock()) is not None  # nobody writes any more
    os.rename(path, path.with_suffix(".gone"))
    assert reader.get(key(1), clock()) is None


def test_a_directory_that_cannot_be_written_costs_entries_and_nothing_else(tmp_path: Path, clock: Clock) -> None:
    store = ResponseStore(tmp_path / "missing" / "r.sqlite", 1 << 20, RESPONSE_TTL_MS, Signer(), NETWORK, clock)
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


_WRITER_HEAD = """
import resource, sys
from pathlib import Path
from nacl.signing import SigningKey
from hyperspace_vllm.core.records.ids import network_id
from hyperspace_vllm.core.records.local import StoreResponse
from hyperspace_vllm.daemon.response_store import ResponseStore

class Signer:
    signing_key = SigningKey(bytes(32))

def response(number, size):
    return StoreResponse(number.to_bytes(32, "big"), "network", bytes(32), "v", 86_400_000, bytes(size))

store = ResponseStore(Path(sys.argv[1]), 1 << 30, 86_400_000, Signer(), network_id("test"))
"""

_FULL_DISK = """
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # write() fails beyond, as on a full disk
for number, size in enumerate((1000, 2_000_000, 1000), 1):
    store.store(response(number, size))
    assert store.flush(10)
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
        store.flush(10)
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
    assert store.flush(10)
    assert store.stats()["moved_aside"] == 0
    assert store.stats()["entries"] >= committed
