"""Answers of other nodes, scored: which can be, what a score says, and a real model that knows its own words."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from starlette.types import Message, Receive, Scope, Send

from hyperspace_vllm.api import audits
from hyperspace_vllm.api.client_source import source_of
from hyperspace_vllm.core.records.ids import RequestKey
from hyperspace_vllm.core.response.audit import (
    Said,
    compare,
    confirming_request,
    confirms,
    plain_answer,
    prompt_of,
    rest_of,
    score,
    scoring_request,
)
from hyperspace_vllm.core.response.request_fields import FIELDS
from tests.support.audits import CHAT, TEXT, Suspect, message
from tests.support.cached_server import benches
from tests.support.until import until_async


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (message(content="Because."), Said("Because.", "stop")),
        (message("length", content="Because"), Said("Because", "length")),
        (message(content="Because.", reasoning=None, tool_calls=[], refusal=None), Said("Because.", "stop")),
        (message(content=""), Said("", "stop")),
        (message(content=None), Said("", "stop")),
        (message(content="Because.", reasoning="Hm."), None),
        (message(content="Because.", annotations=[0]), None),
        (message(content="Because.", tool_calls=[{}]), None),
        (message("tool_calls", content="Because."), None),
        (message(content=["Because."]), None),
        ({"choices": message(content="a")["choices"] * 2}, None),
        ({"choices": []}, None),
        ([], None),
    ],
)
def test_a_plain_answer_is_one_text_and_nothing_else(answer: object, said: Said | None) -> None:
    assert plain_answer("chat", answer) == said


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.7},
        {"temperature": None},
        {"repetition_penalty": 1.2},
        {"frequency_penalty": 0.1},
        {"logit_bias": {"5": 10}},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_object"}},
        {"min_tokens": 5},
        {"ignore_eos": True},
        {"stop_token_ids": [7]},
        {"include_stop_str_in_output": True},
        {"skip_special_tokens": False},
        {"spaces_between_special_tokens": False},
        {"bad_words": ["why"]},
        {"allowed_token_ids": [5]},
        {"truncate_prompt_tokens": 9},
        {"chat_template": "{{ 1 }}"},
        {"add_generation_prompt": False},
        {"structured_outputs": {"choice": ["a"]}},
        {"n": 2},
        {"continue_final_message": True},
        {"something_new": 1},
        {"reasoning_effort": "high"},
        {"documents": [{"text": "d"}]},
        {"mm_processor_kwargs": {"a": 1}},
        {"chat_template_kwargs": {"documents": [{"text": "d"}]}},
        {"chat_template_kwargs": {"enable_thinking": {"a": 1}}},
        {"chat_template_kwargs": []},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]},
        {"messages": [{"role": "assistant", "content": "ok", "reasoning_content": "Hm."}]},
        {"messages": [{"role": "assistant", "content": "ok", "reasoning": "Hm."}]},
        {"messages": [{"role": "assistant", "content": "ok", "tool_calls": []}]},
        {"messages": [{"role": "tool", "content": "ok", "tool_call_id": "1"}]},
        {"messages": [{"role": "critic", "content": "ok"}]},
        {"messages": [{"role": "user", "content": "ok", "name": None}]},
        {"messages": [{"role": "user", "content": "ok", "something_new": 1}]},
        {"messages": [{"role": "user"}]},
        {"messages": ["Why?"]},
        {"messages": "Why?"},
        {"prompt": "Why not?"},  # ignored by the route, and /tokenize would read it
        {"max_completion_tokens": 5, "prompt": None},
    ],
)
def test_what_bends_the_logits_or_the_prompt_is_not_scored(change: dict[str, object]) -> None:
    assert prompt_of("chat", {**CHAT, **change}) is None


def test_plain_greedy_requests_are_scored_after_their_own_prompt() -> None:
    shaped = {"max_tokens": 5, "seed": 1, "top_p": 0.9, "stream": True, "user": "ann", "stop": ["x"]}
    assert prompt_of("chat", {**CHAT, **shaped}) == {"model": "demo", "messages": CHAT["messages"]}
    assert prompt_of("completions", TEXT) == {"model": "demo", "prompt": "Once"}
    assert prompt_of("completions", {**TEXT, "prompt": [1, 2]}) is None
    assert prompt_of("completions", {**TEXT, "messages": CHAT["messages"]}) is None
    assert prompt_of("completions", {**TEXT, "chat_template_kwargs": {"enable_thinking": True}}) is None
    assert prompt_of("messages", CHAT) is None
    assert scoring_request("demo", [1, 2], [3])["prompt"] == [1, 2, 3]
    assert "model" not in scoring_request(None, [1], [2])


def place(own: float, best: float | None = None) -> dict[str, dict[str, Any]]:
    """As vLLM lists it: the prompt's token, and the best one if that is another."""
    found = {"7": {"logprob": own, "rank": 1 if best is None else 9, "decoded_token": "a"}}
    return found if best is None else {**found, "8": {"logprob": best, "rank": 1, "decoded_token": "b"}}


