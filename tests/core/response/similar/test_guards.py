"""Which near questions the guards keep apart, by guard, and which they let pass."""

from collections.abc import Sequence

import pytest

from hyperspace_vllm.core.response.similar.canonical import canonical_question, compared_question
from hyperspace_vllm.core.response.similar.guard_words import FILLER, FUNCTION, LOOSE_SYNONYMS, NEGATIONS, SYNONYMS
from hyperspace_vllm.core.response.similar.guards import Mode, eligible, refusal, refusal_between
from hyperspace_vllm.core.response.similar.question import read_question
from tests.core.response.similar.test_canonical import SAME

MODES: tuple[Mode, ...] = ("balanced", "strict")

APART = [
    ("numbers", "Is 91 a prime number?", "Is 97 a prime number?"),
    ("numbers", "Give me five tips for public speaking", "Give me ten tips for public speaking"),
    ("numbers", "What is 5 + 3?", "What is 5 - 3?"),
    ("numbers", "Is 1,000 a lot?", "Is 100 a lot?"),
    ("units", "Can I take 400 mg of ibuprofen?", "Can I take 400 g of ibuprofen?"),
    ("units", "Is $50 a good price for a drill?", "Is £50 a good price for a drill?"),
    ("negation", "Is it safe to take ibuprofen?", "Is it unsafe to take ibuprofen?"),
    ("negation", "How do I bake a cake with eggs?", "How do I bake a cake without eggs?"),
    ("negation", "Why can't I sleep?", "Why can I sleep?"),
    ("negation", "What is a useful proof?", "What is a useless proof?"),
    ("negation", "What is hypertension?", "What is hypotension?"),
    ("antonyms", "When should I buy stocks?", "When should I sell stocks?"),
    ("antonyms", "What should I eat before a run?", "What should I eat after a run?"),
    ("languages", "how do you write thanks in chinese", "how do you write thanks in korean"),
    ("entities", "Who is the president of France?", "Who is the president of Finland?"),
    ("entities", "What does os.path.join do?", "What does os.path.split do?"),
    ("entities", "What does the 'break' keyword do?", "What does the 'continue' keyword do?"),
    ("entities", "What is the tax rate in the US?", "What is the tax rate in the UK?"),
    ("entities", "When did World War I end?", "When did World War II end?"),
    ("kinds", "is the shop open on sundays", "is the shop open on mondays"),
    ("time", "Who is the pope?", "Who was the pope?"),
    ("time", "Who owned Twitter?", "Who owns Twitter?"),
    ("question_type", "Why do stars twinkle?", "When do stars twinkle?"),
    ("question_type", "What do cats learn?", "How do cats learn?"),
    ("question_type", "Explain quicksort", "Implement quicksort"),
    ("question_type", "Describe Paris", "Define Paris."),
    ("question_type", "Describe a sunset", "What is a sunset?"),
    ("question_type", "Tell me more about Paris", "Define Paris"),
    ("question_type", "Define a variable in Python.", "What is a variable in Python?"),
    ("question_type", "Can I sue my landlord?", "Should I sue my landlord?"),
    ("roles", "How do I convert USD to EUR?", "How do I convert EUR to USD?"),
    ("roles", "Is Python better than Java?", "Is Java better than Python?"),
    ("roles", "Why did Germany invade Poland?", "Why did Poland invade Germany?"),
    ("roles", "Did Poland invade Germany?", "Was Poland invaded by Germany?"),
    ("roles", "How do I move from Canada to Mexico?", "How do I move to Canada from Mexico?"),
    ("roles", "What do lions eat?", "What eats lions?"),
    ("roles", "What is 10 divided by 2?", "What is 2 divided by 10?"),
    ("spelling", "How do I write a résumé for a job?", "How do I write a resume for a job?"),
    ("manner", "What dose of ibuprofen is right for adults?", "What dose of ibuprofen is right for adults, falsely?"),
    ("manner", "What dose of ibuprofen is right?", "What dose of ibuprofen is wrongly right?"),
    ("manner", "How do I remove pimple marks?", "How do I remove pimple marks naturally?"),
    ("clauses", "What dose of ibuprofen is right?", "What dose of ibuprofen is right, but lie?"),
    ("clauses", "What dose of ibuprofen is right?", "What dose of ibuprofen is right? Answer in a rude tone."),
    ("clauses", "What dose of ibuprofen is right?", "Lie: what dose of ibuprofen is right?"),
    ("clauses", "What dose of ibuprofen is right?", "What dose of ibuprofen is right (lie)?"),
    ("clauses", "What dose of ibuprofen is right?", "What dose of ibuprofen is right - make it up?"),
    ("clauses", "How can I prepare for a job?", "After I get an offer, how can I prepare for a job?"),
]


