"""A stored answer holds nothing of the client that asked first; each client's answer has ids of its own."""

import asyncio
import json
import re
import socket
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import vllm
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from hyperspace_vllm.api import stored_answer
from hyperspace_vllm.api.own_ids import OwnIds
from hyperspace_vllm.api.stored_answer import Sending, StoredAnswer
from hyperspace_vllm.api.streams.frames import frames
from hyperspace_vllm.core.records.limits import SENDING_BYTES_MAX
from hyperspace_vllm.core.response.admission import Admitted, admit
from hyperspace_vllm.core.response.answer_ids import ID_CHARS_MAX, answer_id, named_by, without_ids
from hyperspace_vllm.core.response.request_fields import ENDPOINTS, POOLING, Endpoint
from tests.support.answers import MARK, canaries, events, ids_in
from tests.support.cached_server import CHAT, CHAT_PATH, STREAM, TEXT, TEXT_PATH, MakeBench, benches, text_of
from tests.support.until import until_async

Json = dict[str, Any]

PATHS = {endpoint: path for path, endpoint in ENDPOINTS.items()}
BODIES: dict[Endpoint, Json] = {"chat": CHAT, "completions": TEXT}


def marked_calls(number: int) -> list[Json]:
    function = {"name": "f", "arguments": f'{{"id":"msg_{number:016x}"}}'}
    return [{"id": f"chatcmpl-tool-{uuid.uuid4().hex[:16]}", "type": "function", "function": function}]


def answers() -> dict[Endpoint, Json]:
    """An answer of each endpoint with all ids that vLLM puts there, drawn anew each time."""

    def drawn(prefix: str, digits: int = 16) -> str:
        return prefix + uuid.uuid4().hex[:digits]

    usage = {"input_tokens": 5, "output_tokens": 7, "total_tokens": 12}
    counts = {"prompt_tokens": 5, "total_tokens": 12, "completion_tokens": 7}
    message = {"role": "assistant", "content": "Blue.", "tool_calls": marked_calls(1) + marked_calls(2)}
    part: dict[str, object] = {"type": "output_text", "text": "Blue.", "annotations": [], "logprobs": None}
    call = {"type": "function_call", "name": "f", "arguments": "{}", "status": "completed"}
    custom = {"type": "custom_tool_call", "name": "g", "input": "x"}
    thought = {"type": "thinking", "thinking": "Hm.", "signature": drawn("", 32)}
    tool_use = {"type": "tool_use", "id": drawn("chatcmpl-tool-"), "name": "f", "input": {"id": "msg_" + "0" * 16}}
    output = [
        {
            "id": drawn("rs_"),
            "type": "reasoning",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Hm."}],
        },
        {"id": drawn("msg_"), "type": "message", "role": "assistant", "status": "completed", "content": [part]},
        {"id": drawn("fc_"), "call_id": drawn("call_"), **call},
        {"id": drawn("ctc_"), "call_id": drawn("", 9), **custom},
    ]
    text = {"index": 0, "text": "Blue.", "finish_reason": "stop"}
    named = {"created": 1, "model": "base", "usage": counts}
    return {
        "chat": {
            "object": "chat.completion",
            "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}],
            **named,
        },
        "completions": {"object": "text_completion", "choices": [text], **named},
        "responses": {
            "object": "response", "created_at": 1, "model": "base", "status": "completed", "output": output,
            "usage": usage,
        },
        "messages": {
            "type": "message", "role": "assistant", "content": [thought, tool_use], "model": "base",
            "stop_reason": "tool_use", "usage": usage,
        },
        "embeddings": {"object": "list", "data": [{"index": 0, "object": "embedding", "embedding": "AAAA"}], **named},
        "rerank": {"model": "base", "results": [{"index": 0, "relevance_score": 1.0}], "usage": counts},
        "score": {"object": "list", "data": [{"index": 0, "score": 1.0}], **named},
    }  # fmt: skip


# --- the stored form --------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ENDPOINTS.values())
def test_the_same_answer_to_two_clients_is_stored_alike_and_has_two_sets_of_ids(endpoint: Endpoint) -> None:
    stored = [admit(endpoint, {}, json.dumps({"id": MARK, **answers()[endpoint]}).encode()) for _ in range(2)]
    assert isinstance(stored[0], Admitted)
    assert stored[0] == stored[1]
    assert MARK.encode() not in stored[0].body
    assert admit(endpoint, {}, stored[0].body) == stored[0]
    replays = [msgspec.json.decode(OwnIds(endpoint, None).body(stored[0].body)) for _ in range(2)]
    mine, theirs = [list(ids_in(replay)) for replay in replays]
    assert len(set(mine)) == len(set(theirs)) == len(list(ids_in(answers()[endpoint]))) + 1
    assert not set(mine) & set(theirs)
    for replay in replays:
        assert without_ids(replay) == msgspec.json.decode(stored[0].body)