PLACES = [None, place(-9, -0.1), place(-0.5), place(-2.0, -0.5), place(-7.0, -0.5)]


@pytest.mark.parametrize(
    ("said", "goes_on", "body", "far"),
    [
        (Said("a b c", "stop"), False, CHAT, 1),
        (Said("a b c", "stop"), True, CHAT, 2),
        (Said("a b c", "stop"), True, {**CHAT, "stop": ["."]}, 1),
        (Said("a b c", "length"), True, {**CHAT, "max_tokens": 3}, 1),
        (Said("a b c", "length"), True, {**CHAT, "max_tokens": 5}, 1),
        (Said("a b c", "length"), True, {**CHAT, "max_tokens": 6}, 2),
        (Said("a b c", "length"), True, {**CHAT, "max_completion_tokens": 100, "max_tokens": 3}, 2),
        (Said("a b c", "length"), True, CHAT, 1),
        (Said("a b c", "length"), True, {**CHAT, "max_tokens": "100"}, 1),
    ],
)
def test_a_score_counts_the_tokens_that_are_far_from_the_best_and_an_end_that_is_none(
    said: Said, goes_on: bool, body: dict[str, Any], far: int
) -> None:
    scored = {"choices": [{"prompt_logprobs": PLACES, "finish_reason": "length" if goes_on else "stop"}]}
    scored_as = score(scored, 2, said, body)
    assert (scored_as.tokens, scored_as.far_at, scored_as.far) == (4, (2,), far)
    with pytest.raises((LookupError, TypeError)):
        score({"choices": [{"prompt_logprobs": None, "finish_reason": "stop"}]}, 2, said, body)


KEY = RequestKey(bytes(32))


MISSISSIPPI = [" Mississippi", " River", ".", " It"]


EOS = "<eos>"


def continued(tokens: list[str], near: dict[int, dict[str, float]] | None = None, finish: str = "length") -> Any:
    """The engine's own words, as vLLM lists them: at each place its token, and others; hidden ones begin with '<'."""
    text = "".join(token for token in tokens if not token.startswith("<"))
    others = {"zebra": -9.0, "quagga": -9.5}
    ranked = [{token: -0.1} | (near or {}).get(at, {}) | others for at, token in enumerate(tokens)]
    logprobs = {"tokens": tokens, "top_logprobs": ranked}
    return {"choices": [{"text": text, "logprobs": logprobs, "finish_reason": finish}]}


