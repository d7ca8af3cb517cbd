"""A node without peers to ask: what it costs the requests of an API server, and how lookups end."""

import asyncio
import time
from dataclasses import dataclass

import pytest

from hyperspace_vllm.api import node_lookup
from hyperspace_vllm.api.node_lookup import NodeLookup
from hyperspace_vllm.api.options import ApiMessage
from hyperspace_vllm.core.local.claim_messages import ClaimEnded, ClaimRequest, RequestClaimed
from hyperspace_vllm.core.local.messages import NodeMessage
from hyperspace_vllm.core.local.response_cache_messages import (
    FindResponse,
    ReleaseResponse,
    ResponseFound,
    ResponseHint,
    ResponseNotFound,
)
from hyperspace_vllm.core.records.limits import RESPONSE_LOOKUPS_MAX
from tests.api.conftest import PATIENT_S
from tests.api.test_network_race import KEY
from tests.support.inbox import Hear, Inbox
from tests.support.until import until_async

pytestmark = [pytest.mark.io, pytest.mark.usefixtures("patience")]


@dataclass
class Link:
    """A node that says what the test puts into its inbox."""

    connected: bool = True
    epoch: int = 1
    api_servers: int = 1

    def __post_init__(self) -> None:
        self.sent: list[ClaimRequest | FindResponse | ReleaseResponse] = []
        self.inbox = Inbox()

    def send(self, message: ApiMessage) -> bool:
        assert isinstance(message, ClaimRequest | FindResponse | ReleaseResponse)
        self.sent.append(message)
        return True

    def receive(self) -> list[NodeMessage]:
        return self.inbox.take()

    def listen(self, hear: Hear) -> None:
        self.inbox.listen(hear)


async def answered(lookups: NodeLookup, link: Link, *messages: NodeMessage) -> None:
    link.inbox.extend(messages)
    await until_async(lambda: not link.inbox)


@pytest.mark.parametrize("reason", ["off", "alone", "no_peers"])
async def test_a_node_with_nobody_to_ask_is_left_in_peace_and_then_asked_without_waiting(
    monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    monkeypatch.setattr(node_lookup, "_USELESS_S", 1.0)
    link = Link()
    lookups = NodeLookup(link)
    first = lookups.start(KEY, bytes(32), PATIENT_S)
    assert first is not None
    assert not first.hint.done()
    await answered(lookups, link, ResponseHint(first.number, False), ResponseNotFound(first.number, reason))
    assert (first.hint.result(), first.answer.result()) == (False, None)
    assert lookups.start(KEY, bytes(32), PATIENT_S) is None
    while (second := lookups.start(KEY, bytes(32), PATIENT_S)) is None:  # noqa: ASYNC110  # it is time that passes
        await asyncio.sleep(0.002)
    assert second.hint.result() is False, "nobody waits for the hint of a node that had none to give"
    await answered(lookups, link, ResponseHint(second.number, True))
    third = lookups.start(KEY, bytes(32), PATIENT_S)
    assert third is not None
    assert not third.hint.done(), "somebody has come: its hints are worth a moment"
    second.release()
    third.release()


async def test_a_node_that_says_nothing_costs_a_moment_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_lookup, "HINT_S", 0.01)
    monkeypatch.setattr(node_lookup, "_USELESS_S", 60.0)
    link = Link()
    lookups = NodeLookup(link)
    started_s = time.monotonic()
    first = lookups.start(KEY, bytes(32), 0.1)
    assert first is not None
    assert await first.hint is False
    assert time.monotonic() - started_s >= node_lookup.HINT_S
    second = lookups.start(KEY, bytes(32), 0.1)
    assert second is not None
    assert second.hint.result() is False
    assert await first.answer is await second.answer is None
    assert {m.lookup for m in link.sent if isinstance(m, ReleaseResponse)} == {first.number, second.number}
    assert lookups.start(KEY, bytes(32), 0.1) is None, "not a word by the deadline: it is asked seldom"
    assert lookups.pending == 0


async def test_a_late_hint_makes_the_next_lookup_wait_again() -> None:
    link = Link()
    lookups = NodeLookup(link)
    first = lookups.start(KEY, bytes(32), PATIENT_S)
    assert first is not None
    assert await first.hint is False
    await answered(lookups, link, ResponseHint(first.number, True))
    assert first.hint.result() is False, "the first word counts: the engine runs already"
    second = lookups.start(KEY, bytes(32), PATIENT_S)
    assert second is not None
    assert not second.hint.done()
    first.release()
    second.release()


async def test_lookups_are_bounded_and_make_room_when_they_end() -> None:
    link = Link()
    lookups = NodeLookup(link)
    pending = [lookups.start(KEY, bytes(32), PATIENT_S) for _ in range(RESPONSE_LOOKUPS_MAX + 1)]
    assert pending.pop() is None
    last = pending[-1]
    assert last is not None
    last.release()
    last.release()
    assert sum(isinstance(message, ReleaseResponse) for message in link.sent) == 1
    assert lookups.start(KEY, bytes(32), PATIENT_S) is not None
    link.connected = False
    link.inbox.tell()
    await until_async(lambda: lookups.pending == 0)
    assert lookups.start(KEY, bytes(32), PATIENT_S) is None


async def test_a_lookup_is_woken_by_its_answer_and_nothing_polls() -> None:
    link = Link()
    lookups = NodeLookup(link)
    pending = lookups.start(KEY, bytes(32), PATIENT_S)
    assert pending is not None
    assert len(asyncio.all_tasks()) == 1, "this one alone: none looks at the socket"
    await asyncio.sleep(0.02)
    assert link.inbox.takes == 0
    await answered(lookups, link, ResponseFound(pending.number, b"", b"", 0, 0, "", "", ""))
    assert await pending.hint is True
    assert await pending.answer is not None
    assert link.inbox.takes == 1


async def test_a_session_that_ends_ends_what_was_asked_in_it() -> None:
    link = Link()
    lookups = NodeLookup(link)
    pending = lookups.start(KEY, bytes(32), PATIENT_S)
    assert pending is not None
    link.epoch = 2
    link.inbox.tell()
    assert await pending.answer is None
    assert lookups.pending == 0


async def test_a_computation_elsewhere_is_waited_for_in_the_first_session_too() -> None:
    """Where other nodes aren't asked, no lookup has told of the session before."""
    link = Link()
    lookups = NodeLookup(link)
    waiting = asyncio.create_task(lookups.lead_or_wait(KEY, PATIENT_S))
    await until_async(lambda: lookups.pending == 1)
    (claim,) = link.sent
    assert isinstance(claim, ClaimRequest)
    await answered(lookups, link, RequestClaimed(claim.claim, False))
    assert not waiting.done()
    await answered(lookups, link, ClaimEnded(claim.claim))
    assert await waiting is False


async def test_a_lone_node_costs_a_miss_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figure is for bench/; here it is bounded loosely, for the machine may be busy."""
    monkeypatch.setattr(node_lookup, "_USELESS_S", 60.0)
    link = Link()
    lookups = NodeLookup(link)
    first = lookups.start(KEY, bytes(32), PATIENT_S)
    assert first is not None
    await answered(lookups, link, ResponseNotFound(first.number, "alone"))
    took_s = []
    for _ in range(1000):
        started_s = time.perf_counter()
        assert lookups.start(KEY, bytes(32), PATIENT_S) is None
        took_s.append(time.perf_counter() - started_s)
    assert min(took_s) < 0.0002
