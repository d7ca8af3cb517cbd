"""The response database survives its writer, its disk and its age; a reader never sees an error."""

import json
import os
import sqlite3
from pathlib import Path

import pytest
import zstandard

from hyperspace_vllm.core.records.limits import RESPONSE_BYTES_MAX, RESPONSE_TTL_MS
from hyperspace_vllm.core.response.cache_proof import check_proof, decode_proof, request_hash
from hyperspace_vllm.daemon.responses.response_store import ResponseStore
from hyperspace_vllm.response_db import ResponseReader, packed, unpacked
from tests.support.daemons.response_stores import (
    MODEL,
    NETWORK,
    NOISE,
    Clock,
    Heard,
    Open,
    Signer,
    fetched,
    key,
    response,
)


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


def test_what_was_taken_before_the_start_is_written_then(path: Path, clock: Clock) -> None:
    store, heard = ResponseStore(path, 1 << 30, RESPONSE_TTL_MS, Signer(), NETWORK, clock), Heard()
    assert store.store(response(1))
    assert not path.exists()
    store.start(heard)
    assert store.flush(60)
    store.close()
    assert heard.numbers() == [1]
    assert ResponseReader(path).get(key(1), clock()) is not None


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
    store.store_fetched(**fetched(1, b"of now", clock() - 1000))
    assert store.flush(60)
    entry = reader.get(key(1), clock())
    assert entry is not None
    assert entry.body == b"of now"
    assert store.stats() | {"entries": 1, "expired": 1 + restarted} == store.stats()
    assert heard.numbers() == ([1] if restarted else [])


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


def test_an_error_of_the_writer_costs_its_batch_alone(
    open_store: Open, path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(body: bytes) -> bytes:
        return packed(body) if body != b"odd" else b"%d" % (1 // 0)

    monkeypatch.setattr("hyperspace_vllm.daemon.responses.store_transaction.packed", broken)
    store = open_store()
    for number, body in enumerate((b"odd", b"{}")):
        assert store.store(response(number, body))
        assert store.flush(60)
    assert store.stats() | {"failed": 1, "stored": 1, "entries": 1} == store.stats()