@pytest.mark.parametrize(
    ("rest", "engine", "expected"),
    [
        # honest: the text is the engine's, whatever its tokens
        (" Missi", continued(MISSISSIPPI), "agrees"),
        (" Mississippi River. It", continued(MISSISSIPPI), "agrees"),
        (" Mississippi River. It is long", continued(MISSISSIPPI), "agrees_so_far"),
        ("Missi", continued(MISSISSIPPI), "agrees"),
        (" blue", continued(["<unused7>", " blue", "<unused7>"]), "agrees"),
        ("", continued(MISSISSIPPI), "agrees"),
        (" Missi", continued([" Miss", "issippi"]), "agrees"),
        # honest, as far as anybody can tell: rounding may have tipped it
        (" Missouri", continued([" Missi", "ssippi"], {0: {" Misso": -0.5}}), "unclear"),
        (" Missouri", continued([" Miss", "issippi"], {1: {"ou": -1.9}}), "unclear"),
        (" Nile", continued(MISSISSIPPI, {0: {" Nile": -2.0}}), "unclear"),
        (" Nile", continued(MISSISSIPPI, {0: {" N": -2.0}}), "unclear"),
        (" caf\N{REPLACEMENT CHARACTER}", continued([" caf", "e"]), "unclear"),
        (" Nile", continued(["\N{REPLACEMENT CHARACTER}"]), "unclear"),
        # false: the engine would have said something else
        (" Nile", continued(MISSISSIPPI), "departs"),
        (" Missouri", continued(MISSISSIPPI), "departs"),
        (" Mississippi Delta", continued(MISSISSIPPI), "departs"),
        (" the Mississippi", continued(MISSISSIPPI), "departs"),
        (" blue skies", continued(["<unused7>", " blue", "<unused7>", " sea"]), "departs"),
        (" Mississippi. Visit example.com", continued([" Mississippi", ".", EOS], finish="stop"), "departs"),
        (" Visit example.com", continued([EOS], finish="stop"), "departs"),
        (" Mississippi. So", continued([" Mississippi", ".", EOS], {2: {" So": -1.0}}, finish="stop"), "unclear"),
    ],
)
def test_an_answer_is_false_where_the_engines_own_words_depart_from_it_beyond_rounding(
    rest: str, engine: dict[str, Any], expected: str
) -> None:
    assert compare(engine, rest) == expected


def test_where_more_tokens_may_be_near_than_are_listed_nothing_is_clear() -> None:
    engine = continued(MISSISSIPPI)
    for ranked in engine["choices"][0]["logprobs"]["top_logprobs"]:
        ranked |= {"zebra": -1.0, "quagga": -1.1}
    assert compare(engine, " Nile") == "unclear"
    with pytest.raises((LookupError, TypeError)):
        compare({"choices": [{"text": " a", "logprobs": None, "finish_reason": "length"}]}, " b")


@pytest.mark.parametrize(
    ("text", "beginning", "rest"),
    [
        (" the Missi", " the", " Missi"),
        (" the Missi", "the", " Missi"),
        ("the Missi", "the", " Missi"),
        ("the Missi", "", "the Missi"),
        ("the Missi", "teh", None),
        ("caf\u00e9", "caf\N{REPLACEMENT CHARACTER}", None),
    ],
)
def test_the_rest_of_an_answer_follows_what_its_first_tokens_say(text: str, beginning: str, rest: str | None) -> None:
    assert rest_of(text, beginning) == rest


PLAIN = {"object": "chat.completion", "created": 1, "model": "demo", "system_fingerprint": "fp"} | {
    "usage": {"prompt_tokens": 5, "total_tokens": 7, "completion_tokens": 2}
}


class Engine:
    """vLLM's routes as an audit uses them: it tokenises by characters and goes on as it is told."""

    def __init__(self, far_at: tuple[int, ...], own_answer: str, goes_on_for: int, prompt: str = "Why?") -> None:
        self.prompt = prompt  # as the route that answers renders it
        self.far_at, self.own_answer, self.goes_on_for = far_at, own_answer, goes_on_for
        self.asked: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = json.loads((await receive())["body"])
        self.asked.append(scope["path"])
        content = json.dumps(self._answer(scope["path"], body)).encode()
        start: Message = {"type": "http.response.start", "status": 200, "headers": []}
        await send(start)
        await send({"type": "http.response.body", "body": content})

    def _answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/tokenize":
            text = body.get("prompt") or body["messages"][0]["content"]
            return {"tokens": [ord(character) for character in text]}
        if path == "/detokenize":
            return {"prompt": "".join(map(chr, body["tokens"]))}
        if path == "/v1/chat/completions":
            assert (body["max_completion_tokens"], body["return_token_ids"], body["stop"]) == (1, True, ["ssippi"])
            return message(content="M") | {"prompt_token_ids": list(map(ord, self.prompt))}
        prompt = len("Why?")
        if "logprobs" in body:
            at = len(body["prompt"]) - prompt
            own_words: dict[str, Any] = continued(list(self.own_answer[at : at + self.goes_on_for]))
            return own_words
        places = [place(-9.0, -0.1) if at - prompt in self.far_at else place(-0.1) for at in range(len(body["prompt"]))]
        return {"choices": [{"prompt_logprobs": [None, *places[1:]], "finish_reason": "stop"}]}


