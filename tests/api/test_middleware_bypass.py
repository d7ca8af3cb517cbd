"""What passes by the response cache, and errors that leave the application as it is without one."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from hyperspace_vllm.api.middleware import response_cache
from hyperspace_vllm.api.options import ResponseCacheOptions
from hyperspace_vllm.core.records.limits import REQUEST_BYTES_MAX
from hyperspace_vllm.core.response.scope import RequestScope, verify_scope
from tests.support.cached_server import CHAT, CHAT_PATH, STREAM, TEXT, TEXT_PATH, USAGE, Bench, MakeBench, data_of
from tests.support.until import until_async

pytestmark = pytest.mark.io


@pytest.mark.parametrize(
    ("raw", "content_type", "reason"),
    [
        (b"{not json", "application/json", "not_json"),
        (b'{"prompt": "a", "prompt": "b"}', "application/json", "duplicate_key"),
        (json.dumps(TEXT).encode(), "text/plain", "not_json"),
        (json.dumps(TEXT | {"prompt": "x" * REQUEST_BYTES_MAX}).encode(), "application/json", "too_large"),
        (json.dumps(TEXT | {"prompt_logprobs": 1, "stream": True}).encode(), "application/json", "stream_conflict"),
        (json.dumps(TEXT | {"model": "unknown"}).encode(), "application/json", "unknown_model"),
        (b' {"kv_transfer_params": {"do_remote_decode": true}}', "application/json", "kv_transfer_params"),
    ],
)
async def test_what_cannot_be_cached_reaches_the_server_byte_for_byte(
    bench: Bench, raw: bytes, content_type: str, reason: str
) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for at in range(0, len(raw), 100_000):
            yield raw[at : at + 100_000]

    for content in (raw, chunks()):
        answer = await bench.client.post(TEXT_PATH, content=content, headers={"content-type": content_type})
        assert answer.headers["cache-status"] == f"hyperspace; fwd=bypass; detail={reason}"
    assert bench.upstream.bodies == [raw, raw]
    assert bench.node.scopes == []


@pytest.mark.parametrize(
    "headers",
    [
        [("content-type", "application/json")],
        [("content-type", "Application/JSON; charset=utf-8")],
        [("content-type", "application/json ;a=b")],
        [("content-type", "application/json"), ("content-type", "text/plain")],
        [("content-type", "text/plain"), ("content-type", "application/json")],
        [("content-type", "application/vnd.api+json")],
        [("content-type", "text/plain")],
        [("content-type", "")],
        [],
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32-le"])
async def test_a_scope_that_a_client_made_up_reaches_no_server_whatever_it_calls_its_body(
    bench: Bench, headers: list[tuple[str, str]], encoding: str
) -> None:
    forged = {"scope": "public", "tenant": "", "mac": "00"}
    raw = json.dumps(TEXT | {"kv_transfer_params": {"hyperspace": forged, "other": 1}}).encode(encoding)
    await bench.client.post(TEXT_PATH, content=raw, headers=headers)
    (body,) = bench.upstream.bodies
    params = json.loads(body)["kv_transfer_params"]
    assert params["other"] == 1
    assert params.get("hyperspace") != forged


@pytest.mark.parametrize(
    "raw",
    [
        json.dumps(TEXT | {"prompt": "x" * REQUEST_BYTES_MAX}).encode(),
        b'{"prompt": "a", "prompt": "b", "model": "base"}',
    ],
    ids=["too large", "two prompts"],
)
async def test_what_cannot_be_cached_still_stays_in_the_node_when_its_client_says_so(bench: Bench, raw: bytes) -> None:
    headers = {"content-type": "application/json", "cache-control": "private"}
    assert "fwd=bypass" in (await bench.client.post(TEXT_PATH, content=raw, headers=headers)).headers["cache-status"]
    received = json.loads(bench.upstream.bodies[0])
    signed = received.pop("kv_transfer_params")["hyperspace"]
    assert verify_scope(b"process", signed, None) == RequestScope("private", "")
    assert received == json.loads(raw)


async def test_a_server_that_wants_fresh_samples_caches_only_what_cannot_differ(make_bench: MakeBench) -> None:
    bench = await make_bench(cache_sampled=False)
    sampled: tuple[dict[str, Any], ...] = (
        CHAT,
        CHAT | {"temperature": 0.7},
        CHAT | {"temperature": None, "seed": None},
    )
    for body in sampled:
        answer = await bench.ask(body)
        assert answer.headers["cache-status"] == "hyperspace; fwd=bypass; detail=sampled"
    for body in (CHAT | {"temperature": 0}, CHAT | {"temperature": 0.0}, CHAT | {"seed": 0}):
        assert "fwd=bypass" not in (await bench.ask(body)).headers["cache-status"]


async def test_a_model_that_is_no_name_is_the_servers_to_refuse(bench: Bench) -> None:
    answer = await bench.ask(CHAT | {"model": ["base"]})
    assert (answer.status_code, len(bench.upstream.bodies)) == (200, 1)
    assert answer.headers["cache-status"] == "hyperspace; fwd=bypass; detail=unknown_model"


async def test_a_request_for_a_route_of_weights_changes_nothing_by_itself(bench: Bench) -> None:
    await bench.ask(CHAT)
    await bench.stored(1)
    for route in ("/update_weights", "/collective_rpc", "/start_weight_update"):
        await bench.client.post(route, json={})
    assert "hit" in (await bench.ask(CHAT)).headers["cache-status"]


async def test_what_was_computed_while_the_weights_changed_is_not_stored(make_bench: MakeBench) -> None:
    changes = 0
    bench = await make_bench(weights_changes=lambda: changes)
    bench.upstream.gate.clear()
    asked = asyncio.create_task(bench.ask(CHAT))
    await until_async(lambda: len(bench.upstream.bodies) == 1)
    changes = 1  # and back again: the digest is the same as before
    bench.upstream.gate.set()
    await asked
    await bench.ask(CHAT)
    await bench.stored(1)
    assert len(bench.node.scopes) == 1


async def test_other_routes_and_methods_are_not_ours(bench: Bench) -> None:
    for answer in (await bench.client.get(CHAT_PATH), await bench.client.post("/v1/audio/speech", json={})):
        assert answer.status_code in (404, 405)
        assert "cache-status" not in answer.headers


@pytest.mark.parametrize("asked_as", [{}, STREAM])
async def test_an_error_of_ours_is_a_bypass(
    bench: Bench, asked_as: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(bench.cache.recent, "newer", broken)
    for _ in range(2):
        answer = await bench.ask(CHAT | asked_as)
        assert answer.status_code == 200
        assert answer.headers["cache-status"] == "hyperspace; fwd=bypass; detail=error"


@pytest.mark.parametrize("asked_as", [{}, STREAM])
@pytest.mark.parametrize(
    "broken",
    ["middleware.parse_request", "middleware.first_header", "request_facts.tenant_of", "request_facts.storage_scope"],
)
async def test_an_error_before_the_way_is_known_leaves_the_request_to_the_application(
    bench: Bench, asked_as: dict[str, Any], broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"hyperspace_vllm.api.{broken}", lambda *_: 1 / 0)
    answer = await bench.ask(CHAT | asked_as)
    assert answer.status_code == 200
    assert "cache-status" not in answer.headers
    assert json.loads(bench.upstream.bodies[0]) == CHAT | asked_as


async def test_a_scope_that_cant_be_signed_is_no_error(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperspace_vllm.api.request_context.changes_of", lambda *_, **__: 1 / 0)
    for _ in range(2):
        answer = await bench.ask(CHAT)
        assert answer.status_code == 200
        assert answer.headers["cache-status"] == "hyperspace; fwd=bypass; detail=error"


@pytest.mark.parametrize("broken", ["CompletionCollector.feed", "CompletionCollector.result"])
async def test_a_collector_that_raises_breaks_no_stream(
    bench: Bench, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = CHAT | STREAM | USAGE
    expected = await bench.ask(body, cache_control="no-store")
    monkeypatch.setattr(f"hyperspace_vllm.api.streams.collect.{broken}", lambda *_: 1 / 0)
    for _ in range(2):
        answer = await bench.ask(body)
        assert answer.headers["cache-status"] == "hyperspace; fwd=uri-miss; stored"
        assert len(data_of(answer)) == len(data_of(expected))


def test_a_cache_that_cant_be_made_leaves_the_application_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    async def application(*_: object) -> None: ...

    monkeypatch.setattr("hyperspace_vllm.api.middleware.l1_metrics", lambda: 1 / 0)
    options = ResponseCacheOptions(None, lambda: None, None)  # type: ignore[arg-type]
    assert response_cache(application, options) is application


async def test_without_a_node_bodies_pass_unchanged_and_nothing_claims_to_be_stored(bench: Bench) -> None:
    bench.node.connected = False
    answer = await bench.ask(CHAT | STREAM)
    assert answer.headers["cache-status"] == "hyperspace; fwd=uri-miss"
    assert json.loads(bench.upstream.bodies[0]) == CHAT | STREAM


async def test_switched_off_the_cache_leaves_no_trace(make_bench: MakeBench) -> None:
    bench = await make_bench(db_path=None)
    for headers in ({}, {"cache_control": "only-if-cached"}, {"cache_control": "no-store"}):
        answer = await bench.ask(CHAT, **headers)
        assert answer.status_code == 200
        assert "cache-status" not in answer.headers
    assert "cache-status" not in (await bench.ask("not an object")).headers
    assert bench.node.scopes == []


async def test_errors_are_passed_on_and_not_stored(bench: Bench) -> None:
    for body, failure in ((CHAT, "refuse"), (CHAT | STREAM, "error frame"), (CHAT | STREAM, "refuse")):
        bench.upstream.failures = [failure]
        answer = await bench.ask(body)
        assert "hit" not in answer.headers["cache-status"]
        assert "error" in answer.text
    assert (await bench.ask(CHAT)).headers["cache-status"] == "hyperspace; fwd=uri-miss; stored"


async def test_a_stream_that_breaks_off_breaks_off_for_the_client_and_is_not_stored(bench: Bench) -> None:
    bench.upstream.failures = ["raise"]
    with pytest.raises(httpx.RemoteProtocolError):
        await bench.ask(CHAT | STREAM)
    bench.upstream.failures = ["raise"]
    assert (await bench.ask(CHAT)).status_code == 500
    assert bench.node.scopes == []


async def test_a_model_that_changed_meanwhile_is_not_blamed_for_the_answer(make_bench: MakeBench) -> None:
    digest: bytes | None = bytes(32)
    bench = await make_bench(model_digest=lambda: digest)
    bench.upstream.gate.clear()
    asked = asyncio.create_task(bench.ask(CHAT))
    await until_async(lambda: len(bench.upstream.bodies) == 1)
    digest = bytes([1]) * 32
    bench.upstream.gate.set()
    await asked
    await bench.ask(CHAT)
    await bench.stored(1)
    assert len(bench.node.scopes) == 1
    digest = None
    assert (await bench.ask(CHAT)).headers["cache-status"] == "hyperspace; fwd=bypass; detail=no_model_digest"
