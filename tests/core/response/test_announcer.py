"""Gossip in and out, what becomes of it (hints), popularity, and how much the DHT is used."""

from collections.abc import Callable

import pytest
from nacl.signing import SigningKey

from hyperspace_vllm.core.events.gossip import Publish
from hyperspace_vllm.core.records.announcement import (
    PREFIX_TOPIC,
    RESPONSE_TOPIC,
    Announcement,
    PrefixEntry,
    ResponseEntry,
    decode_announcement,
    encode_announcement,
)
from hyperspace_vllm.core.records.errors import Refused
from hyperspace_vllm.core.records.ids import NetworkId, PeerId, network_id, sha256
from hyperspace_vllm.core.records.limits import (
    ANNOUNCEMENT_ENTRIES_MAX,
    CLOCK_SKEW_MS,
    PEERS_KNOWN_MAX,
    PROVIDERS_MAX,
    RESPONSE_HINTS_MAX,
)
from hyperspace_vllm.core.records.now import Now
from hyperspace_vllm.core.response import hints as hints_module
from hyperspace_vllm.core.response.announcer import (
    ENTRIES_BURST,
    ENTRIES_PER_S,
    FLUSH_MS,
    QUEUED_MAX,
    SEQUENCES_KEPT,
    Inbox,
    Outbox,
)
from hyperspace_vllm.core.response.dht_use import (
    NOT_FOUND_MS,
    PROVIDE_EVERY_MS,
    PROVIDES_MAX,
    SEARCH_BURST_MS,
    SEARCH_COST_MS,
    SEARCH_SHARE,
    ProvideQueue,
    SearchBudget,
)
from hyperspace_vllm.core.response.hints import Hints
from hyperspace_vllm.core.response.popularity import (
    CLAIM_MAX,
    HALF_LIFE_MS,
    REPLICAS_MAX,
    TRACKED_MAX,
    Popularity,
    decayed,
    replicas_wanted,
)
from tests.support.moments import at, dated

NETWORK = network_id("test")
NOW_MS = 1_790_000_000_000
HOUR_MS = 3_600_000
SENDER, OWN = SigningKey(b"s" * 32), SigningKey(b"o" * 32)
LATER_MS = NOW_MS + HOUR_MS


def name(number: int) -> bytes:
    return sha256(b"name", number.to_bytes(4, "big"))


def batch(
    sequence: int,
    names: range = range(1),
    sent_at_ms: int = NOW_MS,
    key: SigningKey = SENDER,
    network: NetworkId = NETWORK,
) -> bytes:
    entries = tuple(ResponseEntry(name(number), LATER_MS) for number in names)
    return encode_announcement(Announcement(network, key.verify_key.encode(), sequence, sent_at_ms, entries), key)


def inbox(known: Callable[[bytes], bool] = lambda _: True) -> Inbox:
    return Inbox(NETWORK, OWN.verify_key.encode(), known)


def verdict(result: Announcement | Refused) -> str:
    return result.reason if isinstance(result, Refused) else "taken"


# --- what others announce -----------------------------------------------------------------------


def test_a_batch_is_taken_once() -> None:
    box = inbox()
    opened = box.open(RESPONSE_TOPIC, batch(7, range(3)), dated(NOW_MS))
    assert isinstance(opened, Announcement)
    assert [entry.request_hash for entry in opened.entries if isinstance(entry, ResponseEntry)] == [
        *map(name, range(3))
    ]
    assert verdict(box.open(RESPONSE_TOPIC, batch(7, range(3)), dated(NOW_MS))) == "duplicate"


def test_batches_may_overtake_each_other() -> None:
    box = inbox()
    assert [verdict(box.open(RESPONSE_TOPIC, batch(n), dated(NOW_MS))) for n in (3, 1, 2, 3)] == [
        *["taken"] * 3,
        "duplicate",
    ]


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "malformed"),
        (batch(1)[:-1], "malformed"),
        (batch(1)[:-1] + bytes([batch(1)[-1] ^ 1]), "bad_signature"),
        (batch(1, key=OWN), "own"),
        (batch(1, network=network_id("other")), "other_network"),
        (batch(1, sent_at_ms=NOW_MS - CLOCK_SKEW_MS - 1), "stale"),
        (batch(1, sent_at_ms=NOW_MS + CLOCK_SKEW_MS + 1), "from_the_future"),
    ],
)
def test_what_does_not_count_is_refused_with_its_reason(payload: bytes, reason: str) -> None:
    box = inbox()
    assert verdict(box.open(RESPONSE_TOPIC, payload, dated(NOW_MS))) == reason
    assert verdict(box.open(RESPONSE_TOPIC, batch(1), dated(NOW_MS))) == "taken"  # no forgery uses up a sequence number


