"""Which spellings of a question are one, and which never are."""

import pytest

from hyperspace_vllm.core.records.limits import QUESTION_CHARS_MAX
from hyperspace_vllm.core.response.similar.canonical import ACRONYMS, WORDS_MAX, canonical_question, compared_question

SAME = [
    ("What is ML?", "Explain machine learning"),
    ("what is ML", "Define ML."),
    ("What is an LLM?", "Explain large language model"),
    ("What's a neural network?", "Define neural network"),
    ("What does entropy mean?", "what is the definition of entropy?"),
    ("What is meant by recursion?", "What does recursion mean?"),
    ("What is recursion?", "Could you please explain recursion? Thanks!"),
    ("What is quantum computing", "Explain quantum computing."),
    ("can you explain what a REST API is?", "What is a REST API?"),
    ("Please explain blockchain.", "Hi there, what is blockchain?"),
    ("How do I boil an egg?", "Can you tell me how to boil an egg?"),
    ("How can I reverse a string in Python?", "how to reverse a string in Python"),
    ("I want to know what love is. Thanks!", "What is love?"),
    ("Please tell me what entropy means", "What does entropy mean?"),
    ("Why don't cats like water?", "why do not cats like water"),
    ("What’s the capital of France ?", "what is  the capital of France"),
    ("How big is the UK?", "How big is the United Kingdom?"),
    ("Who may vote in the US", "Who may vote in the United States?"),
    ("What is a black hole?", "Explain black hole"),
    ("What is Kubernetes?", "Explain Kubernetes"),
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
    ("What is glass?", "What is a glass?"),
    ("What is windows?", "What are windows?"),
    ("Explain windows", "What is windows?"),
    ("What is a red hat?", "What is Red Hat?"),
    ("What is Islam?", "What does Islam mean?"),
    ("What is trending?", "Define trending"),
    ("How do I kill a python?", "How do I kill a Python?"),
    ("How do I reverse a string in Python?", "How do I reverse a string in python?"),
    ("Who plays for the Saints?", "Who plays for the saints?"),
    ("Who killed Will?", "Who killed will?"),
    ("Is A a vowel?", "Is a a vowel?"),
    ("How good is U.S. Polish?", "How good is U.S. polish?"),
    ("What time is?", "What is time?"),
    ("What color is", "what is color"),
    ("What cats mean?", "What do cats mean?"),
    ("What is recursion with an example?", "Explain recursion with an example"),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_questions_with_other_answers_never_meet(one: str, other: str) -> None:
    assert canonical_question(one) != canonical_question(other)


# Ask for other texts than "what is" does, of whatever they ask.
OPENINGS = ("Describe {}.", "Tell me about {}.", "Give me an overview of {}.", "What are {}?", "What does {} mean?")
TOPICS = ("a sunset", "Paris", "Albert Einstein", "the moon", "love", "machine learning", "ML", "Apples")


@pytest.mark.parametrize("topic", TOPICS)
def test_each_opening_but_that_of_a_definition_asks_for_something_else(topic: str) -> None:
    forms = {canonical_question(opening.format(topic)) for opening in ("What is {}?", *OPENINGS)}
    assert len(forms) == len(OPENINGS) + 1


@pytest.mark.parametrize("topic", ["love", "machine learning", "neural networks"])
def test_whatever_asks_about_a_thing_is_compared_as_one(topic: str) -> None:
    assert len({compared_question(opening.format(topic)) for opening in ("What is {}?", "Define {}", *OPENINGS)}) == 1


def test_what_is_no_definition_is_compared_in_its_canonical_form() -> None:
    for text in ("How do I boil an egg?", "What is a variable in Python?", "Explain f(a, b)", "WHAT IS LOVE?"):
        assert compared_question(text) == canonical_question(text)


PREPOSITIONS = ("in", "of", "for", "to", "with", "without", "by", "on", "under", "during", "between", "from", "via")


@pytest.mark.parametrize("preposition", PREPOSITIONS)
@pytest.mark.parametrize("noun", ["a variable", "a macro", "inheritance"])
def test_what_has_more_than_a_noun_is_no_definition(noun: str, preposition: str) -> None:
    asked = {f"{opening} {noun} {preposition} Python" for opening in ("what is", "define", "explain", "describe")}
    assert len(set(map(canonical_question, asked))) == 4


@pytest.mark.parametrize("acronym", sorted(ACRONYMS))
def test_an_acronym_is_written_out_where_it_is_all_that_is_asked_about(acronym: str) -> None:
    words = ACRONYMS[acronym]
    for asked in ("What is {}?", "what is {}", "Explain {}.", "Can you explain what {} is?", "What are {}?"):
        assert canonical_question(asked.format(acronym)) == canonical_question(asked.format(words))
    for asked in ("How many {} are in a cup?", "What is {} in a recipe?", "What is {} law?", "Who is {}?", "Lead {}."):
        assert canonical_question(asked.format(acronym)) != canonical_question(asked.format(words))
    after_the = canonical_question(f"How old is the {acronym}?") == canonical_question(f"How old is the {words}?")
    assert after_the == words[0].isupper()


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
    assert canonical_question("What is a Spark?") != canonical_question("What is Spark?")
