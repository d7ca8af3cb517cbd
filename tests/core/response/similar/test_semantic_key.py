"""Which requests ask a plain question, and which of them ask the same."""

from typing import Any

import pytest

from hyperspace_vllm.core.local.similar_messages import Question
from hyperspace_vllm.core.records.ids import sha256
from hyperspace_vllm.core.records.limits import QUESTION_CHARS_MAX
from hyperspace_vllm.core.response.similar.canonical import ACRONYMS
from hyperspace_vllm.core.response.similar.semantic_key import question_of, tightened

DIGEST = bytes(32)


def user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


def system(content: object) -> dict[str, object]:
    return {"role": "system", "content": content}


def asked(*messages: object, tenant: str = "", lora: bytes | None = None, **fields: object) -> Question | None:
    body: dict[str, Any] = {"model": "base", "messages": list(messages), **fields}
    return question_of("chat", body, DIGEST, lora, tenant, ACRONYMS)


def question(*messages: object, **more: Any) -> Question:
    found = asked(*messages, **more)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (question(user("What is ML?")), question(user("Explain machine learning"))),
        (question(user("what's ML")), question(user([{"type": "text", "text": "What is ML?"}]))),
        (question(user("What is ML?"), user="a", stream=True), question(user("What is ML?"), user="b")),
        (question(user("What is ML?"), max_tokens=9), question(user("What is ML?"), max_completion_tokens=9)),
        (question(system("Be kind."), user("What is ML?")), question(system("Be kind."), user("Define ML"))),
    ],
)
def test_the_same_question_has_one_canonical_key(one: Question, other: Question) -> None:
    assert one.partition == other.partition
    assert one.canonical_key == other.canonical_key


@pytest.mark.parametrize(
    "other",
    [
        question(user("What is ML?"), tenant="b"),
        question(user("What is ML?"), lora=b"\1" * 32),
        question(user("What is ML?"), cache_salt="x"),
        question(user("What is ML?"), temperature=0.5),
        question(user("What is ML?"), max_tokens=17),
        question(user("What is ML?"), model="other"),
        question(system("Be kind."), user("What is ML?")),
        question({"role": "developer", "content": "Be kind."}, user("What is ML?")),
    ],
)
def test_whatever_else_differs_parts_the_questions(other: Question) -> None:
    one = question(user("What is ML?"))
    assert one.text == other.text
    assert one.partition != other.partition
    assert one.canonical_key != other.canonical_key


@pytest.mark.parametrize(
    ("messages", "fields"),
    [
        ([user("What is ML?"), {"role": "assistant", "content": "It is..."}, user("And why?")], {}),
        ([user("One"), user("What is ML?")], {}),
        ([{"role": "assistant", "content": "What is ML?"}], {}),
        ([user("What is ML?") | {"name": "Ann"}], {}),
        ([user([{"type": "text", "text": "What is ML?"}, {"type": "text", "text": "Now."}])], {}),
        ([user([{"type": "image_url", "image_url": {"url": "data:,"}}])], {}),
        ([user("")], {}),
        ([user(None)], {}),
        ([user("What is \ud800?")], {}),
        ([user("a" * (QUESTION_CHARS_MAX + 1))], {}),
        ([], {}),
        ([system("Translate what the user says into French."), user("What is ML?")], {}),
        ([system("Antworte auf Französisch."), user("What is ML?")], {}),
        ([system("Be kind."), system("Be brief."), user("What is ML?")], {}),
        ([user("What is ML?")], {"n": 2}),
        ([user("What is ML?")], {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        ([user("What is ML?")], {"tool_choice": "none"}),
        ([user("What is ML?")], {"logprobs": True}),
        ([user("What is ML?")], {"prompt_logprobs": 1}),
        ([user("What is ML?")], {"response_format": {"type": "json_object"}}),
        ([user("What is ML?")], {"structured_outputs": {"regex": "a"}}),
        ([user("What is ML?")], {"documents": [{"text": "a"}]}),
        ([user("What is ML?")], {"a_field_of_tomorrow": 1}),
        ([user("What is ML?")], {"kv_transfer_params": {"remote_host": "x"}}),
    ],
)
def test_what_is_no_plain_question_has_exact_hits_alone(messages: list[object], fields: dict[str, Any]) -> None:
    assert asked(*messages, **fields) is None


def test_a_key_of_the_wider_forms_of_before_matches_none() -> None:
    asked = question(user("What is ML?"))
    before = sha256(b"hyperspace/canonical-question/2", asked.partition, b"what is machine learning")
    assert asked.canonical_key != before


def test_a_chat_without_messages_asks_nothing() -> None:
    assert question_of("chat", {"model": "base", "max_tokens": 1}, DIGEST, None, "", ACRONYMS) is None


def test_prompts_to_be_continued_are_no_questions() -> None:
    body = {"model": "base", "prompt": "What is ML?"}
    assert question_of("completions", body, DIGEST, None, "", ACRONYMS) is None


@pytest.mark.parametrize(
    ("server", "wish", "mode"),
    [
        ("off", None, None),
        ("off", "balanced", None),
        ("strict", None, "strict"),
        ("strict", "balanced", "strict"),
        ("strict", "off", None),
        ("balanced", None, "balanced"),
        ("balanced", " Strict ", "strict"),
        ("balanced", "balanced", "balanced"),
        ("balanced", "loose", None),
        ("balanced", "", None),
    ],
)
def test_callers_may_only_tighten(server: Any, wish: str | None, mode: str | None) -> None:
    assert tightened(server, wish) == mode