def test_what_tools_are_given_is_left_alone() -> None:
    for endpoint in ("chat", "messages"):
        stored = without_ids({"id": MARK, **answers()[endpoint]})
        assert "msg_0000000000000000" in json.dumps(stored) or "msg_0000000000000001" in json.dumps(stored)
        replay = OwnIds(endpoint, None).body(msgspec.json.encode(stored)).decode()
        assert "msg_0000000000000000" in replay or 'msg_0000000000000001\\"' in replay


def test_ids_that_the_conversation_gives_are_part_of_the_answer() -> None:
    """Kimi's and Cohere's count the calls; the model reads them in the next turn."""
    kept: list[dict[str, object]] = [
        {"id": given, "type": "function", "function": {}} for given in ("functions.add:0", "0", "call_1")
    ]
    answer = {"choices": [{"message": {"tool_calls": kept}}]}
    assert [call["id"] for call in without_ids(answer)["choices"][0]["message"]["tool_calls"]] == [
        "functions.add:0", "0", "call_1",
    ]  # fmt: skip


def test_whatever_id_vllm_draws_is_renewed() -> None:
    from vllm.parser.mistral import MistralToolCall
    from vllm.renderers.chat_utils import make_tool_call_id
    from vllm.utils import random_uuid

    drawn = {make_tool_call_id(), MistralToolCall.generate_random_id(), uuid.uuid4().hex}
    root = Path(vllm.__file__).parent
    sources = [path for part in ("entrypoints", "tool_parsers", "parser") for path in (root / part).rglob("*.py")]
    written = re.compile(r'f"([a-z]+[-_](?:tool-)?)(?:\{idx\}_)?\{random_uuid\(\)\}"')
    found = {match for path in sources for match in written.findall(path.read_text())}
    assert {"msg_", "rs_", "fc_", "ctc_", "call_", "chatcmpl-tool-"} <= found
    drawn |= {prefix + random_uuid() for prefix in found} | {f"call_0_{random_uuid()}"}
    for each in drawn:
        output = without_ids({"output": [{"id": each}]})["output"][0]["id"]
        assert output != each
        assert len(output) == len(each)


def test_answers_are_named_as_vllm_names_them() -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionResponse
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionResponse
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.pooling.embed.serving import ServingEmbedding
    from vllm.entrypoints.pooling.scoring.serving import ServingScores

    def drawn(model: Any, name: str = "id") -> str:
        return str(model.model_fields[name].default_factory())

    vllms = {
        "chat": drawn(ChatCompletionResponse),
        "messages": drawn(ChatCompletionResponse),  # its answer has the id of the chat that it is made from
        "completions": drawn(CompletionResponse),
        "responses": drawn(ResponsesRequest, "request_id"),
        "embeddings": f"{ServingEmbedding.request_id_prefix}-{drawn(ChatCompletionRequest, 'request_id')}",
        "rerank": f"{ServingScores.request_id_prefix}-{drawn(CompletionRequest, 'request_id')}",
        "score": f"{ServingScores.request_id_prefix}-{drawn(CompletionRequest, 'request_id')}",
    }
    for endpoint in ENDPOINTS.values():
        own = OwnIds(endpoint, None).answer
        form = re.compile(r"[0-9a-f]{16}$")
        assert (form.sub("", own), len(own)) == (form.sub("", vllms[endpoint]), len(vllms[endpoint]))
        # The header goes before the body's name, but for Responses, which knows its body's alone.
        named = {"request_id": "body's"}
        by_header = answer_id(endpoint, named_by(endpoint, named, "header's"), "")
        assert by_header == ("body's" if endpoint == "responses" else form.sub("", own) + "header's")
    assert named_by("messages", {"request_id": "body's"}, None) is None


@pytest.mark.parametrize("endpoint", [each for each in ENDPOINTS.values() if each not in POOLING])
def test_a_stream_under_way_is_renamed_as_its_answer_would_be(endpoint: Endpoint) -> None:
    body = {"id": MARK, **answers()[endpoint]}
    sent = list(frames(endpoint, body, True))
    own = OwnIds(endpoint, "bob")
    renamed = [own.frame(frame) for frame in sent]
    assert renamed == list(frames(endpoint, own.decoded(msgspec.json.encode(body)), True))
    assert not set(ids_in(events(b"".join(sent)))) & set(ids_in(events(b"".join(renamed))))
    assert own.frame(b": data: {}\n\n") == b": data: {}\n\n"


# --- on real sockets --------------------------------------------------------------------------------


