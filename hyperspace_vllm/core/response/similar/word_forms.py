"""Words that are one word to the guards: synonyms, and forms that no ending explains. English, lower case."""

from .guard_words import classes

# Each line: words of one sense, which may stand for each other in any question. `strict` knows no others.
SYNONYMS = classes("""
biggest largest
begin commence
buy purchase
improve enhance
happen occur
math mathematics maths
tv television
favourite favorite
colour color
afraid scared
delicious tasty
quickest fastest
petrol gasoline
lorry truck
sofa couch
lawyer attorney
airplane aeroplane
use utilize utilise
drawback disadvantage
teenager teen
""")

# Each line: words of which one has a sense that the others lack. `balanced` takes them for one: put into a question
# about the other sense, the synonym makes none that people ask (a difficult drive, a company mattress, the apartment
# screen). Where it does, the word is in neither table: to erase or remove a drive, pick or choose a lock, a site or a
# website for camping, a laptop or a notebook to write in, wine to shop or store, the right side of the road.
LOOSE_SYNONYMS = classes("""
fast quick quickly rapidly
big large huge
smart intelligent clever
rich wealthy
career profession
film movie
phone smartphone cellphone telephone
photo picture image
begin start
fix repair
benefit advantage
symptom sign
cause reason
delete erase
create build
important essential
company firm
child kid
country nation
inventor invent
author write
life live
city town
difference different differ
bicycle bike
various different
yearly annual
kind type sort
reduce lower decrease lessen
cure heal
mother mom mum
father dad
choose select
mistake error
sick ill
speak talk
easiest simplest
purpose goal
pimple acne
coding programming
view opinion
difficult hard
popular famous
increase raise
prepare preparation
teach train
tap faucet
holiday vacation
apartment flat
lift elevator
garbage rubbish trash
doctor physician
illness disease
medicine medication
car automobile
airplane plane aircraft
salary wage
cost price
answer reply respond
help assist
need require
happy glad
angry mad
wrong incorrect
main primary principal
often frequently
discover find
own possess
trip journey
test exam examination
effect impact
feature characteristic
component part
teenager adolescent
baby infant newborn
""")

# Each line: a word and its forms that no ending explains.
IRREGULAR = classes("""
child children
woman women
man men
person people
foot feet
tooth teeth
mouse mice
life lives
wife wives
write wrote written
make made
get got gotten
buy bought
sell sold
lose lost
win won
find found
go went gone
take took taken
give gave given
begin began begun
think thought
teach taught
feel felt
fall fell fallen
know knew known
see saw seen
come came
speak spoke spoken
drive drove driven
choose chose chosen
break broke broken
grow grew grown
become became
run ran
drink drank drunk
sleep slept
spend spent
send sent
pay paid
meet met
hold held
bring brought
fight fought
keep kept
leave left
say said
build built
steal stole stolen
eat ate eaten
lie lying
die dying
""")