async def test_audits_take_a_small_share_of_the_time_whoever_is_suspected(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 1_000.0
    monkeypatch.setattr("hyperspace_vllm.api.audits.time.monotonic", lambda: clock)

    class Slow(audits.Audits):
        async def _audit(self, *_: object) -> None:
            nonlocal clock
            clock += 2.0

    some = Slow()
    assert some.draw(suspect=True)
    await some.audit(None, KEY, b"", b"")  # type: ignore[arg-type]
    clock += 2.0 * (1 / audits.AUDIT_SHARE - 1) - 0.001
    assert not some.draw(suspect=True)
    clock += 0.001
    assert some.draw(suspect=True)


@pytest.mark.io
@pytest.mark.parametrize(
    ("far_at", "own_answer", "goes_on_for", "far", "continuations"),
    [
        ((), "", 9, 0, 0),
        ((0, 1, 2, 3, 4), "Mississippi", 9, 0, 1),
        ((0, 3), "Mississippi", 2, 0, 2),
        ((3, 4), "Missouri", 9, 2, 1),
        ((0, 1, 2, 3), "Mississippi", 1, 1, 3),
    ],
    ids=["near", "cut", "spelt differently", "false", "too many to look at"],
)
async def test_far_tokens_count_only_where_the_engine_itself_says_something_else(
    tmp_path: Path, far_at: tuple[int, ...], own_answer: str, goes_on_for: int, far: int, continuations: int
) -> None:
    engine = Engine(far_at, own_answer, goes_on_for)
    async with benches(tmp_path) as make:
        bench = await make(served_models=frozenset({"demo"}), network_deadline_s=30.0)
        bench.cache.app = engine
        suspect = bench.node.others = Suspect()
        suspect.says = PLAIN | message(content="Missi")
        await bench.ask({**CHAT, "stop": ["ssippi"]})
        await until_async(lambda: bench.node.audited, 30)
    assert bench.node.audited[0].far == far
    assert bench.node.audited[0].source == source_of({"client": ("127.0.0.1", 0), "headers": []}, False)
    assert engine.asked.count("/v1/completions") == 1 + continuations
    assert ("/v1/chat/completions" in engine.asked) is bool(far)


@pytest.mark.io
@pytest.mark.parametrize(("names_proxies", "named"), [(False, "127.0.0.1"), (True, "198.51.100.7")])
async def test_an_audit_names_the_network_of_the_client_only_as_the_operator_lets_it_be_told(
    tmp_path: Path, names_proxies: bool, named: str
) -> None:
    async with benches(tmp_path) as make:
        bench = await make(served_models=frozenset({"demo"}), network_deadline_s=30.0, names_proxies=names_proxies)
        bench.cache.app = Engine((), "", 9)
        suspect = bench.node.others = Suspect()
        suspect.says = PLAIN | message(content="Missi")
        await bench.client.post("/v1/chat/completions", json=CHAT, headers={"x-forwarded-for": "198.51.100.7"})
        await until_async(lambda: bench.node.audited, 30)
    assert bench.node.audited[0].source == source_of({"client": (named, 0), "headers": []}, False)


@pytest.mark.io
@pytest.mark.parametrize(
    ("far_at", "own_answer"), [((3, 4), "Missouri"), ((0, 1, 2, 3), "Mississippi")], ids=["false", "unclear"]
)
async def test_an_answer_to_another_prompt_than_the_one_scored_is_judged_in_no_way(
    tmp_path: Path, far_at: tuple[int, ...], own_answer: str
) -> None:
    engine = Engine(far_at, own_answer, 1 if len(far_at) > 3 else 9, "Why? Hm.")
    async with benches(tmp_path) as make:
        bench = await make(served_models=frozenset({"demo"}), network_deadline_s=30.0)
        bench.cache.app = engine
        suspect = bench.node.others = Suspect()
        suspect.says = PLAIN | message(content="Missi")
        await bench.ask({**CHAT, "stop": ["ssippi"]})
        await until_async(lambda: "/v1/chat/completions" in engine.asked, 30)
        await until_async(lambda: bench.cache.audits.idle, 30)
        assert bench.node.audited == []


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (message(content="a") | {"prompt_token_ids": [1, 2]}, True),
        ({"choices": [{"text": "a", "prompt_token_ids": [1, 2]}]}, True),
        (message(content="a") | {"prompt_token_ids": [1, 2, 3]}, False),
        (message(content="a") | {"prompt_token_ids": None}, False),
        (message(content="a"), False),
    ],
)
def test_a_route_confirms_a_prompt_by_all_of_its_ids(answer: dict[str, Any], told: bool) -> None:
    assert confirms(answer, (1, 2)) is told


