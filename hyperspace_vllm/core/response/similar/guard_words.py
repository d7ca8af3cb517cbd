"""The word tables of the guards, from the files in `words/`: English, lower case. The guards know no other words.

Each file is read once, when this module is imported. A line that begins with "#" is a comment.
"""

from importlib.resources import files


def table(name: str) -> str:
    """The lines of `words/<name>.txt`, without comments."""
    lines = (files(__package__) / "words" / f"{name}.txt").read_text("utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith("#"))


def word_set(text: str) -> frozenset[str]:
    """The words of a table."""
    return frozenset(text.split())


def classes(text: str) -> dict[str, str]:
    """Word -> first word of its line."""
    return {word: line.split()[0] for line in text.strip().splitlines() for word in line.split()}


# Words that carry no content of their own: articles, pronouns, auxiliaries, prepositions, conjunctions.
FUNCTION = word_set(table("function"))

PREPOSITIONS = word_set(table("prepositions"))

# What a thing has, and is told in a word or a figure: "what is" asks for that, "explain" for more. `FIGURES` are told
# so also with their thing before them ("Bitcoin price"), where others make a notion ("IP address", "interest rate").
FIGURES = word_set(table("figures"))
PROPERTIES = FIGURES | word_set(table("properties"))

# What treats alike whatever it joins.
SYMMETRIC = frozenset(("and", "or", "vs", "versus", "between", "&"))

# Content that changes what is asked only a little.
FILLER = word_set(table("filler"))

# Words in "ly" that say how often or how sure, or that are no adverbs; all others say how something is done.
NOT_OF_MANNER = word_set(table("not_of_manner"))

# Words that make another thing of what they stand before, so that only one question having it changes the answer.
QUALIFIERS = word_set(table("qualifiers"))

NEGATIONS = word_set(table("negations"))

LANGUAGES = word_set(table("languages"))

# Each line: spellings of one unit.
UNITS = classes(table("units"))

CURRENCIES = frozenset(UNITS[sign] for sign in "$€£₹¥")

# Each line: a number and its words. "One" is left out: mostly it is a pronoun.
NUMBERS = classes(table("numbers"))

# Each line: words of one sense, which may stand for each other in any question. `strict` knows no others.
SYNONYMS = classes(table("synonyms"))

# Each line: words of which one has a sense that the others lack. `balanced` takes them for one: put into a question
# about the other sense, the synonym makes none that people ask (a difficult drive, a company mattress, the apartment
# screen). Where it does, the word is in neither table: to erase or remove a drive, pick or choose a lock, a site or a
# website for camping, a laptop or a notebook to write in, wine to shop or store, the right side of the road.
LOOSE_SYNONYMS = classes(table("loose_synonyms"))

# Each line: a word and its forms that no ending explains.
IRREGULAR = classes(table("irregular"))

# Words that place a question in the moment or the talk in which it is asked.
DEICTIC = word_set(table("deictic"))
DEICTIC_DETERMINERS = word_set("this last next coming past")
DEICTIC_PERIODS = word_set(table("deictic_periods"))
DEICTIC_PHRASES = ("so far", "these days", "at the moment", "as of", "to date")

# One of these is in nearly every English question, and is no word of German, Dutch, French, Spanish and their like, as
# "is", "was", "of" and "die" are; or one of these others, beside one of ENGLISH_BESIDE, which both such languages have.
ENGLISH = word_set(table("english"))
ENGLISH_OTHERS = word_set("my has have need make good really just possible easy like free high or")
ENGLISH_BESIDE = word_set("is in of was will do to for we")

# A system prompt with one of these works on the user's text, whose wording then matters.
TEXT_WORK = word_set(table("text_work"))

IMPERATIVES = word_set(table("imperatives"))


def _kinds() -> dict[str, tuple[int, str]]:
    lines = enumerate(table("kinds").splitlines())
    return {
        word: (line, spellings.partition("/")[0])
        for line, text in lines
        for spellings in text.split()
        for word in spellings.split("/")
    }


# Each line: words of one kind, of which a question says one or another; those with "/" between say the same.
KINDS = _kinds()