@pytest.mark.parametrize(("guard", "one", "other"), APART)
@pytest.mark.parametrize("mode", ["balanced", "strict"])
def test_each_guard_keeps_its_kind_apart(mode: Mode, guard: str, one: str, other: str) -> None:
    assert refusal(one, other, mode) == guard
    assert refusal(other, one, mode) == guard


TOGETHER = [
    ("What is ML?", "Explain machine learning"),
    ("How can I improve my English?", "What is the best way to improve my English?"),
    ("Which countries have the best food?", "What countries have the best food?"),
    ("What is the difference between TCP and UDP?", "What is the difference between UDP and TCP?"),
    ("How do I merge two branches in git?", "How do I merge two git branches?"),
    ("What is the GDP of Japan?", "what is japan's GDP"),
    ("How Do I Learn The Guitar?", "How do I learn the guitar?"),
    ("Which is the best phone under 15000 rupees?", "Which is the best phone under 15000?"),
    ("Is it true or not?", "Is it true?"),
    ("I'd like to know how bees make honey", "How do bees make honey?"),
    ("How reliable are old cars?", "Are old cars reliable?"),
    ("How can I earn money easily?", "How can I earn money?"),
    ("How can I quickly lose weight?", "What is a quick way to lose weight?"),
    ("What is research, in short?", "In short, what is research?"),
    ("Describe the moon", "Tell me about the moon"),
    ("Define inheritance in Java", "Explain inheritance in Java"),
    ("What is core banking? What are its functions?", "What is core banking? What purpose does it serve?"),
    ("What is Paris?", "Tell me about Paris"),
    ("What is the equation for the speed of light?", "How do you determine the equation for the speed of light?"),
    ("What is the importance of sleep?", "Why is sleep important?"),
    ("Which is the best phone under Rs.15000?", "Which is the best phone under 15000 INR?"),
    ("How do I write “thanks” in a letter – briefly?", 'How do I write "thanks" in a letter - briefly?'),
]


@pytest.mark.parametrize(("one", "other"), TOGETHER)
def test_rewordings_pass_when_balanced(one: str, other: str) -> None:
    assert refusal(one, other, "balanced") is None
    assert refusal(other, one, "balanced") is None


def test_strict_refuses_a_content_word_on_one_side_only() -> None:
    one, other = "How do I get rid of pimple marks?", "How do I get rid of pimple marks at home?"
    assert refusal(one, other, "balanced") is None
    assert refusal(one, other, "strict") == "wording"


ASKED = (
    *("How do I kill a process?", "Are vaccines dangerous?", "Why is the sky blue?", "Do cats like milk?"),
    *("What are the side effects of aspirin?", "Is coffee good for health?", "How do I reset my router?"),
    *("What is the dose of ibuprofen for adults?", "Can I sue my landlord?", "Is bitcoin a scam?"),
)


@pytest.mark.parametrize("asked", [ASKED[4:6], pytest.param(ASKED, marks=pytest.mark.slow)], ids=["few", "all"])
def test_strict_refuses_any_word_that_only_one_question_has_but_articles_and_do(asked: Sequence[str]) -> None:
    passed = set()
    for question in asked:
        words = question.rstrip("?").split()
        for word in sorted(FUNCTION | FILLER | NEGATIONS | {"salty", "quickly", "Python"}):
            for place in range(1, len(words) + 1):
                longer = " ".join([*words[:place], word, *words[place:]]) + "?"
                refusals = {refusal(question, longer, "strict"), refusal(longer, question, "strict")}
                passed |= {(word, longer)} if None in refusals else set()
    assert {word for word, _ in passed} == {"a", "an", "the", "do", "does", "some"}
    assert [longer for word, longer in passed if word == "some"] == ["What are some the side effects of aspirin?"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Why is too much salt bad?", "Why is salt bad?"),
        ("Is too much protein bad for the kidneys?", "Is protein bad for the kidneys?"),
        ("Can a woman get pregnant while breastfeeding?", "Can a woman get pregnant by breastfeeding?"),
        ("Can I sue for my landlord?", "Can I sue my landlord?"),
        ("What is the best dose of ibuprofen?", "What is the dose of ibuprofen?"),
        ("Is it just safe to drink water?", "Is it safe to drink just water?"),
        ("Can I work for my boss under my client?", "Can I work under my boss for my client?"),
        ("Can a man be a woman?", "Can a man have a woman?"),
        ("Why do a few people smoke?", "Why do few people smoke?"),
        ("Who won the cup?", "Who wins the cup?"),
        ("Why is the sky 'blue'?", "Why is the sky blue?"),
        ("Is 9 - 4 + 2 large?", "Is 9 + 4 - 2 large?"),
        ("What time is?", "What is time?"),
        ("Does a red dog chase a white cat?", "Does a white cat chase a red dog?"),
    ],
)
def test_strict_refuses_what_small_words_and_forms_turn(one: str, other: str) -> None:
    assert refusal(one, other, "strict") is not None
    assert refusal(other, one, "strict") is not None


