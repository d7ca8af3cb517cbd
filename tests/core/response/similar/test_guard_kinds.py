"""Kinds of near-misses that the guards keep apart, each made by rule: whatever of a kind is exchanged for another."""

import time
from itertools import combinations, permutations

import pytest

from hyperspace_vllm.core.response.similar.guard_words import PREPOSITIONS
from hyperspace_vllm.core.response.similar.guards import Mode, eligible, refusal
from hyperspace_vllm.core.response.similar.opposites import have_antonyms, have_other_affixes
from hyperspace_vllm.core.response.similar.signs import signs

MODES: tuple[Mode, ...] = ("balanced", "strict")


def is_refused(one: str, other: str) -> bool:
    """In both modes, and whichever of the two is stored."""
    assert eligible(one) is None, one
    assert eligible(other) is None, other
    refusals = {refusal(*pair, mode) for pair in ((one, other), (other, one)) for mode in MODES}
    assert len(refusals) == 1 or None in refusals, f"{one} | {other}: {refusals}"
    return None not in refusals


def not_refused(frames: tuple[str, ...], words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Of all pairs of words in each frame, the pairs of questions that pass."""
    pairs = [(frame.format(x), frame.format(y)) for frame in frames for x, y in combinations(words, 2)]
    return [pair for pair in pairs if not is_refused(*pair)]


QUANTIFIERS = ("all", "some", "any", "most", "few", "several", "no")
MODALS = ("can", "could", "may", "might", "must", "should", "will", "would")
FREQUENCIES = ("hourly", "daily", "nightly", "weekly", "monthly", "quarterly", "yearly")
RELATIONS = ("before", "after", "during", "since")
AMOUNTS = ("starting", "average", "maximum", "minimum", "final", "total")
LEVELS = ("federal", "state", "local", "national", "international")


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        (
            ("Do {} birds migrate in winter?", "Are {} snakes venomous?", "What do {} doctors say about sugar?"),
            QUANTIFIERS,
        ),
        (("{} a tenant paint the walls?", "Who {} sign the contract?", "When {} the jury speak?"), MODALS),
        (("How much is a {} pass for the metro?", "What are the {} costs of a dog?"), FREQUENCIES),
        (("What happens {} a solar eclipse?", "Can I eat {} a fast?"), RELATIONS),
        (("What is the {} salary of a teacher?", "Is the {} dose of iron safe?"), AMOUNTS),
        (("What does {} law say about knives?", "Who pays for {} roads?"), LEVELS),
    ],
)
def test_a_word_of_a_closed_class_exchanged_for_another_keeps_questions_apart(
    frames: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert not_refused(frames, words) == []


ADJECTIVES = (
    *(
        ("large", "small"),
        ("big", "little"),
        ("hot", "cool"),
        ("deep", "shallow"),
        ("heavy", "light"),
        ("thick", "thin"),
    ),
    *(
        ("rich", "poor"),
        ("wide", "narrow"),
        ("cheap", "expensive"),
        ("fast", "slow"),
        ("loud", "quiet"),
    ),
    *(("strong", "weak"), ("hard", "soft"), ("bright", "dim"), ("safe", "dangerous"), ("happy", "sad"), ("wet", "dry")),
)


def degrees(adjective: str) -> tuple[str, str]:
    """The comparative and the superlative of an English adjective."""
    if len(adjective) > 6:
        return f"more {adjective}", f"most {adjective}"
    doubled = adjective[-1] in "tgdn" and adjective[-2] in "aeiou" and adjective[-3] not in "aeiou"
    root = adjective + adjective[-1] if doubled else adjective.removesuffix("e")
    root = root[:-1] + "i" if root.endswith("y") and root[-2] not in "aeiou" else root
    return f"{root}er", f"{root}est"


@pytest.mark.parametrize(("one", "other"), ADJECTIVES)
def test_opposites_are_told_in_every_degree(one: str, other: str) -> None:
    comparatives, superlatives = zip(degrees(one), degrees(other), strict=True)
    assert is_refused(f"Which is a {one} animal?", f"Which is a {other} animal?")
    assert is_refused(
        f"Which animals are {comparatives[0]} than a dog?", f"Which animals are {comparatives[1]} than a dog?"
    )
    assert is_refused(f"What is the {superlatives[0]} animal?", f"What is the {superlatives[1]} animal?")


@pytest.mark.parametrize("adjective", sorted({word for pair in ADJECTIVES for word in pair if len(word) < 7}))
def test_degrees_of_comparison_are_not_each_other(adjective: str) -> None:
    comparative, superlative = degrees(adjective)
    assert is_refused(f"Which animals are {comparative} than a dog?", f"Which animals are as {adjective} as a dog?")
    assert is_refused(f"Which animals are {comparative} than a dog?", f"Which animals are the {superlative} of dogs?")


def test_more_is_not_less() -> None:
    assert is_refused("Is more sleep better for you?", "Is less sleep better for you?")
    assert is_refused("Which country has the most lakes?", "Which country has the fewest lakes?")


# Two of a row, and one of them and none, before a stem.
PREFIXES = (
    *(("hypo", "hyper"), ("endo", "exo"), ("intra", "inter", "extra"), ("micro", "macro"), ("milli", "micro", "nano")),
    *(("mono", "poly"), ("uni", "multi"), ("pre", "post"), ("sub", "super"), ("brady", "tachy"), ("homo", "hetero")),
    *(
        ("over", "under"),
        ("im", "ex"),
        ("de", "in"),
        ("anti", "pro"),
        ("eu", "dys"),
        ("auto", "hetero"),
        ("mis", "dis"),
    ),
)
STEMS = ("thermia", "glycemia", "lingual", "cellular", "cardia", "trophic", "zorbing")


@pytest.mark.parametrize("row", PREFIXES)
def test_prefixes_turn_words_that_no_table_has(row: tuple[str, ...]) -> None:
    for stem in STEMS:
        words = (stem, *(prefix + stem for prefix in row))
        assert [pair for pair in permutations(words, 2) if not have_other_affixes({pair[0]}, {pair[1]})] == []
        assert not_refused(("How is {} treated?",), words) == []


@pytest.mark.parametrize(
    "row",
    [("ful", "less"), ("phobia", "philia"), ("phobic", "philic"), ("er", "ee"), ("or", "ee"), ("ate", "ite", "ide")],
)
def test_endings_turn_words_that_no_table_has(row: tuple[str, ...]) -> None:
    for stem in ("hydro", "sulf", "mord", "train"):
        assert not_refused(("What is the duty of the {}?",), tuple(stem + ending for ending in row)) == []


@pytest.mark.parametrize("word", ["glass", "windows", "iron", "time", "paper"])
def test_a_substance_is_no_thing(word: str) -> None:
    assert is_refused(f"What is {word}?", f"What are {word}?")
    assert is_refused(f"What is {word}?", f"Define a {word}") or word == "windows"


QUALIFIERS = ("attempted", "alleged", "suspected", "former", "starting", "maximum", "gross", "net", "partial", "fake")


@pytest.mark.parametrize("qualifier", QUALIFIERS)
def test_a_qualifier_that_only_one_question_has_makes_it_another(qualifier: str) -> None:
    for frame in ("What is the sentence for {}murder in Texas?", "Who are the {}victims of the fraud?"):
        assert is_refused(frame.format(""), frame.format(f"{qualifier} "))


FRAMES = (
    "How does {} happen in the body?",
    "What is {} used for in the body?",
    "Does {} affect children more than adults?",
    "Why do doctors study {} so closely?",
)
# Words that no table knows, and that say something else.
THINGS = ("mitosis", "meiosis", "lysis", "osteolysis", "scurvy", "rickets")


@pytest.mark.parametrize(
    "frame", ["How do I convert {} to {}?", "what is the best way to turn {} into {}", "How far is it from {} to {}?"]
)
def test_what_goes_one_way_does_not_go_the_other(frame: str) -> None:
    things = ("a pdf", "a word file", "an old java program", "grey")
    reversed_pairs = [(frame.format(x, y), frame.format(y, x)) for x, y in combinations(things, 2)]
    assert [pair for pair in reversed_pairs if not is_refused(*pair)] == []


def test_two_words_for_two_others_keep_questions_apart_that_are_else_the_same() -> None:
    assert not_refused(("how do i get to {} by train", "why is {} so expensive"), ("new york", "los angeles")) == []
    assert is_refused("What is a tall building in Dubai?", "What is the tallest building in Dubai?")
    assert is_refused("Which books are by Darwin?", "Which books are about Darwin?")
    assert is_refused("Can I take iron and zinc?", "Can I take iron or zinc?")


def test_one_word_for_another_keeps_questions_apart_that_are_else_the_same() -> None:
    assert not_refused(FRAMES, THINGS) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("How do I stop beard growing?", "How do I stop beard growth?"),
        ("How do I start travelling?", "How do I start traveling?"),
        ("What would you do if you fell in love?", "What would you do if you fall in love?"),
        ("What is the biggest city of Peru?", "What is the largest city of Peru?"),
        ("How can I reduce my blood pressure?", "How can I lower my blood pressure?"),
        ("How long does it take to learn to drive?", "How much time does it take to learn to drive?"),
        ("Define inheritance in Java", "Explain inheritance in Java"),
    ],
)
def test_another_form_of_a_word_or_a_synonym_is_no_other_word(one: str, other: str) -> None:
    assert refusal(one, other, "balanced") is None
    assert refusal(other, one, "balanced") is None


EXCHANGED = (*sorted(PREPOSITIONS - {"and", "or", "between", "above", "below", "until"}), "out of")


@pytest.mark.parametrize(
    "frame", ["How do I copy files {} a server?", "Did anyone vote {} Brexit?", "Are girls pregnant {} breastfeeding?"]
)
def test_a_preposition_exchanged_for_another_keeps_questions_apart(frame: str) -> None:
    assert not_refused((frame,), EXCHANGED) == []


MEASURES = {"height": "tall", "length": "long", "depth": "deep", "width": "wide", "age": "old", "speed": "fast"}


@pytest.mark.parametrize("noun", sorted(MEASURES))
def test_a_measure_is_asked_for_by_its_noun_or_its_adjective(noun: str) -> None:
    one = f"What is the {noun} of the Eiffel Tower?"
    assert refusal(one, f"How {MEASURES[noun]} is the Eiffel Tower?", "balanced") is None
    assert refusal(f"How {MEASURES[noun]} is the Eiffel Tower?", one, "balanced") is None
    others = [measure for measure in MEASURES if measure != noun]
    assert all(is_refused(one, f"How {MEASURES[other]} is the Eiffel Tower?") for other in others)
    assert all(is_refused(one, f"What is the {other} of the Eiffel Tower?") for other in others)


def test_different_words_of_one_form_are_no_opposites() -> None:
    for one, other in (
        ("way", "away"),
        ("story", "history"),
        ("teacher", "teach"),
        ("start", "begin"),
        ("cat", "cater"),
    ):
        assert not have_other_affixes({one}, {other})
        assert not have_antonyms({one}, {other})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("How can I lose weight?", "How could I lose weight?"),
        ("Where can I buy books?", "Where could I buy books?"),
        ("What are some good books?", "What are good books?"),
        ("Do all the birds of a flock sing?", "Does every bird of a flock sing?"),
        ("What is the annual cost of a dog?", "What is the yearly cost of a dog?"),
        ("What should I eat until noon?", "What should I eat till noon?"),
        ("Is the starting salary high?", "Is the salary high at the start?"),
        ("What are vaccines?", "What is a vaccine?"),
        ("Does a driver have to stop at a red light?", "Does a driver need to stop at a red light?"),
        ("Which is the fastest animal?", "What is the fastest animal?"),
    ],
)
def test_words_that_say_the_same_keep_nothing_apart(one: str, other: str) -> None:
    assert refusal(one, other, "balanced") is None
    assert refusal(other, one, "balanced") is None


def test_long_questions_take_time_in_proportion() -> None:
    def took_s(words: int) -> float:
        one, other = (
            f"Why do {' '.join(f'{side}{number}tion' for number in range(words))}?" for side in ("over", "and")
        )
        began = time.process_time()
        refusal(one, other, "strict")
        return time.process_time() - began

    quickest = [min(took_s(words) for _ in range(5)) for words in (25, 250)]
    assert quickest[1] < 40 * quickest[0]  # 10 times as long; 100 times if each word were held against each


@pytest.mark.parametrize(
    ("frames", "persons"),
    [
        (("What is {} name?", "Who can read {} messages?", "Does {} dog eat the right food?"), ("my", "your", "our")),
        (("What do {} think about taxes?", "Do {} like cats?", "When do {} feel tired?"), ("I", "you", "we")),
        (("Who made {}?", "Can anyone trust {} with a secret?"), ("me", "you", "us")),
    ],
)
def test_a_person_exchanged_for_another_keeps_questions_apart(
    frames: tuple[str, ...], persons: tuple[str, ...]
) -> None:
    assert not_refused(frames, persons) == []


def test_who_helps_whom_keeps_questions_apart() -> None:
    assert is_refused("Can you help me with my essay?", "Can I help you with your essay?")
    assert is_refused("How do you know my name?", "How do I know your name?")


@pytest.mark.parametrize("frame", ["How do {} tie a tie?", "Should {} drink coffee before a run?"])
def test_a_subject_that_stands_for_people_in_general_may_be_exchanged(frame: str) -> None:
    assert refusal(frame.format("I"), frame.format("you"), "balanced") is None


def test_what_belongs_to_people_in_general_may_be_exchanged() -> None:
    assert refusal("How do I clean my oven at home?", "How do you clean your oven at home?", "balanced") is None


@pytest.mark.parametrize("place", ["Can dogs {}eat vegetables?", "Do children {}learn Python at school?"])
def test_only_keeps_questions_apart(place: str) -> None:
    assert is_refused(place.format("only "), place.format(""))


SIGNS = (".", "-", "+", "*", "**", "!", "(", "[", "#", "@", "~", "^", "/", "//", "&&", "=", "<", ">", "|", "°", "")


@pytest.mark.parametrize(
    ("place", "read_as_punctuation"),
    [
        ("What does {}5 mean?", ""),
        ("Is 5{} enough for a child?", "."),
        ("What does chmod {}x do?", "(["),
        ("Who can use O{} blood?", ".!(["),
    ],
)
def test_a_sign_exchanged_for_another_or_left_out_keeps_questions_apart(place: str, read_as_punctuation: str) -> None:
    signs = [sign for sign in SIGNS if not sign or sign not in read_as_punctuation]
    assert not_refused_by_signs(place, signs) == []


def not_refused_by_signs(place: str, signs: list[str]) -> list[tuple[str, str]]:
    """The pairs that are a hit."""
    return [
        (one, other)
        for one, other in combinations(signs, 2)
        if refusal(place.format(one), place.format(other), "balanced") is None
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("How long do 5 mg of iron last?", "How long do .5 mg of iron last?"),
        ("What is 100 - 50 - 20?", "What is 100 - (50 - 20)?"),
        ("What do I wear at 10 °C?", "What do I wear at –10 °C?"),
        ('What is a 6" pipe?', "What is a 6' pipe?"),
        ("Is Disney+ good for kids?", "Is Disney good for kids?"),
        ("What does :) mean in a text?", "What does :( mean in a text?"),
    ],
)
def test_signs_that_were_unread_keep_questions_apart(one: str, other: str) -> None:
    assert is_refused(one, other)


def test_an_article_exchanged_for_another_is_another_thing_to_strict() -> None:
    assert refusal("Who owns a cloud of data?", "Who owns the cloud of data?", "strict") == "articles"
    assert refusal("What divides the cats?", "What divides cats?", "strict") is None


def test_punctuation_between_words_is_no_sign() -> None:
    one = "How do I get a well-known brand (in India) to the dogs' market?"
    assert signs(one) == signs("How do I get a well known brand, in India, to the dogs market...") == ()
    assert signs("How far are 1,000 km at 50%?") == ()
