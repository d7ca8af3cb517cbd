"""Questions in other words, answered by the response cache in front of a real server, with the real embedder."""

import json
from functools import partial
from typing import Any

import msgspec
import pytest

from hyperspace_vllm.api import checks, node_lookup
from hyperspace_vllm.api.states import from_store
from hyperspace_vllm.core.local.response_cache_messages import StoreResponse
from hyperspace_vllm.core.response.similar import match_error
from hyperspace_vllm.core.response.similar.semantic import COSINE_MIN
from tests.support.cached_server import CHAT_PATH, STREAM, USAGE, Bench, MakeBench, text_of
from tests.support.until import until_async

pytestmark = pytest.mark.io


def chat(question: str, **more: object) -> dict[str, Any]:
    return {"model": "base", "messages": [{"role": "user", "content": question}], **more}


@pytest.fixture(autouse=True)
def no_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed as well by chance."""
    monkeypatch.setattr(match_error, "CHECK_EVERY", 1 << 40)
    monkeypatch.setattr(from_store, "CHECK_EVERY", 1 << 40)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long an embedding may take is not the subject here, and the machine may be busy."""
    monkeypatch.setattr(node_lookup, "SIMILAR_S", 30.0)


@pytest.fixture
async def bench(make_bench: MakeBench) -> Bench:
    return await make_bench(semantic="balanced")


async def detail_of(bench: Bench, body: dict[str, Any], path: str = CHAT_PATH, **headers: str) -> str:
    """What Cache-Status says of the answer, after "hyperspace; "."""
    answer = await bench.ask(body, path, **headers)
    return ";".join(part for part in answer.headers["cache-status"].split(";")[1:] if " ttl=" not in part).strip()


@pytest.mark.parametrize("asked_as", [{}, STREAM, STREAM | USAGE])
async def test_an_answer_serves_other_spellings_and_other_wordings(bench: Bench, asked_as: dict[str, Any]) -> None:
    first = await bench.ask(chat("What is ML?"))
    await bench.stored(1)
    same = await bench.ask(chat("Please explain machine learning.") | asked_as)
    assert same.headers["cache-status"].endswith("; detail=canonical")
    assert text_of(same) == text_of(first)
    other = await bench.ask(chat("How do I learn to play the guitar?"))
    await bench.stored(2)
    similar = await bench.ask(chat("How can I learn to play guitar?") | asked_as)
    status, _, similarity = similar.headers["cache-status"].partition("; detail=semantic; similarity=")
    assert status.startswith("hyperspace; hit; ttl=86")
    assert COSINE_MIN <= float(similarity) <= 1
    assert text_of(similar) == text_of(other)
    assert len(bench.upstream.bodies) == 2


async def test_near_misses_are_computed_and_stored_for_themselves(bench: Bench) -> None:
    for question in (
        "Is it safe to take ibuprofen?",
        "Is it unsafe to take ibuprofen?",
        "Is it safe to take 2 ibuprofen?",
        "Is it safe to take aspirin?",
    ):
        assert await detail_of(bench, chat(question)) == "fwd=uri-miss; stored"
    await bench.stored(4)


async def test_what_belongs_to_one_moment_is_not_compared(bench: Bench) -> None:
    await bench.ask(chat("What is the latest news about Mars?"))
    await bench.stored(1)
    assert await detail_of(bench, chat("What are the latest news about Mars?")) == "fwd=uri-miss; stored"
    assert bench.node.compared == []


@pytest.mark.parametrize(
    ("wish", "spelling", "wording"),
    [
        ("balanced", "hit; detail=canonical", "hit; detail=semantic"),
        ("strict", "hit; detail=canonical", "fwd=uri-miss"),
        ("off", "fwd=uri-miss", "fwd=uri-miss"),
        ("nonsense", "fwd=uri-miss", "fwd=uri-miss"),
    ],
)
async def test_a_caller_may_want_it_stricter(bench: Bench, wish: str, spelling: str, wording: str) -> None:
    await bench.ask(chat("When did World War II end?"))
    await bench.stored(1)
    bench.node.compared.clear()
    same, other = chat("please tell me when did World War II end"), chat("In what year did World War II end?")
    assert (await detail_of(bench, other, x_hyperspace_semantic=wish)).startswith(wording)
    assert [message.mode for message in bench.node.compared] == ([wish] if "hit" in spelling else [])
    assert (await detail_of(bench, same, x_hyperspace_semantic=wish)).startswith(spelling)
    assert len(bench.node.compared) == ("hit" in spelling)


