"""On a local miss: many clients that ask for one answer, answers that are not taken, and `only-if-cached`."""

import asyncio
from typing import Any

import pytest

from tests.api.test_network_race import Counts, Says, as_json_and_streams, asked, found, not_found, pending
from tests.support.cached_server import CHAT, STREAM, TEXT_PATH, USAGE, Bench, MakeBench, text_of
from tests.support.until import until_async

pytestmark = [pytest.mark.io, pytest.mark.usefixtures("patience")]


# --- many at once ---------------------------------------------------------------------------------


@pytest.mark.parametrize("hinted", [True, False])
async def test_one_asks_for_all_and_all_get_what_was_found(bench: Bench, hinted: bool) -> None:
    bench.node.others = Says(hinted)
    bench.upstream.first.clear()
    bodies = [CHAT | STREAM, CHAT | STREAM | USAGE, CHAT | STREAM] * 5
    counts = Counts.now()
    asking = [asyncio.create_task(bench.ask(body)) for body in bodies]
    await until_async(lambda: bench.cache.flights.readers == len(bodies))
    bench.node.inbox.append(found(await asked(bench)))
    answers = await asyncio.gather(*asking)
    assert {text_of(answer) for answer in answers} == {"from afar"}
    assert ["usage" in answer.text for answer in answers] == [False, True, False] * 5
    assert all(answer.headers["cache-status"].endswith("detail=peer") for answer in answers)
    assert len(bench.node.asked) == 1
    await until_async(lambda: bench.upstream.disconnects == (0 if hinted else 1))
    won = "waited_hit" if hinted else "network_won"
    await until_async(lambda: counts.since() == {won: 1, "hit": len(bodies), "timed": 1})


async def test_followers_of_a_race_that_the_engine_wins_get_its_answer(bench: Bench) -> None:
    bench.node.others = Says(hinted=False)
    bench.upstream.gate.clear()
    counts = Counts.now()
    asking = [asyncio.create_task(bench.ask(CHAT)) for _ in range(5)]
    await until_async(lambda: bench.cache.flights.readers == 5)
    bench.upstream.gate.set()
    assert {text_of(answer) for answer in await asyncio.gather(*asking)} == {"w1.0 w1.1 w1.2 "}
    assert len(bench.node.asked) == 1
    assert counts.since() == {"engine_won": 1, "miss": 1, "collapsed": 4}


async def test_the_leaders_leaving_ends_neither_the_lookup_nor_the_wait_of_others(bench: Bench) -> None:
    bench.node.others = Says(hinted=True)
    leader = asyncio.create_task(bench.ask(CHAT))
    lookup = await asked(bench)
    follower = asyncio.create_task(bench.ask(CHAT))
    await until_async(lambda: bench.cache.flights.readers == 2)
    leader.cancel()
    await until_async(lambda: bench.cache.flights.readers == 1)
    assert bench.node.released == []
    bench.node.inbox.append(found(lookup))
    assert text_of(await follower) == "from afar"


# --- what must not leave, and what must not come in -------------------------------------------------


async def test_private_requests_never_ask(make_bench: MakeBench) -> None:
    bench = await make_bench()
    tenants = await make_bench(api_keys=("one", "two"))
    bench.node.others = tenants.node.others = Says(True, found)
    for wish in ("private", "no-store", "no-cache", "private, only-if-cached", "no-store, only-if-cached"):
        await bench.ask(CHAT | {"seed": len(wish)}, cache_control=wish)
    await bench.ask(CHAT | {"cache_salt": "salt"})
    await tenants.ask(CHAT, authorization="Bearer one")
    assert bench.node.asked == tenants.node.asked == []


async def test_nobody_is_asked_when_that_is_switched_off(make_bench: MakeBench) -> None:
    bench = await make_bench(network_deadline_s=0.0)
    bench.node.others = Says(True, found)
    assert text_of(await bench.ask(CHAT)).startswith("w1.0")
    assert bench.node.asked == []


