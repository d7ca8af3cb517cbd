"""A question as the guards read it: its words, numbers, names and type."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from .canonical import names_property, plain_question
from .guard_words import (
    FILLER,
    FUNCTION,
    IMPERATIVES,
    IRREGULAR,
    LOOSE_SYNONYMS,
    NEGATIONS,
    NUMBERS,
    SYNONYMS,
    UNITS,
    word_set,
)

_TOKEN = re.compile(
    r"(?P<number>(?<![\w.)])[-−]?\d+(?:[.,:/]\d+)*(?:st|nd|rd|th)?|\d+(?:[.,:/]\d+)*(?:st|nd|rd|th)?)"
    r"|(?P<unit>[$€£₹¥%]|°[cf]\b|\b(?:km|m)/[hs]\b|\brs(?=\.? ?\d))"
    r"|(?P<word>(?!rs\.? ?\d)\w+(?:[.'&/_]\w+)*(?:\+\+|#(?!\w))?)"
    r"|(?P<operator>[-−+*/^=<>×÷](?=\s*[\d(]))"
    r"|(?P<stop>[.?!:](?=\s|$))"
    r"|(?P<quote>\"|(?<!\w)'|'(?!\w))",
    re.IGNORECASE,
)
_QUOTATION = re.compile(r"\"+[^\"]*\"+")
_SENTENCE_ENDS = re.compile(r"(?<=[.!?])\s+")
_CLAUSE_ENDS = re.compile(r"[,;:.!?](?=\s)|[()–—]|\s-+\s")
_QUESTION_WORDS = word_set("what which who whom whose when where why how")
_YES_NO: dict[str, str] = {
    **dict.fromkeys(word_set("can could may might"), "can"),
    **dict.fromkeys(word_set("should must ought shall need"), "should"),
    **dict.fromkeys(word_set("will would"), "will"),
    **dict.fromkeys(word_set("is are am was were do does did has have had"), "is"),
}
_ASKING = _QUESTION_WORDS | _YES_NO.keys()
_MODALS: dict[str, str] = {
    **{word: word for word in word_set("can could may might must should will would")},
    **dict.fromkeys(word_set("ought shall"), "should"),
}
_TENSES: dict[str, str] = {
    **dict.fromkeys(word_set("is are am do does"), "present"),
    **dict.fromkeys(word_set("was were did had"), "past"),
    "will": "future",
}
# "In a day", "a cup" and "s" measure something only with a number before them.
_UNITS_OF_NUMBERS = word_set(
    "g s v w min minute minutes hour hours day days week weeks month months year years decade decades century "
    "centuries feet pound pounds cup cups bit bits cent ton tons yard yards"
)
_MEASURED = word_set("long old far tall big large often fast quickly deep high soon heavy wide hot cold")
# What is asked for by its noun: "what is the height of" is "how tall is".
_MEASURES = {
    "height": "tall",
    "length": "long",
    "distance": "far",
    "depth": "deep",
    "width": "wide",
    "weight": "heavy",
    "age": "old",
    "speed": "fast",
}
_CURRENCY_CODES = frozenset(("Rs", "INR", "USD", "EUR", "GBP", "JPY"))  # a unit of an amount, which may be left out
_WAYS = word_set("way ways method methods steps step procedure process tips trick tricks strategy formula recipe")
_REASONS = word_set("reason reasons cause causes importance significance")
_TIMES = word_set("year date day month")
_WAYS_ASKED = re.compile(r"(?:is|are) there (?:a |an |any |some )?(?:\w+ )?ways?\b|is it possible to\b")
_DOINGS = re.compile(r"(?:should|can|could|must|do|does) \w+ (?:have to |need to )?do to\b")
_SENSES = re.compile(r"\b(?:feel|look|taste|sound|smell|be) like\b")
_PLACES = word_set("place places")
_PLACED = word_set("in on under inside behind above below over near with within beyond between")
# What makes another form of a word, and no other thing: not "longer", "investor", "socialism".
_ENDINGS = word_set("s es ed ing th ment ments ness ion ions ation ations ance ence ity ly y")
_NOUNS = (
    ("count", re.compile(r"(?:what is|explain|define|describe) an? \w+")),
    ("mass", re.compile(r"what is \w+|(?:explain|define|describe) \w+(?:(?<!s)|(?<=[isu]s))")),
    ("plural", re.compile(r"what are \w+")),
)
_COMPARISONS = (
    ("than", re.compile(r"\b(?:\w+er|more|less|worse) (?:\w+ )?than\b")),
    ("as", re.compile(r"\bas (?!well|long|far|soon|a\b|an\b|the\b)\w+ as\b")),
    ("most", re.compile(r"\bthe (?:\w+est|most)\b")),
)
_DEFINE = word_set("explain define describe tell")
_ABOUT_A_THING = word_set("what definition about")
_BE = word_set("is are was were am be been being get gets got")
_ARTICLES = word_set("a an the my your his her their our its this that these those some")


@dataclass(frozen=True, slots=True)
class Word:
    """One word or number of a question.

    `key` is its lower case without dots and a possessive; `concept` the stem of it or of its synonyms;
    `link` the function words between it and the content word before, articles left out.
    """

    key: str
    concept: str
    link: tuple[str, ...]

    @property
    def is_filler(self) -> bool:
        """Whether its absence changes little."""
        return self.key in FILLER or self.concept in FILLER


@dataclass(frozen=True, slots=True)
class ParsedQuestion:
    """What two questions are compared by. All words are lower case.

    `numbers` are sorted, operators between them included; `content` are the words that say something, in order;
    `names` the keys of what is capitalised, written as an identifier, or quoted; `asks` is its type: what, why, how,
    how_many, who, when, where, is, can, should, will, definition, about ("tell me about"), or the verb of an order.
    `modal` is the first modal verb: can, could, may, might, must ("have to" is one), should, will, would; `noun`, where
    one is all that is asked about, "mass" (what is glass), "count" (a glass) or "plural" (what are glasses); `compares`
    "than", "as" or "most". `accented` are the words with letters beyond ASCII, sorted; `clauses` the keys and concepts
    of what each part between commas, brackets and full stops says, further questions left out. `plain` is the whole
    text, in its own case.
    """

    keys: frozenset[str]
    numbers: tuple[str, ...]
    units: frozenset[str]
    names: frozenset[str]
    content: tuple[Word, ...]
    asks: str
    tense: str | None
    modal: str | None
    noun: str | None
    compares: str | None
    is_negated: bool
    is_passive: bool
    accented: tuple[str, ...]
    clauses: tuple[frozenset[str], ...]
    plain: str

    @property
    def says(self) -> frozenset[str]:
        """The concepts of its words that say something."""
        return frozenset(word.concept for word in self.content if not word.is_filler)


@dataclass(frozen=True, slots=True)
class Token:
    """A word, number, unit or operator of a text; `opens`: a sentence."""

    kind: str
    text: str
    opens: bool
    is_quoted: bool

    @property
    def key(self) -> str:
        key = self.text.lower().removesuffix("'s").removesuffix("s'")
        return key.replace(".", "") if self.kind == "word" else key


def read_question(text: str) -> ParsedQuestion:
    """The features of a question, in time linear in its length."""
    plain = plain_question(text)
    tokens = tokens_of(plain)
    words = [token.text.lower() for token in tokens if token.kind == "word"]
    asks, content = _asks(words), _content(tokens)
    is_said = (asks in _ABOUT_A_THING and not _DEFINE.isdisjoint(words[:1])) or (
        asks.startswith("how_") and content and content[0].key in _MEASURED | _MEASURES.keys() | {"time"}
    )
    if is_said:
        del content[:1]  # "explain" says no more than "what is", nor "tall" than that it asks how tall
    return ParsedQuestion(
        keys=frozenset(token.key for token in tokens if token.kind == "word"),
        numbers=tuple(sorted(number for token in tokens if (number := number_of(token)) is not None)),
        units=frozenset(_units(tokens)),
        names=frozenset(_names(tokens)),
        content=tuple(content),
        asks=asks,
        tense=_tense(words),
        modal=_modal(words),
        noun=next((kind for kind, form in _NOUNS if form.fullmatch(" ".join(words))), None),
        compares=next((kind for kind, form in _COMPARISONS if form.search(" ".join(words))), None),
        is_negated=_is_negated(words),
        is_passive=_is_passive(words),
        accented=tuple(sorted(word for word in words if not word.isascii())),
        clauses=tuple(filter(None, map(_clause, _parts(plain)))),
        plain=plain,
    )


def stem(word: str) -> str:
    """A word without its plural, tense or adverb's ending; equal stems need not be words."""
    word = IRREGULAR.get(word, word)
    if len(word) <= 2 or not word.isalpha():
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("sses", "xes", "zes", "ches", "shes", "oes")):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    for ending in ("ing", "ed", "ly"):
        root = word.removesuffix(ending)
        if root != word and len(root) >= 3 and re.search("[aeiouy]", root):
            word = root[:-1] if root[-1] == root[-2] and root[-1] not in "lsz" else root
            break
    return word.removesuffix("e") if len(word) > 3 else word


