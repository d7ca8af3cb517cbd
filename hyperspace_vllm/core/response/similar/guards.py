"""Guards: differences between two similar questions that a cosine does not show, and that forbid a semantic hit.

Context: "Is it safe to take ibuprofen?" and "Is it unsafe to take ibuprofen?" are as near to each other as two
spellings of one question. Choice: guards over word tables (`guard_words`); each detects one kind of difference, and
refuses. Rejected: a cross-encoder, which costs tens of milliseconds per candidate on a core that the engine needs.
Cost: the guards read English, and refuse many pairs that have the same answer.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from operator import ne
from typing import Literal

from ...records.limits import QUESTION_CHARS_MAX
from .canonical import WORDS_MAX, canonical_question, is_read
from .guard_words import (
    CURRENCIES,
    DEICTIC,
    DEICTIC_DETERMINERS,
    DEICTIC_PERIODS,
    DEICTIC_PHRASES,
    ENGLISH,
    ENGLISH_BESIDE,
    ENGLISH_OTHERS,
    FUNCTION,
    KINDS,
    LANGUAGES,
    NOT_OF_MANNER,
    PREPOSITIONS,
    QUALIFIERS,
    SYMMETRIC,
    word_set,
)
from .opposites import have_antonyms, have_other_affixes
from .persons import are_exchanged
from .question import ParsedQuestion, Word, are_derived, read_question
from .signs import signs
from .wording import articles, wording

Mode = Literal["balanced", "strict"]

_EXCHANGED_MAX = 2  # "new york" for "los angeles"
_GOALS = frozenset(("to", "into", "onto"))
_TOWARDS = _GOALS | {"in"}
_OF_THEIR_TIME = frozenset(("who", "what", "where", "is"))
_ALIKE = ({"what", "definition"}, {"what", "about"})
_OPEN = frozenset(("what", "where", "why"))
_POINTING = word_set("it its this that these those they them their he him his she her such")
# "It" that stands for nothing, or for what follows. Two searches: one pattern for both takes quadratic time.
_EXPLETIVE = re.compile(
    r"\b(?:it(?:'s| is| was| will be| would be| takes?| took| costs?| feels?)"
    r"|(?:is|was|will|would|does|did|do|can) it (?:be |ever |really )?(?!work|mean|do\b|go\b|happen)\w+)\b",
    re.IGNORECASE,
)
_WHAT_FOLLOWS = re.compile(r"\b(?:to|that|if|when|for|like|\w+ing)\b", re.IGNORECASE)
_LIMITS = re.compile(r"\b(?:above|below) [$€£₹¥]?(?:rs\.? ?)?\d")
_ENGLISH = re.compile(r"^\W*do\b|\bis (\w+ )?an?\b", re.IGNORECASE)
_DEICTIC = re.compile(
    rf"\b(?:(?:{'|'.join(sorted(DEICTIC_DETERMINERS))}) (?:{'|'.join(sorted(DEICTIC_PERIODS))})"
    rf"|{'|'.join(DEICTIC_PHRASES)})\b",
    re.IGNORECASE,
)


def eligible(text: str) -> str | None:
    """The reason why a question takes no part in semantic hits; None if it does.

    "empty", "too_long", "not_english", "unread" (characters that the comparison ignores) or "deictic".

    The guards read English: in another language they recognise neither negation nor names.
    """
    if not text.strip():
        return "empty"
    if len(text) > QUESTION_CHARS_MAX or len(text.split()) > WORDS_MAX:
        return "too_long"
    words = re.findall(r"[\w']+", _LIMITS.sub("", text.lower()))
    if not _is_english(text, {word.partition("'")[0] for word in words}):
        return "not_english"
    if not is_read(text):
        return "unread"
    if DEICTIC & set(words) or _DEICTIC.search(text) or _points_outside(text, words):
        return "deictic"
    return None


def _is_english(text: str, words: set[str]) -> bool:
    others = len(ENGLISH_OTHERS & words)
    return bool(ENGLISH & words or others > 1 or (others and ENGLISH_BESIDE & words) or _ENGLISH.search(text))


def refusal(a: str, b: str, mode: Mode) -> str | None:
    """The guard that forbids to serve the stored answer of question `b` to question `a`; None if it may be served.

    Symmetric. The result is one of `GUARDS`, or for `strict` of `STRICT_GUARDS`.
    """
    if canonical_question(a) == canonical_question(b):
        return None
    return refusal_between(read_question(a), read_question(b), mode)


def refusal_between(one: ParsedQuestion, other: ParsedQuestion, mode: Mode) -> str | None:
    """As `refusal`, for questions that have been parsed and whose canonical forms differ."""
    guards = GUARDS + STRICT_GUARDS if mode == "strict" else GUARDS
    return next((name for name, differ in guards if differ(one, other)), None)


def _differ_in_numbers(one: ParsedQuestion, other: ParsedQuestion) -> bool:
    return one.numbers != other.numbers


def _differ_in_units(one: ParsedQuestion, other: ParsedQuestion) -> bool:
    """A currency may be left out, but not exchanged."""
    ours, theirs = one.units - other.units, other.units - one.units
    return bool(ours and theirs) or not (ours | theirs) <= CURRENCIES


def _differ_in_signs(one: ParsedQuestion, other: ParsedQuestion) -> bool:
    """What "+x" does, and "-x"."""
    return signs(one.plain) != signs(other.plain)


def _differ_in_negation(one: ParsedQuestion, other: ParsedQuestion) -> bool:
    return one.is_negated != other.is_negated or have_other_affixes(*_differing_words(one, other))


def _differ_by_antonym(one: ParsedQuestion, other: ParsedQuestion) -> bool:
    return have_antonyms(*_differing_words(one, other))


def _differ_in_kind(one: ParsedQuestion, other: ParsedQuestion) -> bool:
    """A word exchanged for another of its kind: a month for a month, "daily" for "weekly", "all" for "some"."""
    ours, theirs = ({KINDS[word] for word in words & KINDS.keys()} for words in _differing_words(one, other))
    return any(kind == other_kind and x != y for kind, x in ours for other_kind, y in theirs)


def _differ_in_noun(one: ParsedQuestion, other: ParsedQuestion) -> bool:
    """What glass is, and what a glass is; what Windows is, and what windows are."""
    return None not in (one.noun, other.noun) and one.noun != other.noun and "mass" in (one.noun, other.noun)


def _differ_in_comparison(one: ParsedQuestion, other: ParsedQuestion) -> bool:
    """What is faster is not what is as fast, nor what is fastest."""
    return None not in (one.compares, other.compares) and one.compares != other.compares


def _differ_in_qualifier(one: ParsedQuestion, other: ParsedQuestion) -> bool:
    """A qualifier in only one question changes its subject: "attempted murder", "only vegetables"."""
    return ("only" in one.keys) != ("only" in other.keys) or _adds_qualifier(one, other) or _adds_qualifier(other, one)


def _differ_in_persons(one: ParsedQuestion, other: ParsedQuestion) -> bool:
    """My name and your name."""
    return are_exchanged(one.plain, other.plain)


def _differ_in_language(one: ParsedQuestion, other: ParsedQuestion) -> bool:
    return (one.keys & LANGUAGES) != (other.keys & LANGUAGES)


def _differ_in_names(one: ParsedQuestion, other: ParsedQuestion) -> bool:
    """Names must be the same on both sides."""
    return not (all(_is_named(name, other) for name in one.names) and all(_is_named(name, one) for name in other.names))


def _differ_in_time(one: ParsedQuestion, other: ParsedQuestion) -> bool:
    """Who, what and where is another than who, what and where was; how and why mostly remain."""
    return {one.asks, other.asks} <= _OF_THEIR_TIME and _differ_in_tense(one, other)


def _differ_in_tense(one: ParsedQuestion, other: ParsedQuestion) -> bool:
    return one.tense is not None and other.tense is not None and one.tense != other.tense


def _differ_in_modality(one: ParsedQuestion, other: ParsedQuestion) -> bool:
    """What can be done is not what may or must be; how something is done mostly remains."""
    if one.asks == "how" or one.modal is None or other.modal is None:
        return False
    if one.asks in _OPEN and {one.modal, other.modal} in ({"can", "could"}, {"will", "would"}):
        return False
    return one.modal != other.modal


def _differ_in_type(one: ParsedQuestion, other: ParsedQuestion) -> bool:
    """How an equation is determined is what the equation is; how cats learn isn't what cats learn."""
    asked = {one.asks, other.asks}
    return len(asked) > 1 and asked not in _ALIKE and not (asked == {"how", "what"} and one.says != other.says)


