"""A stored answer replays as the stream it might have been, and a stream is stored as the answer it is."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperspace_vllm.api.streams.frames import collector as collector_of
from hyperspace_vllm.api.streams.frames import frames
from hyperspace_vllm.core.response.admission import Admitted, NotStored, admit, streams_completely
from hyperspace_vllm.core.response.request_fields import Endpoint

USAGE = {
    "prompt_tokens": 5,
    "total_tokens": 8,
    "completion_tokens": 3,
    "prompt_tokens_details": {"cached_tokens": 4, "created_cache_tokens": None, "multimodal_tokens": None},
    "completion_tokens_details": None,
}

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=300) | st.just("wörd " * 3000)
ids = st.none() | st.lists(st.integers(0, 300_000), max_size=150)
logprob = st.floats(-9999.0, 0.0)


def chat_entry(token: str, value: float) -> dict[str, Any]:
    top = {"token": token, "logprob": value, "bytes": list(token.encode())}
    return {**top, "top_logprobs": [top]}


@st.composite
def chat_choices(draw: st.DrawFn, index: int) -> dict[str, Any]:
    calls = [
        {"id": f"call-{at}", "type": "function", "function": {"name": "f", "arguments": draw(texts)}}
        for at in range(draw(st.integers(0, 3)))
    ]
    reasoning = draw(st.none() | texts)
    message = {
        "role": "assistant",
        "content": draw(texts if not calls and reasoning is None else st.none() | texts),
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        **({"tool_calls": calls} if calls else {}),
        "reasoning": reasoning,
    }
    entries = draw(st.none() | st.lists(st.builds(chat_entry, st.text("abé", max_size=3), logprob), max_size=150))
    return {
        "index": index,
        "message": message,
        "logprobs": None if entries is None else {"content": entries},
        "finish_reason": draw(st.sampled_from(["stop", "length", "tool_calls"])),
        "stop_reason": draw(st.none() | st.just("###") | st.just(7)),
        "token_ids": draw(ids),
        "routed_experts": None,
    }


@st.composite
def chat_bodies(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_800_000_000,
        "model": "m",
        "choices": [draw(chat_choices(index)) for index in range(draw(st.integers(1, 3)))],
        "service_tier": None,
        "system_fingerprint": draw(st.none() | st.just("vllm-0.32.0-abcdef01")),
        "usage": USAGE,
        "prompt_logprobs": None,
        "prompt_token_ids": draw(ids),
        "prompt_text": draw(st.none() | st.just("<user>hi")),
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }


@st.composite
def completion_bodies(draw: st.DrawFn) -> dict[str, Any]:
    choices = []
    for index in range(draw(st.integers(1, 3))):
        count = draw(st.none() | st.integers(0, 150))
        logprobs = count if count is None else {
            "text_offset": list(range(count)),
            "token_logprobs": [None, *[-0.5] * count][:count],
            "tokens": ["t"] * count,
            "top_logprobs": [None, *[{"t": -0.5}] * count][:count],
        }  # fmt: skip
        choices.append(
            {
                "index": index,
                "text": draw(texts),
                "logprobs": logprobs,
                "finish_reason": "stop",
                "stop_reason": None,
                "token_ids": draw(ids),
                "prompt_logprobs": None,
                "prompt_token_ids": draw(ids),
                "routed_experts": None,
            }
        )
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1_800_000_000,
        "model": "m",
        "choices": choices,
        "service_tier": None,
        "system_fingerprint": draw(st.none() | st.just("vllm-0.32.0-abcdef01")),
        "usage": USAGE,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }


def collected(endpoint: Endpoint, stream: list[bytes]) -> Any:
    collector = collector_of(endpoint)
    for frame in stream:
        collector.feed(frame)
    result = collector.result()
    return result if isinstance(result, NotStored) else msgspec.json.decode(result)


@given(chat_bodies())
def test_a_chat_answer_survives_being_streamed(body: dict[str, Any]) -> None:
    assert collected("chat", list(frames("chat", body, include_usage=True))) == without_null_details(body)


@given(completion_bodies())
def test_a_completion_survives_being_streamed(body: dict[str, Any]) -> None:
    assert collected("completions", list(frames("completions", body, include_usage=True))) == without_null_details(body)


def without_null_details(body: dict[str, Any]) -> dict[str, Any]:
    """vLLM's usage frames leave out nulls inside the details."""
    return body | {"usage": USAGE | {"prompt_tokens_details": {"cached_tokens": 4}}}


def chunk(**fields: object) -> bytes:
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return b"data: " + msgspec.json.encode(head | fields) + b"\n\n"


