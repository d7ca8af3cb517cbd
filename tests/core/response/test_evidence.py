"""Evidence of false answers: what it must say to be heard, what hearing it does, and what slander can't do."""

from dataclasses import replace
from itertools import pairwise

import pytest

from hyperspace_vllm.core.events.conduct import AnswerAudited, ChargePeer
from hyperspace_vllm.core.events.gossip import GossipReceived, Publish
from hyperspace_vllm.core.events.node_state import Tick
from hyperspace_vllm.core.events.vocabulary import NetworkEffect
from hyperspace_vllm.core.node.network_part import NetworkPart
from hyperspace_vllm.core.peers.findings import FINDING_EVERY_MS, FINDINGS_MIN
from hyperspace_vllm.core.peers.reputation import score_of
from hyperspace_vllm.core.peers.standing import CONVICTED_MS, Standings
from hyperspace_vllm.core.peers.suspicion import ACCUSED_MAX, ACCUSERS_MAX, SUSPECTED_MS
from hyperspace_vllm.core.records.announcement import (
    RESPONSE_TOPIC,
    Announcement,
    EvidenceEntry,
    decode_announcement,
    encode_announcement,
)
from hyperspace_vllm.core.records.errors import Refused
from hyperspace_vllm.core.records.ids import RequestKey, sha256
from hyperspace_vllm.core.records.limits import CLOCK_SKEW_MS, EVIDENCE_ENTRIES_MAX, PEERS_KNOWN_MAX, RESPONSE_TTL_MS
from hyperspace_vllm.core.records.reason import Reason
from hyperspace_vllm.core.response.announcer import (
    ACCUSED_KEPT,
    ENTRIES_BURST,
    EVIDENCE_EVERY_MS,
    EVIDENCE_QUEUED_MAX,
    EVIDENCE_WEIGHT,
)
from hyperspace_vllm.core.response.cache_proof import make_proof
from hyperspace_vllm.core.response.evidence import check_evidence, evidence_of, verdict
from tests.support.moments import at, dated
from tests.support.network_world import NETWORK, NETWORK_KEY, NOW_MS, SECOND_MS, Identity, World, make_node, only

ME, ACCUSER, ACCUSED, OTHER = range(4)
MODEL = sha256(b"a model")


def lie(signer: int = ACCUSED, number: int = 0, tokens: int = 40, far: int = 2) -> EvidenceEntry:
    """Evidence against an answer that `signer` did sign."""
    key = RequestKey(sha256(b"request", number.to_bytes(4, "big")))
    return evidence_of(make_proof(Identity(signer).key, NETWORK, key, b"{}", MODEL, "vllm", NOW_MS), tokens, far)


def batch(*entries: EvidenceEntry, sender: int = ACCUSER, sequence: int = 1, now_ms: int = NOW_MS) -> GossipReceived:
    who = Identity(sender)
    said = Announcement(NETWORK, who.public_key, sequence, now_ms, entries)
    return GossipReceived(RESPONSE_TOPIC, who.peer, encode_announcement(said, who.key))


def listener(*listed: int, network_key: bytes | None = NETWORK_KEY) -> NetworkPart:
    """A node that believes who is listed."""
    return make_node(ME, network_key=network_key, listed=listed)


def suspects(node: NetworkPart, number: int = ACCUSED, now_ms: int = NOW_MS) -> bool:
    return node._trust.standings.suspects(Identity(number).public_key, dated(now_ms))


# --- what evidence must say ---------------------------------------------------------------------


@pytest.mark.parametrize(("far", "expected"), [(0, "passed"), (1, "dropped"), (2, "lie"), (40, "lie")])
def test_one_far_token_may_be_honest_and_two_are_not(far: int, expected: str) -> None:
    assert verdict(far) == expected


