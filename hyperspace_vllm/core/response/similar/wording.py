"""Every word of a question, for `strict`: any that only one of two questions has keeps them apart.

Context: a small word turns a question ("too much salt", "sue for", "get off drugs"), and no list of those that do is
ever complete. Choice: a closed list of what may be missing, and all else counts, in its tense, where it stands. Equal
are only plurals, synonyms of one sense (words/synonyms.txt), what stands for one word by grammar alone (is, are), and
a few openings. Rejected: a list of words that may be missing for each kind of question. Cost: most rewordings, such as
"you" for "I".
"""

import re
from collections.abc import Iterator
from itertools import pairwise

from .guard_words import FUNCTION, IRREGULAR, NEGATIONS, SYMMETRIC, word_set
from .question import Token, number_of, sense_of, tokens_of

# Articles, and "do", which only makes a question of a statement. Not the forms of "be" and "have", which say something
# by themselves, nor "did", the past.
_UNSAID = word_set("a an the do does")
_ARTICLES = {"a": "a", "an": "a", "the": "the"}
_AFTER_ARTICLES = word_set("few little")  # "a few" are some, "few" hardly any
_WITHOUT_CAPITALS = word_set("I An The Do Does")
_SPELT = {"are": "is", "were": "was", "has": "have", "which": "what", "whom": "who"}
# Openings that say the same, and what they are read as. "How do we die" and "how should I" ask for something else, and
# so do "how do you store what I say" and "how can you defend a murderer".
_OPENINGS = (
    (
        "how to ",
        r"how (?:do|can) i |how (?:does|can) (?:one|someone) |what (?:can|do) i do to "
        r"|what (?:is|are) (?:the |an? |some (?:of the )?)?(?:best |good )?ways? (?:to|i can) ",
    ),
    (
        "what is ",
        # Not of a thing that is another's: the boiling point of water is a figure.
        r"(?:explain|define) (?!.*(?: of | between |'s ))"
        r"|(?:what|which) are some (?:of (?=the |your |my ))?|(?:what|which) (?:is|are) ",
    ),
)
_OPENED = tuple((read_as, re.compile(rf"^(?:{said})(?=\w)", re.IGNORECASE)) for read_as, said in _OPENINGS)
# "Which book about Rome is the best", where nothing but a place, a time or a purpose follows.
_SUPERLATIVE_LAST = re.compile(
    r"^(?:which|what) (?P<thing>(?!is |are )[\w' -]{1,80}?) (?:is|are) "
    r"(?:the (?P<most>\w+est|most \w+)|(?:the )?(?P<best>best|worst))"
    r"(?P<rest>(?: (?:in|for|on|at|under|to) [^,;:.?!]{1,80})?)[?.!]*$",
    re.IGNORECASE,
)


def wording(plain: str) -> list[tuple[str, ...]]:
    """The words of a plain question (canonical.py) that say something, in order, each after its small words.

    What is written with a capital inside the text, or quoted, is as it is written: a Python is no python.
    """
    for read_as, opening in _OPENED:
        plain = opening.sub(read_as, plain)
    if (found := _SUPERLATIVE_LAST.match(plain)) is not None:
        plain = f"what is the {found['most'] or found['best']} {found['thing']}{found['rest']}"
    return list(_bound(tokens_of(plain)))


def articles(plain: str) -> dict[str, str]:
    """The article before each word of a plain question that has one: a cloud is not the cloud."""
    tokens = tokens_of(plain)
    found = ((word.key, _ARTICLES[article.key]) for article, word in pairwise(tokens) if article.key in _ARTICLES)
    return dict(found)


def _bound(tokens: list[Token]) -> Iterator[tuple[str, ...]]:
    small: list[str] = []
    for place, token in enumerate(tokens):
        word = _spelt(token, opens=place == 0)
        if word in SYMMETRIC:
            yield (word,)
        elif word in _UNSAID:
            small += [word for each in tokens[place + 1 : place + 2] if each.key in _AFTER_ARTICLES]
        elif word in FUNCTION or word in NEGATIONS or token.kind == "operator":
            small.append(_SPELT.get(word, word))
        else:
            yield (*small, word)
            small = ["'s"] if token.text.lower().endswith("'s") else []
    yield tuple(small)


def _spelt(token: Token, opens: bool) -> str:
    text, key = token.text, token.key
    is_opening = opens and (len(text) == 1 or text[1:].islower())
    if token.is_quoted:
        return f'"{text}"'
    if text != text.lower() and text not in _WITHOUT_CAPITALS and not is_opening:
        return text.replace(".", "").removesuffix("'s")
    if key in FUNCTION:
        return key
    has_ending = IRREGULAR.get(key, key) != key or key.endswith(("ed", "ing", "ly"))
    return number_of(token) or (key if has_ending else sense_of(key))
