"""Large requests at a server that has no time for them pass by the cache as they came."""

import asyncio
import json
import threading
from typing import Any

import pytest

from hyperspace_vllm.api.http_headers import RawHeaders
from hyperspace_vllm.core.records.limits import INLINE_BODY_BYTES, LARGE_BODIES_BYTES_MAX
from hyperspace_vllm.core.response.request_fields import Endpoint
from hyperspace_vllm.core.response.scope import RequestScope, engine_salt, verify_scope
from tests.support.cached_server import CHAT, CHAT_PATH, MakeBench, text_of
from tests.support.large_requests import AS_JSON, BYPASSED, LARGEST, LONG_CHAT, PATIENT_S, emptied, taken
from tests.support.until import until_async


@pytest.mark.io
async def test_a_large_request_for_which_there_is_no_time_passes_by_as_it_came(make_bench: MakeBench) -> None:
    bench = await make_bench()
    await bench.ask(CHAT)
    await bench.ask(LONG_CHAT)
    raw = json.dumps(LONG_CHAT).encode()
    async with taken(bench.cache.bodies, LARGE_BODIES_BYTES_MAX):
        answer = await bench.client.post(CHAT_PATH, content=raw, headers=AS_JSON)
        assert (answer.status_code, answer.headers["cache-status"]) == (200, BYPASSED)
        assert bench.upstream.bodies[-1] == raw
        assert "; hit; " in (await bench.ask(CHAT)).headers["cache-status"]
        refused = await bench.ask(LONG_CHAT, cache_control="only-if-cached")
        assert (refused.status_code, refused.headers["cache-status"]) == (504, "hyperspace; detail=busy")
    await emptied(bench.cache.bodies)
    assert "; hit; " in (await bench.ask(LONG_CHAT)).headers["cache-status"]


@pytest.mark.io
async def test_a_large_request_of_another_type_passes_by_as_it_came_too(make_bench: MakeBench) -> None:
    bench = await make_bench()
    raw = json.dumps(LONG_CHAT).encode()
    async with taken(bench.cache.bodies, LARGE_BODIES_BYTES_MAX):
        answer = await bench.client.post(CHAT_PATH, content=raw, headers={"content-type": "text/plain"})
    assert answer.headers["cache-status"] == "hyperspace; fwd=bypass; detail=not_json"
    assert bench.upstream.bodies == [raw]


@pytest.mark.io
async def test_large_requests_that_are_alike_are_computed_once(make_bench: MakeBench) -> None:
    bench = await make_bench(api_keys=("one", "two"))  # whose salt is put into each of them
    bench.upstream.gate.clear()
    asked = [asyncio.create_task(bench.ask(LONG_CHAT, authorization="Bearer one")) for _ in range(20)]
    await until_async(lambda: bench.cache.flights.readers == 20)
    bench.upstream.gate.set()
    answers = await asyncio.gather(*asked)
    assert len(bench.upstream.bodies) == 1
    assert len({text_of(answer) for answer in answers}) == 1


@pytest.mark.io
async def test_a_large_request_waits_no_longer_than_its_deadline(make_bench: MakeBench) -> None:
    bench = await make_bench(body_deadline_s=0.05)
    async with taken(bench.cache.bodies, LARGEST):
        assert (await bench.ask(LONG_CHAT)).headers["cache-status"] == BYPASSED


@pytest.mark.io
async def test_an_entry_waits_no_longer_for_the_servers_own_checks(make_bench: MakeBench) -> None:
    done = threading.Event()

    def accepts(endpoint: Endpoint, body: bytes, headers: RawHeaders) -> bool:
        return len(body) <= INLINE_BODY_BYTES or done.wait(PATIENT_S)

    bench = await make_bench(accepts=accepts)
    await bench.ask(LONG_CHAT)
    await bench.stored(1)
    bench.cache.bodies._deadline_s = 0.05
    answer = await bench.ask(LONG_CHAT)
    done.set()
    assert (answer.status_code, answer.headers["cache-status"]) == (200, BYPASSED)
    assert len(bench.upstream.bodies) == 2


@pytest.mark.io
@pytest.mark.parametrize("path", [CHAT_PATH, "/pooling"])
async def test_what_keeps_tenants_apart_reaches_the_server_also_without_time(make_bench: MakeBench, path: str) -> None:
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response

    received: list[dict[str, Any]] = []

    async def pooling(request: Request) -> Response:
        received.append(await request.json())
        return JSONResponse({})

    bench = await make_bench(api_keys=("one", "two"), more_routes={"/pooling": pooling})
    async with taken(bench.cache.bodies, LARGE_BODIES_BYTES_MAX):
        await bench.ask(LONG_CHAT, path, authorization="Bearer one")
    (body,) = received or [json.loads(raw) for raw in bench.upstream.bodies]
    assert body["cache_salt"] == engine_salt("one", None)


@pytest.mark.io
async def test_a_private_request_stays_in_the_node_also_without_time(make_bench: MakeBench) -> None:
    bench = await make_bench()
    async with taken(bench.cache.bodies, LARGE_BODIES_BYTES_MAX):
        answer = await bench.ask(LONG_CHAT, cache_control="private")
        assert answer.headers["cache-status"] == BYPASSED
    signed = json.loads(bench.upstream.bodies[0])["kv_transfer_params"]["hyperspace"]
    assert verify_scope(b"process", signed, None) == RequestScope("private", "")


@pytest.mark.io
async def test_a_client_that_leaves_while_its_request_is_read_leaves_nothing_behind(make_bench: MakeBench) -> None:
    bench = await make_bench()
    bench.upstream.gate.clear()
    async with taken(bench.cache.bodies, LARGEST):
        asked = asyncio.create_task(bench.ask(LONG_CHAT))
        await until_async(lambda: bench.cache.bodies.waiting > LARGEST)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
    await until_async(lambda: bench.requests.running == 0)
    await emptied(bench.cache.bodies)
    assert bench.cache.flights.readers == 0
    bench.upstream.gate.set()
    assert (await bench.ask(LONG_CHAT)).headers["cache-status"] == "hyperspace; fwd=uri-miss; stored"