def test_a_batch_on_the_other_topic_is_refused() -> None:
    assert verdict(inbox().open(PREFIX_TOPIC, batch(1), dated(NOW_MS))) == "wrong_topic"


def test_a_stranger_is_refused_before_its_signature_is_checked() -> None:
    forged = batch(1)[:-64] + bytes(64)
    assert verdict(inbox(lambda _: False).open(RESPONSE_TOPIC, forged, dated(NOW_MS))) == "stranger"


def test_a_sender_is_held_to_its_rate_and_recovers() -> None:
    box = inbox()
    full = range(ANNOUNCEMENT_ENTRIES_MAX)
    burst = ENTRIES_BURST // ANNOUNCEMENT_ENTRIES_MAX
    assert all(verdict(box.open(RESPONSE_TOPIC, batch(n, full), dated(NOW_MS))) == "taken" for n in range(burst))
    assert verdict(box.open(RESPONSE_TOPIC, batch(burst, full), dated(NOW_MS))) == "rate"
    other = SigningKey(b"t" * 32)
    assert verdict(box.open(RESPONSE_TOPIC, batch(1, full, key=other), dated(NOW_MS))) == "taken"
    soon_ms = NOW_MS + 1 + ANNOUNCEMENT_ENTRIES_MAX * 1000 // ENTRIES_PER_S
    assert verdict(box.open(RESPONSE_TOPIC, batch(burst + 1, full, soon_ms), dated(soon_ms))) == "taken"


def test_a_clock_that_is_set_back_silences_no_sender() -> None:
    box = inbox()
    assert verdict(box.open(RESPONSE_TOPIC, batch(1), dated(NOW_MS))) == "taken"
    earlier_ms = NOW_MS - HOUR_MS
    set_back = Now(dated(NOW_MS).mono_ms, earlier_ms)
    assert verdict(box.open(RESPONSE_TOPIC, batch(2, sent_at_ms=earlier_ms), set_back)) == "taken"
    assert verdict(box.open(RESPONSE_TOPIC, batch(3, sent_at_ms=earlier_ms), set_back)) == "taken"


def test_a_batch_whose_number_was_forgotten_is_not_taken_again() -> None:
    box = inbox()
    for sequence in range(SEQUENCES_KEPT + 2):
        box.open(RESPONSE_TOPIC, batch(sequence, sent_at_ms=NOW_MS + sequence), dated(NOW_MS + sequence))
    assert verdict(box.open(RESPONSE_TOPIC, batch(0), dated(NOW_MS + 2000))) == "duplicate"
    assert verdict(box.open(RESPONSE_TOPIC, batch(1), dated(NOW_MS + 2000))) == "duplicate"


def test_senders_are_bounded() -> None:
    box = inbox()
    for number in range(PEERS_KNOWN_MAX + 5):
        key = SigningKey(sha256(number.to_bytes(4, "big")))
        assert verdict(box.open(RESPONSE_TOPIC, batch(1, key=key), dated(NOW_MS))) == "taken"
    assert len(box._senders) == PEERS_KNOWN_MAX


# --- what this node announces -------------------------------------------------------------------


def published(effects: list[Publish]) -> list[tuple[str, list[bytes]]]:
    found = []
    for effect in effects:
        opened = inbox().open(effect.topic, effect.payload, dated(decode_announcement(effect.payload).sent_at_ms))
        assert isinstance(opened, Announcement)
        found.append(
            (effect.topic, [e.row_id if isinstance(e, PrefixEntry) else e.request_hash for e in opened.entries])
        )
    return found


