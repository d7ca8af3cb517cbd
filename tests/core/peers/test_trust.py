"""Whose word counts: by mode, by list, by tag of the network key, and nobody else's."""

import pytest

from hyperspace_vllm.core.peers.findings import DOUBTED_MIN, FINDING_EVERY_MS, FINDINGS_MIN
from hyperspace_vllm.core.peers.reputation import THRESHOLD, score_of
from hyperspace_vllm.core.peers.standing import CONVICTED_MS, Delivered, Failed
from hyperspace_vllm.core.peers.trust import PASSED_TOKENS_MIN, SHOWN_MAX, TRIAL_EVERY_MS, Trust, TrustMode
from hyperspace_vllm.core.records.ids import peer_id, sha256
from hyperspace_vllm.core.records.reason import Reason
from hyperspace_vllm.core.records.signing import NO_MEMBER_TAG, member_tag
from tests.support.moments import at

KEY, OTHER_KEY = sha256(b"network key"), sha256(b"another network's")
OWN, LISTED, ALLOWED, MEMBER, EARNED, RELAY, STRANGER = (
    sha256(name.encode()) for name in ("own", "listed", "allowed", "member", "earned", "relay", "stranger")
)
NAMES = {
    OWN: "own",
    LISTED: "listed",
    ALLOWED: "allowed",
    MEMBER: "member",
    EARNED: "earned",
    RELAY: "relay",
    STRANGER: "stranger",
}


SOURCES = tuple(bytes([number]) for number in range(100))
CLIENTS = tuple(enumerate(SOURCES[:FINDINGS_MIN]))


def make(mode: TrustMode, network_key: bytes | None = KEY, is_public: bool = False) -> Trust:
    """EARNED signed what held in many clients' audits, RELAY served what others had signed, again and again."""
    trust = Trust(mode, OWN, frozenset({LISTED}), frozenset({ALLOWED}), network_key, is_public)
    for source in SOURCES:
        trust.audited(EARNED, PASSED_TOKENS_MIN, "passed", source, at(0))
    for _ in range(10_000):
        trust.standings.note(Delivered(peer_id(RELAY), 1, 1), at(0))
    trust.meet(MEMBER, member_tag(KEY, MEMBER))
    return trust


@pytest.mark.parametrize(
    ("mode", "trusted"),
    [
        ("members", {"own", "listed", "allowed", "member"}),
        ("reputation", {"own", "listed", "allowed", "member", "earned"}),
        ("allowlist", {"own", "allowed"}),
    ],
)
def test_who_counts(mode: TrustMode, trusted: set[str]) -> None:
    trust = make(mode)
    assert {name for key, name in NAMES.items() if trust.trusts(key, at(0))} == trusted
    assert {name for key, name in NAMES.items() if trust.trusts_kv(key, at(0))} == trusted - {"earned"}
    assert {name for key, name in NAMES.items() if trust.is_member(key)} == {"own", "listed", "member"}


@pytest.mark.parametrize(
    ("mode", "is_public", "served", "asked"),
    [
        ("members", False, "members", "members"),
        ("members", True, "members", "members"),
        ("allowlist", True, "members", "members"),
        ("reputation", False, "members", "everybody"),
        ("reputation", True, "everybody", "everybody"),
    ],
)
def test_a_stranger_may_be_asked_but_gets_only_what_is_for_everybody(
    mode: TrustMode, is_public: bool, served: str, asked: str
) -> None:
    trust = make(mode, is_public=is_public)
    groups = {"members": {"own", "listed", "allowed", "member"}, "everybody": set(NAMES.values())}
    assert {name for key, name in NAMES.items() if trust.is_chosen(key)} == groups["members"]
    assert {name for key, name in NAMES.items() if trust.serves_kv(key)} == groups[served]
    assert {name for key, name in NAMES.items() if trust.asks_for_kv(key)} == groups[asked]


def test_earned_trust_is_lost_by_a_lie() -> None:
    trust = make("reputation")
    assert trust.trusts(EARNED, at(0))
    trust.standings.note(Failed(peer_id(EARNED), Reason.BAD_PROOF), at(0))
    assert not trust.trusts(EARNED, at(0))


def test_who_serves_well_is_asked_first_and_waited_for_and_believed_nothing_that_it_signs() -> None:
    trust = make("reputation")
    assert trust.standings.service(peer_id(RELAY), at(0)) > THRESHOLD
    assert trust.may_be_waited_for(peer_id(RELAY), at(0))
    assert not trust.trusts(RELAY, at(0))
    assert trust.standings.word(peer_id(RELAY), at(0)) == score_of(0, 0, 0)
    assert trust.standings.service(peer_id(EARNED), at(0)) == score_of(0, 0, 0)
    assert not trust.may_be_waited_for(peer_id(EARNED), at(0))


@pytest.mark.parametrize(
    ("tokens", "sources", "hours"),
    [(PASSED_TOKENS_MIN, 1, 0), (PASSED_TOKENS_MIN, 1, 1_000), (PASSED_TOKENS_MIN - 1, 100, 0)],
    ids=["one client's many requests", "one client's for weeks", "answers that are soon guessed"],
)
def test_belief_takes_long_answers_to_many_clients(tokens: int, sources: int, hours: int) -> None:
    trust = make("reputation")
    for number in range(1_000):
        now_ms = 3_600_000 * min(number, hours)
        trust.audited(STRANGER, tokens, "passed", SOURCES[number % sources], at(now_ms))
        assert not trust.trusts(STRANGER, at(now_ms))


