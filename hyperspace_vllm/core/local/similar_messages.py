"""Similar questions: stored responses that answer another wording, and the measured error of such matches."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from ..records.limits import QUESTION_CHARS_MAX
from .message_fields import U32, Bytes32, LocalMessage, Name

ANSWER_CHARS_MAX = 8192  # far more than an embedder reads

Similarity = Annotated[float, Meta(ge=-1.01, le=1.01)]  # a cosine, of vectors that were rounded
AnswerText = Annotated[str, Meta(max_length=ANSWER_CHARS_MAX)]


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The question of a request, which other requests may ask in other words.

    `partition` names everything else about the request, including its tenant: only questions of one partition are
    compared. `canonical_key` is the key of its normalised form (core/response/similar/semantic_key.py). `source` names
    the tenant and the weights, for which wrong matches are counted; `is_greedy`: the engine would give the same answer
    again.
    """

    partition: Bytes32
    canonical_key: Bytes32
    text: Annotated[str, Meta(max_length=QUESTION_CHARS_MAX)]
    source: Bytes32
    is_greedy: bool


class FindSimilar(LocalMessage, tag="find_similar", frozen=True):
    """Find a stored response of the question's partition that answers the question too, by `mode`'s guards.

    At most the share `max_error` of the matches for this model and mode may be wrong. `lookup` is unique among the
    session's unfinished ones, including FindResponse's. Answered by SimilarFound or SimilarNotFound; after
    `deadline_ms` the answer is ignored.
    """

    lookup: U32
    question: Question
    mode: Literal["strict", "balanced"]
    model_digest: Bytes32
    max_error: Annotated[float, Meta(ge=0, le=1)]
    deadline_ms: U32


class SimilarFound(LocalMessage, tag="similar_found", frozen=True):
    """The response of `request_key`, in this node's database, answers the question too.

    `similarity` is the cosine, the larger of that of the questions as asked and of their canonical forms. `verdict`:
    serve it; serve it and compute another to `check` it; or don't serve, `compute`, and check (SimilarChecked).
    """

    lookup: U32
    request_key: Bytes32
    similarity: Similarity
    verdict: Literal["serve", "check", "compute"]


class SimilarNotFound(LocalMessage, tag="similar_not_found", frozen=True):
    """None answers it. `reason`: off (do not ask again soon), busy, far, or the guard that refused the nearest."""

    lookup: U32
    reason: Name


class SimilarChecked(LocalMessage, tag="similar_checked", frozen=True):
    """A match for `question` was computed as well: the answer that is stored under `request_key`, and the engine's.

    `similarity` is that of the match, 1 for canonical forms that are equal. Not answered.
    """

    request_key: Bytes32
    question: Question
    similarity: Similarity
    mode: Literal["strict", "balanced"]
    stored: AnswerText
    computed: AnswerText


class RememberQuestion(LocalMessage, tag="remember_question", frozen=True):
    """The question of a response from another node, which the node is storing. Not answered."""

    request_key: Bytes32
    question: Question