async def test_who_is_stricter_leaves_nothing_for_the_others(bench: Bench) -> None:
    await bench.ask(chat("What is ML?"), x_hyperspace_semantic="off")
    await bench.stored(1)
    assert await detail_of(bench, chat("Explain machine learning")) == "fwd=uri-miss; stored"
    assert (await detail_of(bench, chat("What is ML?"))).startswith("hit; detail=exact")


async def test_a_server_that_was_not_asked_to_compares_nothing(make_bench: MakeBench) -> None:
    bench = await make_bench()
    await bench.ask(chat("What is ML?"))
    await bench.stored(1)
    wish = {"x_hyperspace_semantic": "balanced"}
    assert await detail_of(bench, chat("Explain machine learning"), **wish) == "fwd=uri-miss; stored"
    assert bench.node.compared == []


async def test_cache_control_holds_for_other_wordings_too(bench: Bench) -> None:
    await bench.ask(chat("What is ML?"))
    await bench.stored(1)
    again = chat("Explain machine learning")
    assert (await detail_of(bench, again, cache_control="only-if-cached")).startswith("hit; detail=canonical")
    assert await detail_of(bench, again, cache_control="no-store") == "fwd=request; detail=no-store"
    assert (await detail_of(bench, again, cache_control="no-cache")).startswith("fwd=request")
    assert (await detail_of(bench, again, cache_control="min-fresh=99999999")).startswith("fwd=")


@pytest.mark.parametrize("other", [{"cache_salt": "x"}, {"temperature": 0.1}, {"max_tokens": 7}])
async def test_other_parameters_are_another_world(bench: Bench, other: dict[str, Any]) -> None:
    await bench.ask(chat("What is ML?"))
    await bench.stored(1)
    assert await detail_of(bench, chat("Explain machine learning", **other)) == "fwd=uri-miss; stored"


async def test_tenants_do_not_share_meanings(make_bench: MakeBench) -> None:
    bench = await make_bench(semantic="balanced", api_keys=("a", "b"))
    await bench.ask(chat("What is ML?"), authorization="Bearer a")
    await bench.stored(1)
    again = chat("Explain machine learning")
    assert await detail_of(bench, again, authorization="Bearer b") == "fwd=uri-miss; stored"
    assert (await detail_of(bench, again, authorization="Bearer a")).startswith("hit; detail=canonical")


async def test_a_node_that_says_nothing_is_not_waited_for_again(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_lookup, "SIMILAR_S", 0.05)
    monkeypatch.setattr(node_lookup, "_USELESS_S", 60.0)
    bench = await make_bench(semantic="strict")
    node = bench.node
    assert node.similar is not None
    monkeypatch.setattr(node.similar, "find", lambda want, answer: None)
    for number in range(10):
        await bench.ask(chat(f"Why is the number {number} odd?"))
    assert len(node.compared) == 1


# --- held against the engine --------------------------------------------------------------------

GUITAR = chat("How do I learn to play the guitar?", temperature=0)
GUITAR_TOO = chat("How can I learn to play guitar?", temperature=0)
DAILY = "Practise the chords every day, slowly, for half an hour."
CHORDS = "Practise your chords daily, slowly, for half an hour."


async def checked(bench: Bench, count: int) -> dict[str, object]:
    similar = bench.node.similar
    assert similar is not None
    await until_async(lambda: similar.stats()["checked"] == count)
    return similar.stats()


