"""Opposites: antonyms in any inflection, and words with one stem under two prefixes or endings.

Context: similar questions may differ in one word, and an embedding puts a word next to its opposite. Choice: tables of
antonyms (this project's and WordNet's), and rules for regular opposites (hypo-, hyper-, un-; -less, -phobic), which
cover words that no table has. Cost: two words that only look like opposites are kept apart too (contain, retain).
"""

from collections import defaultdict
from collections.abc import Set

from .guard_words import FUNCTION, table, word_set
from .question import concept_of, stem

_STEM_LETTERS_MIN = 4  # behind a prefix: "way" and "away" are no opposites
# Any two of them, and one and none, make two words of a stem.
_PREFIXES = word_set(table("prefixes"))
# In each group, one ending for another makes the opposite, or another thing, of a stem.
_ENDINGS = (
    *(("ful", "less"), ("", "less"), ("phobia", "philia"), ("phobic", "philic"), ("phobe", "phile")),
    *(
        ("er", "ee"),
        ("or", "ee"),
        ("ate", "ite", "ide"),
        ("ane", "ene", "yne"),
        ("ous", "ic"),
        ("ectomy", "otomy", "ostomy"),
    ),
)


def have_antonyms(ours: Set[str], theirs: Set[str]) -> bool:
    """Whether a word of each, in lower case, exclude each other, in any degree, number or tense. Linear, symmetric."""
    bases = frozenset[str]().union(*map(_bases, theirs))
    return any(not _OPPOSITES[base].isdisjoint(bases) for word in ours for base in _bases(word) & _OPPOSITES.keys())


def have_other_affixes(ours: Set[str], theirs: Set[str]) -> bool:
    """Whether a word of each, in lower case, are of one stem under prefixes or endings that turn its meaning.

    Linear, symmetric.
    """
    concepts = defaultdict[str, set[str]](set)
    for word in theirs:
        for bare in _bare(word):
            concepts[bare].add(concept_of(word))
    if any(concepts[bare] - {concept_of(word)} for word in ours for bare in _bare(word) & concepts.keys()):
        return True
    return any(not _with_other_endings(word).isdisjoint(theirs) for word in ours)


def _bases(word: str) -> set[str]:
    """A word, its stem, and what it is the comparative or the superlative of."""
    bases = {word, stem(word)}
    for ending in ("er", "est"):
        root = word.removesuffix(ending)
        if root != word and len(root) > 1:
            undoubled = root[:-1] if root[-1] == root[-2] else root
            bases |= {root, f"{root}e", undoubled, f"{root[:-1]}y" if root[-1] == "i" else root} - FUNCTION
    return bases


def _bare(word: str) -> set[str]:
    """A word and its stem, and what they are without each prefix that they may have."""
    bare = {each.removeprefix(prefix) for each in (word, stem(word)) for prefix in ("", *_PREFIXES)}
    return {each for each in bare if len(each) >= _STEM_LETTERS_MIN}


def _with_other_endings(word: str) -> set[str]:
    return {
        word[: len(word) - len(mine)] + yours
        for endings in _ENDINGS
        for mine in endings
        for yours in endings
        if mine != yours and word.endswith(mine) and len(word) > len(mine) + 2
    }


def _opposites() -> dict[str, set[str]]:
    pairs = set[tuple[str, str]]()
    for line in (*table("antonyms").splitlines(), *table("wordnet_antonyms").splitlines()):
        left, right = (side.split() for side in line.split("|"))  # each word of one excludes each of the other
        pairs |= {(one, other) for one in left for other in right}
    pairs |= {(stem(one), stem(other)) for one, other in pairs if stem(one) != stem(other)}
    opposites = defaultdict[str, set[str]](set)
    for one, other in pairs:
        opposites[one].add(other)
        opposites[other].add(one)
    return dict(opposites)


_OPPOSITES = _opposites()
