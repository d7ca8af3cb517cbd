"""Whose word counts: by mode, by list, by tag of the network key, and nobody else's."""

import pytest

from hyperspace_vllm.core.peers.reputation import Reputation
from hyperspace_vllm.core.peers.suspicion import CONVICTED_MS
from hyperspace_vllm.core.peers.trust import SHOWN_MAX, Trust, TrustMode
from hyperspace_vllm.core.records.ids import peer_id, sha256
from hyperspace_vllm.core.records.signing import NO_MEMBER_TAG, member_tag

KEY, OTHER_KEY = sha256(b"network key"), sha256(b"another network's")
OWN, LISTED, ALLOWED, MEMBER, EARNED, STRANGER = (
    sha256(name.encode()) for name in ("own", "listed", "allowed", "member", "earned", "stranger")
)
NAMES = {OWN: "own", LISTED: "listed", ALLOWED: "allowed", MEMBER: "member", EARNED: "earned", STRANGER: "stranger"}


def make(mode: TrustMode, network_key: bytes | None = KEY, is_public: bool = False) -> Trust:
    reputation = Reputation()
    for _ in range(200):
        reputation.served(peer_id(EARNED), 0)
    trust = Trust(mode, OWN, frozenset({LISTED}), frozenset({ALLOWED}), network_key, reputation, is_public)
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
    assert {name for key, name in NAMES.items() if trust.trusts(key, 0)} == trusted
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
    assert trust.trusts(EARNED, 0)
    trust.reputation.failed(peer_id(EARNED), "bad_proof", 0)
    assert not trust.trusts(EARNED, 0)


@pytest.mark.parametrize("mode", ["members", "reputation", "allowlist"])
def test_whom_this_nodes_own_audit_convicted_counts_on_no_list(mode: TrustMode) -> None:
    trust = make(mode)
    for key in NAMES:
        trust.suspicion.convict(key, 0)
    assert {name for key, name in NAMES.items() if trust.trusts(key, CONVICTED_MS - 1)} == {"own"}
    assert trust.trusts(ALLOWED, CONVICTED_MS)


@pytest.mark.parametrize(
    "tag", [NO_MEMBER_TAG, member_tag(OTHER_KEY, STRANGER), member_tag(KEY, MEMBER), b"", bytes(31), b"\xff" * 32]
)
def test_a_tag_under_another_key_or_of_somebody_else_makes_no_member(tag: bytes) -> None:
    trust = make("members")
    assert not trust.meet(STRANGER, tag)
    assert not trust.trusts(STRANGER, 0)
    assert trust.vouch(STRANGER) == NO_MEMBER_TAG


def test_without_a_network_key_no_tag_means_anything() -> None:
    trust = make("members", network_key=None)
    assert not trust.meet(MEMBER, member_tag(KEY, MEMBER))
    assert not trust.meet(MEMBER, NO_MEMBER_TAG)
    assert trust.vouch(OWN) == trust.vouch(MEMBER) == NO_MEMBER_TAG


def test_a_member_vouches_for_itself_and_for_members_it_has_met_and_others_believe_it() -> None:
    first = make("members")
    second = Trust("members", STRANGER, frozenset(), frozenset(), KEY, Reputation())
    for key in (OWN, MEMBER):
        assert not second.is_member(key)
        assert second.meet(key, first.vouch(key))
        assert second.trusts(key, 0)
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