def flush(box: Outbox, now_ms: int) -> list[tuple[str, list[bytes]]]:
    effects = box.flush(dated(now_ms))
    return published([effect for effect in effects if isinstance(effect, Publish)])


def test_entries_travel_in_batches_one_a_topic_and_interval() -> None:
    box = Outbox(NETWORK, SENDER, dated(NOW_MS))
    assert box.next_deadline_ms() is None
    for number in range(ANNOUNCEMENT_ENTRIES_MAX + 1):
        box.add(ResponseEntry(name(number), LATER_MS))
    box.add(PrefixEntry(name(0), name(1), bytes(48), LATER_MS))
    assert [(topic, len(names)) for topic, names in flush(box, NOW_MS)] == [
        (RESPONSE_TOPIC, ANNOUNCEMENT_ENTRIES_MAX),
        (PREFIX_TOPIC, 1),
    ]
    assert flush(box, NOW_MS + FLUSH_MS - 1) == []
    assert box.next_deadline_ms() == dated(NOW_MS + FLUSH_MS).mono_ms
    assert flush(box, NOW_MS + FLUSH_MS) == [(RESPONSE_TOPIC, [name(ANNOUNCEMENT_ENTRIES_MAX)])]
    assert box.next_deadline_ms() is None


def test_of_too_many_entries_the_newest_stay() -> None:
    box = Outbox(NETWORK, SENDER, dated(NOW_MS))
    for number in range(QUEUED_MAX + 1):
        box.add(ResponseEntry(name(number), LATER_MS))
    assert flush(box, NOW_MS)[0][1][0] == name(1)


def test_what_has_gone_is_announced_no_more() -> None:
    box = Outbox(NETWORK, SENDER, dated(NOW_MS))
    for number in range(3):
        box.add(ResponseEntry(name(number), LATER_MS))
    box.remove(frozenset({name(1), name(9)}))
    assert flush(box, NOW_MS) == [(RESPONSE_TOPIC, [name(0), name(2)])]


def test_sequence_numbers_grow_within_an_instant_and_when_the_clock_is_set_back() -> None:
    box = Outbox(NETWORK, SENDER, dated(NOW_MS))
    sequences = []
    for passed_ms, set_by_ms in ((0, 0), (FLUSH_MS, 0), (2 * FLUSH_MS, -HOUR_MS)):
        mono_ms = dated(NOW_MS + passed_ms).mono_ms
        box.add(ResponseEntry(name(0), LATER_MS))
        box.add(PrefixEntry(name(0), name(1), bytes(48), LATER_MS))
        effects = box.flush(at(mono_ms, set_by_ms))
        sequences += [decode_announcement(each.payload).sequence for each in effects if isinstance(each, Publish)]
    assert len(sequences) == 6
    assert sequences == sorted(set(sequences))


# --- hints --------------------------------------------------------------------------------------


def peer(number: int) -> PeerId:
    return PeerId(f"peer {number}")


def everybody(_: PeerId) -> bool:
    return True


def test_hints_name_their_providers_until_they_expire() -> None:
    hints = Hints(everybody)
    hints.add(name(1), peer(1), NOW_MS + 10, NOW_MS)
    hints.add(name(1), peer(2), NOW_MS + 20, NOW_MS)
    assert hints.providers(name(1), NOW_MS) == (peer(1), peer(2))
    assert hints.providers(name(1), NOW_MS + 10) == (peer(2),)
    assert hints.providers(name(1), NOW_MS + 20) == ()
    assert hints.providers(name(2), NOW_MS) == ()
    assert len(hints) == 0


def test_a_hint_said_again_is_one_hint_with_the_later_word_on_its_expiry() -> None:
    hints = Hints(everybody)
    hints.add(name(1), peer(1), NOW_MS + 10, NOW_MS)
    hints.add(name(1), peer(1), NOW_MS + 30, NOW_MS)
    assert len(hints) == 1
    assert hints.providers(name(1), NOW_MS + 20) == (peer(1),)


def test_the_first_providers_stay_however_many_claim_the_same_later() -> None:
    hints = Hints(everybody)
    for number in range(PROVIDERS_MAX + 3):
        hints.add(name(1), peer(number), LATER_MS, NOW_MS)
    assert hints.providers(name(1), NOW_MS) == tuple(map(peer, range(PROVIDERS_MAX)))


