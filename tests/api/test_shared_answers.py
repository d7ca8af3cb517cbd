"""Clients that share an answer: none slows the others, and none chooses what they get."""

import asyncio
from typing import Any

import httpx
import pytest

from hyperspace_vllm.daemon.clock import wall_ms
from tests.support.cached_server import CHAT, STREAM, Bench, MakeBench, text_of
from tests.support.until import until_async

pytestmark = pytest.mark.io

GREEDY, SEEDED = {"temperature": 0}, {"seed": 7}


# --- computations -------------------------------------------------------------------------------


@pytest.mark.parametrize("asked_as", [{}, STREAM])
@pytest.mark.parametrize(
    ("fields", "headers"),
    [
        ({"priority": 2**31 - 1}, {}),
        ({"stream_interval": 10**6}, {}),
        ({}, {"x_vllm_priority": "2147483647"}),
        ({}, {"x_data_parallel_rank": "0"}),
    ],
)
async def test_who_asks_to_be_served_otherwise_computes_apart(
    bench: Bench, fields: dict[str, Any], headers: dict[str, str], asked_as: dict[str, Any]
) -> None:
    bench.upstream.gate.clear()
    leading = asyncio.create_task(bench.ask(CHAT | asked_as | fields, **headers))
    await until_async(lambda: len(bench.upstream.bodies) == 1)
    following = asyncio.create_task(bench.ask(CHAT | asked_as))
    await until_async(lambda: len(bench.upstream.bodies) == 2)
    likewise = asyncio.create_task(bench.ask(CHAT | asked_as | fields, **headers))
    await until_async(lambda: bench.cache.flights.readers == 3)
    bench.upstream.gate.set()
    answers = await asyncio.gather(leading, following, likewise)
    assert [text_of(answer)[:2] for answer in answers] == ["w1", "w2", "w1"]


async def test_the_default_priority_is_no_wish(bench: Bench) -> None:
    bench.upstream.gate.clear()
    asked = [asyncio.create_task(bench.ask(CHAT | more)) for more in ({}, {"priority": 0})]
    await until_async(lambda: bench.cache.flights.readers == 2)
    bench.upstream.gate.set()
    assert {text_of(answer)[:2] for answer in await asyncio.gather(*asked)} == {"w1"}


@pytest.mark.parametrize("asked_as", [{}, STREAM])
async def test_followers_of_a_leader_that_stalls_share_one_computation(
    make_bench: MakeBench, asked_as: dict[str, Any]
) -> None:
    bench = await make_bench(follow_deadline_s=0.5)
    bench.upstream.failures = ["stall"]
    leading = asyncio.create_task(bench.ask(CHAT | asked_as))
    await until_async(lambda: len(bench.upstream.bodies) == 1)
    answers = await asyncio.gather(*(bench.ask(CHAT | asked_as) for _ in range(5)))
    assert {text_of(answer)[:2] for answer in answers} == {"w2"}
    assert len(bench.upstream.bodies) == 2
    leading.cancel()
    await until_async(lambda: bench.cache.flights.readers == 0)


async def test_whom_a_leader_fails_late_gets_what_was_computed_meanwhile(make_bench: MakeBench) -> None:
    bench = await make_bench(follow_deadline_s=2.0)
    bench.upstream.failures = ["stall"]
    asked = [asyncio.create_task(bench.ask(CHAT))]
    await until_async(lambda: len(bench.upstream.bodies) == 1)
    for readers in (2, 3):
        asked.append(asyncio.create_task(bench.ask(CHAT)))
        await until_async(lambda readers=readers: bench.cache.flights.readers == readers)  # type: ignore[misc]
        await asyncio.sleep(0.5)  # between their deadlines: the second of them finds an answer
    answers = await asyncio.gather(*asked[1:])
    assert [text_of(answer)[:2] for answer in answers] == ["w2", "w2"]
    assert "; hit; " in answers[1].headers["cache-status"]
    asked[0].cancel()
    await until_async(lambda: bench.cache.flights.readers == 0)


