"""Which words exclude each other: antonyms in any inflection, and one stem under two prefixes or endings.

Context: near questions differ in one word, and an embedding puts a word next to its opposite. Choice: tables of
antonyms (ours and WordNet's), and rules where opposites are made by rule (hypo-, hyper-, un-; -less, -phobic), which
know words that no table has. Cost: two words that merely look so are kept apart too (contain, retain).
"""

from collections import defaultdict
from collections.abc import Set

from .antonyms import WORDNET_ANTONYMS
from .guard_words import FUNCTION, word_set
from .question import concept_of, stem

_STEM_LETTERS_MIN = 4  # behind a prefix: "way" and "away" are no opposites
# Any two of them, and one and none, make two words of a stem.
_PREFIXES = word_set("""
a ab ad aero ambi amphi ana ante anti apo auto bi bio cata centi circum co contra counter de deca deci demi di dia dis
down dys ecto en endo epi eu ex exo extra fore giga hemi hetero holo homo hydro hyper hypo il im in infra inter intra
intro ir iso kilo macro mal maxi mega meso meta micro midi milli mini mis mono multi nano neo non omni ortho out over
pan para peri photo pico poly post pre pro proto pseudo quadri quasi re retro semi sub super supra syn tachy tele tera
thermo trans tri ultra un under uni up vice brady
""")
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

# Each line: two sides that exclude each other.
_ANTONYMS = """
increase raise grow boost gain rise | decrease reduce lower lose drop decline shrink fall lessen
up | down
on | off
buy purchase | sell
before prior | after following
best greatest top | worst
good | bad evil
better | worse
biggest largest greatest | smallest tiniest littlest
big large huge | small tiny little
male man men masculine guy guys he his him | female woman women feminine lady ladies she her hers
boy boys son sons brother brothers | girl girls daughter daughters sister sisters
husband boyfriend father king | wife girlfriend mother queen
high higher highest | low lower lowest
long longer longest | short shorter shortest
tall taller tallest | short shorter shortest
fast faster fastest quickly | slow slower slowest slowly
hot hotter hottest warm | cold colder coldest cool
easy easier easiest simple | hard harder hardest difficult complex
advantage advantages pro pros benefit benefits strength strengths upside upsides | disadvantage disadvantages con cons
advantage advantages benefit benefits | drawback drawbacks downside downsides risk risks
strength strengths | weakness weaknesses
open opening | close closed closing shut
start begin starting enable activate | end finish stop disable deactivate
install add | uninstall remove delete
import | export
upload | download
push | pull
encode encoding encrypt encryption compress | decode decoding decrypt decryption decompress
allow permit accept legal | forbid ban prohibit reject illegal deny
love like loves likes | hate dislike hates dislikes
win won | lose lost
maximum max most maximize | minimum min least minimize
first earliest | last latest
old older oldest | new newer newest young younger youngest
early | late
left | right
north northern | south southern
east eastern | west western
from | to
by | about
for | against
more | less fewer
happy glad | sad
loud noisy | quiet silent
bright | dim
most | least fewest
offence offense offensive prosecution | defence
immigrant immigrants immigration | emigrant emigrants emigration
inside indoor internal inner | outside outdoor external outer
above over | below under beneath
rich wealthy | poor
strong stronger | weak weaker
light lighter | dark darker heavy heavier
alive living live born birth | dead death die died
true real | false fake
public | private
positive | negative
right correct | wrong incorrect
input | output
send sending | receive receiving
ask | answer
teach teacher teachers | learn student students
lend | borrow
employer employers boss | employee employees
parent parents | child children kid kids
husband | wife
introvert introverts introverted | extrovert extroverts extroverted
optimist optimists optimistic | pessimist pessimists pessimistic
synonym synonyms | antonym antonyms
arrive arrival | depart departure leave
offline | online
single | married
cheap cheapest | expensive costly
similarity similarities similar | difference differences different
cause causes | effect effects
attack | defend defense
always | never
lock | unlock
front | back
horizontal horizontally | vertical vertically
ascending | descending
morning | evening night
day | night
past | future
acid acidic | alkaline base
sync synchronous | async asynchronous
"""


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
    pairs = {(one, other) for one, _, other in (pair.partition("|") for pair in WORDNET_ANTONYMS.split())}
    for line in _ANTONYMS.strip().splitlines():
        left, right = (side.split() for side in line.split("|"))
        pairs |= {(one, other) for one in left for other in right if one != other}
    pairs |= {(stem(one), stem(other)) for one, other in pairs if stem(one) != stem(other)}
    opposites = defaultdict[str, set[str]](set)
    for one, other in pairs:
        opposites[one].add(other)
        opposites[other].add(one)
    return dict(opposites)


_OPPOSITES = _opposites()