@pytest.mark.parametrize(
    ("forged", "reason"),
    [
        ({}, ""),
        ({"far": 40}, ""),
        ({"tokens": 2}, ""),
        ({"computed_at_ms": NOW_MS + 1}, "bad_signature"),
        ({"signer": Identity(OTHER).public_key}, "bad_signature"),
        ({"signer": bytes(32)}, "bad_signature"),
        ({"request_hash": bytes(32)}, "bad_signature"),
        ({"response_hash": bytes(32)}, "bad_signature"),
        ({"proof_hash": bytes(32)}, "bad_signature"),
        ({"signature": bytes(64)}, "bad_signature"),
        ({"signature": lie(number=1).signature}, "bad_signature"),
        ({"far": 1}, "no_lie"),
        ({"far": 0}, "no_lie"),
        ({"far": 41}, "no_lie"),
        ({"tokens": 1}, "no_lie"),
    ],
)
def test_nobody_is_accused_of_what_it_did_not_sign(forged: dict[str, object], reason: str) -> None:
    evidence = replace(lie(), **forged)  # type: ignore[arg-type]
    if not reason:
        check_evidence(evidence, NOW_MS)
        return
    with pytest.raises(Refused) as refused:
        check_evidence(evidence, NOW_MS)
    assert refused.value.reason == reason


@pytest.mark.parametrize(
    ("now_ms", "reason"),
    [
        (NOW_MS - CLOCK_SKEW_MS, ""),
        (NOW_MS - CLOCK_SKEW_MS - 1, "from_the_future"),
        (NOW_MS + RESPONSE_TTL_MS - 1, ""),
        (NOW_MS + RESPONSE_TTL_MS, "expired"),
    ],
)
def test_evidence_counts_as_long_as_the_answer_that_it_is_about(now_ms: int, reason: str) -> None:
    if not reason:
        check_evidence(lie(), now_ms)
        return
    with pytest.raises(Refused) as refused:
        check_evidence(lie(), now_ms)
    assert refused.value.reason == reason


# --- who is suspected ---------------------------------------------------------------------------


def key(number: int) -> bytes:
    return sha256(b"key", number.to_bytes(4, "big"))


def test_suspicion_and_conviction_end_by_themselves() -> None:
    table = Standings(key(ME))
    table.accuse(key(ACCUSER), key(ACCUSED), at(0))
    table.convict(key(OTHER), at(0))
    assert table.suspects(key(ACCUSED), at(SUSPECTED_MS - 1))
    assert not table.suspects(key(ACCUSED), at(SUSPECTED_MS))
    assert not table.is_convicted(key(ACCUSED), at(0))
    assert table.is_convicted(key(OTHER), at(CONVICTED_MS - 1))
    assert table.suspects(key(OTHER), at(CONVICTED_MS - 1))
    assert not table.is_convicted(key(OTHER), at(CONVICTED_MS))
    assert [table.suspected(at(at_ms)) for at_ms in (0, SUSPECTED_MS, CONVICTED_MS)] == [2, 1, 0]


@pytest.mark.parametrize("set_by_ms", [-1_000, -100 * CONVICTED_MS, 100 * CONVICTED_MS])
def test_a_wall_clock_that_is_set_acquits_nobody_and_lengthens_no_sentence(set_by_ms: int) -> None:
    table = Standings(key(ME))
    table.accuse(key(ACCUSER), key(ACCUSED), at(0))
    table.convict(key(OTHER), at(0))
    times_ms = (SUSPECTED_MS - 1, SUSPECTED_MS, CONVICTED_MS)
    assert [table.suspected(at(at_ms, set_by_ms)) for at_ms in times_ms] == [2, 1, 0]


def test_neither_this_node_nor_an_accuser_itself_is_suspected() -> None:
    table = Standings(key(ME))
    table.accuse(key(ACCUSER), key(ME), at(0))
    table.accuse(key(ACCUSER), key(ACCUSER), at(0))
    table.convict(key(ME), at(0))
    assert table.suspected(at(0)) == 0


def test_a_slanderer_pushes_out_its_own_words_and_nobody_elses() -> None:
    table = Standings(key(ME))
    table.accuse(key(OTHER), key(ACCUSED), at(0))
    table.accuse(key(ME), key(99), at(0))
    for number in range(100, 1_100):
        table.accuse(key(ACCUSER), key(number), at(number))
    assert table.suspects(key(ACCUSED), at(0))
    assert table.suspects(key(99), at(0))
    assert [number for number in range(100, 1_100) if table.suspects(key(number), at(0))] == [
        *range(1_100 - ACCUSED_MAX, 1_100)
    ]