def _differ_in_roles(one: ParsedQuestion, other: ParsedQuestion) -> bool:
    """The roles of subject and object, and the directions of conversions.

    Two words that both questions have may not change places, unless the words between treat them alike ("between A and
    B"), or connect them in another way ("branches in git", "git branches").
    """
    mine, yours = _shared(one, other), _shared(other, one)
    if _directions_differ(mine, yours):
        return True
    order, other_order = [word.concept for word in mine], [word.concept for word in yours]
    if order == other_order:
        return one.is_passive != other.is_passive
    moved = [place for place, (x, y) in enumerate(zip(order, other_order, strict=True)) if x != y]
    if len(moved) != 2:
        return False
    first, second = moved
    links, other_links = _links(mine, first, second), _links(yours, first, second)
    if SYMMETRIC & set(links) and SYMMETRIC & set(other_links):
        return False
    is_amount = any(mine[place].concept[0].isdigit() for place in moved)  # "INR 500", "500 INR"
    return second - first > 1 or (links == other_links and not (is_amount and not links))


def _differ_in_spelling(one: ParsedQuestion, other: ParsedQuestion) -> bool:
    """Embedders remove accents, so words with accents must be the same."""
    return one.accented != other.accented


def _differ_in_manner(one: ParsedQuestion, other: ParsedQuestion) -> bool:
    """An adverb in only one question may reverse the answer: "falsely"."""
    return _adds_manner(one, other) or _adds_manner(other, one)


