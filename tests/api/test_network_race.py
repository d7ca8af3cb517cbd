"""On a local miss: a real server and client, a real cache, and a node whose words are scripted."""

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import pytest
from nacl.signing import SigningKey
from prometheus_client import REGISTRY

from hyperspace_vllm import contained
from hyperspace_vllm.api import network_race, node_lookup
from hyperspace_vllm.core.local.messages import NodeMessage
from hyperspace_vllm.core.local.response_cache_messages import (
    FindResponse,
    PurgeResponses,
    ResponseFound,
    ResponseHint,
    ResponseNotFound,
)
from hyperspace_vllm.core.records.ids import RequestKey, network_id
from hyperspace_vllm.core.records.limits import RESPONSE_TTL_MS
from hyperspace_vllm.core.response.cache_proof import make_proof
from hyperspace_vllm.daemon.clock import wall_ms
from tests.api.conftest import PATIENT_S
from tests.support.cached_server import CHAT, CHAT_PATH, STREAM, USAGE, Bench, MakeBench, Node, text_of
from tests.support.until import until_async

pytestmark = [pytest.mark.io, pytest.mark.usefixtures("patience")]

KEY = RequestKey(bytes(32))
ASKED_AS: list[dict[str, Any]] = [{}, STREAM, STREAM | USAGE]
as_json_and_streams = pytest.mark.parametrize("asked_as", ASKED_AS, ids=["json", "stream", "usage"])


def pending(bench: Bench, lookup: FindResponse) -> node_lookup.Pending:
    return bench.cache.node._pending[lookup.lookup]


@dataclass
class Says:
    """Says at once whether there is a hint (None: not a word), and then perhaps whether there is a response."""

    hinted: bool | None
    then: Callable[[FindResponse], NodeMessage] | None = None

    def find(self, node: Node, asked: FindResponse) -> None:
        if self.hinted is not None:
            node.inbox.append(ResponseHint(asked.lookup, self.hinted))
        if self.then is not None:
            node.inbox.append(self.then(asked))


SAID = {"message": {"role": "assistant", "content": "from afar"}}


def found(asked: FindResponse, said: dict[str, Any] = SAID, age_ms: int = 60_000, **changes: Any) -> ResponseFound:
    """Another node's answer to CHAT; it says so."""
    choice = {"index": 0, "finish_reason": "stop"} | said
    usage = {"prompt_tokens": 5, "total_tokens": 7, "completion_tokens": 2}
    head = {"object": "chat.completion", "created": 1, "model": "base", "system_fingerprint": "fp"}
    body = msgspec.json.encode(head | {"choices": [choice], "usage": usage})
    at_ms = wall_ms() - age_ms
    key, network = RequestKey(asked.request_key), network_id("test")
    proof = make_proof(SigningKey(bytes(32)), network, key, body, asked.model_digest, "vllm 0.32.0", at_ms)
    answer = ResponseFound(
        asked.lookup, body, proof.encode(), at_ms, at_ms + RESPONSE_TTL_MS, "12D3KooW", "gossip", "members"
    )
    return msgspec.structs.replace(answer, **changes)


def not_found(asked: FindResponse, reason: str = "not_found") -> ResponseNotFound:
    return ResponseNotFound(asked.lookup, reason)


def count(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"hyperspace_l1_{name}", labels) or 0.0


@dataclass
class Counts:
    """How often things have happened since this was made."""

    before: dict[str, float]

    @classmethod
    def now(cls) -> "Counts":
        return cls(cls._read())

    def since(self) -> dict[str, float]:
        return {name: value - self.before[name] for name, value in self._read().items() if value != self.before[name]}

    @staticmethod
    def _read() -> dict[str, float]:
        outcomes: tuple[str, ...] = network_race.Outcome.__args__  # type: ignore[attr-defined]
        return {
            **{outcome: count("network_lookups_total", outcome=outcome) for outcome in outcomes},
            "hit": count("lookups_total", result="hit", reason="network"),
            "miss": count("lookups_total", result="miss", reason="uri-miss"),
            "collapsed": count("lookups_total", result="collapsed", reason="uri-miss"),
            "only-if-cached": count("lookups_total", result="miss", reason="only-if-cached"),
            "timed": count("network_hit_seconds_count"),
            "local": count("hit_seconds_count"),
        }


async def asked(bench: Bench, number: int = 1) -> FindResponse:
    """The lookup, once the node has been asked."""
    await until_async(lambda: len(bench.node.asked) >= number)
    return bench.node.asked[number - 1]