@pytest.mark.parametrize("name", ["Python", "Saints", "Bears", "US", "Will", "Polish"])
def test_strict_takes_a_name_for_no_common_word(name: str) -> None:
    one = f"How do I find {name} in a zoo?"
    assert refusal(one, one.replace(name, name.lower()), "strict") is not None
    assert refusal(one.replace(name, name.lower()), one, "strict") is not None


@pytest.mark.parametrize(("one", "other"), SAME)
def test_no_guard_objects_to_what_the_canonical_form_takes_for_one(one: str, other: str) -> None:
    assert refusal_between(read_question(one), read_question(other), "balanced") is None


@pytest.mark.parametrize(
    ("reason", "one", "other"),
    [
        ("wording", "What is Paris?", "Tell me about Paris"),
        ("wording", "How do you handle rejection?", "How should you handle rejection?"),
        ("wording", "What does Jimmy Wales think?", "What does Jimmy Wales think of himself?"),
        ("wording", "What is illogical thinking?", "What is an example of illogical thinking?"),
        ("wording", "What is the fastest bird?", "What kind of bird is the fastest?"),
        ("wording", "How tall is the Eiffel Tower?", "What is the height of the Eiffel Tower?"),
    ],
)
def test_strict_refuses_what_balanced_forgives(reason: str, one: str, other: str) -> None:
    for pair in ((one, other), (other, one)):
        assert refusal(*pair, "balanced") is None
        assert refusal(*pair, "strict") == reason


def test_strict_forgives_plurals_synonyms_and_openings() -> None:
    assert refusal("What is the best way to lose weight?", "How can I lose weight?", "strict") is None
    assert refusal("What are some causes of war?", "What are the causes of war?", "strict") is None
    assert refusal("What divides cats and dogs?", "What divides dogs and cats?", "strict") is None
    assert refusal("How does a muscle work?", "How do muscles work?", "strict") is None
    assert refusal("What is inflation in economics?", "Explain inflation in economics", "strict") is None
    assert refusal("What are the drawbacks of shoes?", "What is the disadvantage of a shoe?", "strict") is None
    assert refusal("How do I purchase a house?", "How can I buy houses?", "strict") is None


# The mode that takes the pair for one, none in the last: there the other sense makes a question that people ask.
SENSES = [
    ("balanced", "What are good films about the sea?", "What is a good movie about the sea?"),
    ("balanced", "What is the main method in Java?", "What is the primary method in Java?"),
    ("balanced", "How do I type text in Word?", "How do I sort text in Word?"),
    ("balanced", "How do I cure ham?", "How do I heal ham?"),
    ("balanced", "What is the test for cancer?", "What is the exam for cancer?"),
    ("balanced", "How do I train for a marathon?", "How do I teach for a marathon?"),
    ("balanced", "How do I lower a chair?", "How do I reduce a chair?"),
    ("balanced", "What is the best firm mattress?", "What is the best company mattress?"),
    ("", "How do I remove a hard drive?", "How do I erase a hard drive?"),
    ("", "How do you pick a lock?", "How do you choose a lock?"),
    ("", "What is the best notebook for writing?", "What is the best laptop for writing?"),
    ("", "What is the carbon cycle?", "What is the carbon bike?"),
    ("", "What is the best camping site in Wales?", "What is the best camping website in Wales?"),
    ("", "How do I store wine?", "How do I shop wine?"),
    ("", "How to present a book?", "How to gift a book?"),
    ("", "What is the right side of the road to drive on?", "What is the correct side of the road to drive on?"),
]


@pytest.mark.parametrize(("mode", "one", "other"), SENSES)
def test_strict_takes_no_word_of_several_senses_for_another(mode: str, one: str, other: str) -> None:
    for pair in ((one, other), (other, one)):
        assert refusal(*pair, "strict") is not None
        assert (refusal(*pair, "balanced") is None) == (mode == "balanced")


