"""The best match of a question: the stored question, if any, that is near enough for its answer to be served.

Similarity is the larger of two cosines, of the questions as asked and of their compared forms (canonical.py): the first
tolerates rewordings that the forms do not know, the second those that embeddings do not (an acronym, the openings of a
definition).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from ...records.ids import RequestKey
from .canonical import canonical_question
from .guards import Mode, refusal_between
from .question import ParsedQuestion, read_question

# By bench/semantic.py, of the pairs that the guards let pass, one in four was labelled different between 0.90 and 0.92,
# and two in five up to 0.935 where only one question has words more.
COSINE_MIN = 0.92
_MORE_IF_ADDED = 0.015
CANDIDATES_MAX = 8  # of the nearest, looked at by the guards: x 0.5 ms = 4 ms


@dataclass(frozen=True, slots=True)
class SimilarCandidate:
    """A stored question of the same partition, its similarity to the one asked (-1 to 1), and the key of its answer."""

    question: str
    similarity: float
    key: RequestKey


@dataclass(frozen=True, slots=True)
class Match:
    """The answer of `candidate` may be served."""

    candidate: SimilarCandidate


@dataclass(frozen=True, slots=True)
class NoMatch:
    """No answer may be served; `reason` is the guard that refused the nearest, or "far". Used as a metric label."""

    reason: str


class Vector(Protocol):
    """The part of a NumPy array that is used here; the core does not import NumPy."""

    def __matmul__(self, other: Any, /) -> Any:
        """The dot product."""


def similarity(raw_a: Vector, canonical_a: Vector, raw_b: Vector, canonical_b: Vector) -> float:
    """The larger of two cosines; all four are float32 [dimensions] of length 1."""
    return max(float(raw_a @ raw_b), float(canonical_a @ canonical_b))


def similarity_needed(one: ParsedQuestion, other: ParsedQuestion, cosine_min: float = COSINE_MIN) -> float:
    """The least similarity at which one answer serves both questions, if no guard refuses."""
    return cosine_min + _MORE_IF_ADDED * (one.says < other.says or other.says < one.says)


def best_match(
    question: str, candidates: Iterable[SimilarCandidate], mode: Mode, cosine_min: float = COSINE_MIN
) -> Match | NoMatch:
    """The nearest candidate that is near enough and that no guard refuses. Both questions must be `eligible`."""
    near = [candidate for candidate in candidates if candidate.similarity >= cosine_min]
    near.sort(key=lambda candidate: candidate.similarity, reverse=True)
    reason = "far"
    canonical, read = canonical_question(question), read_question(question)
    for candidate in near[:CANDIDATES_MAX]:
        if canonical_question(candidate.question) == canonical:
            return Match(candidate)
        other = read_question(candidate.question)
        refused = refusal_between(read, other, mode)
        is_near = candidate.similarity >= similarity_needed(read, other, cosine_min)
        if refused is None and is_near:
            return Match(candidate)
        reason = refused if refused is not None and reason == "far" else reason
    return NoMatch(reason)