@pytest.mark.parametrize("asked_as", [{}, STREAM])
async def test_a_request_that_two_leaders_have_failed_is_computed_alone(
    make_bench: MakeBench, asked_as: dict[str, Any]
) -> None:
    bench = await make_bench(follow_deadline_s=0.3)
    bench.upstream.failures = ["stall", "stall"]
    asked = [asyncio.create_task(bench.ask(CHAT | asked_as))]
    await until_async(lambda: len(bench.upstream.bodies) == 1)
    asked += [asyncio.create_task(bench.ask(CHAT | asked_as)) for _ in range(3)]
    await until_async(lambda: sum(task.done() for task in asked) == 2)
    assert {text_of(await task)[:2] for task in asked if task.done()} <= {"w3", "w4"}
    for task in asked:
        task.cancel()
    await until_async(lambda: bench.cache.flights.readers == 0)


async def test_a_stream_that_stops_is_ended_for_those_who_follow_it(make_bench: MakeBench) -> None:
    bench = await make_bench(stalled_stream_s=0.3)
    bench.upstream.gate.clear()
    leading = asyncio.create_task(bench.ask(CHAT | STREAM))
    await until_async(lambda: bench.upstream.frames_sent == 2)
    with pytest.raises(httpx.RemoteProtocolError):
        await bench.ask(CHAT | STREAM)
    bench.upstream.gate.set()
    assert text_of(await leading) == "w1.0 w1.1 w1.2 "
    assert len(bench.upstream.bodies) == 1


# --- which sample all get -----------------------------------------------------------------------


@pytest.mark.parametrize("directive", ["no-cache", "max-age=0", "min-fresh=999999"])
async def test_a_client_that_computes_a_sample_anew_leaves_the_others_theirs(
    make_bench: MakeBench, directive: str
) -> None:
    later_ms = 0
    bench = await make_bench(clock=lambda: wall_ms() + later_ms)
    first = text_of(await bench.ask(CHAT))
    await bench.stored(1)
    later_ms = 10_000
    for asked_as in ({}, STREAM):
        anew = await bench.ask(CHAT | asked_as, cache_control=directive)
        assert text_of(anew) != first
        assert anew.headers["cache-status"] == f"hyperspace; fwd={'request' if directive == 'no-cache' else 'stale'}"
        assert text_of(await bench.ask(CHAT)) == first
    assert len(bench.node.scopes) == 1


@pytest.mark.parametrize("fixed", [GREEDY, SEEDED])
async def test_what_has_one_answer_is_refreshed(bench: Bench, fixed: dict[str, Any]) -> None:
    await bench.ask(CHAT | fixed)
    await bench.stored(1)
    anew = await bench.ask(CHAT | fixed, cache_control="no-cache")
    assert anew.headers["cache-status"] == "hyperspace; fwd=request; stored"
    assert text_of(await bench.ask(CHAT | fixed)) == text_of(anew) == "w2.0 w2.1 w2.2 "


async def test_a_sample_that_nobody_has_yet_is_stored(bench: Bench) -> None:
    anew = await bench.ask(CHAT, cache_control="no-cache")
    assert anew.headers["cache-status"] == "hyperspace; fwd=request; stored"
    assert text_of(await bench.ask(CHAT)) == text_of(anew)


async def test_of_samples_computed_at_one_time_the_first_stays(bench: Bench) -> None:
    bench.upstream.gate.clear()
    late = asyncio.create_task(bench.ask(CHAT | STREAM, cache_control="no-cache"))
    await until_async(lambda: bench.upstream.frames_sent == 2)
    asked = asyncio.create_task(bench.ask({**CHAT, "seed": None}))
    await until_async(lambda: len(bench.upstream.bodies) == 2)
    bench.upstream.gate.set()
    await asyncio.gather(late, asked)
    await until_async(lambda: bench.node.store.stats()["stored"] >= 1)
    assert len(bench.node.scopes) == 1
