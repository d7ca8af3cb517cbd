"""Semantic hits: stored questions that are similar to a request's, embedded, compared and guarded in one thread.

Requests wait for the thread until a deadline. Responses to store with their question's vectors wait behind them, and so
do answers to compare. Beyond its bounds the thread answers `busy`, or stores a response without vectors, so that only
the exact wording finds it.
"""

import logging
import random
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...contained import report_error
from ...core.local.response_cache_messages import StoreResponse
from ...core.local.similar_messages import (
    FindSimilar,
    Question,
    RememberQuestion,
    SimilarChecked,
    SimilarFound,
    SimilarNotFound,
)
from ...core.records.ids import RequestKey, sha256
from ...core.records.limits import SIMILAR_LOOKUPS_MAX, STORE_QUEUE_BYTES_MAX
from ...core.response.similar.canonical import CANONICAL_VERSION, compared_question
from ...core.response.similar.guards import eligible
from ...core.response.similar.match_error import NEVER, MatchErrors, floor_after, tells
from ...core.response.similar.same_answer import say_the_same
from ...core.response.similar.semantic import Match, best_match
from ...response_db import Embedded, ResponseReader
from ..clock import wall_ms
from .embedding import Embedder, EmbedderMissing
from .question_index import QUESTIONS_MAX, Codes, QuestionIndex, quantized
from .response_store import ResponseStore

logger = logging.getLogger(__name__)

_ID = 32  # bytes of a kind, before those of a question, in the database
_RECENT_MAX = 1024  # x 1 KiB: a question that is looked for in vain is stored soon after
_COMMIT_S = 10.0  # an entry that isn't in the database by then has left it
_LATER_MAX = 4096  # of 1 KiB to 16 KiB, bodies of responses apart

Answer = Callable[[SimilarFound | SimilarNotFound], None]
_Later = StoreResponse | RememberQuestion | SimilarChecked


@dataclass(frozen=True, slots=True)
class _Asked:
    want: FindSimilar
    until_s: float
    answer: Answer