def _differ_in_clauses(one: ParsedQuestion, other: ParsedQuestion) -> bool:
    """A part between commas, or a sentence, of which the other question has no word."""
    return _adds_clause(one, other) or _adds_clause(other, one)


def _differ_in_prepositions(one: ParsedQuestion, other: ParsedQuestion) -> bool:
    """Those before a word that both have: "into a server", "out of a server"; only one may have some."""
    mine, yours = _prepositions(one), _prepositions(other)
    return any(mine[concept] != yours[concept] for concept in mine.keys() & yours.keys())


def _differ_in_a_word(one: ParsedQuestion, other: ParsedQuestion) -> bool:
    """Questions that are the same but for a word or two ask for two things, unless those are other forms of them."""
    mine, yours = _phrase(one), _phrase(other)
    if len(mine) != len(yours):
        return False
    exchanged = [(x, y) for x, y in zip(mine, yours, strict=True) if x.concept != y.concept]
    moved = {x.concept for x, _ in exchanged} & {y.concept for _, y in exchanged}
    if len(exchanged) > _EXCHANGED_MAX or moved:
        return False
    return any(_are_two(x, y) for x, y in exchanged)


def _differ_in_articles(one: ParsedQuestion, other: ParsedQuestion) -> bool:
    """One may be missing, but not exchanged."""
    mine, yours = articles(one.plain), articles(other.plain)
    return any(mine[word] != yours[word] for word in mine.keys() & yours.keys())


def _differ_in_wording(one: ParsedQuestion, other: ParsedQuestion) -> bool:
    """Any word that only one has, or that stands elsewhere, but for two that change places (see roles)."""
    mine, yours = wording(one.plain), wording(other.plain)
    return sorted(mine) != sorted(yours) or sum(map(ne, mine, yours)) > 2


# The first that refuses is named.
GUARDS: tuple[tuple[str, Callable[[ParsedQuestion, ParsedQuestion], bool]], ...] = (
    ("numbers", _differ_in_numbers),
    ("units", _differ_in_units),
    ("signs", _differ_in_signs),
    ("negation", _differ_in_negation),
    ("antonyms", _differ_by_antonym),
    ("languages", _differ_in_language),
    ("entities", _differ_in_names),
    ("kinds", _differ_in_kind),
    ("kinds", _differ_in_noun),
    ("comparison", _differ_in_comparison),
    ("qualifiers", _differ_in_qualifier),
    ("persons", _differ_in_persons),
    ("time", _differ_in_time),
    ("question_type", _differ_in_type),
    ("modality", _differ_in_modality),
    ("roles", _differ_in_roles),
    ("spelling", _differ_in_spelling),
    ("manner", _differ_in_manner),
    ("clauses", _differ_in_clauses),
    ("prepositions", _differ_in_prepositions),
    ("word", _differ_in_a_word),
)
STRICT_GUARDS: tuple[tuple[str, Callable[[ParsedQuestion, ParsedQuestion], bool]], ...] = (
    ("time", _differ_in_tense),
    ("articles", _differ_in_articles),
    ("wording", _differ_in_wording),
)