# --- with a hint ----------------------------------------------------------------------------------


@as_json_and_streams
async def test_a_hinted_request_waits_and_is_answered_from_afar(bench: Bench, asked_as: dict[str, Any]) -> None:
    bench.node.others = Says(hinted=True)
    counts = Counts.now()
    asking = asyncio.create_task(bench.ask(CHAT | asked_as))
    lookup = await asked(bench)
    assert (lookup.model_digest, lookup.deadline_ms) == (bytes(32), PATIENT_S * 1000)
    assert await pending(bench, lookup).hint
    await asyncio.sleep(0.05)  # it is the answer that is awaited
    assert not asking.done()
    bench.node.inbox.append(found(lookup))
    answer = await asking
    assert text_of(answer) == "from afar"
    status, ttl, detail = answer.headers["cache-status"].split("; ")[1:]
    assert (status, detail) == ("hit", "detail=peer")
    assert 86_000 < int(ttl.removeprefix("ttl=")) < 86_400
    assert int(answer.headers["age"]) in (60, 61)
    assert "x-hyperspace-proof" not in answer.headers
    assert answer.headers["hyperspace-origin"] == 'computed-by="12D3KooW"; source="gossip"; verified-by="members"'
    assert ("usage" in answer.text) is (asked_as != STREAM)
    assert bench.upstream.bodies == []
    assert bench.node.released == []
    assert bench.node.scopes == [], "what came from afar is the node's to store"
    await until_async(lambda: counts.since() == {"waited_hit": 1, "hit": 1, "timed": 1})


async def test_an_answer_from_afar_that_is_older_than_answers_may_be_here_is_computed(make_bench: MakeBench) -> None:
    bench = await make_bench(ttl_ms=30_000)
    bench.node.others = Says(True, partial(found, age_ms=29_000))
    assert text_of(await bench.ask(CHAT)) == "from afar"
    bench.node.others = Says(True, partial(found, age_ms=31_000))
    other = CHAT | {"max_tokens": 7}
    assert text_of(await bench.ask(other)) != "from afar"
    assert not [sent for sent in bench.node.sent if isinstance(sent, PurgeResponses)]


async def test_a_repeat_of_what_was_found_is_a_local_hit_at_once(bench: Bench) -> None:
    bench.node.others = Says(True, found)
    await bench.ask(CHAT)
    again = await bench.ask(CHAT)
    assert again.headers["cache-status"].endswith("; detail=exact")
    assert text_of(again) == "from afar"
    assert len(bench.node.asked) == 1


async def test_a_hint_that_comes_to_nothing_costs_its_deadline_and_no_more(make_bench: MakeBench) -> None:
    bench = await make_bench(network_deadline_s=0.1)
    bench.node.others = Says(hinted=True)
    counts, started_s = Counts.now(), time.monotonic()
    answer = await bench.ask(CHAT)
    assert time.monotonic() - started_s >= 0.1
    assert answer.headers["cache-status"] == "hyperspace; fwd=uri-miss; stored"
    assert text_of(answer).startswith("w1.0")
    assert bench.node.released == [bench.node.asked[0].lookup]
    await bench.stored(1)
    assert counts.since() == {"waited_miss": 1, "miss": 1}


async def test_a_hint_that_was_wrong_is_over_when_the_node_says_so(bench: Bench) -> None:
    bench.node.others = Says(True, not_found)
    started_s = time.monotonic()
    assert text_of(await bench.ask(CHAT)).startswith("w1.0")
    assert time.monotonic() - started_s < PATIENT_S / 2
    assert bench.node.released == []


@pytest.mark.parametrize("finds", [True, False])
async def test_once_a_hint_is_withdrawn_the_engine_starts_and_races_the_lookup(bench: Bench, finds: bool) -> None:
    bench.node.others = Says(hinted=True)
    bench.upstream.gate.clear()
    counts = Counts.now()
    asking = asyncio.create_task(bench.ask(CHAT))
    lookup = await asked(bench)
    assert await pending(bench, lookup).hint
    assert bench.upstream.bodies == []
    bench.node.inbox.append(ResponseHint(lookup.lookup, False))
    await until_async(lambda: len(bench.upstream.bodies) == 1)
    if finds:
        bench.node.inbox.append(found(lookup))
        assert text_of(await asking) == "from afar"
        await until_async(lambda: counts.since().get("network_won") == 1)
    else:
        bench.upstream.gate.set()
        assert text_of(await asking).startswith("w1.0")
        await until_async(lambda: counts.since().get("engine_won") == 1)