def choice(delta: object, finish: str | None = None, **more: object) -> dict[str, object]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish, **more}


ROLE = chunk(choices=[choice({"role": "assistant", "content": ""})])
USAGE_FRAME = chunk(choices=[], usage={"prompt_tokens": 1, "total_tokens": 2, "completion_tokens": 1})
DONE = b"data: [DONE]\n\n"


def test_the_frames_of_a_chat_answer_are_those_of_vllm() -> None:
    """Recorded from vLLM 0.32.0, the text in one piece."""
    body = {
        "id": "c",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Blue."}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "total_tokens": 2, "completion_tokens": 1, "prompt_tokens_details": None},
        "system_fingerprint": "fp",
    }
    head = b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m",'
    assert list(frames("chat", body, include_usage=True)) == [
        head + b'"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,'
        b'"finish_reason":null}],"prompt_token_ids":null,"prompt_text":null}\n\n',
        head + b'"choices":[{"index":0,"delta":{"content":"Blue."},"logprobs":null,"finish_reason":null,'
        b'"token_ids":null}]}\n\n',
        head + b'"choices":[{"index":0,"delta":{"content":""},"logprobs":null,"finish_reason":"stop",'
        b'"stop_reason":null,"token_ids":null}]}\n\n',
        head + b'"choices":[],"usage":{"prompt_tokens":1,"total_tokens":2,"completion_tokens":1},'
        b'"system_fingerprint":"fp"}\n\n',
        DONE,
    ]
    assert b'"system_fingerprint":"fp"' in list(frames("chat", body, include_usage=False))[-2]


def test_tool_call_deltas_are_put_together() -> None:
    calls = [
        {"id": "call-1", "type": "function", "index": 0, "function": {"name": "f"}},
        {"index": 0, "function": {"arguments": '{"a"'}},
        {"index": 0, "function": {"arguments": ":1}"}},
        {"id": "call-2", "type": "function", "index": 1, "function": {"name": "g", "arguments": "{}"}},
    ]
    stream = [ROLE, *(chunk(choices=[choice({"tool_calls": [call]})]) for call in calls)]
    body = collected("chat", [*stream, chunk(choices=[choice({}, "tool_calls")]), USAGE_FRAME, DONE])
    message = body["choices"][0]["message"]
    assert message["content"] is None
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "f", "arguments": '{"a":1}'},
        {"name": "g", "arguments": "{}"},
    ]


FINISH = chunk(choices=[choice({"content": "Blue."}, "stop")])
BAD_STREAMS = [
    ("unfinished", [ROLE, FINISH, USAGE_FRAME]),
    ("unfinished", [DONE]),
    ("no_usage", [ROLE, FINISH, DONE]),
    ("error", [ROLE, b'data: {"error":{"message":"gone","code":500}}\n\n', DONE]),
    ("garbled", [ROLE, b"data: {\n\n", DONE]),
    ("garbled", [ROLE, b"event: other\n\n", FINISH, USAGE_FRAME, DONE]),
    ("unknown_field", [ROLE, chunk(choices=[choice({"citations": [1]})]), FINISH, USAGE_FRAME, DONE]),
    ("unknown_field", [ROLE, chunk(choices=[choice({"content": "a"}, of_tomorrow=1)]), FINISH, USAGE_FRAME, DONE]),
    ("unknown_field", [ROLE, chunk(choices=[choice({"content": ["a"]})]), FINISH, USAGE_FRAME, DONE]),
    ("unknown_field", [ROLE, FINISH, USAGE_FRAME, DONE, FINISH]),
    ("inconsistent", [ROLE, FINISH.replace(b'"id":"c"', b'"id":"d"'), USAGE_FRAME, DONE]),
    ("inconsistent", [ROLE, chunk(choices=[choice({"tool_calls": [{"index": 1, "id": "x"}]})]), USAGE_FRAME, DONE]),
    ("empty", [ROLE, chunk(choices=[choice({}, "stop")]), USAGE_FRAME, DONE]),
    ("too_large", [ROLE, *[chunk(choices=[choice({"content": "x" * (1 << 20)})])] * 9, FINISH, USAGE_FRAME, DONE]),
]


@pytest.mark.parametrize(("reason", "stream"), BAD_STREAMS)
def test_an_odd_stream_is_not_stored(reason: str, stream: list[bytes]) -> None:
    assert collected("chat", stream) == NotStored(reason)