async def test_a_match_is_now_and_then_computed_as_well_after_it_was_served(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(match_error, "CHECK_EVERY", 1)
    monkeypatch.setattr(from_store, "CHECK_EVERY", 1)
    bench.upstream.says = [DAILY, CHORDS]
    first = await bench.ask(GUITAR)
    await bench.stored(1)
    hit = await bench.ask(GUITAR_TOO | STREAM | USAGE)
    assert text_of(hit) == text_of(first)
    assert (await checked(bench, 1))["wrong_ratio"] == 0
    assert json.loads(bench.upstream.bodies[1]) == GUITAR_TOO
    await bench.stored(2)
    assert await detail_of(bench, GUITAR_TOO) == "hit; detail=exact", "what was computed is stored"
    assert text_of(await bench.ask(GUITAR_TOO)) == CHORDS


async def test_a_canonical_match_that_was_wrong_is_none_any_more(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(from_store, "CHECK_EVERY", 1)
    bench.upstream.says = ["Machines that learn from data what no one wrote down.", "Boil the rice for twelve minutes."]
    await bench.ask(chat("What is ML?", temperature=0))
    await bench.stored(1)
    assert await detail_of(bench, chat("Explain machine learning", temperature=0)) == "hit; detail=canonical"
    assert (await checked(bench, 1))["wrong_ratio"] == 1
    await bench.stored(2)
    assert bench.node.store.flush(60)
    assert await detail_of(bench, chat("What is ML?", temperature=0)) == "hit; detail=exact", (
        "its own question it answers as before"
    )


async def test_with_a_bound_matches_are_computed_until_they_are_known_to_be_right(make_bench: MakeBench) -> None:
    bench = await make_bench(semantic="balanced", max_error=0.8)
    bench.upstream.says = [DAILY, CHORDS, "Practise your chords each day, slowly, for half an hour."]
    await bench.ask(GUITAR)
    await bench.stored(1)
    assert await detail_of(bench, GUITAR_TOO) == "fwd=uri-miss; stored"
    assert (await checked(bench, 1))["wrong_ratio_high"] == 0.7935
    await bench.stored(2)
    assert (
        await detail_of(bench, chat("please, how do I learn to play the guitar", temperature=0))
        == "hit; detail=semantic; similarity=1.000"
    )


async def test_a_bound_is_kept_for_each_tenant_whatever_others_ask(make_bench: MakeBench) -> None:
    bench = await make_bench(semantic="balanced", max_error=0.8, api_keys=("a", "b"))
    bench.upstream.says = ["The", "The", DAILY, CHORDS, DAILY, CHORDS]
    short = ("Bearer a", GUITAR | {"max_tokens": 1}, GUITAR_TOO | {"max_tokens": 1})
    for number, (key, one, other) in enumerate(
        (short, ("Bearer a", GUITAR, GUITAR_TOO), ("Bearer b", GUITAR, GUITAR_TOO))
    ):
        await bench.ask(one, authorization=key)
        await bench.stored(2 * number + 1)
        assert await detail_of(bench, other, authorization=key) == "fwd=uri-miss; stored"
        await bench.stored(2 * number + 2)
    await checked(bench, 2)


async def test_an_engine_that_fails_or_hangs_costs_the_hit_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(from_store, "CHECK_EVERY", 1)
    monkeypatch.setattr(checks, "CHECK_S", 2.0)
    await bench.ask(chat("What is ML?"))
    await bench.stored(1)
    bench.upstream.failures = ["stall", "refuse", "raise"]

    def asked(times: int) -> bool:
        return len(bench.upstream.bodies) == times

    for number in range(3):
        assert await detail_of(bench, chat("Explain machine learning")) == "hit; detail=canonical"
        await until_async(partial(asked, number + 2))
        await until_async(lambda: bench.cache.checks.idle)
    assert bench.upstream.disconnects == 1
    assert bench.node.checked == []


async def test_who_wants_nothing_computed_has_nothing_computed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(from_store, "CHECK_EVERY", 1)
    await bench.ask(chat("What is ML?"))
    await bench.stored(1)
    answer = await bench.ask(chat("Explain machine learning"), cache_control="only-if-cached")
    assert answer.headers["cache-status"].endswith("detail=canonical")
    assert bench.cache.checks.idle
    assert len(bench.upstream.bodies) == 1


@pytest.mark.parametrize(
    "body", [b"not json", b"[]", b'{"choices": 5}', b'{"choices": [{"message": {"content": null}}]}']
)
async def test_a_stored_answer_that_is_no_text_is_not_compared_and_loses_nothing(
    make_bench: MakeBench, body: bytes
) -> None:
    bench = await make_bench(semantic="balanced", max_error=0.5)
    await bench.ask(GUITAR)
    await bench.stored(1)
    similar = bench.node.similar
    assert similar is not None
    (asked,) = [sent for sent in bench.node.sent if isinstance(sent, StoreResponse)]
    similar.remember(msgspec.structs.replace(asked, body=body))
    await bench.stored(2)
    assert await detail_of(bench, GUITAR_TOO) == "fwd=uri-miss; stored"
    await bench.stored(3)
    assert bench.node.checked == []


async def test_one_check_at_a_time_is_under_way(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(from_store, "CHECK_EVERY", 1)
    bench.upstream.says = [DAILY, CHORDS]
    await bench.ask(chat("What is ML?", temperature=0))
    await bench.stored(1)
    bench.upstream.gate.clear()
    for _ in range(5):
        assert await detail_of(bench, chat("Explain machine learning", temperature=0)) == "hit; detail=canonical"
    bench.upstream.gate.set()
    await checked(bench, 1)
    assert len(bench.upstream.bodies) == 2
