"""The word tables of the guards: English, lower case. What is not here, the guards don't know."""


def word_set(text: str) -> frozenset[str]:
    """The words of a table written as prose."""
    return frozenset(text.split())


def classes(text: str) -> dict[str, str]:
    """Word -> first word of its line."""
    return {word: line.split()[0] for line in text.strip().splitlines() for word in line.split()}


# Words that carry no content of their own: articles, pronouns, auxiliaries, prepositions, conjunctions.
FUNCTION = word_set("""
a an the this that these those some any each every either another other such own same i me my mine myself we us our
ours ourselves you your yours yourself he him his himself she her hers herself it its itself they them their theirs
themselves one ones oneself someone anyone everyone somebody anybody everybody something anything everything who whom
whose which what where when why how there here is are was were be been being am do does did done doing have has had
having can could will would shall should may might must ought need to of in on at by for from with into onto about as
than then so too very just also if whether or and but while during through over under between among within via per up
out off down again ever even still yet only more most much many lot really actually exactly
""")

PREPOSITIONS = word_set("""
of in on at by for from with into onto about as than over under above below between among within via per through up out
off down before after during while until against around across without towards to and or
""")

# What a thing has, and is told in a word or a figure: "what is" asks for that, "explain" for more. `FIGURES` are told
# so also with their thing before them ("Bitcoin price"), where others make a notion ("IP address", "interest rate").
FIGURES = word_set("""
price cost fee salary wage population value worth age birthday height weight gdp ceo president founder owner winner
score
""")
PROPERTIES = FIGURES | word_set("""
income revenue budget number amount count total quantity sum average percentage ratio rate size length width depth
distance area volume mass density speed temperature duration date time day month year deadline capital currency symbol
colour color address location coordinates name nickname password code result record minister king queen mayor governor
author inventor director status version square cube root logarithm sine cosine tangent
""")

# What treats alike whatever it joins.
SYMMETRIC = frozenset(("and", "or", "vs", "versus", "between", "&"))

# Content that changes what is asked only a little.
FILLER = word_set("""
best good great better way ways thing things people person possible different various kind type sort
amazing awesome excellent perfect nice effective
""")

# Words in "ly" that say how often or how sure, or that are no adverbs; all others say how something is done.
NOT_OF_MANNER = word_set("""
ally annually anomaly apply approximately assembly basically bully commonly daily easily family fly generally hourly
italy jelly july likely lovely mainly monopoly monthly mostly multiply nightly normally only quarterly rely reply
simply supply truly typically usually weekly yearly
""")

# Words that make another thing of what they stand before, so that only one question having it changes the answer.
QUALIFIERS = word_set("""
accused acting acute adjusted adult adults aggravated alleged annual annually artificial aspiring assistant
associate attempted average babies baby base beginner beginners boy boys chief child children chronic co compulsory
conditional cooked counterfeit daily deputy dried elderly estimated ex expected fake federal female females final
former frozen full girl girls gross hourly illegal imitation indoor infant infants initial intended junior kid kids
legal lower male males man mandatory marginal maximum median men micro mild mini minimum moderate monthly multi net
newborn newborns nightly nominal optional outdoor partial partially permanent post pre pregnant preliminary
premature projected proposed prospective provisional pseudo raw retired semi senior seniors severe starting sub
suspected synthetic teen teenager teenagers teens temporary toddler toddlers total ultra uncooked unofficial unpaid
upper vice virtual voluntary weekly woman women yearly
""")

NEGATIONS = word_set("""
not no never without except cannot neither nor none nothing nobody nowhere hardly barely rarely seldom unless
excluding lacking lack avoid prevent stop quit fail failed fails refuse instead non anti
""")

# Each line: words of one kind, of which a question says one or another; those with "/" between say the same.
_KINDS = """
before during after until/till since
hourly daily nightly weekly fortnightly/biweekly monthly quarterly yearly/annual/annually
always usually/normally often/frequently sometimes/occasionally once
all/every/each any some most half both several few only
and or
single double triple
full partial
federal state local municipal national international global regional
primary secondary tertiary
starting initial average median maximum/max/peak minimum/min final total
gross net
glass glasses
custom customs
good goods
manner manners
mean means
cloth clothes
saving savings
spectacle spectacles
brain brains
spirit spirits
short shorts
january february march april june july august september october november december
monday/mondays tuesday/tuesdays wednesday/wednesdays thursday/thursdays friday/fridays saturday/saturdays sunday/sundays
spring summer autumn fall winter
red blue green yellow black white orange purple pink brown grey/gray
north south east west northern southern eastern western
hydrogen helium carbon nitrogen oxygen sodium potassium calcium iron copper zinc silver gold mercury lead uranium
dog/dogs puppy cat/cats kitten horse/horses bird/birds fish cow/cows pig/pigs rabbit/rabbits
arm leg knee hip foot hand eye ear nose lung liver kidney heart stomach
python java javascript typescript ruby rust go golang php perl swift kotlin scala haskell matlab sql html css r c c++ c#
windows linux macos ubuntu debian android ios
breakfast lunch dinner
physics chemistry biology mathematics/math history geography economics
iphone ipad ipod macbook
facebook instagram twitter whatsapp snapchat youtube linkedin quora reddit tinder gmail
"""

