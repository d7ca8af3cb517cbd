"""The one judge of peers: what each fact costs or earns, where it counts, and whose conduct is remembered longest."""

import pytest

from hyperspace_vllm.core.peers.avoidance import LIAR_MS, MISSES_MAX, SILENT_MS
from hyperspace_vllm.core.peers.reputation import score_of
from hyperspace_vllm.core.peers.standing import STALLED_MS, Delivered, Failed, Standings
from hyperspace_vllm.core.records.ids import PeerId, peer_id, sha256
from hyperspace_vllm.core.records.limits import PEERS_KNOWN_MAX
from hyperspace_vllm.core.records.reason import Reason
from tests.support.moments import at

SIGNER = sha256(b"signer")
PEER = peer_id(SIGNER)
OTHER = PeerId("other")


def standings(*facts: Delivered | Failed) -> Standings:
    """After these facts, all at once."""
    judged = Standings(sha256(b"own"))
    for fact in facts:
        judged.note(fact, at(0))
    return judged


@pytest.mark.parametrize(
    ("reason", "service", "word", "avoided_ms", "no_kv_ms"),
    [
        (Reason.MISS, score_of(0, 0, 0), score_of(0, 0, 0), 0, 0),
        (Reason.KZG_BUSY, score_of(0, 0, 0), score_of(0, 0, 0), 0, 0),
        (Reason.UNTRUSTED_SIGNER, score_of(0, 0, 0), score_of(0, 0, 0), 0, 0),
        (Reason.BUSY, score_of(0, 0.25, 0), score_of(0, 0, 0), 0, 0),
        (Reason.TIMEOUT, score_of(0, 1, 0), score_of(0, 0, 0), SILENT_MS, 0),
        (Reason.STALLED, score_of(0, 1, 0), score_of(0, 0, 0), 0, STALLED_MS),
        (Reason.TOO_SLOW, score_of(0, 1, 0), score_of(0, 0, 0), 0, STALLED_MS),
        (Reason.PROTOCOL, score_of(0, 10, 0), score_of(0, 0, 0), SILENT_MS, LIAR_MS),
        (Reason.BAD_DIGEST, score_of(0, 0, 1), score_of(0, 0, 1), LIAR_MS, LIAR_MS),
        (Reason.BAD_SIGNATURE, score_of(0, 0, 1), score_of(0, 0, 1), LIAR_MS, LIAR_MS),
        (Reason.REGISTRY_EQUIVOCATION, score_of(0, 0, 1), score_of(0, 0, 1), LIAR_MS, LIAR_MS),
    ],
)
def test_what_a_failure_costs(reason: Reason, service: float, word: float, avoided_ms: int, no_kv_ms: int) -> None:
    judged = standings(Failed(PEER, reason))
    assert judged.service(PEER, at(0)) == service
    assert judged.word(PEER, at(0)) == word
    for avoids, for_ms in ((judged.avoids, avoided_ms), (judged.avoids_for_kv, no_kv_ms)):
        assert avoids(PEER, at(max(for_ms - 1, 0))) is (for_ms > 0)
        assert not avoids(PEER, at(for_ms))
        assert not avoids(OTHER, at(0))


def test_who_is_slow_again_and_again_is_asked_for_no_kv_for_longer_until_it_delivers() -> None:
    slow = [Failed(PEER, Reason.STALLED), Failed(PEER, Reason.TOO_SLOW)]
    for times, for_ms in ((1, STALLED_MS), (2, 2 * STALLED_MS), (3, 4 * STALLED_MS), (40, LIAR_MS)):
        judged = standings(*(slow * 20)[:times])
        assert judged.avoids_for_kv(PEER, at(for_ms - 1))
        assert not judged.avoids_for_kv(PEER, at(for_ms))
    judged = standings(*slow, Delivered(PEER, 1, 1))
    judged.note(slow[0], at(100_000))
    assert not judged.avoids_for_kv(PEER, at(100_000 + STALLED_MS))


def test_a_delivery_earns_service_and_patience_and_no_belief() -> None:
    judged = standings(Delivered(PEER, 1_000, 10))
    assert judged.service(PEER, at(0)) == score_of(1, 0, 0)
    assert judged.word(PEER, at(0)) == score_of(0, 0, 0)
    assert judged.has_earned(PEER)
    assert not judged.has_earned(OTHER)


def test_a_good_answer_wipes_out_misses_and_silences_before_it() -> None:
    misses = [Failed(PEER, Reason.MISS)] * (MISSES_MAX - 1)
    assert standings(*misses, Failed(PEER, Reason.MISS)).avoids(PEER, at(0))
    assert not standings(*misses, Delivered(PEER, 1, 1), Failed(PEER, Reason.MISS)).avoids(PEER, at(0))


def test_a_shorter_reason_to_avoid_a_peer_shortens_no_longer_one() -> None:
    judged = standings(Failed(PEER, Reason.FORGED), Failed(PEER, Reason.STALLED), Failed(PEER, Reason.TIMEOUT))
    judged.spoke(PEER)
    assert judged.avoids(PEER, at(LIAR_MS - 1))
    assert judged.avoids_for_kv(PEER, at(LIAR_MS - 1))


def test_who_goes_on_is_let_in_no_more_for_a_while() -> None:
    judged = standings(Failed(PEER, Reason.PROTOCOL))
    assert not judged.is_cut_off(PEER, at(0))
    judged.goes_on(PEER, at(0))
    assert judged.is_cut_off(PEER, at(LIAR_MS - 1))
    assert not judged.is_cut_off(PEER, at(LIAR_MS))


def test_a_conviction_costs_what_a_lie_does() -> None:
    judged = standings()
    found = [judged.found_false(SIGNER, b"%d" % number, at(number * 300_000)) for number in range(3)]
    assert found == [False, False, True]
    now = at(2 * 300_000)
    assert judged.is_convicted(SIGNER, now)
    assert judged.avoids(PEER, now)
    assert judged.word(PEER, now) == score_of(0, 0, 1)


def test_a_flood_of_new_identities_pushes_out_only_each_other() -> None:
    judged = standings(*[Delivered(PEER, 1, 1)] * 100)
    convicted, found = sha256(b"convicted"), sha256(b"found")
    judged.convict(convicted, at(0))
    judged.found_false(found, b"source", at(0))
    for number in range(3 * PEERS_KNOWN_MAX):
        judged.note(Failed(PeerId(f"sybil {number}"), Reason.TIMEOUT), at(1 + number))
        judged.note(Delivered(PeerId(f"sybil {number}"), 1, 1), at(1 + number))
        assert len(judged._peers) <= PEERS_KNOWN_MAX
    assert judged.service(PEER, at(0)) == score_of(100, 0, 0)
    assert judged.is_convicted(convicted, at(0))
    assert judged._peers[peer_id(found)].findings.against(at(0))
    last = PeerId(f"sybil {3 * PEERS_KNOWN_MAX - 1}")
    assert judged.avoids(last, at(3 * PEERS_KNOWN_MAX)), "the newest is not forgotten for the older ones"