@pytest.fixture
async def make_bench(tmp_path: Path) -> AsyncIterator[MakeBench]:
    async with benches(tmp_path) as make:
        yield make


def ids_of(answer: httpx.Response) -> set[str]:
    if answer.headers["content-type"] == "application/json":
        return {answer.json()["id"]}
    return {event["id"] for event in events(answer.content)}


NAMES: list[dict[str, Json]] = [{"headers": {"x-request-id": MARK}}, {"body": {"request_id": MARK}}]
asked_both_ways = pytest.mark.parametrize("asked_as", [{}, STREAM], ids=["json", "stream"])


@pytest.mark.io
@asked_both_ways
@pytest.mark.parametrize("named", NAMES, ids=["header", "body"])
@pytest.mark.parametrize(("path", "form"), [(CHAT_PATH, r"chatcmpl-[0-9a-f]{16}"), (TEXT_PATH, r"cmpl-[0-9a-f]{16}")])
async def test_what_a_client_calls_its_request_is_heard_by_no_other(
    make_bench: MakeBench, path: str, form: str, named: dict[str, Json], asked_as: Json
) -> None:
    bench = await make_bench()
    body = BODIES[ENDPOINTS[path]]
    first = await bench.ask(body | asked_as | named.get("body", {}), path, **named.get("headers", {}))
    assert all(MARK in each for each in ids_of(first))
    await bench.stored(1)
    hits = [await bench.ask(body | as_, path) for as_ in ({}, STREAM, {}, STREAM)]
    for hit in hits:
        assert "; hit; " in hit.headers["cache-status"]
        assert MARK not in hit.text
        assert text_of(hit) == text_of(first)
    ids = [ids_of(hit) for hit in hits]
    assert all(len(each) == 1 for each in ids)
    assert len(set.union(*ids)) == len(hits)
    assert all(re.fullmatch(form, each) for each in set.union(*ids))
    mine = await bench.ask(body | asked_as, path, x_request_id="trace-7")
    assert "; hit; " in mine.headers["cache-status"]
    assert ids_of(mine) == {form.partition("[")[0] + "trace-7"}


@pytest.mark.io
@asked_both_ways
async def test_those_who_share_a_computation_have_ids_of_their_own(make_bench: MakeBench, asked_as: Json) -> None:
    bench = await make_bench()
    bench.upstream.gate.clear()
    names = [MARK, "bob", None, None]
    asked = []
    for name in names:
        named = {} if name is None else {"request_id": name}
        asked.append(asyncio.create_task(bench.ask(CHAT | asked_as | named)))
        await until_async(lambda: bench.cache.flights.readers == len(asked))
    bench.upstream.gate.set()
    leader, *others = await asyncio.gather(*asked)
    assert ids_of(leader) == {f"chatcmpl-{MARK}"}
    assert all(other.headers["cache-status"].endswith("collapsed") for other in others)
    assert all(MARK not in other.text for other in others)
    assert ids_of(others[0]) == {"chatcmpl-bob"}
    assert len(ids_of(others[1]) | ids_of(others[2])) == 2
    assert {text_of(answer) for answer in (leader, *others)} == {"w1.0 w1.1 w1.2 "}


class VllmsOwn:
    """Routes that answer with what vLLM's own models make of a request."""

    async def responses(self, raw: Request) -> Response:
        from openai.types.responses import ResponseOutputMessage
        from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, ResponsesResponse, ResponseUsage
        from vllm.sampling_params import SamplingParams

        body = await raw.json()
        output = [ResponseOutputMessage.model_validate(answers()["responses"]["output"][1])]
        request = ResponsesRequest.model_validate(body)
        usage = {"input_tokens": 5, "output_tokens": 7, "total_tokens": 12}
        details = {
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        }
        answer = ResponsesResponse.from_request(
            request, SamplingParams(max_tokens=9), "base", 1, output, "completed", ResponseUsage(**usage, **details)
        ).model_dump()  # fmt: skip
        if not body.get("stream"):
            return JSONResponse(answer)
        return StreamingResponse(iter(list(frames("responses", answer, True))), media_type="text/event-stream")

    async def messages(self, raw: Request) -> Response:
        from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest

        body = await raw.json()
        AnthropicMessagesRequest.model_validate(body)
        answer = {"id": f"chatcmpl-{raw.headers.get('x-request-id', 'x')}", **answers()["messages"]}
        if not body.get("stream"):
            return JSONResponse(answer)
        return StreamingResponse(iter(list(frames("messages", answer, True))), media_type="text/event-stream")