LANGUAGES = word_set("""
english french german spanish italian portuguese dutch swedish norwegian danish finnish polish russian ukrainian czech
slovak hungarian romanian bulgarian greek turkish arabic hebrew persian farsi urdu hindi bengali punjabi tamil telugu
marathi gujarati kannada malayalam sanskrit chinese mandarin cantonese japanese korean vietnamese thai indonesian
malay tagalog swahili latin
""")

# Each line: spellings of one unit.
UNITS = classes("""
mm millimeter millimeters millimetre millimetres
cm centimeter centimeters centimetre centimetres
meter meters metre metres
km kilometer kilometers kilometre kilometres kms
inch inches
feet ft
yard yards
mile miles
mph
km/h kmh kph
km/s
m/s
mg milligram milligrams
gram grams g
kg kilogram kilograms kilo kilos kgs
ounce ounces oz
pound pounds lb lbs
stones
ton tons tonne tonnes
ml milliliter milliliters millilitre millilitres
liter liters litre litres
gallon gallons
cup cups
tablespoon tablespoons tbsp
teaspoon teaspoons tsp
ms millisecond milliseconds
seconds sec secs s
minute minutes min mins
hour hours hr hrs
day days
week weeks
month months
year years yr yrs
decade decades
century centuries
celsius °c
fahrenheit °f
kelvin
bit bits
byte bytes
kb kilobyte kilobytes
mb megabyte megabytes
gb gigabyte gigabytes
tb terabyte terabytes
hz hertz
khz
mhz
ghz
watt watts w
kw kilowatt kilowatts
kwh
volt volts v
amp amps
joule joules
calorie calories
kcal
% percent percentage
$ dollar dollars usd
€ euro euros eur
£ gbp sterling
₹ rupee rupees inr rs
¥ yen jpy
cent cents
lakh lakhs
crore crores
""")

CURRENCIES = frozenset(UNITS[sign] for sign in "$€£₹¥")

# Each line: a number and its words. "One" is left out: mostly it is a pronoun.
NUMBERS = classes("""
0 zero
2 two twice
3 three thrice
4 four
5 five
6 six
7 seven
8 eight
9 nine
10 ten
11 eleven
12 twelve dozen
13 thirteen
14 fourteen
15 fifteen
16 sixteen
17 seventeen
18 eighteen
19 nineteen
20 twenty
30 thirty
40 forty
50 fifty
60 sixty
70 seventy
80 eighty
90 ninety
100 hundred
1000 thousand
1000000 million
1000000000 billion
1000000000000 trillion
1/2 half
1/4 quarter
1st first
2nd second
3rd third
4th fourth
5th fifth
6th sixth
7th seventh
8th eighth
9th ninth
10th tenth
""")

# Words that place a question in the moment or the talk in which it is asked.
DEICTIC = word_set("""
now today tonight tomorrow yesterday currently current latest recent recently nowadays presently ago here above below
aforementioned previous previously earlier later lately soon upcoming ongoing newest
""")
DEICTIC_DETERMINERS = word_set("this last next coming past")
DEICTIC_PERIODS = word_set("""
year month week weekend day night morning evening afternoon summer winter spring autumn fall season century decade
hour time quarter semester monday tuesday wednesday thursday friday saturday sunday
""")
DEICTIC_PHRASES = ("so far", "these days", "at the moment", "as of", "to date")

# One of these is in nearly every English question, and is no word of German, Dutch, French, Spanish and their like, as
# "is", "was", "of" and "die" are; or one of these others, beside one of ENGLISH_BESIDE, which both such languages have.
ENGLISH = word_set("""
what who whom whose which when where why how are the and does did should would could explain describe define tell there
your you they it between about this from can be any ever someone if than better with some many
""")
ENGLISH_OTHERS = word_set("my has have need make good really just possible easy like free high or")
ENGLISH_BESIDE = word_set("is in of was will do to for we")

# A system prompt with one of these works on the user's text, whose wording then matters.
TEXT_WORK = word_set("""
translate translates translating translation translator interpreter rewrite rewrites rewriting rephrase rephrases
paraphrase paraphrases reword summarize summarise summarizes summary classify classifies classifier classification
categorize correct corrects correction corrector grammar spelling spell proofread proofreader edit editor edits extract
extracts extraction label labels sentiment repeat repeats echo count counts convert converts converter format
transcribe autocomplete complete completes continue continues completion input text sentence sentences word words
letter letters characters quote verbatim message messages phrase phrases tag tags detect parse parser prompt query
queries keyword keywords search sql code language languages terminal shell console interpreter compiler function
functions roleplay character game pretend act
""")

IMPERATIVES = word_set("""
explain describe define tell give show list write translate summarize summarise compare contrast convert calculate
compute solve create generate make find name suggest recommend help fix implement prove derive draw plan outline
rewrite rephrase paraphrase correct improve classify analyze analyse discuss criticize criticise evaluate predict
answer design draft compose count add subtract multiply divide simplify factor debug optimize optimise sort replace
remove spell say identify extract review rate rank
""")


def _kinds() -> dict[str, tuple[int, str]]:
    lines = enumerate(_KINDS.strip().splitlines())
    return {
        word: (line, spellings.partition("/")[0])
        for line, text in lines
        for spellings in text.split()
        for word in spellings.split("/")
    }


KINDS = _kinds()
