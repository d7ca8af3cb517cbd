"""What the server itself refuses is not answered from the cache, whatever the cache has for it."""

import asyncio
from typing import Any

import pytest

from hyperspace_vllm.api.http_headers import RawHeaders
from hyperspace_vllm.core.response.request_fields import Endpoint
from tests.api.conftest import PATIENT_S
from tests.api.test_network_race import Says, found
from tests.support.cached_server import CHAT, STREAM, Bench, MakeBench
from tests.support.until import until_async

pytestmark = pytest.mark.io

REFUSED = {"user": "refused"}
BYPASSED = "hyperspace; fwd=bypass; detail=refused"


def accepts(endpoint: Endpoint, body: bytes, headers: RawHeaders) -> bool:
    return b'"refused"' not in body


@pytest.mark.parametrize("asked_as", [{}, STREAM])
async def test_an_entry_is_not_for_a_request_that_is_refused(make_bench: MakeBench, asked_as: dict[str, Any]) -> None:
    bench = await make_bench(accepts=accepts)
    await bench.ask(CHAT)
    assert "; hit; " in (await bench.ask(CHAT | asked_as)).headers["cache-status"]
    bench.upstream.failures.append("refuse")
    answer = await bench.ask(CHAT | REFUSED | asked_as)
    assert (answer.status_code, answer.headers["cache-status"]) == (503, BYPASSED)


async def test_no_computation_is_shared_with_a_request_that_is_refused(make_bench: MakeBench) -> None:
    bench = await make_bench(accepts=accepts)
    bench.upstream.gate.clear()
    leader = asyncio.create_task(bench.ask(CHAT))
    await until_async(lambda: bench.cache.flights.readers == 1)
    refused = asyncio.create_task(bench.ask(CHAT | REFUSED))
    await until_async(lambda: len(bench.upstream.bodies) == 2)
    bench.upstream.gate.set()
    assert (await refused).headers["cache-status"] == BYPASSED
    assert (await leader).headers["cache-status"] == "hyperspace; fwd=uri-miss; stored"


async def test_another_nodes_answer_is_not_for_a_request_that_is_refused(make_bench: MakeBench) -> None:
    bench = await make_bench(accepts=accepts, network_deadline_s=PATIENT_S)
    bench.node.others = Says(True, found)
    assert (await bench.ask(CHAT | REFUSED)).headers["cache-status"] == "hyperspace; fwd=uri-miss; stored"
    assert "; detail=peer" in (await bench.ask(CHAT | {"max_tokens": 5})).headers["cache-status"]


async def test_other_wordings_do_not_answer_a_request_that_is_refused(make_bench: MakeBench) -> None:
    def chat(question: str, **more: object) -> dict[str, Any]:
        return {"model": "base", "messages": [{"role": "user", "content": question}], **more}

    bench: Bench = await make_bench(accepts=accepts, semantic="balanced")
    await bench.ask(chat("What is ML?"))
    await bench.stored(1)
    wording = "Please explain machine learning."
    assert " hit" not in (await bench.ask(chat(wording, **REFUSED))).headers["cache-status"]
    assert len(bench.upstream.bodies) == 2
