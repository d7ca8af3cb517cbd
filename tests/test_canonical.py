"""Which spellings of a question are one, and which never are."""

import pytest

from hyperspace_vllm.core.records.limits import QUESTION_CHARS_MAX
from hyperspace_vllm.core.response.canonical import WORDS_MAX, canonical_question

SAME = [
    ("What is ML?", "Explain machine learning"),
    ("what is ML", "Tell me about ML."),
    ("What's a neural network?", "Define neural network"),
    ("What does entropy mean?", "what is the definition of entropy?"),
    ("What is meant by recursion?", "Could you please explain recursion? Thanks!"),
    ("Give me an overview of quantum computing", "Describe quantum computing."),
    ("can you explain what a REST API is?", "What is a REST API?"),
    ("Please tell me about blockchain.", "Hi there, what is blockchain?"),
    ("How do I boil an egg?", "Can you tell me how to boil an egg?"),
    ("How can I reverse a string in Python?", "how to reverse a string in python"),
    ("Why don't cats like water?", "why do not cats like water"),
    ("What’s the capital of France ?", "what is  the capital of France"),
    ("How big is the UK?", "How big is the United Kingdom?"),
    ("Ｗhat is ２+２?", "What is 2+2"),
    ("List three fruits", "Please list three fruits."),
    ("I'd like to know why the sky is blue", "Why the sky is blue?"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_spellings_of_one_question_meet(one: str, other: str) -> None:
    assert canonical_question(one) == canonical_question(other)


DIFFERENT = [
    ("What is 5+3?", "What is 53?"),
    ("What is -5?", "What is 5?"),
    ("What is 5!", "What is 5?"),
    ("What is n!", "What is n?"),
    ("What is 2¹⁰?", "What is 210?"),
    ("What is 1½ + 1?", "What is 11/2 + 1?"),
    ("What is 1.5 x 2?", "What is 15 x 2?"),
    ("What is US?", "What is us?"),
    ("What is Turkey?", "What is turkey?"),
    ("What is IT?", "What is it?"),
    ("What is C?", "What is C++?"),
    ("Explain machine learning", "How does machine learning work?"),
    ("Explain the planets", "List the planets"),
    ("What is Python and Java?", "Compare Python and Java"),
    ("What is love in French?", "Translate love to French"),
    ("Describe a poem", "Write a poem"),
    ("What is the capital of France?", "Describe the capital of France"),
    ("What is the time?", "What is time?"),
    ("What is wrong?", "Define wrong"),
    ("What is pecan pie?", "What is pecpie?"),
    ("How do we die?", "How do I die?"),
    ("Describe yourself", "What is yourself"),
    ("What is the meaning of life?", "What is life?"),
    ("What does AI stand for?", "What does artificial intelligence stand for?"),
    ("What is the Spanish for hello, please", "What is the Spanish for hello, thanks"),
    ("How do you say thank you?", "How do you say please?"),
    ("Can you swim?", "Swim"),
    ("hello world in Go", "world in Go"),
    ("The sky is blue?", "The sky is blue."),
    ("What does 'Break' mean?", "What does 'break' mean?"),
    ("Explain x = 1", "Explain X = 1"),
    ("Explain f(a, b)", "Explain f(A, B)"),
    ("Is it safe?", "Is it unsafe?"),
    ("Who is he?", "Who was he?"),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_questions_with_other_answers_never_meet(one: str, other: str) -> None:
    assert canonical_question(one) != canonical_question(other)


@pytest.mark.parametrize(("one", "other"), [*SAME, *DIFFERENT])
def test_a_canonical_form_is_its_own(one: str, other: str) -> None:
    for text in (one, other):
        assert canonical_question(canonical_question(text)) == canonical_question(text)


@pytest.mark.parametrize(
    "text",
    [
        "What does `ls -L` do?",
        "Why does x == NaN fail?",
        "Fix this:\n  def F(): pass",
        "WHAT IS LOVE?",
        "What is " + "Very " * WORDS_MAX + "Long?",
        "What is " + "A" * QUESTION_CHARS_MAX,
    ],
)
def test_code_lines_shouts_and_long_texts_stay_as_they_are(text: str) -> None:
    assert canonical_question(f"  {text}\n") == text


@pytest.mark.parametrize(
    "text", ["", " ", "please", "?", "...", "hi,", "'", '"', "’s", "what is", "\u0301", "!" * 4000]
)
def test_every_text_has_a_canonical_form(text: str) -> None:
    assert isinstance(canonical_question(text), str)


def test_operators_add_acronyms() -> None:
    table = {"SLA": "service level agreement"}
    assert canonical_question("What is an SLA?", table) == canonical_question("explain service level agreement", table)
    assert canonical_question("What is an sla?", table) != canonical_question("What is an SLA?", table)


def test_a_name_is_no_common_noun() -> None:
    assert canonical_question("What is Spark?") != canonical_question("What is a spark?")
    assert canonical_question("What is Spark?") == canonical_question("Please explain Spark.")
    assert canonical_question("What is a Spark?") == canonical_question("what is spark")
    assert canonical_question("What is Machine Learning?") == canonical_question("What is machine learning?")
