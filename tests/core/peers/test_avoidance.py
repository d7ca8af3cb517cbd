"""How long a peer is avoided that was silent, lied or had nothing."""

import pytest

from hyperspace_vllm.core.peers.avoidance import AVOID_MS_MAX, LIAR_MS, MISSES_MAX, SILENT_MS, Avoidance, avoid_ms
from hyperspace_vllm.core.peers.peer_table import Peer
from hyperspace_vllm.core.records.ids import PeerId
from tests.support.moments import at, dated
from tests.support.network_world import HOUR_MS, NOW_MS


@pytest.mark.parametrize(("times", "wait_ms"), [(1, SILENT_MS), (2, 6_000), (3, 12_000), (5, AVOID_MS_MAX)])
def test_the_silent_are_avoided_longer_and_longer(times: int, wait_ms: int) -> None:
    assert avoid_ms(times) == wait_ms
    avoidance = Avoidance()
    for _ in range(times):
        avoidance.failed(dated(NOW_MS))
    assert avoidance.avoids(dated(NOW_MS + wait_ms - 1))
    assert not avoidance.avoids(dated(NOW_MS + wait_ms))


def test_a_good_answer_wipes_out_failures_before_it() -> None:
    avoidance = Avoidance()
    avoidance.failed(dated(NOW_MS))
    avoidance.served()
    avoidance.failed(dated(NOW_MS + HOUR_MS))
    assert not avoidance.avoids(dated(NOW_MS + HOUR_MS + SILENT_MS))


def test_who_is_back_is_forgiven_its_silence_and_not_its_lies() -> None:
    avoidance = Avoidance()
    avoidance.failed(dated(NOW_MS))
    avoidance.back()
    assert not avoidance.avoids(dated(NOW_MS))
    avoidance.lied(dated(NOW_MS))
    avoidance.failed(dated(NOW_MS))
    avoidance.back()
    assert avoidance.avoids(dated(NOW_MS + LIAR_MS - 1))
    assert not avoidance.avoids(dated(NOW_MS + LIAR_MS))


def test_a_stale_word_is_forgiven_and_a_boaster_is_not() -> None:
    avoidance = Avoidance()
    for _ in range(MISSES_MAX - 1):
        avoidance.missed(dated(NOW_MS))
    assert not avoidance.avoids(dated(NOW_MS))
    avoidance.missed(dated(NOW_MS))
    assert avoidance.avoids(dated(NOW_MS))


@pytest.mark.parametrize("set_by_ms", [-HOUR_MS, HOUR_MS])
def test_avoidance_lasts_as_long_whatever_the_wall_clock_shows(set_by_ms: int) -> None:
    avoidance = Avoidance()
    avoidance.lied(at(0))
    assert avoidance.avoids(at(LIAR_MS - 1, set_by_ms))
    assert not avoidance.avoids(at(LIAR_MS, set_by_ms))


def test_a_silent_peer_is_asked_again_once_it_was_heard_of_or_may_be_dialled() -> None:
    known = Peer(PeerId("a"), advertised="10.0.0.1:1", silent=True, silent_at_ms=100, dial_at_ms=500)
    assert not known.may_be_asked(at(499))
    assert known.may_be_asked(at(500))
    known.alive_at_ms = 101
    assert known.may_be_asked(at(102))
    known.connected = True  # over which it keeps silent
    assert not known.may_be_asked(at(1_000))
