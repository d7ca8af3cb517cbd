"""The canonical form of a question: without courtesies and other wrapping, but with everything that may change the
answer.

Context: "What is ML?" and "Explain machine learning" have one answer, but the embeddings of the pair have a cosine of
0.36. Choice: a few rewritings that keep the question; the result is an exact key. Rejected: dropping all punctuation,
case and function words, which merges "5+3" with "53", "US" with "us" and "explain" with "list". Cost: spellings that
need understanding ("capital of France", "France's capital") have different forms.

Only "what is", "explain" and "define" become equal, and only before one noun with its modifiers, because equal forms
are served without comparing embeddings. "Describe Paris", "what does Islam mean" and "define a variable in Python" ask
for something else, "what are windows" for other things than "what is windows"; "what is the Bitcoin price" asks for a
figure, "explain the Bitcoin price" does not. An acronym is written out if the question is about nothing else, and in a
name after "the" or "in" (the US); elsewhere it may be a unit, a pronoun or a technical term.

Kept: all other instructions (how, list, compare, translate, write); punctuation except the final mark; upper case
wherever it may mark a name (a Python): inside the text, and at its start in a word of capitals (US) or a word that
means something else without it (Turkey); all quotations. Text that looks like code, has more than one line or more than
256 words, or is all in capitals, is only put into Unicode's NFC and stripped at its ends.
"""

import re
import unicodedata
from collections.abc import Mapping
from itertools import pairwise

from ...records.limits import QUESTION_CHARS_MAX
from .guard_words import FIGURES, PROPERTIES, word_set

CANONICAL_VERSION = 5  # raised with each change of the forms, so that no key or vector of another is compared
WORDS_MAX = 256  # of a question, between white space; a longer text is a document

# Asked about alone, in capitals, each has one reading. Operators add their own; those with several (CNN, PM) stay out.
ACRONYMS: dict[str, str] = {
    "AI": "artificial intelligence",
    "AGI": "artificial general intelligence",
    "API": "application programming interface",
    "CPU": "central processing unit",
    "EU": "European Union",
    "GDP": "gross domestic product",
    "GPU": "graphics processing unit",
    "LLM": "large language model",
    "LLMs": "large language models",
    "ML": "machine learning",
    "NLP": "natural language processing",
    "NYC": "New York City",
    "OCD": "obsessive compulsive disorder",
    "ROI": "return on investment",
    "UK": "United Kingdom",
    "UN": "United Nations",
    "US": "United States",
    "U.S.": "United States",
    "USA": "United States",
    "VPN": "virtual private network",
}

# Capitals of these tell two words apart.
CASED = word_set(
    "Amazon Apple August Bill Chad China Chrome Excel Georgia Java Jordan Lent March Mark May Mercury Meta Mobile Nice "
    "Oracle Polish Reading Rust Safari Shell Swift Target Teams Tesla Turkey Visa Will Windows Word"
)

CONTRACTIONS: dict[str, str] = {
    "can't": "cannot",
    "won't": "will not",
    "shan't": "shall not",
    "let's": "let us",
    "i'm": "I am",
    **{f"{word}'s": f"{word} is" for word in word_set("what who where when why how which there here that it he she")},
    **{f"{word}'re": f"{word} are" for word in word_set("what who where why how you we they there these those")},
    **{f"{word}'ve": f"{word} have" for word in word_set("i you we they should could would")},
    **{f"{word}'ll": f"{word} will" for word in word_set("i you we they it he she what that who")},
    **{
        f"{word}n't": f"{word} not"
        for word in word_set("do does did is are was were has have had would could should must need might ought")
    },
}

_CODE = re.compile(r"[`{}<>\\|=;]|::|->|\w\(|\w_\w|://|/\w+/")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SUPERSCRIPT_RUN = re.compile("[⁰¹²³⁴-⁹⁺⁻]+")
_VULGAR_FRACTION = re.compile("(?<=[0-9])(?=[¼-¾⅐-⅞])")
_QUOTES = str.maketrans({"‘": "'", "’": "'", "ʼ": "'", "“": '"', "”": '"', "„": '"', "«": '"', "»": '"'})
# A quotation, or a run of anything else between white space.
_PIECES = re.compile(r"\"[^\"]*\"[^\s\"]*|(?<!\w)'[^']*'(?!\w)[^\s']*|[^\s]+")
_WORD = re.compile(r"\w+(?:[.'&]\w+)*\.?")