def test_strangers_that_claim_an_id_first_keep_nobody_with_standing_out() -> None:
    hints = Hints(lambda other: other in (peer(3), peer(90), peer(91)))
    for number in (*range(PROVIDERS_MAX), 90, 91, 92):
        hints.add(name(1), peer(number), LATER_MS, NOW_MS)
    assert hints.providers(name(1), NOW_MS) == tuple(map(peer, (*range(PROVIDERS_MAX - 2), 90, 91)))
    assert len(hints) == PROVIDERS_MAX


def test_a_crowd_of_strangers_takes_no_hint_from_who_has_standing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hints_module, "RESPONSE_HINTS_MAX", 500)
    hints = Hints(lambda other: other == peer(0))
    for number in range(200):
        hints.add(name(number), peer(0), LATER_MS, NOW_MS)
    for number in range(2_000):
        hints.add(name(1_000 + number), peer(1 + number % 100), LATER_MS, NOW_MS)
    assert len(hints) <= 500
    assert all(hints.providers(name(number), NOW_MS) == (peer(0),) for number in range(200))


def test_expired_providers_make_room() -> None:
    hints = Hints(everybody)
    for number in range(PROVIDERS_MAX):
        hints.add(name(1), peer(number), NOW_MS + 10, NOW_MS)
    hints.add(name(1), peer(99), LATER_MS, NOW_MS + 10)
    assert hints.providers(name(1), NOW_MS + 10) == (peer(99),)


def test_who_announces_everything_displaces_only_its_own_hints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hints_module, "HINTS_PER_PEER_MAX", 100)
    monkeypatch.setattr(hints_module, "RESPONSE_HINTS_MAX", 250)
    hints = Hints(everybody)
    for number in range(20):
        hints.add(name(number), peer(0), LATER_MS, NOW_MS)
    for boaster in (1, 2, 3):
        for number in range(1_000, 1_500):
            hints.add(name(number), peer(boaster), LATER_MS, NOW_MS)
    assert len(hints) <= 250
    assert all(hints.providers(name(number), NOW_MS) == (peer(0),) for number in range(20))
    assert peer(3) in hints.providers(name(1_499), NOW_MS)  # its newest


def test_hints_never_lose_count() -> None:
    hints = Hints(everybody)
    for number in range(200):
        hints.add(name(number % 30), peer(number % 7), NOW_MS + number % 11, NOW_MS)
        hints.remove(name(number % 13), peer(number % 5))
        hints.providers(name(number % 17), NOW_MS + number % 3)
    assert len(hints) == sum(map(len, hints._providers.values())) == sum(map(len, hints._said.values()))
    assert all(hints._providers.values())
    assert all(hints._said.values())


assert hints_module.HINTS_PER_PEER_MAX * 2 < RESPONSE_HINTS_MAX


# --- popularity ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("requests", "copies"), [(-1, 1), (0, 1), (1, 2), (2, 3), (3, 3), (7, 4), (127, 8), (1e9, 8)])
def test_copies_grow_by_one_with_every_doubling_up_to_a_bound(requests: float, copies: int) -> None:
    assert replicas_wanted(requests) == copies


@pytest.mark.parametrize(("age_ms", "left"), [(0, 8.0), (HALF_LIFE_MS, 4.0), (3 * HALF_LIFE_MS, 1.0)])
@pytest.mark.parametrize("set_by_ms", [0, -HOUR_MS, HOUR_MS])
def test_half_of_the_requests_count_after_each_half_life(age_ms: int, left: float, set_by_ms: int) -> None:
    assert decayed(8.0, age_ms) == left
    popularity = Popularity()
    popularity.add(name(1), at(0), 8.0)
    assert popularity.requests(name(1), at(age_ms, set_by_ms)) == left


def test_requests_add_up_and_a_claim_does_not() -> None:
    popularity = Popularity()
    popularity.add(name(1), dated(NOW_MS))
    popularity.add(name(1), dated(NOW_MS))
    popularity.claimed(name(1), dated(NOW_MS), 1.5)
    assert popularity.requests(name(1), dated(NOW_MS)) == 2
    popularity.claimed(name(1), dated(NOW_MS), 5)
    assert popularity.requests(name(1), dated(NOW_MS)) == 5
    assert popularity.sixteenths(name(1), dated(NOW_MS)) == 80


