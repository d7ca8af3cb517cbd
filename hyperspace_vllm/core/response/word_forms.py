"""Words that are one word to the guards: synonyms, and forms that no ending explains. English, lower case."""

from .guard_words import classes

# Each line: words that may stand for each other where only a word's absence would be held against it.
SYNONYMS = classes("""
fast quick quickly rapidly
big large huge
biggest largest
smart intelligent clever
rich wealthy
career profession
film movie
phone smartphone cellphone telephone
photo picture image
begin start commence
buy purchase
fix repair
improve enhance
benefit advantage
symptom sign
cause reason
delete remove erase
create build
important essential
happen occur
company firm
child kid
country nation
inventor invent
author write
life live
city town
difference different differ
bicycle bike cycle
various different
yearly annual
kind type sort
reduce lower decrease lessen
math mathematics maths
tv television
favourite favorite
colour color
cure heal
shop store
mother mom mum
father dad
afraid scared
choose select pick
mistake error
delicious tasty
sick ill
speak talk
quickest fastest
easiest simplest
purpose goal
pimple acne
coding programming
view opinion
website site
difficult hard
popular famous
increase raise
prepare preparation
teach train
tap faucet
sofa couch
holiday vacation
apartment flat
lift elevator
petrol gasoline
lorry truck
garbage rubbish trash
doctor physician
lawyer attorney
illness disease
medicine medication
car automobile
plane airplane aeroplane aircraft
salary wage
cost price
answer reply respond
help assist
need require
use utilize utilise
happy glad
angry mad
correct right
wrong incorrect
main primary principal
often frequently
discover find
own possess
trip journey
test exam examination
effect impact
drawback disadvantage
feature characteristic
component part
gift present
laptop notebook
teenager teen adolescent
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