# Greetings need their comma, and no name after it: "hello world" is no greeting, nor is "Good morning, Vietnam".
_GREETING = re.compile(
    r"(?i:hi|hello|hey|good morning|good evening)(?i: there)? ?[,!.] ?"
    r"(?=[a-z]|I\b|(?i:what|who|whom|whose|where|when|why|how|which|is|are|was|were|do|does|did|can|could|will|would"
    r"|should|may|please|kindly|tell|give|show|list|explain|describe|define|write|if|in)\b)"
)
_LEAD = re.compile(
    r"(?:please,? |kindly "
    r"|(?:can|could|would|will) (?:you|anyone|someone)(?: please| kindly)?,? "
    r"(?=(?:please |explain|describe|define |tell me|give me|show me)|(?<=please )|(?<=kindly ))"
    r"|(?P<indirect>do you know|does anyone know|i would like to know|i'd like to know|i want to know|i am wondering"
    r"|i was wondering|tell me|explain(?: to me)?),? "
    r"(?=(?:what|who|where|when|why|how|which|whether)\b))",
    re.IGNORECASE,
)
_LEADS_MAX = 3
# Thanks and pleas at the end, unless the question is about words: "the Spanish for hello, please".
_TRAIL = re.compile(
    r"(?:, please|(?<=[.?!]) (?:please|many thanks|thanks(?: a lot| in advance)?|thank you(?: so much| very much)?))"
    r"[.!?]*$",
    re.IGNORECASE,
)
_ABOUT_WORDS = re.compile(
    r"\b(?:say|translate|spell|means?|words?|phrases?|letters?|write|pronounce|call(?:ed)?|stands?|short for"
    r"|acronyms?|abbreviat\w*|initials)\b|[\":]",
    re.IGNORECASE,
)
# A text that opens so is a question or an order, and its question mark says nothing new.
_OPENERS = word_set("""
what who whom whose where when why how which is are was were am do does did can could will would shall should may might
must has have had if in at on for to explain describe define tell give show list
""")
_END_MARKS = "?!.… "
# Not "how do we", "how could I": "how do we die" is another question than "how do I die".
_MEANS_TO = re.compile(r"(?:how (?:do|can) i|how (?:does|can) one) (?=\w)")
_DEFINITIONS = (
    re.compile(r"what is (?P<topic>.+)", re.IGNORECASE),
    re.compile(
        r"(?:explain(?: to me)?|define(?! an? )) (?P<topic>.+(?<!s)|.+[iu]s|.+ss|(?-i:[A-Z])\w+)", re.IGNORECASE
    ),
)
# Openings that a model may answer alike, if the guards let them pass; longer ones first.
_OPENINGS = (
    re.compile(
        r"(?:what is meant by|what do you mean by|what is the definition of|tell me(?: more)? about"
        r"|give me an (?:overview|introduction|explanation) (?:of|to)"
        r"|explain the (?:concept|idea|term|notion) of) (?P<topic>.+)"
    ),
    re.compile(r"(?:what (?:is|are)|explain(?: to me)?|define|describe) (?P<topic>.+)"),
    re.compile(r"what do(?:es)? (?P<topic>.+) mean"),
)
_MEANINGS = (
    re.compile(r"what (?:is meant by|do you mean by|is the definition of) (?P<topic>.+)", re.IGNORECASE),
    re.compile(r"what do(?:es)? (?P<topic>.+) mean", re.IGNORECASE),
)
# After "explain" and its like alone: "What time is" asks for the time.
_INDIRECT = (
    ("what is {}", re.compile(r"what (?P<topic>.+) is", re.IGNORECASE)),
    ("what does {} mean", re.compile(r"what (?P<topic>.+) means?", re.IGNORECASE)),
)
# A glass isn't what glass is; "a black hole" is what "black hole" is.
_ARTICLE = re.compile(r"an? (?=[a-z]+ [a-z ]+$)")
# The only acronym of a text, which the text is about.
_SUBJECT = re.compile(
    r"(?P<before>(?:what(?:'s| is| are)?|explain|define) (?:(?:an?|the) )?)(?P<acronym>[\w.&]+)"
    r"(?P<after>(?: is| are)?[?!.… ]*)",
    re.IGNORECASE,
)
_BEFORE_NAMES = ("the", "in")
_TOPIC_WORDS_MAX = 4
# "What is the capital of France" is no definition, nor "what is wrong": a topic is a few words and none of these.
_NO_TOPIC = word_set("""
the this that these those my your our his her their its one some any all every each no both either neither few many much
of for between to from with without by at as than or and vs versus if when which who whom whose how why what where
about above across after against along among around before behind below beneath beside beyond but down during except in
inside into like near off on onto out outside over per since through till toward towards under until up upon via within
is are was were be been being am do does did has have had can could will would shall should may might must not never it
he she they we you i me us him them there here yourself myself themselves itself
best worst most least better worse wrong right new next first last going happening so
true false important possible missing needed required allowed available popular trending cool good bad
""")