class SimilarQuestions:
    """`find` and `remember` may be called from any thread and never block; the work happens in this object's thread.

    `load` makes the embedder (seconds, in the thread); when it fails, no question is like another.
    """

    def __init__(
        self,
        db_path: Path,
        load: Callable[[], Embedder],
        acronyms: Mapping[str, str],
        store: ResponseStore,
    ) -> None:
        """`store` writes the database at `db_path`."""
        self._reader = ResponseReader(db_path)
        self._errors = MatchErrors(random.Random())
        self._floors: dict[RequestKey, float] = {}  # of entries that erred
        self._load = load
        self._acronyms = acronyms
        self._store = store
        self._changed = threading.Condition()
        self._asked: deque[_Asked] = deque()
        self._later: deque[_Later] = deque()
        self._later_bytes = 0
        self._state = "starting"  # or "on", "off"
        self._closing = False
        self._recent: OrderedDict[tuple[bytes, str], Codes] = OrderedDict()
        self._added_s: dict[RequestKey, float] = {}  # of those that may not be in the database yet
        self._index: QuestionIndex | None = None
        self._thread = threading.Thread(target=self._run, name="hyperspace-similar", daemon=True)
        self._thread.start()

    def find(self, want: FindSimilar, answer: Answer) -> None:
        """Look for a question similar to that in `want`. `answer` is called once, here or in this object's thread."""
        with self._changed:
            full = len(self._asked) >= SIMILAR_LOOKUPS_MAX
            state = "busy" if full else {"starting": "starting", "off": "off"}.get(self._state, "")
            if not state and not self._closing:
                self._asked.append(_Asked(want, time.monotonic() + want.deadline_ms / 1000, answer))
                self._changed.notify()
                return
        answer(SimilarNotFound(want.lookup, state or "off"))

    def remember(self, message: StoreResponse) -> None:
        """Have a response stored, with its question's vectors if they can be computed."""
        with self._changed:
            if message.question and self._enqueue(message):
                return
        self._store.store(message)

    def remember_question(self, message: RememberQuestion) -> None:
        """Have a question stored with a response that was fetched."""
        with self._changed:
            if self._enqueue(message):
                return
        self._store.store_question(RequestKey(message.request_key), message.question, None)

    def check(self, message: SimilarChecked) -> None:
        """Have two answers compared; beyond the bound this is skipped."""
        with self._changed:
            self._enqueue(message)

    def wrong_ratio(self, end: str) -> float:
        """Of the matches that were checked: the "estimate", or the "low" or "high" end of its interval."""
        with self._changed:
            return float(getattr(self._errors.ratio, end))

    def stats(self) -> dict[str, object]:
        """For `hyperspace status`."""
        with self._changed:
            ratio = self._errors.ratio
            return {
                "state": self._state,
                "questions": len(self._index or ()),
                "waiting": len(self._asked),
                "checked": self._errors.checked,
                "wrong_ratio": round(ratio.estimate, 4),
                "wrong_ratio_low": round(ratio.low, 4),
                "wrong_ratio_high": round(ratio.high, 4),
            }

    def close(self) -> None:
        """Store what is queued, without vectors, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(5)

    # --- in the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._start()
            while (job := self._next()) is not None:
                try:
                    self._do(job)
                except Exception:  # a bug of ours, or of an embedder: what is asked next may be free of it
                    report_error("semantic hits")
                    self._leave(job)
        except EmbedderMissing as error:
            logger.error("semantic hits are off: %s", error)
        except Exception:  # of an embedder: whatever it is, exact hits go on
            logger.exception("semantic hits are off from here on: please report it")
        finally:
            self._end()

    def _do(self, job: _Asked | _Later) -> None:
        match job:
            case _Asked():
                job.answer(self._found(job))
            case StoreResponse():
                self._store_embedded(job)
            case RememberQuestion():
                self._store_question(job)
            case SimilarChecked():
                self._compare(job)

    def _leave(self, job: _Asked | _Later) -> None:
        """End a failed job: with a miss, or by storing the response without vectors."""
        match job:
            case _Asked():
                job.answer(SimilarNotFound(job.want.lookup, "failed"))
            case StoreResponse():
                self._store.store(job)
            case RememberQuestion():
                self._store.store_question(RequestKey(job.request_key), job.question, None)

    def _start(self) -> None:
        embedder = self._load()
        dimensions = embedder.embed(["a question"]).shape[1]
        index = QuestionIndex(dimensions)
        for stored in self._reader.questions(_vectors_of(embedder), QUESTIONS_MAX, wall_ms()):
            vectors = np.frombuffer(stored.vectors, np.int8)
            if vectors.size == 2 * dimensions:  # else another model of the same name
                self._note_floor(stored.key, stored.floor)
                if stored.floor < NEVER:
                    index.add(stored.key, stored.partition, stored.text, vectors.reshape(2, dimensions))
        with self._changed:
            self._embedder, self._index, self._state = embedder, index, "on"
            checks = ((name[:_ID], name[_ID:], wrong) for name, wrong in self._reader.checks())
            self._errors = MatchErrors(random.Random(), checks)
        logger.info("semantic hits: %s, %d questions", embedder.name, len(index))

    def _end(self) -> None:
        with self._changed:
            self._state = "off"
            asked, self._asked = self._asked, deque()
            later, self._later = self._later, deque()
        for job in asked:
            job.answer(SimilarNotFound(job.want.lookup, "off"))
        for message in later:
            if isinstance(message, StoreResponse):
                self._store.store(message)
        self._reader.close()

    def _enqueue(self, message: _Later) -> bool:
        """False at the bound; call it with the lock."""
        size = self._later_bytes + _bytes(message)
        if self._state == "off" or self._closing or size > STORE_QUEUE_BYTES_MAX or len(self._later) >= _LATER_MAX:
            return False
        self._later.append(message)
        self._later_bytes = size
        self._changed.notify()
        return True

    def _next(self) -> _Asked | _Later | None:
        """The next job, first those for which a request waits; None when closing."""
        with self._changed:
            self._changed.wait_for(lambda: self._asked or self._later or self._closing)
            if self._closing:
                return None
            if self._asked:
                return self._asked.popleft()
            message = self._later.popleft()
            self._later_bytes -= _bytes(message)
            return message

    def _found(self, job: _Asked) -> SimilarFound | SimilarNotFound:
        want, question = job.want, job.want.question
        if time.monotonic() >= job.until_s:
            return SimilarNotFound(want.lookup, "late")
        if (refused := eligible(question.text)) is not None:
            return SimilarNotFound(want.lookup, refused)
        return self._best(job)

    def _best(self, job: _Asked) -> SimilarFound | SimilarNotFound:
        lookup, question, mode = job.want.lookup, job.want.question, job.want.mode
        assert self._index is not None
        vectors = self._vectors(question)
        while True:
            near = self._index.nearest(question.partition, vectors)
            allowed = [each for each in near if each.similarity >= self._floors.get(each.key, 0.0)]
            match = best_match(question.text, allowed, mode)
            if not isinstance(match, Match):
                return SimilarNotFound(lookup, match.reason)
            key = match.candidate.key
            if self._is_stored(key):
                with self._changed:
                    verdict = self._errors.judge(self._kind(mode, question), job.want.max_error)
                return SimilarFound(lookup, key, match.candidate.similarity, verdict)
            self._index.remove(key)
            self._floors.pop(key, None)
            if time.monotonic() >= job.until_s:
                return SimilarNotFound(lookup, "late")

    def _kind(self, mode: str, question: Question) -> bytes:
        """What a comparison counts for."""
        return sha256(self._embedder.name.encode(), mode.encode(), question.source)

    def _note_floor(self, key: RequestKey, floor: float) -> None:
        if floor > 0:
            self._floors[key] = floor
            if len(self._floors) > QUESTIONS_MAX:
                del self._floors[next(iter(self._floors))]

    def _is_stored(self, key: RequestKey) -> bool:
        """Whether the database has it, or will soon."""
        if self._reader.holds(key, wall_ms()):
            self._added_s.pop(key, None)
            return True
        return time.monotonic() < self._added_s.get(key, 0.0) + _COMMIT_S

    def _store_embedded(self, message: StoreResponse) -> None:
        question = message.question
        assert question is not None
        if eligible(question.text) is not None:
            self._store.store(message)
            return
        embedded, key = self._embedded(question), RequestKey(message.request_key)
        self._store.store(message, embedded)
        self._floors.pop(key, None)  # another answer
        self._add(key, question)

    def _store_question(self, message: RememberQuestion) -> None:
        question, key = message.question, RequestKey(message.request_key)
        assert self._index is not None
        if key in self._index or self._floors.get(key) == NEVER:
            return  # the same answer again
        is_eligible = eligible(question.text) is None
        self._store.store_question(key, question, self._embedded(question) if is_eligible else None)
        if is_eligible:
            self._add(key, question)

    def _embedded(self, question: Question) -> Embedded:
        return Embedded(_vectors_of(self._embedder), self._vectors(question).tobytes())

    def _add(self, key: RequestKey, question: Question) -> None:
        """Compare it from now on, although the database may not have it yet."""
        assert self._index is not None
        self._index.add(key, question.partition, question.text, self._vectors(question))
        now_s = time.monotonic()
        self._added_s.pop(key, None)
        self._added_s[key] = now_s
        while next(iter(self._added_s.values())) < now_s - _COMMIT_S:
            del self._added_s[next(iter(self._added_s))]

    def _compare(self, check: SimilarChecked) -> None:
        """Count an error if the answers differ, and let the entry answer less for it."""
        key, question = RequestKey(check.request_key), check.question
        assert self._index is not None
        wrong = not say_the_same(check.stored, check.computed, self._cosine)
        name = b""
        if question.is_greedy and tells(check.stored, check.computed):
            kind = self._kind(check.mode, question)
            asked = sha256(compared_question(question.text, self._acronyms).encode())
            name = kind + asked
            with self._changed:
                self._errors.add(kind, asked, wrong)
        floor = floor_after(check.similarity, self._floors.get(key, 0.0)) if wrong else None
        self._store.note_check(key, name, floor)
        if floor is not None:
            self._note_floor(key, floor)
        if floor == NEVER:
            self._index.remove(key)

    def _cosine(self, one: str, other: str) -> float:
        vectors = self._embedder.embed([one, other])
        return float(vectors[0] @ vectors[1])

    def _vectors(self, question: Question) -> Codes:
        """int8 [2, dimensions] of a question and its compared form."""
        # By partition: otherwise the time would show a tenant what another one has asked.
        named = question.partition, question.text
        vectors = self._recent.pop(named, None)
        if vectors is None:
            texts = [question.text, compared_question(question.text, self._acronyms)]
            vectors = quantized(self._embedder.embed(texts))
        self._recent[named] = vectors
        if len(self._recent) > _RECENT_MAX:
            self._recent.popitem(last=False)
        return vectors


def _vectors_of(embedder: Embedder) -> str:
    """What vectors can be compared with each other."""
    return f"{embedder.name}; canonical {CANONICAL_VERSION}"


def _bytes(message: _Later) -> int:
    """What counts against the queue's bound."""
    match message:
        case StoreResponse():
            return len(message.body)
        case RememberQuestion():
            return len(message.question.text)
        case SimilarChecked():
            return len(message.stored) + len(message.computed)
