"""Questions like the one asked, among those whose answers this node has: embedded, compared and guarded in one thread.

Requests wait for the thread, by a deadline; responses that are to be stored with their question's vectors wait behind
them. What it can't take on is answered `busy`, or stored without vectors, to be found by exact wordings alone.
"""

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..core.records.ids import RequestKey
from ..core.records.limits import SIMILAR_LOOKUPS_MAX, STORE_QUEUE_BYTES_MAX
from ..core.records.local import FindSimilar, Question, SimilarFound, SimilarNotFound, StoreResponse
from ..core.response.canonical import canonical_question
from ..core.response.guards import eligible
from ..core.response.semantic import Match, best_match
from ..response_db import Embedded, ResponseReader
from .embedding import Embedder, EmbedderMissing
from .question_index import QUESTIONS_MAX, QuestionIndex, quantized
from .response_store import wall_clock_ms

if TYPE_CHECKING:
    from .question_index import Codes

logger = logging.getLogger(__name__)

_RECENT_MAX = 1024  # x 1 KiB: a question that is looked for in vain is stored soon after
_COMMIT_S = 10.0  # an entry that isn't in the database by then has left it

Answer = Callable[[SimilarFound | SimilarNotFound], None]
Store = Callable[[StoreResponse, Embedded | None], object]


@dataclass(frozen=True, slots=True)
class _Asked:
    want: FindSimilar
    until_s: float
    answer: Answer


class SimilarQuestions:
    """`find` and `remember` may be called from any thread and never block; what they promise happens in ours.

    `load` makes the embedder (seconds, in the thread); when it fails, no question is like another.
    """

    def __init__(self, db_path: Path, load: Callable[[], Embedder], acronyms: Mapping[str, str], store: Store) -> None:
        """`store` is told what `remember` was given, with vectors if there are any."""
        self._reader = ResponseReader(db_path)
        self._load = load
        self._acronyms = acronyms
        self._store = store
        self._changed = threading.Condition()
        self._asked: deque[_Asked] = deque()
        self._to_store: deque[StoreResponse] = deque()
        self._to_store_bytes = 0
        self._state = "starting"  # or "on", "off"
        self._closing = False
        self._recent: OrderedDict[tuple[bytes, str], Codes] = OrderedDict()
        self._added_s: dict[RequestKey, float] = {}  # of those that may not be in the database yet
        self._index: QuestionIndex | None = None
        self._thread = threading.Thread(target=self._run, name="hyperspace-similar", daemon=True)
        self._thread.start()

    def find(self, want: FindSimilar, answer: Answer) -> None:
        """Look for a question like the one in `want`. `answer` is called once, here or from our thread."""
        with self._changed:
            full = len(self._asked) >= SIMILAR_LOOKUPS_MAX
            state = "busy" if full else {"starting": "starting", "off": "off"}.get(self._state, "")
            if not state and not self._closing:
                self._asked.append(_Asked(want, time.monotonic() + want.deadline_ms / 1000, answer))
                self._changed.notify()
                return
        answer(SimilarNotFound(want.lookup, state or "off"))

    def remember(self, message: StoreResponse) -> None:
        """Have a response stored, with its question's vectors if that is to be had."""
        with self._changed:
            size = self._to_store_bytes + len(message.body)
            if message.question and self._state != "off" and not self._closing and size <= STORE_QUEUE_BYTES_MAX:
                self._to_store.append(message)
                self._to_store_bytes = size
                self._changed.notify()
                return
        self._store(message, None)

    def stats(self) -> dict[str, object]:
        """For `hyperspace status`."""
        with self._changed:
            return {"state": self._state, "questions": len(self._index or ()), "waiting": len(self._asked)}

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
                if isinstance(job, _Asked):
                    job.answer(self._found(job))
                else:
                    self._store_embedded(job)
        except EmbedderMissing as error:
            logger.error("semantic hits are off: %s", error)
        except Exception:  # of an embedder: whatever it is, exact hits go on
            logger.exception("semantic hits are off from here on: please report it")
        finally:
            self._end()

    def _start(self) -> None:
        embedder = self._load()
        dimensions = embedder.embed(["a question"]).shape[1]
        index = QuestionIndex(dimensions)
        for stored in self._reader.questions(embedder.name, QUESTIONS_MAX, wall_clock_ms()):
            vectors = np.frombuffer(stored.vectors, np.int8)
            if vectors.size == 2 * dimensions:  # else another model of the same name
                index.add(stored.key, stored.partition, stored.text, vectors.reshape(2, dimensions))
        with self._changed:
            self._embedder, self._index, self._state = embedder, index, "on"
        logger.info("semantic hits: %s, %d questions", embedder.name, len(index))

    def _end(self) -> None:
        with self._changed:
            self._state = "off"
            asked, self._asked = self._asked, deque()
            to_store, self._to_store = self._to_store, deque()
        for job in asked:
            job.answer(SimilarNotFound(job.want.lookup, "off"))
        for message in to_store:
            self._store(message, None)
        self._reader.close()

    def _next(self) -> _Asked | StoreResponse | None:
        """The next job, those that somebody waits for first; None when closing."""
        with self._changed:
            self._changed.wait_for(lambda: self._asked or self._to_store or self._closing)
            if self._closing:
                return None
            if self._asked:
                return self._asked.popleft()
            message = self._to_store.popleft()
            self._to_store_bytes -= len(message.body)
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
            match = best_match(question.text, self._index.nearest(question.partition, vectors), mode)
            if not isinstance(match, Match):
                return SimilarNotFound(lookup, match.reason)
            key = match.candidate.key
            if self._is_stored(key):
                return SimilarFound(lookup, key, match.candidate.similarity)
            self._index.remove(key)
            if time.monotonic() >= job.until_s:
                return SimilarNotFound(lookup, "late")

    def _is_stored(self, key: RequestKey) -> bool:
        """Whether the database has it, or will soon."""
        if self._reader.holds(key, wall_clock_ms()):
            self._added_s.pop(key, None)
            return True
        return time.monotonic() < self._added_s.get(key, 0.0) + _COMMIT_S

    def _store_embedded(self, message: StoreResponse) -> None:
        question = message.question
        assert question is not None
        assert self._index is not None
        if eligible(question.text) is not None:
            self._store(message, None)
            return
        vectors = self._vectors(question)
        self._store(message, Embedded(self._embedder.name, vectors.tobytes()))
        key = RequestKey(message.request_key)
        self._index.add(key, question.partition, question.text, vectors)
        now_s = time.monotonic()
        self._added_s.pop(key, None)
        self._added_s[key] = now_s
        while next(iter(self._added_s.values())) < now_s - _COMMIT_S:
            del self._added_s[next(iter(self._added_s))]

    def _vectors(self, question: Question) -> "Codes":
        """int8 [2, dimensions] of a question and its canonical form."""
        # By partition: else a tenant's time would tell what another has asked.
        named = question.partition, question.text
        vectors = self._recent.pop(named, None)
        if vectors is None:
            texts = [question.text, canonical_question(question.text, self._acronyms)]
            vectors = quantized(self._embedder.embed(texts))
        self._recent[named] = vectors
        if len(self._recent) > _RECENT_MAX:
            self._recent.popitem(last=False)
        return vectors