def concept_of(word: str) -> str:
    """The stem of a word, or of the first of its synonyms."""
    root = stem(word)
    return _SYNONYM_STEMS.get(root, root)


def are_derived(one: str, other: str) -> bool:
    """Whether two words are of one root (grow, growth), as far as their endings tell."""
    short, long = sorted((re.sub(r"(.)\1", r"\1", word) for word in (one, other)), key=len)
    root = short.removesuffix("e")
    return long == short or (
        len(root) >= 3 and long.startswith(root) and bool(_ENDINGS & {long[len(each) :] for each in (root, short)})
    )


def singular(word: str) -> str:
    """A word without its plural; equal ones need not be words ("axes", "axe" and "ax")."""
    if len(word) <= 3 or not word.isalpha():
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    return word[:-1] if len(word) > 3 and word.endswith(("sse", "xe", "ze", "che", "she", "oe")) else word


def sense_of(word: str) -> str:
    """The singular of a word, or of the first of those with its one sense."""
    one = singular(word)
    return _SENSES_OF.get(one, one)


_SYNONYM_STEMS = {stem(word): stem(first) for word, first in (LOOSE_SYNONYMS | SYNONYMS).items()}
_SENSES_OF = {singular(word): singular(first) for word, first in SYNONYMS.items()}


