"""The persons in a question: first, second or third.

Context: "What is my name?" and "What is your name?" are as near as two spellings of one question, while "How do I tie
a tie?" and "How do you tie a tie?" are one. Choice: persons may not be exchanged, unless the subject stands for people
in general: after how, when, where, why and the like with "do", "can" or "should", where no verb of mind follows. What
belongs to that subject is as general. Cost: rewordings such as "Is my dog ill?" for "Is your dog ill?" are kept apart.
"""

import re

from .guard_words import classes, word_set

_PERSONS = classes("""
i me my mine myself
we us our ours ourselves
you your yours yourself yourselves
he him his himself
she her hers herself
they them their theirs themselves
""")
_GENERAL = word_set("i we you one someone somebody anyone anybody people")
_SUBJECT = re.compile(
    r"^(?:(?:how|what|when|where|why|which|who|whom)\b[\w' -]*? )?(?:do|can|could|should|would|must|may) "
    r"(?P<subject>\w+) (?:\w+ly )?(?P<verb>\w+) \w"
)
# What they say of one person is not so of another.
_OF_MIND = word_set("""
think feel like love hate prefer believe want mean know remember consider recommend suggest say see hope wish miss
enjoy fear trust expect agree plan intend wonder regret understand look sound have own live come work support
""")
_WORD = re.compile(r"[^\W\d_]+")


def are_exchanged(one: str, other: str) -> bool:
    """Whether each of two plain questions (canonical.py) is about a person that the other is not about.

    Or about the same persons in another order: subject and object exchanged.
    """
    ours, theirs = _persons(one.lower()), _persons(other.lower())
    if set(ours) == set(theirs):
        return ours != theirs
    return not (set(ours) <= set(theirs) or set(ours) >= set(theirs))


def _persons(plain: str) -> tuple[str, ...]:
    """In the order in which they are first named."""
    found = dict.fromkeys(_PERSONS[word] for word in _WORD.findall(plain) if word in _PERSONS)
    general = _SUBJECT.match(plain)
    if general is not None and general["subject"] in _GENERAL and general["verb"] not in _OF_MIND:
        found.pop(_PERSONS.get(general["subject"], "they"), None)
    return tuple(found)