@as_json_and_streams
async def test_a_client_that_leaves_while_it_waits_releases_the_lookup(bench: Bench, asked_as: dict[str, Any]) -> None:
    bench.node.others = Says(hinted=True)
    counts = Counts.now()
    asking = asyncio.create_task(bench.ask(CHAT | asked_as))
    lookup = await asked(bench)
    asking.cancel()
    await until_async(lambda: bench.node.released == [lookup.lookup])
    await until_async(lambda: bench.cache.flights.readers == 0)
    assert bench.upstream.bodies == []
    assert counts.since() == {"left": 1, "miss": 1}


@pytest.mark.parametrize("gone", ["connected", "epoch"])
async def test_a_node_that_dies_during_the_lookup_is_not_waited_for(bench: Bench, gone: str) -> None:
    bench.node.others = Says(hinted=True)
    asking = asyncio.create_task(bench.ask(CHAT))
    await asked(bench)
    if gone == "connected":
        bench.node.connected = False
    else:
        bench.node.epoch += 1  # it came back, and knows of nothing
    started_s = time.monotonic()
    assert text_of(await asking).startswith("w1.0")
    assert time.monotonic() - started_s < PATIENT_S / 2


# --- without a hint: a race -----------------------------------------------------------------------


@as_json_and_streams
async def test_the_network_wins_before_the_engines_first_frame(bench: Bench, asked_as: dict[str, Any]) -> None:
    bench.node.others = Says(hinted=False)
    bench.upstream.first.clear()
    bench.upstream.gate.clear()
    counts = Counts.now()
    asking = asyncio.create_task(bench.ask(CHAT | asked_as))
    lookup = await asked(bench)
    await until_async(lambda: len(bench.upstream.bodies) == 1)
    bench.node.inbox.append(found(lookup))
    answer = await asking
    assert text_of(answer) == "from afar"
    assert answer.headers["cache-status"].endswith("; detail=peer")
    assert ("usage" in answer.text) is (asked_as != STREAM)
    await until_async(lambda: bench.upstream.disconnects == 1)
    assert bench.node.scopes == []
    await until_async(lambda: counts.since() == {"network_won": 1, "hit": 1, "timed": 1})


async def test_a_race_outlasts_the_deadline_of_those_who_wait(make_bench: MakeBench) -> None:
    bench = await make_bench(network_deadline_s=0.05)
    bench.node.others = Says(hinted=False)
    bench.upstream.first.clear()
    bench.upstream.gate.clear()
    asking = asyncio.create_task(bench.ask(CHAT))
    lookup = await asked(bench)
    await asyncio.sleep(0.15)
    assert bench.node.released == []
    bench.node.inbox.append(found(lookup))
    assert text_of(await asking) == "from afar"


async def test_a_race_ends_by_itself(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_lookup, "RACE_S", 0.1)
    bench.node.others = Says(hinted=False)
    bench.upstream.first.clear()
    asking = asyncio.create_task(bench.ask(CHAT))
    lookup = await asked(bench)
    await until_async(lambda: bench.node.released == [lookup.lookup])
    bench.upstream.first.set()
    assert text_of(await asking).startswith("w1.0")


@as_json_and_streams
async def test_the_engine_wins_with_its_first_frame(bench: Bench, asked_as: dict[str, Any]) -> None:
    bench.node.others = Says(hinted=False)
    counts = Counts.now()
    answer = await bench.ask(CHAT | asked_as)
    assert answer.headers["cache-status"] == "hyperspace; fwd=uri-miss; stored"
    lookup = bench.node.asked[0]
    assert bench.node.released == [lookup.lookup]
    bench.node.inbox.append(found(lookup))  # it crossed the release
    await bench.stored(1)
    assert text_of(await bench.ask(CHAT | asked_as)) == text_of(answer)
    assert bench.upstream.disconnects == 0
    assert counts.since() == {"engine_won": 1, "miss": 1, "local": 1}


async def test_a_race_streams_what_the_server_alone_would_have(make_bench: MakeBench) -> None:
    racing, plain = await make_bench(), await make_bench(db_path=None)
    racing.node.others = Says(hinted=False)
    for number, asked_as in enumerate(ASKED_AS):
        body = CHAT | asked_as | {"seed": number}
        assert (await racing.ask(body)).content == (await plain.ask(body)).content