def tokens_of(text: str) -> list[Token]:
    """The words, numbers, units and operators of a text, in order."""
    tokens: list[Token] = []
    opens, quoted = True, False
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup or ""
        if kind == "quote":
            quoted = not quoted
        elif kind == "stop":
            opens = True
        else:
            tokens.append(Token(kind, match.group(), opens, quoted))
            opens = False
    return tokens


def _parts(plain: str) -> Iterator[str]:
    first, *others = _SENTENCE_ENDS.split(_QUOTATION.sub(" ", plain))
    for sentence in (first, *others):
        is_question = sentence.endswith("?") and not _ASKING.isdisjoint(sentence.lower().split())
        if sentence is first or not is_question:
            yield from _CLAUSE_ENDS.split(sentence)


def _clause(part: str) -> frozenset[str]:
    said = [word for word in _content(tokens_of(part)) if not word.is_filler and len(word.key) > 1]
    return frozenset(name for word in said for name in (word.key, word.concept))


def number_of(token: Token) -> str | None:
    """The number or operator that a token is, words of numbers in digits; None if it is neither."""
    text = token.text.lower().replace("−", "-")
    if token.kind == "operator":
        return text
    if token.kind == "number":
        return text.replace(",", "") if re.fullmatch(r"-?\d{1,3}(?:,\d{3})+", text) else text
    return NUMBERS.get(text)


def _units(tokens: list[Token]) -> Iterator[str]:
    for place, token in enumerate(tokens):
        unit = UNITS.get(token.text.lower())
        if unit is None:
            continue
        measures = place > 0 and number_of(tokens[place - 1]) is not None
        if measures or token.text.lower() not in _UNITS_OF_NUMBERS:
            yield unit


def _modal(words: list[str]) -> str | None:
    for word, following in pairwise((*words, "")):
        if word in _MODALS:
            return _MODALS[word]
        if following == "to" and word in ("have", "has", "had", "need", "needs"):
            return "must"
    return None


def _tense(words: list[str]) -> str | None:
    """Of the first auxiliary; None if that is a modal, has or have ("has failed" and "did fail" are alike)."""
    first = next((word for word in words if word in _YES_NO), None)
    if first is not None:
        return _TENSES.get(first)
    # "Who owned", "who owns".
    if len(words) < 2 or words[0] != "who":
        return None
    return "past" if words[1].endswith("ed") else "present" if words[1].endswith("s") else None


def _names(tokens: list[Token]) -> list[str]:
    words = [token for token in tokens if token.kind == "word"]
    # In A Heading Set As This Is, capitals say nothing; its function words tell it from a row of names.
    inner = [token.text for token in words if not token.opens and token.text not in ("I", "A")]
    capitals = [text for text in inner if text[0].isupper()]
    is_heading = len(capitals) > 0.7 * len(inner) and any(text.lower() in FUNCTION for text in capitals)
    return [token.key for token in words if _is_name(token, is_heading)]


