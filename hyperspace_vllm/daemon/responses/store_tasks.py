"""The tasks of the response database's writer, and how much of its queue's bound each takes."""

from dataclasses import dataclass
from typing import assert_never

from ...core.local.message_fields import Scope
from ...core.local.response_cache_messages import StoreResponse
from ...core.local.similar_messages import Question
from ...core.records.ids import RequestKey
from ...response_db import Embedded

_ENTRY_OVERHEAD_BYTES = 1024  # proof, key, index entries and the tail of a page
_QUESTION_OVERHEAD_BYTES = 256  # its keys and the index entry


@dataclass(frozen=True, slots=True)
class Computed:
    """A response of this node's engines; `embedded` is of its question."""

    message: StoreResponse
    embedded: Embedded | None


@dataclass(frozen=True, slots=True)
class Fetched:
    """A response from a peer, opened and verified."""

    request_key: RequestKey
    scope: Scope
    proof: bytes
    computed_at_ms: int
    expires_at_ms: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Purge:
    """Entries that the operator wants gone."""

    request_keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """The question of an entry that was stored without."""

    request_key: RequestKey
    question: Question
    embedded: Embedded | None


@dataclass(frozen=True, slots=True)
class Checked:
    """A match of an entry was compared with the engine's answer; `floor` as of `floor_after`, None if it was right."""

    request_key: RequestKey
    kind: bytes
    floor: float | None


@dataclass(frozen=True, slots=True)
class Drop:
    """The entry with a proof that an audit found false, or all entries of its signer."""

    proof: bytes
    all_of_signer: bool


StoreTask = Computed | Fetched | Purge | Asked | Checked | Drop


def task_bytes(task: StoreTask) -> int:
    """Bytes in the queue and, once its body is packed, in the database."""
    match task:
        case Purge():
            return 32 * len(task.request_keys)
        case Drop():
            return len(task.proof)
        case Fetched():
            return len(task.body) + _ENTRY_OVERHEAD_BYTES
        case Checked():
            return _QUESTION_OVERHEAD_BYTES
        case Asked():
            return _question_bytes(task.question, task.embedded)
        case Computed(message):
            question = message.question
            asked = _question_bytes(question, task.embedded) if question is not None else 0
            return len(message.body) + _ENTRY_OVERHEAD_BYTES + asked
        case _:
            assert_never(task)


def _question_bytes(question: Question, embedded: Embedded | None) -> int:
    return len(question.text) + (len(embedded.vectors) if embedded else 0) + _QUESTION_OVERHEAD_BYTES