def test_keep_alive_comments_and_unset_nulls_are_nothing() -> None:
    odd = chunk(choices=[choice({"content": "Sky: ", "refusal": None})], of_tomorrow=None)
    body = collected("chat", [b": keep-alive\n\n", ROLE, b": keep-alive\n\n", odd, FINISH, USAGE_FRAME, DONE])
    assert body["choices"][0]["message"]["content"] == "Sky: Blue."


def answer(**changes: object) -> bytes:
    body = {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "usage": {}}
    body["choices"] = [{"index": 0, "message": {"role": "assistant", "content": "Blue."}, "finish_reason": "stop"}]
    return msgspec.json.encode(body | changes)


@pytest.mark.parametrize(
    ("reason", "raw"),
    [
        ("not_json", b"data: {}"),
        ("error", b'{"error":{"code":400}}'),
        ("error", answer(object="list")),
        ("no_usage", answer(usage=None)),
        ("unfinished", answer(choices=[])),
        ("unfinished", answer(choices=[{"finish_reason": None}])),
        ("unfinished", answer(choices=[{"finish_reason": "abort"}])),
        ("unfinished", answer(choices=[{"finish_reason": "stop"}] * 2)),
        ("too_large", b" " * (9 << 20)),
    ],
)
def test_only_a_finished_answer_is_admitted(reason: str, raw: bytes) -> None:
    assert admit("chat", {}, raw) == NotStored(reason)


def test_what_belongs_to_one_run_is_not_stored() -> None:
    stored = answer().replace(b'"id":"c",', b"")
    assert admit("chat", {}, answer()) == admit("chat", {}, stored) == Admitted(stored)
    admitted = admit("chat", {}, answer(kv_transfer_params={"remote": 1}, metrics={"queue_time_ms": 1.0}))
    assert isinstance(admitted, Admitted)
    assert msgspec.json.decode(admitted.body)["kv_transfer_params"] is None
    assert msgspec.json.decode(admitted.body)["metrics"] is None


def test_streams_that_lack_prompt_logprobs_are_told_from_those_that_lack_nothing() -> None:
    assert streams_completely({"logprobs": 2})
    assert streams_completely({"echo": False})
    assert not streams_completely({"prompt_logprobs": 0})
    assert not streams_completely({"echo": True})


def test_collected_answers_have_the_very_shape_of_vllms_own() -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
    from vllm.entrypoints.openai.completion.protocol import CompletionResponse

    token = {"token": "Bl", "logprob": -0.5, "bytes": [66, 108]}
    logprobs = {"content": [token | {"top_logprobs": [token]}]}
    call = {"id": "call-1", "type": "function", "index": 0, "function": {"name": "f", "arguments": "{}"}}
    delta = {"content": "Bl", "reasoning": "Hm.", "tool_calls": [call]}
    part = choice(delta, "tool_calls", token_ids=[5]) | {"logprobs": logprobs}
    chat = collected("chat", [ROLE, chunk(choices=[part]), USAGE_FRAME, DONE])
    assert json.dumps(ChatCompletionResponse.model_validate(chat).model_dump()) == json.dumps(chat)

    lists = {"text_offset": [0], "token_logprobs": [-0.5], "tokens": ["Bl"], "top_logprobs": [{"Bl": -0.5}]}
    text = {"index": 0, "text": "Bl", "logprobs": lists, "finish_reason": "stop", "stop_reason": None}
    kind = {"object": "text_completion"}
    usage = {"prompt_tokens": 1, "total_tokens": 2, "completion_tokens": 1}
    stream = [chunk(choices=[text], **kind), chunk(choices=[], usage=usage, **kind), DONE]
    completion = collected("completions", stream)
    assert json.dumps(CompletionResponse.model_validate(completion).model_dump()) == json.dumps(completion)


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_replayed_frames_are_what_vllms_models_write(endpoint: Endpoint) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionStreamResponse
    from vllm.entrypoints.openai.completion.protocol import CompletionStreamResponse

    model = ChatCompletionStreamResponse if endpoint == "chat" else CompletionStreamResponse
    answers: dict[str, dict[str, object]] = {
        "chat": {"message": {"role": "assistant", "content": "Blüe.", "reasoning": "Hm."}},
        "completions": {"text": "Blüe."},
    }
    body: dict[str, Any] = {"id": "c", "created": 1, "model": "m", "system_fingerprint": "fp", "usage": USAGE}
    body["choices"] = [{"index": at, **answers[endpoint], "finish_reason": "stop"} for at in range(2)]
    for include_usage in (True, False):
        for frame in list(frames(endpoint, body, include_usage))[:-1]:
            payload = frame.removeprefix(b"data: ").removesuffix(b"\n\n")
            assert model.model_validate_json(payload).model_dump_json(exclude_unset=True).encode() == payload