def test_one_answer_of_a_stranger_at_a_time_is_tried_and_only_where_belief_can_be_earned() -> None:
    trust = make("reputation")
    assert trust.take_trial(STRANGER, at(1_000))
    assert not trust.take_trial(RELAY, at(1_000 + TRIAL_EVERY_MS - 1))
    assert trust.take_trial(RELAY, at(1_000 + TRIAL_EVERY_MS))
    year_ms = 365 * 24 * 3_600_000
    assert not trust.take_trial(RELAY, at(1_000 + 2 * TRIAL_EVERY_MS - 1, year_ms))
    assert trust.take_trial(RELAY, at(1_000 + 2 * TRIAL_EVERY_MS, -year_ms)), "the wall clock stops no trials"
    trust.standings.convict(STRANGER, at(10**9))
    assert not trust.take_trial(STRANGER, at(10**9))
    assert not make("members").take_trial(STRANGER, at(0))
    assert not make("allowlist").take_trial(STRANGER, at(0))


@pytest.mark.parametrize("mode", ["members", "reputation", "allowlist"])
def test_whom_this_nodes_own_audits_convicted_counts_on_no_list(mode: TrustMode) -> None:
    trust = make(mode)
    for key in NAMES:
        trust.standings.convict(key, at(0))
    assert {name for key, name in NAMES.items() if trust.trusts(key, at(CONVICTED_MS - 1))} == {"own"}
    assert {name for key, name in NAMES.items() if trust.trusts_kv(key, at(CONVICTED_MS - 1))} == {"own"}
    waited_for = {name for key, name in NAMES.items() if trust.may_be_waited_for(peer_id(key), at(CONVICTED_MS - 1))}
    assert waited_for <= {"own"}
    assert trust.trusts(ALLOWED, at(CONVICTED_MS))


def test_one_client_convicts_nobody_and_several_do_over_time() -> None:
    trust = make("members")
    for number in range(100):
        assert not trust.audited(LISTED, 40, "lie", SOURCES[0], at(number * FINDING_EVERY_MS))
    assert trust.trusts(LISTED, at(100 * FINDING_EVERY_MS))
    assert trust.standings.suspects(LISTED, at(100 * FINDING_EVERY_MS))

    trust = make("members")
    convicted = [trust.audited(LISTED, 40, "lie", source, at(index * FINDING_EVERY_MS)) for index, source in CLIENTS]
    assert convicted == [False] * (FINDINGS_MIN - 1) + [True]
    assert not trust.trusts(LISTED, at(FINDINGS_MIN * FINDING_EVERY_MS))
    assert trust.standings.word(peer_id(LISTED), at(0)) < score_of(0, 0, 0)


def test_a_dropped_answer_convicts_nobody_however_many_there_are() -> None:
    trust = make("members")
    for index, source in enumerate(SOURCES):
        assert not trust.audited(LISTED, 40, "dropped", source, at(index * FINDING_EVERY_MS))
    assert trust.trusts(LISTED, at(100 * FINDING_EVERY_MS))


def test_a_node_that_disagrees_with_most_convicts_nobody_and_lifts_what_it_had_decided() -> None:
    trust = make("members")
    for index, source in CLIENTS:
        trust.audited(LISTED, 40, "lie", source, at(index * FINDING_EVERY_MS))
    now_ms = FINDINGS_MIN * FINDING_EVERY_MS
    assert not trust.trusts(LISTED, at(now_ms))
    for number in range(DOUBTED_MIN):
        assert not trust.audited(sha256(bytes([number])), 40, "lie", SOURCES[number], at(now_ms))
    assert trust.standings.doubts_itself(at(now_ms))
    assert trust.trusts(LISTED, at(now_ms))
    for index, source in CLIENTS:
        assert not trust.audited(ALLOWED, 40, "lie", source, at(now_ms + index * FINDING_EVERY_MS))


@pytest.mark.parametrize(
    "tag", [NO_MEMBER_TAG, member_tag(OTHER_KEY, STRANGER), member_tag(KEY, MEMBER), b"", bytes(31), b"\xff" * 32]
)
def test_a_tag_under_another_key_or_of_somebody_else_makes_no_member(tag: bytes) -> None:
    trust = make("members")
    assert not trust.meet(STRANGER, tag)
    assert not trust.trusts(STRANGER, at(0))
    assert trust.vouch(STRANGER) == NO_MEMBER_TAG


def test_without_a_network_key_no_tag_means_anything() -> None:
    trust = make("members", network_key=None)
    assert not trust.meet(MEMBER, member_tag(KEY, MEMBER))
    assert not trust.meet(MEMBER, NO_MEMBER_TAG)
    assert trust.vouch(OWN) == trust.vouch(MEMBER) == NO_MEMBER_TAG


def test_a_member_vouches_for_itself_and_for_members_it_has_met_and_others_believe_it() -> None:
    first = make("members")
    second = Trust("members", STRANGER, frozenset(), frozenset(), KEY)
    for key in (OWN, MEMBER):
        assert not second.is_member(key)
        assert second.meet(key, first.vouch(key))
        assert second.trusts(key, at(0))
    for key in (LISTED, ALLOWED, EARNED, STRANGER):
        assert first.vouch(key) == NO_MEMBER_TAG


def test_members_shown_are_bounded_and_the_longest_unmet_is_forgotten() -> None:
    trust = make("members")
    for number in range(SHOWN_MAX):
        key = sha256(number.to_bytes(4, "big"))
        trust.meet(key, member_tag(KEY, key))
        if number == 10:
            trust.meet(MEMBER, member_tag(KEY, MEMBER))
    assert trust.is_member(MEMBER)
    assert not trust.is_member(sha256((0).to_bytes(4, "big")))
    assert trust.is_member(sha256((11).to_bytes(4, "big")))