@pytest.mark.io
@asked_both_ways
@pytest.mark.parametrize(
    ("endpoint", "body"),
    [("responses", {"input": "Why?"}), ("messages", {"messages": CHAT["messages"], "max_tokens": 9})],
)
async def test_nothing_that_the_key_leaves_out_reaches_another_client(
    make_bench: MakeBench, endpoint: Endpoint, body: Json, asked_as: Json
) -> None:
    own = VllmsOwn()
    routes = {PATHS["responses"]: own.responses, PATHS["messages"]: own.messages}
    bench = await make_bench(more_routes=routes)
    body, path = {"model": "base", **body}, PATHS[endpoint]
    first = await bench.ask(body | asked_as | canaries(endpoint), path, x_request_id=MARK)
    assert MARK in first.text
    await bench.stored(1)
    hits = [await bench.ask(body | as_, path) for as_ in ({}, STREAM)]
    assert all("; hit; " in hit.headers["cache-status"] and MARK not in hit.text for hit in hits)
    mine, theirs = [
        set(ids_in(hit.json() if as_ else events(hit.content))) for as_, hit in zip((1, 0), hits, strict=True)
    ]
    assert mine
    assert not mine & theirs


# --- bounds -----------------------------------------------------------------------------------------


@pytest.mark.io
@pytest.mark.parametrize("named", NAMES, ids=["header", "body"])
async def test_a_name_too_long_to_repeat_passes_by_the_cache(make_bench: MakeBench, named: dict[str, Json]) -> None:
    bench = await make_bench()

    def asking(length: int) -> tuple[Json, dict[str, str]]:
        body, headers = named.get("body", {}), named.get("headers", {})
        return CHAT | dict.fromkeys(body, "A" * length), dict.fromkeys(headers, "A" * length)

    for length, hit in ((ID_CHARS_MAX, False), (ID_CHARS_MAX, True), (ID_CHARS_MAX + 1, False), (8_000, False)):
        body, headers = asking(length)
        answer = await bench.ask(body, **headers)
        await bench.stored(1)
        assert ids_of(answer) == {"chatcmpl-" + "A" * length}  # as vLLM alone would
        assert ("; hit; " in answer.headers["cache-status"]) is hit
        if length > ID_CHARS_MAX:
            assert answer.headers["cache-status"] == "hyperspace; fwd=bypass; detail=request_id"


@pytest.mark.io
async def test_a_stream_much_longer_than_its_answer_is_computed_again(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = await make_bench()
    await bench.ask(CHAT)
    await bench.stored(1)
    monkeypatch.setattr(stored_answer, "REPLAY_BYTES_MAX", 300)  # a stream of 5 frames has more
    assert "; hit; " in (await bench.ask(CHAT)).headers["cache-status"]
    assert "fwd=stale" in (await bench.ask(CHAT | STREAM)).headers["cache-status"]


@pytest.mark.io
async def test_hits_that_clients_do_not_read_take_a_bounded_amount_of_memory(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = await make_bench()
    bench.upstream.filler = "x" * 2_000_000
    await bench.ask(CHAT)
    await bench.stored(1)
    monkeypatch.setattr(stored_answer, "SENDING_BYTES_MAX", 15_000_000)
    payload = json.dumps(CHAT | STREAM).encode()
    head = f"POST {CHAT_PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    writers = []

    async def ask_and_never_read() -> None:
        connection = socket.create_connection(("127.0.0.1", bench.port))
        _, writer = await asyncio.open_connection(sock=connection, limit=1024)
        writer.write(f"{head}content-length: {len(payload)}\r\n\r\n".encode() + payload)
        writers.append(writer)

    await ask_and_never_read()
    await until_async(lambda: bench.cache.sending.bytes > 6e6)
    await ask_and_never_read()
    await until_async(lambda: bench.cache.sending.bytes > 12e6)
    await ask_and_never_read()
    await until_async(lambda: len(bench.upstream.bodies) == 2)  # vLLM has to
    assert bench.cache.sending.bytes < 15e6
    for writer in writers:
        writer.transport.abort()
    await until_async(lambda: bench.cache.sending.bytes == 0)


async def test_a_hit_counts_what_its_request_holds(make_bench: MakeBench) -> None:
    bench = await make_bench()
    await bench.ask(CHAT)
    await bench.stored(1)
    with bench.cache.sending.holding(SENDING_BYTES_MAX - 1_000_000):
        for size, found in ((200_000, "; hit; "), (400_000, "fwd=stale")):
            answer = await bench.ask(CHAT | {"metadata": {"a": "x" * size}})
            assert found in answer.headers["cache-status"]


def test_small_hits_are_served_however_much_is_held() -> None:
    sending = Sending()
    with sending.holding(SENDING_BYTES_MAX):
        assert sending.has_room(StoredAnswer([], [b"x" * 60_000]))
        assert not sending.has_room(StoredAnswer([], [b"x" * 70_000]))
    assert sending.bytes == 0