@pytest.mark.parametrize(
    "changes",
    [
        {"body": b"something else"},
        {"proof": b"garbage"},
        {"proof": b""},
        {"expires_at_ms": 1},
    ],
    ids=["body", "proof", "no proof", "expired"],
)
@pytest.mark.parametrize("hinted", [True, False])
async def test_what_is_not_what_its_proof_says_is_ignored(bench: Bench, changes: dict[str, Any], hinted: bool) -> None:
    bench.node.others = Says(hinted, lambda asked: found(asked, **changes))
    bench.upstream.first.clear()
    counts = Counts.now()
    asking = asyncio.create_task(bench.ask(CHAT | STREAM))
    await until_async(lambda: counts.since() == {"unusable": 1, "miss": 1})
    bench.upstream.first.set()
    assert text_of(await asking).startswith("w1.0")


async def test_a_soundly_signed_body_that_answers_no_such_request_is_ignored(bench: Bench) -> None:
    bench.node.others = Says(True, found)
    counts = Counts.now()
    answer = await bench.ask({"model": "base", "prompt": "Once"}, TEXT_PATH)  # `found` is a chat
    assert text_of(answer).startswith("w1.0")
    assert counts.since() == {"unusable": 1, "miss": 1}


async def test_a_soundly_signed_body_that_cannot_be_replayed_is_ignored(bench: Bench) -> None:
    for number, said in enumerate(({}, {"message": 1}, {"message": {"role": "assistant", "content": 1}}), 1):
        bench.node.others = Says(True, lambda asked, said=said: found(asked, said))  # type: ignore[misc]
        assert text_of(await bench.ask(CHAT | STREAM | {"seed": number})).startswith(f"w{number}.0")


async def test_an_answer_older_than_wanted_is_not_taken(bench: Bench) -> None:
    bench.node.others = Says(True, found)
    assert text_of(await bench.ask(CHAT, cache_control="max-age=5")).startswith("w1.0")
    await bench.stored(1)


async def test_who_wants_it_fresher_does_not_follow_who_takes_an_old_answer(bench: Bench) -> None:
    bench.node.others = Says(hinted=True)
    asking = [asyncio.create_task(bench.ask(CHAT)), asyncio.create_task(bench.ask(CHAT, cache_control="max-age=5"))]
    await asked(bench, 2)
    bench.node.inbox += [found(lookup) for lookup in bench.node.asked]
    assert sorted(text_of(answer)[:4] for answer in await asyncio.gather(*asking)) == ["from", "w1.0"]


# --- only-if-cached -------------------------------------------------------------------------------


@as_json_and_streams
@pytest.mark.parametrize("hinted", [True, False, None])
async def test_only_if_cached_waits_for_the_others(bench: Bench, hinted: bool | None, asked_as: dict[str, Any]) -> None:
    bench.node.others = Says(hinted)
    counts = Counts.now()
    asking = asyncio.create_task(bench.ask(CHAT | asked_as, cache_control="only-if-cached"))
    lookup = await asked(bench)
    assert await pending(bench, lookup).hint is (hinted is True)
    bench.node.inbox.append(found(lookup))
    answer = await asking
    assert (answer.status_code, text_of(answer)) == (200, "from afar")
    assert answer.headers["cache-status"].endswith("detail=peer")
    assert bench.upstream.bodies == []
    await until_async(lambda: counts.since() == {"waited_hit": 1, "hit": 1, "timed": 1})


async def test_only_if_cached_never_computes_whatever_the_others_say(make_bench: MakeBench) -> None:
    bench = await make_bench(network_deadline_s=0.05)
    counts = Counts.now()
    for says in (Says(True), Says(True, not_found), Says(False, lambda asked: found(asked, body=b"{}"))):
        bench.node.others = says
        answer = await bench.ask(CHAT, cache_control="only-if-cached")
        assert answer.status_code == 504
        assert answer.headers["cache-status"] == "hyperspace; detail=uri-miss"
    assert bench.upstream.bodies == []
    assert counts.since() == {"waited_miss": 2, "unusable": 1, "only-if-cached": 3}


async def test_only_if_cached_releases_its_lookup_when_its_client_leaves(bench: Bench) -> None:
    bench.node.others = Says(hinted=True)
    asking = asyncio.create_task(bench.ask(CHAT, cache_control="only-if-cached"))
    lookup = await asked(bench)
    asking.cancel()
    await until_async(lambda: bench.node.released == [lookup.lookup])