def test_accusers_and_the_convicted_are_bounded_and_this_nodes_own_doubts_stay() -> None:
    table = Standings(key(ME))
    table.accuse(key(ME), key(ACCUSED), at(0))
    for number in range(10, 10 + 2 * ACCUSERS_MAX):
        table.accuse(key(number), key(OTHER), at(0))
    assert len(table._accusations._said) == ACCUSERS_MAX
    assert table.suspects(key(ACCUSED), at(0))
    for number in range(PEERS_KNOWN_MAX + 5):
        table.convict(key(1_000 + number), at(0))
    assert not table.is_convicted(key(1_004), at(0))
    assert table.is_convicted(key(1_005), at(0))


# --- what hearing it does -----------------------------------------------------------------------


def test_evidence_of_a_member_makes_suspect_and_harms_nothing_else() -> None:
    node = listener(ACCUSER, ACCUSED)
    assert node.handle(batch(lie()), dated(NOW_MS)) == []
    assert suspects(node)
    assert not suspects(node, now_ms=NOW_MS + SUSPECTED_MS)
    accused = Identity(ACCUSED)
    assert node._trust.trusts(accused.public_key, dated(NOW_MS))
    assert node._trust.standings.word(accused.peer, dated(NOW_MS)) == score_of(0, 0, 0)


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (batch(lie(signer=ME)), "about_us"),
        (batch(replace(lie(), signature=bytes(64))), "bad_signature"),
        (batch(lie(far=1)), "no_lie"),
        (batch(lie(), sender=OTHER), "stranger"),
        (batch(lie(), now_ms=NOW_MS - CLOCK_SKEW_MS - 1), "stale"),
    ],
)
def test_evidence_that_does_not_hold_is_counted_and_makes_nobody_suspect(event: GossipReceived, reason: str) -> None:
    node = listener(ACCUSER)
    assert node.handle(event, dated(NOW_MS)) == []
    assert node.gossip.refused == {reason: 1}
    assert node._trust.standings.suspected(dated(NOW_MS)) == 0


def test_who_is_heard_but_not_trusted_accuses_in_vain() -> None:
    """Who greeted in a network without a key, and who was caught at a lie itself."""
    world = World()
    node = world.boot(ME, network_key=None)
    world.boot(ACCUSER, bootstrap=(ME,), network_key=None)
    world.run(5 * SECOND_MS)
    node.handle(batch(lie(), now_ms=world.now_ms), world.now)
    assert node.gossip.refused.get("untrusted_accuser") == 1

    node = listener(ACCUSER)
    convict(node, ACCUSER)
    node.handle(batch(lie()), dated(NOW_MS))
    assert node.gossip.refused == {"untrusted_accuser": 1}
    assert not suspects(node)


def test_a_flood_of_evidence_is_cut_off() -> None:
    """Each piece costs the check of a signature."""
    node = listener(ACCUSER)
    burst = ENTRIES_BURST // (EVIDENCE_WEIGHT * EVIDENCE_ENTRIES_MAX)
    for sequence in range(burst + 3):
        node.handle(batch(*[lie()] * EVIDENCE_ENTRIES_MAX, sequence=sequence), dated(NOW_MS))
    assert node.gossip.refused == {"rate": 3}


# --- what our own audits do ---------------------------------------------------------------------


def told(effects: list[NetworkEffect]) -> list[EvidenceEntry]:
    """The evidence that is published."""
    batches = [decode_announcement(effect.payload) for effect in only(effects, Publish)]
    return [entry for each in batches for entry in each.entries if isinstance(entry, EvidenceEntry)]


def convict(node: NetworkPart, signer: int = ACCUSED, now_ms: int = NOW_MS) -> list[NetworkEffect]:
    """As many findings of as many clients as it takes, the last one at `now_ms`; what follows from that one."""
    effects: list[NetworkEffect] = []
    for left in reversed(range(FINDINGS_MIN)):
        assert effects == []
        found = AnswerAudited(lie(signer, number=left), b"client %d" % left)
        effects = node.handle(found, dated(now_ms - left * FINDING_EVERY_MS))
    return effects