def test_a_flatterer_claims_no_more_than_what_every_copy_needs() -> None:
    popularity = Popularity()
    popularity.claimed(name(1), dated(NOW_MS), float(1 << 28))
    assert popularity.requests(name(1), dated(NOW_MS)) == CLAIM_MAX
    assert replicas_wanted(CLAIM_MAX) == REPLICAS_MAX
    assert replicas_wanted(popularity.requests(name(1), dated(NOW_MS + 24 * HOUR_MS))) <= 2


def test_the_ids_asked_for_longest_ago_are_forgotten() -> None:
    popularity = Popularity()
    for number in range(TRACKED_MAX + 1):
        popularity.add(name(number), dated(NOW_MS))
    assert len(popularity._counts) == TRACKED_MAX
    assert not popularity.requests(name(0), dated(NOW_MS))


# --- the DHT ------------------------------------------------------------------------------------


def test_searches_are_paid_from_a_share_of_a_core() -> None:
    budget = SearchBudget(dated(NOW_MS))
    burst = int(SEARCH_BURST_MS / SEARCH_COST_MS)
    assert all(budget.take(name(number), dated(NOW_MS)) for number in range(burst))
    assert not budget.take(name(99), dated(NOW_MS))
    enough_ms = NOW_MS + round(SEARCH_COST_MS / SEARCH_SHARE)
    assert not budget.take(name(99), dated(enough_ms - 2))
    assert budget.take(name(99), dated(enough_ms + 2))


def test_searches_that_cost_more_than_the_burst_are_still_tried_now_and_then() -> None:
    budget = SearchBudget(dated(NOW_MS))
    for _ in range(50):
        budget.cost(10 * SEARCH_BURST_MS)
    assert budget.take(name(1), dated(NOW_MS))
    assert not budget.take(name(2), dated(NOW_MS))
    assert budget.take(name(2), dated(NOW_MS + round(SEARCH_BURST_MS / SEARCH_SHARE) + 1))


def test_what_was_not_found_is_not_searched_again_at_once() -> None:
    budget = SearchBudget(dated(NOW_MS))
    budget.not_found(name(1), dated(NOW_MS))
    assert not budget.take(name(1), dated(NOW_MS + NOT_FOUND_MS - 1))
    assert budget.take(name(2), dated(NOW_MS))
    assert budget.take(name(1), dated(NOW_MS + NOT_FOUND_MS))


def test_a_clock_that_is_set_back_stops_no_search() -> None:
    budget = SearchBudget(dated(NOW_MS))
    budget.not_found(name(1), dated(NOW_MS))
    mono_ms = dated(NOW_MS + NOT_FOUND_MS).mono_ms
    assert not budget.take(name(1), at(mono_ms - 1, -HOUR_MS))
    assert budget.take(name(1), at(mono_ms, -HOUR_MS))


def test_the_popular_are_provided_first_one_at_a_time() -> None:
    queue = ProvideQueue(dated(NOW_MS))
    assert queue.next_deadline_ms() is None
    for key, requests in (("a", 1), ("b", 3), ("c", 2), ("a", 1)):
        queue.add(key, requests)
    queue.remove(["c", "unknown"])
    assert queue.due(dated(NOW_MS)) == "b"
    assert queue.next_deadline_ms() == dated(NOW_MS + PROVIDE_EVERY_MS).mono_ms
    assert queue.due(dated(NOW_MS + PROVIDE_EVERY_MS - 1)) is None
    assert queue.due(dated(NOW_MS + PROVIDE_EVERY_MS)) == "a"
    assert queue.next_deadline_ms() is None


def test_of_too_many_keys_the_popular_stay() -> None:
    queue = ProvideQueue(dated(NOW_MS))
    for number in range(5 * PROVIDES_MAX):
        queue.add(str(number), number)
        assert len(queue._requests) <= PROVIDES_MAX
    assert queue.due(dated(NOW_MS)) == str(5 * PROVIDES_MAX - 1)