_OF_A_PROPERTY = word_set("of between")
_OF_THE_PROPERTY = _OF_A_PROPERTY | word_set("in for at on from to")


# What is read beside ASCII: signs that are rewritten above, or that guards know (units, numbers, dashes, quotes).
_READ_SIGNS = frozenset("‘’ʼ“”„«»–—…€£₹¥°²³½¼¾×÷−")
_LATIN = re.compile("[\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f]")


def is_read(text: str) -> bool:
    """Whether all characters of a text are read by canonical forms, guards and embedders.

    Others are dropped, or share one token: invisible ones (tags, variation selectors, joiners, private use), emoji,
    arrows, look-alikes of letters. A language model reads them, so they could carry text that no comparison sees.
    """
    return (text.isascii() and text.isprintable()) or all(map(_is_read, text))


def _is_read(char: str) -> bool:
    if char.isascii():
        return char.isprintable() or char in "\t\n\r"
    # Of letters that NFKC rewrites, "ſ" or "ĳ", the guards would see others.
    return char in _READ_SIGNS or (_LATIN.match(char) is not None and unicodedata.is_normalized("NFKC", char))


def canonical_question(text: str, acronyms: Mapping[str, str] = ACRONYMS) -> str:
    """The normalised form of a question: equal forms ask for the same answer. Linear in the text's length.

    `acronyms` maps text in capitals to its words, with the capitals of names.
    """
    if _is_verbatim(text):
        return unicodedata.normalize("NFC", text).strip()
    plain = _without_end_mark(plain_question(text, acronyms))
    if (topic := _topic(plain, _DEFINITIONS)) is not None:
        return f"what is {topic}"
    if (topic := _topic(plain, _MEANINGS)) is not None:
        return f"what does {topic} mean"
    pieces = _PIECES.findall(plain)
    question = " ".join(_lowered(piece, opens=place == 0) for place, piece in enumerate(pieces))
    return _MEANS_TO.sub("how to ", question, count=1) if question.startswith("how ") else question


def compared_question(text: str, acronyms: Mapping[str, str] = ACRONYMS) -> str:
    """The text for similarity: the canonical form, with one opening for all questions about a thing.

    Equal texts may have different answers: the guards decide.
    """
    question = canonical_question(text, acronyms)
    topic = None if _is_verbatim(text) else _topic(question, _OPENINGS)
    return question if topic is None else f"what is {topic.removeprefix('a ').removeprefix('an ')}"


def names_property(topic: str) -> bool:
    """Whether a topic is a property of a thing: "the value of pi", "Bitcoin price"; not "value"."""
    words = topic.lower().rstrip(_END_MARKS).split(" ")
    joins = _OF_THE_PROPERTY if words[0] == "the" else _OF_A_PROPERTY
    bare = words[1:] if words[0] in ("the", "a", "an") else words
    if len(bare) > 1 and {bare[-1], bare[-1].removesuffix("s")} & FIGURES:
        return True
    return any({word, word.removesuffix("s")} & PROPERTIES and after in joins for word, after in pairwise(bare))