def test_a_confirming_request_is_the_clients_own_for_one_token() -> None:
    shaped = {
        "max_tokens": 50,
        "max_completion_tokens": 60,
        "stream": True,
        "user": "ann",
        "request_id": "1",
        "seed": 1,
    }
    own_transfer = {"kv_transfer_params": {"hyperspace": 1}}
    asks = {"return_token_ids": True}
    assert confirming_request("chat", CHAT | shaped | own_transfer) == CHAT | asks | {
        "seed": 1,
        "max_completion_tokens": 1,
    }
    assert confirming_request("completions", TEXT | shaped) == TEXT | asks | {"seed": 1, "max_tokens": 1}


# What vLLM's chat route reads of a message, beside what is scored: each may reach the prompt by another way there.
OTHER_MESSAGE_KEYS = frozenset(
    (
        "reasoning_content", "reasoning", "tool_calls", "tool_call_id", "function_call", "tools", "task", "refusal",
        "audio", "author", "channel", "recipient", "content_type",
    )
)  # fmt: skip


@pytest.mark.feature("every request field is judged")
def test_every_key_of_vllms_messages_is_judged() -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    models = get_args(ChatCompletionRequest.model_fields["messages"].annotation)[0]
    known = {name for model in get_args(models) for name in _keys_of(model)}
    assert {"role", "content", "reasoning"} <= known
    assert known - {"role", "content", "name"} - OTHER_MESSAGE_KEYS == set(), "keys of messages that we have not judged"
    for key in OTHER_MESSAGE_KEYS:
        assert prompt_of("chat", {**CHAT, "messages": [{"role": "user", "content": "Why?", key: "a"}]}) is None


def _keys_of(model: Any) -> Iterable[str]:
    fields: Iterable[str] = getattr(model, "model_fields", None) or get_type_hints(model)
    return fields


@pytest.mark.feature("every request field is judged")
def test_every_field_of_vllms_chats_is_left_out_of_the_prompt_scored_or_not_scored() -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    scored = {
        name for name in ChatCompletionRequest.model_fields if prompt_of("chat", {**CHAT, name: CHAT.get(name, [0])})
    }
    unscored = FIELDS["chat"].neutral.keys() | FIELDS["chat"].forbidden  # an answer to the latter has no key
    # Of sampling: none changes which token is the most likely, or when the answer ends beyond what is looked at.
    sampled = {"model", "messages", "temperature", "top_p", "top_k", "min_p", "seed", "stop"}
    assert scored - unscored == sampled | {"max_tokens", "max_completion_tokens"}


@pytest.mark.feature("every request field is judged")
@pytest.mark.parametrize("options", [None, {}, {"enable_thinking": True}, {"enable_thinking": False, "thinking": True}])
def test_vllm_reads_what_is_scored_alike_in_both_of_its_routes(options: dict[str, bool] | None) -> None:
    from pydantic import TypeAdapter
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest, TokenizeRequest

    roles = ("system", "developer", "user", "assistant")
    said = [{"role": role, "content": f"{role}?"} | named for role in roles for named in ({}, {"name": "ann"})]
    body = {**CHAT, "messages": said, "chat_template_kwargs": options}
    prompt = prompt_of("chat", body)
    assert prompt is not None
    assert prompt.keys() <= TokenizeChatRequest.model_fields.keys()
    answered = ChatCompletionRequest.model_validate(json.loads(json.dumps(body)))
    tokenised = TypeAdapter(TokenizeRequest).validate_python(json.loads(json.dumps(prompt)))
    assert answered.messages == tokenised.messages == said
    ours, theirs = (each.build_chat_params(None, "auto") for each in (answered, tokenised))
    assert ours == theirs
    assert answered.add_special_tokens == tokenised.add_special_tokens