def _points_outside(text: str, words: list[str]) -> bool:
    """Whether a pronoun comes before any word that it could stand for."""
    expletive = _EXPLETIVE.search(text)
    if (expletive and _WHAT_FOLLOWS.search(text, expletive.end())) or ":" in text or '"' in text:
        return False
    for word in words:
        if word in _POINTING:
            return True
        if word not in FUNCTION:
            return False
    return False


def _adds_qualifier(one: ParsedQuestion, other: ParsedQuestion) -> bool:
    kinds = {KINDS[word][1] for word in other.keys if word in KINDS}
    concepts = kinds | {word.concept for word in other.content}
    added = (word for word in one.content if word.key in QUALIFIERS and word.concept not in concepts)
    return any(KINDS.get(word.key, (0, ""))[1] not in kinds for word in added)


def _adds_manner(one: ParsedQuestion, other: ParsedQuestion) -> bool:
    concepts = {word.concept for word in other.content}
    return any(
        word.key.endswith("ly") and word.concept not in concepts and word.key not in NOT_OF_MANNER
        for word in one.content
    )


def _adds_clause(one: ParsedQuestion, other: ParsedQuestion) -> bool:
    theirs = other.keys | {word.concept for word in other.content}
    return len(one.clauses) > 1 and any(clause.isdisjoint(theirs) for clause in one.clauses)


def _differing_words(one: ParsedQuestion, other: ParsedQuestion) -> tuple[frozenset[str], frozenset[str]]:
    return one.keys - other.keys, other.keys - one.keys


def _is_named(name: str, question: ParsedQuestion) -> bool:
    """Whether a name is among a question's words, as a name or not, in its singular or plural."""
    return name in question.keys or name.removesuffix("s") in question.keys or f"{name}s" in question.keys


def _shared(one: ParsedQuestion, other: ParsedQuestion) -> list[Word]:
    """The words of `one`, in its order, that both questions have exactly once."""
    ours, theirs = Counter(word.concept for word in one.content), Counter(word.concept for word in other.content)
    return [word for word in one.content if ours[word.concept] == theirs[word.concept] == 1]


def _directions_differ(mine: list[Word], yours: list[Word]) -> bool:
    """Whether one question goes from, or to, what the other goes to, or from; "a PDF to a Word file"."""
    theirs = {word.concept: word.link[-1:] for word in yours}
    both = [{*word.link[-1:], *theirs[word.concept]} for word in mine]
    ours_to, theirs_to = ({word.concept for word in words if _GOALS & {*word.link[-1:]}} for words in (mine, yours))
    return bool(ours_to - theirs_to and theirs_to - ours_to) or any(
        "from" in prepositions and prepositions & _TOWARDS for prepositions in both
    )


def _phrase(question: ParsedQuestion) -> list[Word]:
    """The content words of a question, and the prepositions between them."""
    return [
        each
        for word in question.content
        for each in (*(Word(link, link, ()) for link in word.link if link in PREPOSITIONS), word)
    ]


def _are_two(x: Word, y: Word) -> bool:
    """Whether the two words have different meanings, as far as the tables tell."""
    if x.is_filler and y.is_filler:
        return False
    if x.key in KINDS and KINDS[x.key] == KINDS.get(y.key):
        return False  # "until", "till"
    return {x.key, y.key} <= PREPOSITIONS or not (are_derived(x.key, y.key) or are_derived(x.concept, y.concept))


def _prepositions(question: ParsedQuestion) -> dict[str, set[str]]:
    """Those before each concept that has any, but for what joins it to another of its kind."""
    found, before = defaultdict[str, set[str]](set), set[str]()
    for word in question.content:
        before |= {*word.link, word.key} & PREPOSITIONS - SYMMETRIC
        if before and word.key not in PREPOSITIONS:
            found[word.concept] |= before
            before = set()
    return found


def _links(words: list[Word], first: int, second: int) -> list[str]:
    """The function words between two places."""
    return [link for word in words[first + 1 : second + 1] for link in word.link]
