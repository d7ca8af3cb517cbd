"""Streams of Anthropic's Messages and OpenAI's Responses: made from stored bodies, and taken together again."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperspace_vllm.api.streams.frames import collector as collector_of
from hyperspace_vllm.api.streams.frames import frames
from hyperspace_vllm.core.response.admission import Admitted, NotStored, admit
from hyperspace_vllm.core.response.request_fields import Endpoint

Json = dict[str, Any]

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300) | st.just("wörd " * 3000)
blocks = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": texts}),
    st.fixed_dictionaries({"type": st.just("thinking"), "thinking": texts, "signature": texts}),
    st.fixed_dictionaries(
        {
            "type": st.just("tool_use"),
            "id": texts,
            "name": texts,
            "input": st.dictionaries(st.text("abc"), st.integers(0, 9) | texts),
        }
    ),
)
items = st.one_of(
    st.fixed_dictionaries(
        {
            "id": texts,
            "type": st.just("message"),
            "role": st.just("assistant"),
            "status": st.just("completed"),
            "content": st.lists(
                st.fixed_dictionaries(
                    {
                        "type": st.just("output_text"),
                        "text": texts,
                        "annotations": st.just([]),
                        "logprobs": st.none()
                        | st.just([{"token": "a", "bytes": [97], "logprob": -0.5, "top_logprobs": []}] * 9),
                    }
                ),
                max_size=1,
            ),
        }
    ),
    st.fixed_dictionaries(
        {
            "id": texts,
            "type": st.just("reasoning"),
            "summary": st.just([]),
            "content": st.lists(st.fixed_dictionaries({"type": st.just("reasoning_text"), "text": texts}), max_size=1),
        }
    ),
    st.fixed_dictionaries(
        {"id": texts, "type": st.just("function_call"), "call_id": texts, "name": texts, "arguments": texts}
    ),
    st.fixed_dictionaries(
        {"id": texts, "type": st.just("custom_tool_call"), "call_id": texts, "name": texts, "input": texts}
    ),
)


def message(content: list[Json], **more: object) -> Json:
    usage = {"input_tokens": 5, "output_tokens": 7}
    body = {"id": "m", "type": "message", "role": "assistant", "content": content, "model": "base"}
    return {**body, "stop_reason": "end_turn", **more, "usage": usage}


def response(output: list[Json], **more: object) -> Json:
    usage = {"input_tokens": 5, "output_tokens": 7, "total_tokens": 12}
    body = {"id": "r", "object": "response", "created_at": 1, "model": "base", "status": "completed"}
    return {**body, "output": output, "usage": usage, "metadata": None, "user": None, **more}


def events(stream: list[bytes]) -> list[Json]:
    """The data of each event, whose names must be their types."""
    found = []
    for frame in stream:
        name, data, *rest = frame.decode().split("\n")
        assert rest == ["", ""]
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def collected(endpoint: Endpoint, stream: list[bytes]) -> Any:
    collector = collector_of(endpoint)
    for frame in stream:
        assert collector.feed(frame) == "other"
    result = collector.result()
    return result if isinstance(result, NotStored) else msgspec.json.decode(result)


@given(st.lists(blocks, min_size=1, max_size=4), st.none() | texts)
def test_a_message_survives_being_streamed(content: list[Json], stop: str | None) -> None:
    body = message(content) if stop is None else message(content, stop_sequence=stop)
    assert collected("messages", list(frames("messages", body, False))) == body


@given(st.lists(items, max_size=4))
def test_a_response_survives_being_streamed(output: list[Json]) -> None:
    body = response(output)
    assert collected("responses", list(frames("responses", body, False))) == body


@given(st.lists(items, max_size=4))
def test_a_replayed_response_says_in_its_events_what_it_says_at_the_end(output: list[Json]) -> None:
    replayed = events(list(frames("responses", response(output), False)))
    assert [event["sequence_number"] for event in replayed] == list(range(len(replayed)))
    assert [event["item"] for event in replayed if event["type"] == "response.output_item.done"] == output
    assert replayed[0]["response"]["status"] == "in_progress"
    assert replayed[0]["response"]["output"] == []
    deltas = {"output_text": "", "reasoning_text": "", "function_call_arguments": "", "custom_tool_call_input": ""}
    for event in replayed:
        kind = event["type"].removeprefix("response.").removesuffix(".delta")
        if event["type"].endswith(".delta"):
            deltas[kind] += event["delta"]
    said = {
        "output_text": [p["text"] for i in output if i["type"] == "message" for p in i["content"]],
        "reasoning_text": [p["text"] for i in output if i["type"] == "reasoning" for p in i["content"]],
        "function_call_arguments": [i["arguments"] for i in output if i["type"] == "function_call"],
        "custom_tool_call_input": [i["input"] for i in output if i["type"] == "custom_tool_call"],
    }
    assert deltas == {kind: "".join(parts) for kind, parts in said.items()}


def test_log_probabilities_come_with_the_text_whose_they_are() -> None:
    entries = [{"token": str(n), "bytes": [], "logprob": -1.0, "top_logprobs": []} for n in range(10)]
    part = {"type": "output_text", "text": "x" * 9000, "annotations": [], "logprobs": entries}
    item = {"id": "i", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
    deltas = [e for e in events(list(frames("responses", response([item]), False))) if e["type"].endswith("text.delta")]
    assert len(deltas) == 3
    assert [entry["token"] for delta in deltas for entry in delta["logprobs"]] == [str(n) for n in range(10)]
    assert deltas[0]["logprobs"][0] == {"token": "0", "logprob": -1.0, "top_logprobs": []}


def test_what_a_servers_own_tool_did_has_no_stream() -> None:
    with pytest.raises(ValueError, match="code_interpreter_call"):
        list(frames("responses", response([{"type": "code_interpreter_call", "id": "c"}]), False))


# --- streams as vLLM sends them ------------------------------------------------------------------


def sse(*stream: Json) -> list[bytes]:
    return [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in stream]


START: Json = {
    "type": "message_start",
    "message": {
        "id": "m", "type": "message", "role": "assistant", "content": [], "model": "base",
        "stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 5, "output_tokens": 0},
    },
}  # fmt: skip
OPEN: Json = {"index": 0, "type": "content_block_start", "content_block": {"type": "text", "text": ""}}
TEXT: Json = {"index": 0, "type": "content_block_delta", "delta": {"type": "text_delta", "text": "blue"}}
CLOSE: Json = {"index": 0, "type": "content_block_stop"}
END: Json = {
    "type": "message_delta",
    "delta": {"stop_reason": "end_turn", "stop_sequence": None},
    "usage": {"input_tokens": 5, "output_tokens": 7},
}
STOP: Json = {"type": "message_stop"}
# Arguments that were cut off.
CALL: list[Json] = [
    OPEN | {"content_block": {"type": "tool_use", "id": "t", "name": "add", "input": {}}},
    TEXT | {"delta": {"type": "input_json_delta", "partial_json": '{"a": 1'}},
    CLOSE,
]


def test_a_stream_of_vllms_becomes_its_answer() -> None:
    assert collected("messages", sse(START, OPEN, TEXT, TEXT, CLOSE, END, STOP)) == message(
        [{"type": "text", "text": "blueblue"}]
    )
    assert collected("messages", sse(START, END, STOP)) == message([{"type": "text", "text": ""}])


def test_an_empty_answer_is_replayed_as_vllm_streams_it() -> None:
    replayed = events(list(frames("messages", message([{"type": "text", "text": ""}]), False)))
    assert replayed == [START, END, STOP]


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (sse(START, OPEN, TEXT, CLOSE, END), "unfinished"),
        (sse(START, OPEN, TEXT, CLOSE, STOP), "unfinished"),
        (sse(OPEN, TEXT, CLOSE, END, STOP), "inconsistent"),
        (sse(START, START, END, STOP), "inconsistent"),
        (sse(START, TEXT, END, STOP), "inconsistent"),
        (sse(START, OPEN, TEXT, END, STOP), "unknown_field"),
        (sse(START, OPEN | {"index": 1}, END, STOP), "inconsistent"),
        (sse(START, OPEN | {"content_block": {"type": "image"}}, CLOSE, END, STOP), "unknown_field"),
        (sse(START, OPEN, TEXT | {"delta": {"type": "thinking_delta", "thinking": "x"}}, END, STOP), "unknown_field"),
        (sse(START, *CALL, END, STOP), "inconsistent"),
        (sse(START, {"type": "error", "error": {"type": "x", "message": "y"}}, STOP), "error"),
        (sse(START, {"type": "new_event"}, END, STOP), "unknown_field"),
        ([*sse(START), b"event: message_delta\ndata: {\n\n", *sse(STOP)], "garbled"),
        ([*sse(START), b"event: ping\ndata: " + json.dumps(END).encode() + b"\n\n", *sse(STOP)], "garbled"),
        ([b"data: {}\n\n"], "garbled"),
    ],
)
def test_a_message_stream_that_is_odd_is_not_stored(stream: list[bytes], reason: str) -> None:
    assert collected("messages", stream) == NotStored(reason)


DONE: Json = {"type": "response.completed", "response": response([])}


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (sse({"type": "response.created", "response": {}}), "unfinished"),
        (sse({"type": "response.failed", "response": {}}, DONE), "error"),
        (sse({"type": "error", "message": "x"}, DONE), "error"),
        (sse(DONE, DONE), "error"),
        ([b"event: response.completed\ndata: {\n\n"], "garbled"),
        ([b"event: response.completed\ndata: []\n\n"], "garbled"),
    ],
)
def test_a_response_stream_that_is_odd_is_not_stored(stream: list[bytes], reason: str) -> None:
    assert collected("responses", stream) == NotStored(reason)


@pytest.mark.parametrize(
    ("endpoint", "body", "reason"),
    [
        ("messages", message([], stop_reason=None), "unfinished"),
        ("messages", message([]) | {"usage": None}, "no_usage"),
        ("messages", {"type": "error", "error": {}}, "error"),
        ("responses", response([], status="failed"), "unfinished"),
        ("responses", response([]), "empty"),
        ("responses", response([{"type": "message", "content": []}]), "empty"),
        ("responses", response([], status="in_progress"), "unfinished"),
        ("responses", response([]) | {"object": "list"}, "error"),
        ("rerank", {"id": "r", "model": "m", "results": [], "usage": {}}, "unfinished"),
        ("score", {"id": "s", "object": "list", "created": 1, "model": "m", "data": [5], "usage": {}}, "unfinished"),
    ],
)
def test_what_did_not_finish_is_not_stored(endpoint: Endpoint, body: Json, reason: str) -> None:
    assert admit(endpoint, {}, json.dumps(body).encode()) == NotStored(reason)


def test_what_an_answer_repeats_of_its_request_is_not_stored() -> None:
    output = [{"type": "reasoning"}]
    body = response(output, metadata={"user": "ann"}, user="ann", kv_transfer_params={"x": 1})
    admitted = admit("responses", {}, json.dumps(body).encode())
    assert isinstance(admitted, Admitted)
    stored = response(output, kv_transfer_params=None)
    del stored["id"]
    assert msgspec.json.decode(admitted.body) == stored
