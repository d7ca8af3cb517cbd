"""The response database survives its writer, its disk and its age; a reader never sees an error."""

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest
import zstandard
from nacl.signing import SigningKey

from hyperspace_vllm.core.local.messages import Scope, StoreResponse
from hyperspace_vllm.core.records.ids import RequestKey, network_id
from hyperspace_vllm.core.records.limits import RESPONSE_BYTES_MAX, RESPONSE_TTL_MS
from hyperspace_vllm.core.response.cache_proof import check_proof, decode_proof, make_proof, request_hash
from hyperspace_vllm.daemon.responses.response_store import ResponseStore
from hyperspace_vllm.daemon.responses.store_changes import Listener, ServableEntry
from hyperspace_vllm.response_db import ResponseReader, Shareable, StoredResponse, packed, unpacked

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

    def open_one(
        quota_bytes: int = 1 << 30, ttl_ms: int = RESPONSE_TTL_MS, listener: Listener | None = None
    ) -> ResponseStore:
        opened.append(ResponseStore(path, quota_bytes, ttl_ms, Signer(), NETWORK, clock, listener))
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


PEER = SigningKey(bytes([5]) * 32)


def fetched(number: int, body: bytes, computed_at_ms: int, scope: Scope = "network") -> dict[str, object]:
    """What `store_fetched` takes for a response that a peer computed."""
    proof = make_proof(PEER, NETWORK, key(number), body, MODEL, "vllm 0.32.0", computed_at_ms)
    return {
        "key": key(number),
        "body": body,
        "raw_proof": proof.encode(),
        "computed_at_ms": computed_at_ms,
        "expires_at_ms": computed_at_ms + RESPONSE_TTL_MS,
        "scope": scope,
    }


class Heard:
    """A listener that remembers: what can be served, and everything told in order."""

    def __init__(self) -> None:
        self.servable: dict[bytes, ServableEntry] = {}
        self.calls: list[tuple[tuple[ServableEntry, ...], tuple[bytes, ...]]] = []

    def __call__(self, stored: tuple[ServableEntry, ...], gone: tuple[bytes, ...]) -> None:
        self.calls.append((stored, gone))
        self.servable.update((entry.request_hash, entry) for entry in stored)
        for name in gone:
            self.servable.pop(name, None)

    def numbers(self) -> list[int]:
        names = {request_hash(NETWORK, key(number)): number for number in range(1000)}
        return sorted(names[name] for name in self.servable)


def test_what_was_stored_is_read_in_place_with_its_proof(open_store: Open, path: Path, clock: Clock) -> None:
    store, reader = open_store(), ResponseReader(path)
    assert reader.get(key(1), clock()) is None
    assert store.store(response(1, b'{"a":1}'))
    assert store.flush(60)
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
        assert store.flush(60)
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
    assert store.flush(60)
    assert reader.get(key(1), clock() + lives_ms - 1) is not None
    assert reader.get(key(1), clock() + lives_ms) is None
    clock.now_ms += lives_ms + 60_000
    store.touch([key(9)])  # any work brings the expiry along
    assert store.flush(60)
    assert store.stats() | {"entries": 0, "bytes": 0, "expired": 1} == store.stats()


@pytest.mark.parametrize("told_to", ["the node", "a server"])
def test_a_life_that_was_shortened_is_that_of_what_is_stored_already(
    open_store: Open, path: Path, clock: Clock, told_to: str
) -> None:
    heard, store = Heard(), open_store()
    store.store(response(1))
    assert store.flush(60)
    store.close()
    if told_to == "the node":
        open_store(ttl_ms=5_000, listener=heard).flush(60)
        assert [told.expires_at_ms for told in heard.servable.values()] == [clock() + 5_000]
    reader = ResponseReader(path, RESPONSE_TTL_MS if told_to == "the node" else 5_000)
    entry = reader.get(key(1), clock() + 4_999)
    assert entry is not None
    assert entry.expires_at_ms == clock() + 5_000
    assert reader.get(key(1), clock() + 5_000) is None


YEAR_MS = 365 * RESPONSE_TTL_MS


