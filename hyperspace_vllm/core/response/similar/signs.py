"""The signs of a question that are neither words nor numbers: "chmod +x" and "chmod -x" differ in nothing else.

Context: embedders and word tables read no signs, a language model does. Choice: whatever is not known to be mere
punctuation must be the same, in the same order: marks at the end of words, brackets around words, quotes around
anything, hyphens inside words, dashes between them. Cost: rewordings that put signs otherwise are kept apart.
"""

import re

_SIGNS = re.compile(r"[^\w\s]+")
_DASHES = str.maketrans("–—−", "---")
_MARKS = frozenset(",;:.?!…")
_ROUND_WORDS = frozenset("()[]\"'")
_INSIDE_WORDS = frozenset("-'&./")
_INSIDE_NUMBERS = frozenset(".,:/-")
_OF_UNITS = frozenset("$€£₹¥%")  # the guards compare units
_BOUND = frozenset(("+", "-", "*", "**"))  # to a word: "O+", "-x"
_FACE = re.compile(r"[:;]-?[()\[\]]")


def signs(plain: str) -> tuple[str, ...]:
    """Those of a plain question (canonical.py) that may say something, in order; "_" stands for a word they touch."""
    text = f" {plain.translate(_DASHES)} "
    found = (_said(match.group(), text[match.start() - 1], text[match.end()]) for match in _SIGNS.finditer(text))
    return tuple(sign for sign in found if sign)


def _said(run: str, before: str, after: str) -> str:
    run = "".join(char for char in run if char not in _OF_UNITS)
    if (
        (run in _INSIDE_WORDS and before.isalpha() and after.isalnum())
        or (run in _INSIDE_NUMBERS and before.isdigit() and after.isdigit())
        or (run in ("-", "&") and before.isspace() and after.isspace())
        or (run == "°" and after in "CFcf")
        or _is_around_words(run, before, after)
    ):
        return ""
    if run in _BOUND and before.isspace() != after.isspace():
        return f"{run}_" if before.isspace() else f"_{run}"
    return run


def _is_around_words(run: str, before: str, after: str) -> bool:
    """Marks at an end, brackets and quotes; behind a number neither factorials, feet nor inches."""
    if _FACE.search(run):
        return False
    if after.isspace():
        is_of_number = before.isdigit() and set(run) & set("!\"'()[]")
        return set(run) <= (_MARKS if before.isspace() else _MARKS | _ROUND_WORDS) and not is_of_number
    return set(run) <= _ROUND_WORDS and not before.isalnum() and not after.isdigit()