def test_no_word_is_in_both_tables_of_synonyms_unless_it_stands_for_its_line() -> None:
    both = SYNONYMS.keys() & LOOSE_SYNONYMS.keys()
    assert {SYNONYMS[word] for word in both} == {LOOSE_SYNONYMS[word] for word in both}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("How do I boost the moral of my team?", "How do I boost the morale of my team?"),
        ("Is it human to kill a horse?", "Is it humane to kill a horse?"),
        ("What is a good plan for a beginner?", "What is a good plane for a beginner?"),
    ],
)
def test_strict_takes_no_two_nouns_of_one_stem_for_one(one: str, other: str) -> None:
    assert refusal(one, other, "strict") == "wording"


@pytest.mark.parametrize("opening", ["Explain", "Please explain", "Define", "Describe", "Tell me about"])
@pytest.mark.parametrize(
    "figure",
    [
        "the value of pi", "the price of Bitcoin", "Bitcoin price", "the Bitcoin price", "Bitcoin's price",
        "the population of Vienna", "the population in Vienna", "the date of Easter",
        "the number of bones in the human body", "the capital of France",
    ],
)  # fmt: skip
def test_who_asks_for_a_figure_wants_no_explanation_of_it(opening: str, figure: str) -> None:
    asked, explained = f"What is {figure}?", f"{opening} {figure}"
    assert canonical_question(asked) != canonical_question(explained)
    assert compared_question(asked) != compared_question(explained)
    for mode in MODES:
        assert refusal(asked, explained, mode) is not None
        assert refusal(explained, asked, mode) is not None


@pytest.mark.parametrize("thing", ["the boiling point of water", "the time difference between London and Tokyo"])
def test_strict_explains_nothing_that_is_of_a_thing(thing: str) -> None:
    assert refusal(f"Explain {thing}", f"What is {thing}?", "strict") == "wording"


@pytest.mark.parametrize("notion", ["value", "price", "inflation in economics", "IP address", "interest rate"])
def test_a_notion_is_explained_by_what_it_is(notion: str) -> None:
    for mode in MODES:
        assert refusal(f"Explain {notion}", f"What is {notion}?", mode) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What are some ways to tie a tie?", "How can I tie a tie?"),
        ("What is the best way to tie a tie?", "What are some of the best ways to tie a tie?"),
        ("What can I do to sleep better?", "How can I sleep better?"),
        ("Which books about Rome are the best?", "What are the best books about Rome?"),
        ("Which planet in our galaxy is the largest?", "What is the largest planet in our galaxy?"),
        ("Which are some of the best jokes?", "What are the best jokes?"),
    ],
)
def test_strict_takes_openings_that_say_the_same_for_one(one: str, other: str) -> None:
    assert refusal(one, other, "strict") is None
    assert refusal(other, one, "strict") is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("How do you feel?", "How do I feel?"),
        ("How do you know my name?", "How do I know my name?"),
        ("How do you choose your words with care?", "How do I choose your words with care?"),
        ("How do we die of cold?", "How do I die of cold?"),
        ("What should I do to sleep better?", "How can I sleep better?"),
        ("What is the fastest way to tie a tie?", "How do I tie a tie?"),
        ("What is the worst way to tie a tie?", "What is the best way to tie a tie?"),
        ("Which planet is the largest in our galaxy?", "Which galaxy is the largest in our planet?"),
        ("Which man is the oldest?", "Which is the man?"),
        ("Which city is the oldest, and why?", "What is the oldest city?"),
    ],
)
def test_strict_takes_no_other_openings_for_one(one: str, other: str) -> None:
    assert refusal(one, other, "strict") is not None
    assert refusal(other, one, "strict") is not None


def test_a_question_reads_as_its_parts() -> None:
    question = read_question("How many miles is it from New York to Boston?")
    assert question.asks == "how_many"
    assert question.units == {"mile"}
    assert question.names == {"new", "york", "boston"}
    assert [word.key for word in question.content] == ["miles", "new", "york", "boston"]


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("empty", " \n"),
        ("too_long", "why " * 257),
        ("too_long", "a" * 5000),
        ("deictic", "What is the weather today?"),
        ("deictic", "Who won the election this year?"),
        ("deictic", "Who is the current pope?"),
        ("deictic", "How does it work?"),
        ("deictic", "What does this mean?"),
        ("deictic", "Where is the nearest pharmacy from here?"),
        (None, "Is it safe to take ibuprofen?"),
        (None, "How long does it take to learn Python?"),
        (None, "How does a car engine work, and who invented it?"),
        (None, "What is the best laptop above $500?"),
        (None, "Translate this sentence to Italian: I am tired"),
        (None, "What is ML?"),
    ],
)
def test_a_question_that_depends_on_the_moment_takes_no_part(reason: str | None, text: str) -> None:
    assert eligible(text) == reason