@pytest.mark.parametrize("restarted", [False, True])
def test_what_was_computed_while_the_clock_was_ahead_is_gone_once_it_is_right(
    open_store: Open, path: Path, clock: Clock, restarted: bool
) -> None:
    heard, store = Heard(), open_store()
    clock.now_ms += YEAR_MS
    for number in (1, 2):
        store.store(response(number, ttl_ms=1000 * number))
    assert store.flush(60)
    if restarted:
        store.close()
    clock.now_ms -= YEAR_MS
    reader, name = ResponseReader(path), request_hash(NETWORK, key(1))
    for now_ms in (clock(), clock() + YEAR_MS - 61_000):
        assert reader.get(key(1), now_ms) is None
        assert reader.find_by_hash(name, now_ms) is None
        assert not reader.holds(key(1), now_ms)
    if restarted:
        store = open_store(listener=heard)
    store.store_fetched(**fetched(1, b"of now", clock() - 1000))  # type: ignore[arg-type]
    assert store.flush(60)
    entry = reader.get(key(1), clock())
    assert entry is not None
    assert entry.body == b"of now"
    assert store.stats() | {"entries": 1, "expired": 1 + restarted} == store.stats()
    assert heard.numbers() == ([1] if restarted else [])


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
    store = ResponseStore(path, 1 << 30, RESPONSE_TTL_MS, Signer(), NETWORK, clock, heard)
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


NOISE = Random(1).randbytes(1024)  # which doesn't shrink
MAGIC = zstandard.FRAME_HEADER


def test_over_its_quota_the_store_drops_what_was_used_longest_ago(open_store: Open, path: Path, clock: Clock) -> None:
    store, reader = open_store(quota_bytes=5 * 2048), ResponseReader(path)
    for number in range(5):
        clock.now_ms += 1
        store.store(response(number, NOISE))
        assert store.flush(60)
    clock.now_ms += 1
    store.touch([key(0)])
    assert store.flush(60)
    store.store(response(5, NOISE))
    assert store.flush(60)
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


def test_what_was_asked_for_often_outlives_what_was_used_lately(open_store: Open, path: Path, clock: Clock) -> None:
    store, reader = open_store(quota_bytes=3 * 2048), ResponseReader(path)
    for number in range(3):
        store.store(response(number, NOISE))
    store.touch([key(0)] * 7)  # log2(1 + 7): worth as much as a use three hours later
    assert store.flush(60)

    def survivors(stored: int) -> list[int]:
        store.store(response(stored, NOISE))
        assert store.flush(60)
        return [number for number in range(9) if reader.get(key(number), clock()) is not None]

    clock.now_ms += 1
    assert survivors(3) == [0, 2, 3]
    clock.now_ms += 2 * 3_600_000
    assert survivors(4) == [0, 3, 4]
    clock.now_ms += 2 * 3_600_000
    assert survivors(5) == [0, 4, 5]
    assert survivors(6) == [0, 5, 6]
    assert survivors(7) == [5, 6, 7]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"{" + b" " * 255,
        b'{"text": "word word word"}' * 1000,
        NOISE,
        b"\x28\xb5\x2f\xfd",
        b"\x28\xb5\x2f\xfd" * 99,
    ],
)
def test_a_packed_body_is_the_same_again_and_no_longer(body: bytes) -> None:
    assert unpacked(packed(body)) == body
    assert len(packed(body)) <= len(body) + (20 if body.startswith(MAGIC) else 0)


@pytest.mark.parametrize(
    "stored",
    [
        packed(b"{" * 1000)[:-1],
        MAGIC,
        zstandard.compress(bytes(RESPONSE_BYTES_MAX + 1)),
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000)),
    ],
)
def test_a_body_that_was_not_packed_so_is_a_miss(stored: bytes) -> None:
    assert unpacked(stored) is None


