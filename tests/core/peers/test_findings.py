"""What audits add up to: how often, of how many clients, and when this node suspects itself."""

import pytest

from hyperspace_vllm.core.peers.findings import (
    DOUBTED_MIN,
    FINDING_EVERY_MS,
    FINDINGS_MIN,
    KEPT_MS,
    PASS_EVERY_MS,
    SOURCES_MAX,
    Findings,
)
from hyperspace_vllm.core.peers.standing import Standings
from hyperspace_vllm.core.records.ids import peer_id
from tests.support.moments import at

A, B, C, D, E = (bytes([number]) * 32 for number in range(5))
OWN = bytes(31) + b"o"
GAP_MS = FINDING_EVERY_MS


@pytest.mark.parametrize(
    ("found", "convicted"),
    [
        ([(b"1", 0)], False),
        ([(b"1", 0), (b"2", GAP_MS), (b"3", 2 * GAP_MS)], True),
        ([(b"1", 0), (b"1", GAP_MS), (b"1", 2 * GAP_MS), (b"1", 3 * GAP_MS)], False),
        ([(b"1", 0), (b"2", GAP_MS), (b"1", 2 * GAP_MS), (b"2", 3 * GAP_MS)], False),
        ([(b"1", 0), (b"2", 1), (b"3", 2), (b"4", 3)], False),
        ([(b"1", 0), (b"2", 1), (b"2", GAP_MS), (b"3", GAP_MS + 1), (b"3", 2 * GAP_MS)], True),
        ([(b"1", 0), (b"2", GAP_MS), (b"3", KEPT_MS)], False),
        ([(b"1", 0), (b"2", KEPT_MS - GAP_MS), (b"3", KEPT_MS - 1)], False),
        ([(b"1", 0), (b"2", KEPT_MS - 2 * GAP_MS), (b"3", KEPT_MS - GAP_MS)], True),
    ],
)
def test_a_conviction_takes_findings_of_different_clients_over_time(
    found: list[tuple[bytes, int]], convicted: bool
) -> None:
    findings = Findings()
    *earlier, last = [findings.found(source, at(at_ms)) for source, at_ms in found]
    assert not any(earlier)
    assert last is convicted


def test_findings_of_one_signer_say_nothing_of_another() -> None:
    standings = Standings(OWN)
    for number in range(2):
        assert not any(standings.found_false(signer, b"%d" % number, at(number * GAP_MS)) for signer in (A, B))


def test_a_pass_counts_once_an_hour_for_each_client() -> None:
    findings = Findings()
    assert findings.passed(b"1", at(0))
    assert not findings.passed(b"1", at(PASS_EVERY_MS - 1))
    assert findings.passed(b"2", at(0))
    assert findings.passed(b"1", at(PASS_EVERY_MS))


def test_a_pass_of_one_signer_is_none_of_another() -> None:
    standings = Standings(OWN)
    for signer in (A, B):
        before = standings.word(peer_id(signer), at(0))
        standings.passed(signer, b"1", at(0))
        assert standings.word(peer_id(signer), at(0)) > before


@pytest.mark.parametrize(
    ("disagrees", "agrees", "doubts"),
    [
        ((), (A,), False),
        ((A, B), (), False),
        ((A, B, C), (), True),
        ((A, B, C), (D,), True),
        ((A, B, C), (C, D), True),
        ((A, B, C), (D, E, bytes(31) + b"f"), False),
    ],
)
def test_a_node_suspects_itself_where_it_disagrees_with_several_and_with_most(
    disagrees: tuple[bytes, ...], agrees: tuple[bytes, ...], doubts: bool
) -> None:
    standings = Standings(OWN)
    for signer in agrees:
        standings.passed(signer, b"1", at(0))
    for number, signer in enumerate(disagrees):
        standings.found_false(signer, b"%d" % number, at(0))
    assert standings.doubts_itself(at(KEPT_MS - 1)) is doubts
    assert not standings.doubts_itself(at(KEPT_MS))