def _is_name(token: Token, is_heading: bool) -> bool:
    text = token.text
    if token.is_quoted or re.search(r"\w[._&#+]\w|\d|_|[+#]$", text):
        return True
    if text in _CURRENCY_CODES:
        return False
    if text == "I" or (token.opens and (len(text) == 1 or text.lower() in FUNCTION)):
        return False
    if text.isupper() or not (text[1:].islower() or len(text) == 1 or text.islower()):
        return True
    return text[0].isupper() and not token.opens and not is_heading and text.lower() not in FUNCTION


def _content(tokens: list[Token]) -> list[Word]:
    content: list[Word] = []
    link: list[str] = []
    for token in tokens:
        lower = token.text.lower()
        number = number_of(token)
        is_content = token.kind == "number" or (
            token.kind == "word" and lower not in FUNCTION and lower not in NEGATIONS
        )
        if not is_content and not (token.is_quoted and token.kind == "word"):
            link.append(lower)
            continue
        content.append(
            Word(token.key, number or concept_of(token.key), tuple(word for word in link if word not in _ARTICLES))
        )
        link = ["'s"] if lower.endswith("'s") else []
    return content


def _is_negated(words: list[str]) -> bool:
    # "Is it or isn't it", "why or why not" ask for both sides.
    return any(
        word in NEGATIONS and not (word == "not" and place > 0 and words[place - 1] in ("or", "why"))
        for place, word in enumerate(words)
    )


def _is_passive(words: list[str]) -> bool:
    return any(
        word == "by"
        and place >= 2
        and words[place - 1].endswith(("ed", "en", "ten"))
        and bool(_BE & set(words[:place]))
        for place, word in enumerate(words)
    )


def _asks(words: list[str]) -> str:
    if not words:
        return "what"
    first = words[0]
    if first in _YES_NO:
        return _asks_yes_no(" ".join(words))
    if first in IMPERATIVES:
        return _asks_order(first, words[1:])
    place = next((place for place, word in enumerate(words) if word in _QUESTION_WORDS), None)
    if place is None:
        return "what"
    word, rest = words[place], words[place + 1 :]
    if word == "how":
        return _asks_how(rest)
    if word in ("what", "which"):
        return _asks_what(rest)
    return "who" if word in ("whom", "whose") else word


def _asks_order(verb: str, rest: list[str]) -> str:
    """ "Define a variable" and "describe a sunset" want one to be made, without the article they ask what it is."""
    if verb in _DEFINE and names_property(" ".join(rest).removeprefix("me ").removeprefix("about ")):
        return verb  # a price is told otherwise than it is explained
    if verb == "tell":
        return "about" if rest[:1] == ["me"] and "about" in rest[1:3] else verb
    if verb in ("define", "describe") and rest[:1] not in (["a"], ["an"]):
        return "definition" if verb == "define" else "about"
    return "what" if verb == "explain" else verb


def _asks_yes_no(question: str) -> str:
    if _WAYS_ASKED.match(question):
        return "how"
    return "should" if question.startswith("is it a good idea to ") else _YES_NO[question.partition(" ")[0]]


def _asks_how(rest: list[str]) -> str:
    if rest[:1] == ["come"]:
        return "why"
    if rest[:2] == ["much", "time"]:
        return "how_long"
    if rest[:1] in (["many"], ["much"]):
        return "how_many"
    if rest[:1] and rest[0] in _MEASURED:
        return f"how_{rest[0]}"
    # "How safe is it?" is answered by what answers "Is it safe?"
    asks_degree = len(rest) >= 2 and rest[0] not in FUNCTION and rest[1] in _YES_NO
    return "is" if asks_degree else "how"


def _asks_what(rest: list[str]) -> str:
    """What, unless it is a long form of another: "what is the best way to" asks how."""
    head = [word for word in rest[:7] if word not in _ARTICLES and word not in _BE]
    if head[:1] and head[0] in _MEASURES and rest[:1] and rest[0] in _BE:
        return f"how_{_MEASURES[head[0]]}"
    if len(rest) > 1 and rest[0] in _BE and rest[1] in _PLACED:
        return f"what_{rest[1]}"  # what is in a kiss
    if rest[:1] in (["makes"], ["made"], ["causes"], ["caused"]) or _REASONS & set(head[:2]):
        return "why"
    asked = " ".join(rest)
    if _WAYS & set(head[:3]) or _DOINGS.match(asked) or _SENSES.search(asked):
        return "how"
    if _TIMES & set(rest[:1]):
        return "when"
    if _PLACES & set(head[:2]):
        return "where"
    return "what"