def test_answers_take_less_room_than_they_are_long(open_store: Open, path: Path, clock: Clock) -> None:
    body = json.dumps({"choices": [{"message": {"content": "The sky is blue because of the air. " * 50}}]}).encode()
    store = open_store()
    store.store(response(1, body))
    assert store.flush(60)
    assert store.stats()["bytes"] < 1024 + len(body) / 4
    found = ResponseReader(path).get(key(1), clock())
    assert found is not None
    assert found.body == body


def test_a_writer_that_is_behind_drops_and_never_blocks(open_store: Open, path: Path, clock: Clock) -> None:
    store = open_store()
    assert store.flush(60)
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


def test_an_error_of_the_writer_costs_its_batch_alone(
    open_store: Open, path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(body: bytes) -> bytes:
        return packed(body) if body != b"odd" else b"%d" % (1 // 0)

    monkeypatch.setattr("hyperspace_vllm.daemon.responses.response_store.packed", broken)
    store = open_store()
    for number, body in enumerate((b"odd", b"{}")):
        assert store.store(response(number, body))
        assert store.flush(60)
    assert store.stats() | {"failed": 1, "stored": 1, "entries": 1} == store.stats()


def test_what_a_peer_computed_is_served_on_with_its_own_proof_and_time(
    open_store: Open, path: Path, clock: Clock
) -> None:
    store, reader, at_ms = open_store(), ResponseReader(path), clock() - 3_600_000
    sent = fetched(1, b"from a peer", at_ms)
    assert store.store_fetched(**sent)
    assert store.flush(60)
    found = reader.find_by_hash(request_hash(NETWORK, key(1)), clock())
    assert found == Shareable(
        key(1), "network", StoredResponse(b"from a peer", sent["raw_proof"], at_ms, at_ms + RESPONSE_TTL_MS)
    )
    assert reader.get(key(1), at_ms + RESPONSE_TTL_MS) is None
    assert store.stats() | {"stored": 0, "fetched": 1, "entries": 1} == store.stats()


@pytest.mark.parametrize(
    ("age_ms", "stays"), [(-1, b"fetched"), (0, b"computed"), (1, b"computed"), (RESPONSE_TTL_MS, b"computed")]
)
def test_what_was_computed_here_gives_way_to_what_is_newer_alone(
    open_store: Open, path: Path, clock: Clock, age_ms: int, stays: bytes
) -> None:
    store = open_store()
    store.store(response(1, b"computed"))
    store.store_fetched(**fetched(1, b"fetched", clock() - age_ms))
    assert store.flush(60)
    entry = ResponseReader(path).get(key(1), clock())
    assert entry is not None
    assert entry.body == stays
    store.store(response(1, b"computed again"))
    assert store.flush(60)
    entry = ResponseReader(path).get(key(1), clock())
    assert entry is not None
    assert entry.body == b"computed again"


def test_this_nodes_shorter_ttl_holds_for_what_others_computed(open_store: Open, path: Path, clock: Clock) -> None:
    store, reader = open_store(ttl_ms=5_000), ResponseReader(path)
    store.store_fetched(**fetched(1, b"old", clock() - 5_000))
    store.store_fetched(**fetched(2, b"young", clock() - 3_000))
    assert store.flush(60)
    assert [reader.get(key(number), clock() + 1_999) is not None for number in (1, 2)] == [False, True]
    assert reader.get(key(2), clock() + 2_000) is None


def test_private_entries_are_neither_told_of_nor_found(open_store: Open, path: Path, clock: Clock) -> None:
    heard = Heard()
    store = open_store(listener=heard)
    for number, scope in enumerate(("private", "network", "public")):
        store.store(response(number, scope=scope))  # type: ignore[arg-type]
    store.store_fetched(**fetched(3, b"{}", clock(), "private"))
    assert store.flush(60)
    reader = ResponseReader(path)
    found = [reader.find_by_hash(request_hash(NETWORK, key(number)), clock()) is not None for number in range(4)]
    assert found == [False, True, True, False]
    assert heard.numbers() == [1, 2]
    store.store(response(1, scope="private"))  # from now on its owner keeps it
    assert store.flush(60)
    assert heard.numbers() == [2]
    assert reader.find_by_hash(request_hash(NETWORK, key(1)), clock()) is None


def test_what_can_be_served_is_told_after_it_can_be_read(open_store: Open, path: Path, clock: Clock) -> None:
    reader, missing = ResponseReader(path), []

    def listener(stored: tuple[ServableEntry, ...], gone: tuple[bytes, ...]) -> None:
        missing.extend(entry for entry in stored if not reader.find_by_hash(entry.request_hash, clock()))

    store = open_store(listener=listener)
    for number in range(50):
        store.store(response(number))
    assert store.flush(60)
    assert not missing


def test_computed_and_fetched_are_told_apart_and_replacing_is_no_loss(
    open_store: Open, path: Path, clock: Clock
) -> None:
    heard = Heard()
    store = open_store(listener=heard)
    store.store(response(1))
    store.store_fetched(**fetched(2, b"{}", clock() - 1000))
    assert store.flush(60)
    assert heard.servable == {
        (name := request_hash(NETWORK, key(1))): ServableEntry(name, clock() + RESPONSE_TTL_MS, True),
        (name := request_hash(NETWORK, key(2))): ServableEntry(name, clock() - 1000 + RESPONSE_TTL_MS, False),
    }
    clock.now_ms += 1
    store.store(response(2))
    assert store.flush(60)
    assert heard.servable[name] == ServableEntry(name, clock() + RESPONSE_TTL_MS, True)
    assert not any(gone for _, gone in heard.calls)


def test_evicted_and_expired_entries_are_told_as_gone(open_store: Open, path: Path, clock: Clock) -> None:
    heard = Heard()
    store = open_store(quota_bytes=3 * 2048, listener=heard)
    for number in range(5):
        clock.now_ms += 1
        store.store(response(number, NOISE, ttl_ms=100_000 * (number + 1)))
        assert store.flush(60)
    assert heard.numbers() == [2, 3, 4]
    clock.now_ms += 350_000
    store.touch([key(9)])
    assert store.flush(60)
    assert heard.numbers() == [3, 4]


def test_an_entry_that_has_expired_when_it_is_stored_is_not_told_of(open_store: Open, clock: Clock) -> None:
    heard = Heard()
    store = open_store(ttl_ms=0, listener=heard)
    store.store(response(1))
    store.store_fetched(**fetched(2, b"{}", clock()))
    assert store.flush(60)
    assert heard.numbers() == []


def test_a_node_that_starts_again_tells_of_all_it_has_bit_by_bit(open_store: Open, path: Path, clock: Clock) -> None:
    store = open_store()
    for number in range(600):
        store.store(response(number, scope="private" if number % 3 == 0 else "network"))
    store.store_fetched(**fetched(600, b"{}", clock()))
    store.store(response(601, ttl_ms=1))
    assert store.flush(60)
    store.close()
    clock.now_ms += 1
    heard, began_s = Heard(), time.monotonic()
    store = open_store(listener=heard)
    store.store(response(700))
    expected = [number for number in range(600) if number % 3] + [600, 700]
    while heard.numbers() != expected and time.monotonic() < began_s + 60:
        time.sleep(0.02)
    assert heard.numbers() == expected
    assert time.monotonic() - began_s >= 0.25
    assert max(len(stored) for stored, _ in heard.calls) <= 256
    assert [entry.computed for entry in heard.servable.values()].count(False) == 1


def test_a_listener_whose_loop_has_closed_stops_nothing(open_store: Open, path: Path, clock: Clock) -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    store = open_store(listener=lambda stored, gone: loop.call_soon_threadsafe(print) and None)
    for number in range(2):
        store.store(response(number))
        assert store.flush(60)
    assert store.stats()["stored"] == 2


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
from hyperspace_vllm.core.local.messages import StoreResponse
from hyperspace_vllm.daemon.responses.response_store import ResponseStore

class Signer:
    signing_key = SigningKey(bytes(32))

def response(number, size):
    return StoreResponse(number.to_bytes(32, "big"), "network", bytes(32), "v", 86_400_000, os.urandom(size))

store = ResponseStore(Path(sys.argv[1]), 1 << 30, 86_400_000, Signer(), network_id("test"))
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
