"""Lookups of a node that has no peers: the shared store alone is asked."""

from typing import Literal

import pytest

from hyperspace_vllm.core.events.response_reading import (
    AnswerResponse,
    HintResponse,
    ReadShared,
    ResponseReleased,
    ResponseWanted,
    SharedRead,
)
from hyperspace_vllm.core.peers.standing import Standings
from hyperspace_vllm.core.response import open_lookups
from hyperspace_vllm.core.response.open_lookups import OpenLookups
from tests.support.moments import at

NAME = b"r" * 32
WANTED = ResponseWanted(1, NAME, 300, shared=True)


@pytest.mark.parametrize(
    ("alone", "read", "reason"),
    [
        ("no_peers", None, "no_peers"),
        ("off", None, "off"),
        ("no_peers", "not_found", "not_found"),
        ("off", "not_found", "not_found"),
        ("off", "bad_seal", "not_found"),
        ("off", "redis_away", "off"),
        ("no_peers", "redis_away", "no_peers"),
    ],
)
def test_a_client_asks_on_while_there_are_peers_to_come_or_a_shared_store(
    alone: Literal["no_peers", "off"], read: str | None, reason: str
) -> None:
    lookups = OpenLookups(Standings(bytes(32)), alone)
    effects = lookups.handle(ResponseWanted(1, NAME, 300, shared=read is not None), at(0))
    if read is not None:
        assert effects == [ReadShared(1, NAME, 100)]
        effects = lookups.handle(SharedRead(1, read), at(7))
    assert effects == [HintResponse(1, False), AnswerResponse(1, None, "none", reason)]
    assert lookups.next_deadline_ms() is None


def test_what_the_shared_store_has_is_the_answer_once() -> None:
    lookups = OpenLookups(Standings(bytes(32)), "off")
    lookups.handle(WANTED, at(0))
    assert lookups.handle(SharedRead(1, "hit"), at(7)) == [AnswerResponse(1, None, "redis", "hit")]
    assert lookups.handle(SharedRead(1, "hit"), at(8)) == []


def test_a_lookup_that_is_released_while_the_shared_store_is_read_is_over() -> None:
    lookups = OpenLookups(Standings(bytes(32)), "off")
    lookups.handle(WANTED, at(0))
    assert lookups.handle(ResponseReleased(1), at(3)) == [AnswerResponse(1, None, "none", "released")]
    assert lookups.handle(SharedRead(1, "hit"), at(7)) == []


def test_a_shared_store_that_keeps_silent_ends_by_the_deadline() -> None:
    lookups = OpenLookups(Standings(bytes(32)), "off")
    lookups.handle(WANTED, at(0))
    assert lookups.next_deadline_ms() == at(300).mono_ms
    assert lookups.on_tick(at(299)) == []
    assert lookups.on_tick(at(300)) == [AnswerResponse(1, None, "none", "deadline")]


def test_lookups_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_lookups, "LOOKUPS_MAX", 1)
    lookups = OpenLookups(Standings(bytes(32)), "off")
    lookups.handle(WANTED, at(0))
    second = lookups.handle(ResponseWanted(2, NAME, 300, shared=True), at(0))
    assert second == [HintResponse(2, False), AnswerResponse(2, None, "none", "busy")]