def plain_question(text: str, acronyms: Mapping[str, str] = ACRONYMS) -> str:
    """The question without greeting, plea and thanks, contractions and acronyms written out, in its own case."""
    if _is_verbatim(text):
        return unicodedata.normalize("NFC", text).strip()
    question, is_indirect = _without_courtesy(" ".join(_unicode(text).split()))
    # Written out, "What does AI stand for?" would ask something else.
    known: Mapping[str, str] = {} if _ABOUT_WORDS.search(question) else acronyms
    if (subject := _SUBJECT.fullmatch(question)) is not None:
        question = subject["before"] + _written_out(subject["acronym"], known) + subject["after"]
    names = {acronym: words for acronym, words in known.items() if words[:1].isupper()}
    pieces = _PIECES.findall(question)
    plain = " ".join(
        _plain(piece, names if before.lower() in _BEFORE_NAMES else {})
        for before, piece in zip(("", *pieces), pieces, strict=False)
    )
    return _direct(plain) if is_indirect else plain


def _plain(piece: str, acronyms: Mapping[str, str]) -> str:
    return piece if piece[0] in "\"'" else _WORD.sub(lambda word: _written_out(word.group(), acronyms), piece)


def _is_verbatim(text: str) -> bool:
    if len(text) > QUESTION_CHARS_MAX or not text.strip():
        return True
    return (
        "\n" in text.strip()
        or len(text.split()) > WORDS_MAX
        or _CODE.search(text) is not None
        or (text.isupper() and " " in text.strip())
    )


def _unicode(text: str) -> str:
    """NFKC, in which 2¹⁰ would read 210 and 1½ 11/2."""
    text = _SUPERSCRIPT_RUN.sub(lambda run: "^" + run.group().translate(_SUPERSCRIPTS), text)
    text = _VULGAR_FRACTION.sub(" ", text)
    return unicodedata.normalize("NFKC", text.translate(_QUOTES)).translate(_QUOTES)


def _without_courtesy(question: str) -> tuple[str, bool]:
    """The question alone, and whether another asked for it ("tell me")."""
    bare = question[match.end() :] if (match := _GREETING.match(question)) else question
    is_indirect = False
    for _ in range(_LEADS_MAX):
        match = _LEAD.match(bare)
        if match is None:
            break
        bare = bare[match.end() :]
        is_indirect |= match["indirect"] is not None
    if not _ABOUT_WORDS.search(bare):
        bare = _TRAIL.sub("", bare)
    return bare or question, is_indirect


def _direct(question: str) -> str:
    """ "What love is", which is asked to be explained, as a question."""
    for form, indirect in _INDIRECT:
        if (topic := _topic(question.rstrip(_END_MARKS), (indirect,))) is not None:
            return form.format(topic)
    return question


def _written_out(word: str, acronyms: Mapping[str, str]) -> str:
    bare = word.rstrip(".")
    spelt = next((each for each in (word, bare, f"{bare}.") if each in acronyms), None)
    return CONTRACTIONS.get(word.lower(), word) if spelt is None else acronyms[spelt]


def _lowered(piece: str, opens: bool) -> str:
    """In lower case if it opens the text, unless its capitals may say something there too."""
    if piece[0] in "\"'":
        return piece
    word = piece.strip(".,;:!?()")
    if word == "I" or (word == "A" and opens):
        return piece.lower()
    return piece.lower() if opens and word[1:].islower() and word not in CASED else piece


def _without_end_mark(question: str) -> str:
    bare = question.rstrip(_END_MARKS)
    marks = question[len(bare) :]
    if "!" in marks and (bare[-1:].isdigit() or bare.endswith(")") or not bare[-2:-1].isalnum()):
        return question.rstrip(_END_MARKS.replace("!", ""))  # a factorial
    # "The sky is blue?" asks what "The sky is blue." states.
    return question if "?" in marks and bare.partition(" ")[0].lower() not in _OPENERS else bare


def _topic(question: str, forms: tuple[re.Pattern[str], ...]) -> str | None:
    """What a question asks the meaning of, in its own case: Spark is no spark."""
    for form in forms:
        if (match := form.fullmatch(question)) is None:
            continue
        topic = _ARTICLE.sub("", match["topic"])
        words = topic.removeprefix("a ").removeprefix("an ").split(" ")
        common = {word for word in words if word.lower() in _NO_TOPIC and (word != word.upper() or word == "I")}
        if names_property(topic):
            continue
        if len(words) <= _TOPIC_WORDS_MAX and not common and topic.replace(" ", "").isalpha():
            return topic
    return None