@pytest.mark.parametrize("passed", [0, 1, 2, 3])
def test_one_client_makes_no_node_suspect_itself_and_frees_no_convict(passed: int) -> None:
    standings = Standings(OWN)
    for number in range(FINDINGS_MIN):
        standings.found_false(A, b"%d" % number, at(number * GAP_MS))
    now = at(FINDINGS_MIN * GAP_MS)
    honest = [bytes([100 + number]) * 32 for number in range(20)]
    for signer in honest[:passed]:
        standings.passed(signer, b"another", now)
    for signer in honest:
        assert not standings.found_false(signer, b"one client", now)
    assert standings.is_convicted(A, now)
    assert not standings.doubts_itself(now)


@pytest.mark.parametrize(
    ("found", "doubts"),
    [
        ({A: b"1", B: b"2", C: b"3"}, True),
        ({A: b"1", B: b"1", C: b"2"}, False),
        ({A: b"12", B: b"12", C: b"12", D: b"12"}, False),
        ({A: b"123"}, False),
        ({A: b"123", B: b"123"}, False),
        ({A: b"123", B: b"1", C: b"1"}, False),
        ({A: b"123", B: b"1", C: b"2"}, True),
        ({A: b"123", B: b"123", C: b"4", D: b"4"}, True),
        ({A: b"123", B: b"123", C: b"123"}, True),
    ],
)
def test_a_source_counts_once_for_all_signers_that_would_not_be_convicted(
    found: dict[bytes, bytes], doubts: bool
) -> None:
    standings = Standings(OWN)
    for signer, sources in found.items():
        for number, source in enumerate(sources):
            standings.found_false(signer, bytes([source]), at(number * GAP_MS))
    assert standings.doubts_itself(at(3 * GAP_MS)) is doubts


def test_one_client_takes_no_agreement_away() -> None:
    """Two liars are found, and one client has all the others found false."""
    standings = Standings(OWN)
    honest = [bytes([100 + number]) * 32 for number in range(DOUBTED_MIN)]
    for signer in honest:
        standings.passed(signer, b"another", at(0))
    for number in range(FINDINGS_MIN):
        for signer in (A, B):
            standings.found_false(signer, b"%d" % number, at(number * GAP_MS))
    now = at(FINDINGS_MIN * GAP_MS)
    for signer in honest:
        standings.found_false(signer, b"one client", now)
    assert standings.is_convicted(A, now)
    assert not standings.doubts_itself(now)


def test_who_doubts_itself_convicts_once_others_agree_with_it_again() -> None:
    standings = Standings(OWN)
    for number in range(FINDINGS_MIN):
        for signer in (A, B, C)[:DOUBTED_MIN]:
            assert not standings.found_false(signer, b"%d" % number, at(number * GAP_MS)) or signer == A
    assert standings.doubts_itself(at(FINDINGS_MIN * GAP_MS))
    for number in range(DOUBTED_MIN):
        standings.passed(bytes([100 + number]) * 32, b"1", at(FINDINGS_MIN * GAP_MS))
    assert standings.found_false(A, b"9", at(FINDINGS_MIN * GAP_MS))


@pytest.mark.parametrize("set_by_ms", [-1_000, -100 * KEPT_MS, 100 * KEPT_MS])
def test_a_wall_clock_that_is_set_forgets_nothing_and_keeps_nothing_longer(set_by_ms: int) -> None:
    standings = Standings(OWN)
    for number, signer in enumerate((A, B, C)):
        standings.found_false(signer, b"%d" % number, at(10 * KEPT_MS))
    assert standings.doubts_itself(at(11 * KEPT_MS - 1, set_by_ms))
    assert not standings.doubts_itself(at(11 * KEPT_MS, set_by_ms))


def test_sources_are_bounded() -> None:
    findings = Findings()
    for number in range(SOURCES_MAX + 10):
        findings.passed(number.to_bytes(2, "big"), at(0))
    assert len(findings.passed_ms) == SOURCES_MAX
