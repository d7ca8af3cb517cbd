"""Whether two answers to one question mean the same, as far as an embedding and a few words show.

Context: sampled models and other wordings of a question give other words. Choice: a cosine of the answers' embeddings,
after two checks of differences that it does not show: yes and no, and numbers, negation and opposites in short answers.
Rejected: a judge model, which the node does not have. Cost: a long answer with one wrong number counts as the same.
"""

import re
from collections.abc import Callable

from .guards import refusal

# All 16 pairs of tests/data/answer_pairs.jsonl that say the same are above, 12 of the 16 others below.
COSINE_SAME = 0.75
SHORT_WORDS = 16
_TELLING = ("numbers", "units", "negation", "antonyms")
_VERDICT = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)


def say_the_same(one: str, other: str, cosine: Callable[[str, str], float]) -> bool:
    """`cosine` is of the embeddings of two texts, and asked for only where it decides."""
    one, other = " ".join(one.split()), " ".join(other.split())
    if one == other:
        return True
    if _verdict(one) != _verdict(other) and _verdict(one) and _verdict(other):
        return False
    is_short = max(len(one.split()), len(other.split())) <= SHORT_WORDS
    if is_short and refusal(one, other, "balanced") in _TELLING:
        return False
    return cosine(one, other) >= COSINE_SAME


def _verdict(answer: str) -> str:
    """ "yes" or "no", if it begins so."""
    found = _VERDICT.match(answer)
    return found[1].lower() if found else ""