async def test_a_start_is_held_back_and_a_frame_never_is(bench: Bench) -> None:
    bench.node.others = Says(hinted=False)
    bench.upstream.first.clear()
    bench.upstream.gate.clear()
    async with AsyncExitStack() as stack:
        stream = bench.client.stream("POST", CHAT_PATH, json=CHAT | STREAM)
        opening = asyncio.create_task(stack.enter_async_context(stream))
        await until_async(lambda: bench.upstream.streaming == 1)  # vLLM has sent its start
        await asyncio.sleep(0.05)
        assert not opening.done()
        bench.upstream.first.set()
        lines = (await opening).aiter_lines()
        frames = [line for line in [await anext(lines) for _ in range(3)] if line]
        assert "w1.0" in frames[1]
        bench.node.inbox.append(found(bench.node.asked[0]))
        bench.upstream.gate.set()
        assert "w1.1" in "".join([line async for line in lines])


async def test_a_start_is_let_go_when_the_others_have_nothing(bench: Bench) -> None:
    bench.node.others = Says(hinted=False)
    bench.upstream.first.clear()
    counts = Counts.now()
    async with AsyncExitStack() as stack:
        stream = bench.client.stream("POST", CHAT_PATH, json=CHAT | STREAM)
        opening = asyncio.create_task(stack.enter_async_context(stream))
        await until_async(lambda: bench.upstream.streaming == 1)
        bench.node.inbox.append(not_found(bench.node.asked[0]))
        response = await opening
        assert response.headers["cache-status"] == "hyperspace; fwd=uri-miss; stored"
        bench.upstream.first.set()
        assert b"w1.2" in await response.aread()
    assert counts.since() == {"not_found": 1, "miss": 1}


async def test_a_client_that_leaves_during_a_race_ends_both(bench: Bench) -> None:
    bench.node.others = Says(hinted=False)
    bench.upstream.first.clear()
    asking = asyncio.create_task(bench.ask(CHAT | STREAM))
    await until_async(lambda: bench.upstream.streaming == 1)
    asking.cancel()
    await until_async(lambda: bench.node.released == [bench.node.asked[0].lookup])
    await until_async(lambda: bench.upstream.disconnects == 1)


@pytest.mark.parametrize("failure", ["refuse", "raise"])
async def test_an_engine_that_fails_fails_as_ever_and_releases_the_lookup(bench: Bench, failure: str) -> None:
    bench.node.others = Says(hinted=False)
    bench.upstream.failures = [failure]
    answer = await bench.ask(CHAT)
    assert answer.status_code == (503 if failure == "refuse" else 500)
    assert bench.node.released == [bench.node.asked[0].lookup]


async def test_an_engine_that_ignores_its_defeat_is_cancelled(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_race, "ABANDONED_GRACE_S", 0.05)
    cancelled = asyncio.Event()

    async def deaf(scope: Any, receive: Any, send: Any) -> None:
        bench.node.inbox.append(found(bench.node.asked[0]))
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    bench.cache.app = deaf
    bench.node.others = Says(hinted=False)
    assert text_of(await bench.ask(CHAT)) == "from afar"
    async with asyncio.timeout(10):
        await cancelled.wait()


@pytest.mark.parametrize("is_a_fault", [True, False])
async def test_an_engine_that_fails_after_its_defeat_is_reported_once_unless_it_means_its_client(
    bench: Bench, is_a_fault: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(contained, "_reported", set())
    monkeypatch.setattr(contained.logger, "propagate", False)
    contained.logger.addHandler(caplog.handler)
    failed = 0

    async def engine(scope: Any, receive: Any, send: Any) -> None:
        nonlocal failed
        await receive()
        bench.node.inbox.append(found(bench.node.asked[-1]))
        assert (await receive())["type"] == "http.disconnect"
        failed += 1
        if is_a_fault:
            raise ZeroDivisionError
        try:
            raise OSError("client disconnected")
        except OSError:
            raise RuntimeError from None  # as Starlette's ClientDisconnect

    bench.cache.app = engine
    bench.node.others = Says(hinted=False)
    for seed in range(2):
        assert text_of(await bench.ask(CHAT | {"seed": seed})) == "from afar"
    await until_async(lambda: failed == 2)
    contained.logger.removeHandler(caplog.handler)
    reports = [record.exc_info is not None for record in caplog.records if "please report it" in record.message]
    assert reports == [True] * is_a_fault