def test_a_conviction_lasts_a_day_costs_belief_and_is_told() -> None:
    node, accused = listener(ACCUSED), Identity(ACCUSED)
    assert node._trust.trusts(accused.public_key, dated(NOW_MS))
    effects = convict(node)
    assert told(effects) == [lie()]
    assert only(effects, ChargePeer) == [ChargePeer(accused.peer, Reason.FALSE_RESPONSE)]
    assert node._trust.standings.word(accused.peer, dated(NOW_MS)) == score_of(0, 0, 1)
    assert not node._trust.trusts(accused.public_key, dated(NOW_MS + CONVICTED_MS - 1))
    assert node._trust.trusts(accused.public_key, dated(NOW_MS + CONVICTED_MS))


@pytest.mark.parametrize("far", [1, 40])
def test_one_finding_makes_suspect_and_is_told_to_nobody(far: int) -> None:
    node, accused = listener(ACCUSED), Identity(ACCUSED)
    assert node.handle(AnswerAudited(lie(far=far), b"client"), dated(NOW_MS)) == []
    assert suspects(node)
    assert node._trust.trusts(accused.public_key, dated(NOW_MS))
    assert node._trust.standings.word(accused.peer, dated(NOW_MS)) == score_of(0, 0, 0)
    assert node.next_deadline_ms() is not None
    assert told(node.handle(Tick(), dated(NOW_MS + 10 * EVIDENCE_EVERY_MS))) == []


def test_a_lie_is_told_once() -> None:
    node = listener()
    assert told(convict(node)) == [lie()]
    again = node.handle(AnswerAudited(lie(far=9), b"client 9"), dated(NOW_MS + 1))
    assert told(again + node.handle(Tick(), dated(NOW_MS + 10 * EVIDENCE_EVERY_MS))) == []


def test_many_lies_are_told_at_one_a_second_the_newest_first_to_survive() -> None:
    node = listener()
    convict(node)
    count = EVIDENCE_QUEUED_MAX + 10
    spoken = []
    for number in range(count):
        effects = node.handle(AnswerAudited(lie(number=1_000 + number), b"client"), dated(NOW_MS))
        spoken.append((0, told(effects)))
    for at_ms in range(0, 100 * SECOND_MS, 100):
        spoken.append((at_ms, told(node.handle(Tick(), dated(NOW_MS + at_ms)))))
    times = [at_ms for at_ms, entries in spoken if entries]
    assert all(later - earlier >= EVIDENCE_EVERY_MS for earlier, later in pairwise(times))
    assert max(len(entries) for _, entries in spoken) == EVIDENCE_ENTRIES_MAX
    newest = [lie(number=1_000 + number) for number in range(count - EVIDENCE_QUEUED_MAX, count)]
    assert [entry for _, entries in spoken for entry in entries] == newest
    assert EVIDENCE_QUEUED_MAX < ACCUSED_KEPT


def test_a_clock_that_is_set_back_delays_no_evidence() -> None:
    node = listener()
    convict(node)
    node.handle(AnswerAudited(lie(number=1), b"client"), dated(NOW_MS))
    mono_ms, set_by_ms = dated(NOW_MS).mono_ms, -3_600 * SECOND_MS
    node.handle(Tick(), at(mono_ms, set_by_ms))
    assert node._outbox.next_deadline_ms() == mono_ms + EVIDENCE_EVERY_MS
    assert told(node.handle(Tick(), at(mono_ms + EVIDENCE_EVERY_MS, set_by_ms))) == [lie(number=1)]


def test_whom_one_node_convicts_all_others_audit() -> None:
    world = World()
    world.boot(ACCUSED)
    for number in (ME, ACCUSER, OTHER):
        world.boot(number, bootstrap=(ACCUSED,))
    world.run(5 * SECOND_MS)
    for number in range(FINDINGS_MIN):
        world.run(FINDING_EVERY_MS)
        assert not suspects(world.nodes[OTHER], now_ms=world.now_ms)
        world.tell(ACCUSER, AnswerAudited(lie(number=number), b"client %d" % number))
    for number in (ME, OTHER):
        assert suspects(world.nodes[number], now_ms=world.now_ms)
        assert world.nodes[number]._trust.trusts(Identity(ACCUSED).public_key, world.now)
    assert not world.nodes[ACCUSER]._trust.trusts(Identity(ACCUSED).public_key, world.now)
    assert world.nodes[ACCUSED].gossip.refused == {"about_us": 1}
