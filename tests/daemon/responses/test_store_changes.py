"""What the response store keeps of peers' answers, and tells of what can be served."""

import asyncio
import time
from pathlib import Path

import pytest

from hyperspace_vllm.core.records.limits import RESPONSE_TTL_MS
from hyperspace_vllm.core.response.cache_proof import request_hash
from hyperspace_vllm.daemon.responses.store_changes import ServableEntry
from hyperspace_vllm.response_db import ResponseReader, Shareable, StoredResponse
from tests.support.daemons.response_stores import NETWORK, NOISE, Clock, Heard, Open, fetched, key, response
from tests.support.until import until


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
    reader = ResponseReader(path)
    missing: list[ServableEntry] = []

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
    until(lambda: heard.numbers() == expected)
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
