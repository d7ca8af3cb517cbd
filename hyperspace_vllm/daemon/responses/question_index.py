"""The questions of this node's stored responses by their meaning: an exact scan over the vectors of one partition.

Context: a question is compared with as many as QUESTIONS_MAX others, in both its wordings, as asked and canonical.
Choice: int8 vectors, scanned by SIMD kernels (numkong), at most 20 ms for all of them. Rejected: an approximate index,
whose misses cannot be measured; float32, four times the memory and the time. Cost: a cosine that is off by up to 0.005,
and the oldest questions beyond QUESTIONS_MAX, or beyond TEXT_CHARS_MAX, are not compared.
"""

import numkong
import numpy as np
from numpy.typing import NDArray

from ...core.records.ids import RequestKey
from ...core.response.similar.semantic import CANDIDATES_MAX, COSINE_MIN, SimilarCandidate

Floats = NDArray[np.float32]
Codes = NDArray[np.int8]  # vectors times a scale of their own each

QUESTIONS_MAX = 200_000  # x (2 x 384 B and about as much for text and key) = 300 MiB
TEXT_CHARS_MAX = 100_000_000  # of all of them: 500 each
_ROWS_MIN = 1  # a partition of one question is the rule where requests vary in their parameters


def quantized(vectors: Floats) -> Codes:
    """int8 of the same shape [n, dimensions]: every row times what makes its largest component 127."""
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    codes: Codes = np.rint(vectors * (127 / np.maximum(largest, 1e-9))).astype(np.int8)
    return codes


class QuestionIndex:
    """Belongs to one thread. The vectors of a question are int8 [2, dimensions], as asked and canonical."""

    def __init__(
        self, dimensions: int, questions_max: int = QUESTIONS_MAX, text_chars_max: int = TEXT_CHARS_MAX
    ) -> None:
        self._dimensions = dimensions
        self._questions_max = questions_max
        self._chars_left = text_chars_max
        self._partitions: dict[bytes, _Partition] = {}
        self._places: dict[RequestKey, _Partition] = {}  # the oldest first

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: RequestKey) -> bool:
        return key in self._places

    def add(self, key: RequestKey, partition: bytes, text: str, vectors: Codes) -> None:
        """Put in a question, in the place of an earlier one with its key; `ValueError` for vectors of another size."""
        if vectors.shape != (2, self._dimensions):
            raise ValueError(f"vectors: expected int8 [2, {self._dimensions}], got {list(vectors.shape)}")
        self.remove(key)
        self._chars_left -= len(text)
        while self._places and (self._chars_left < 0 or len(self._places) >= self._questions_max):
            self.remove(next(iter(self._places)))
        where = self._partitions.get(partition)
        if where is None:
            where = self._partitions[partition] = _Partition(partition, self._dimensions)
        where.add(key, text, vectors)
        self._places[key] = where

    def remove(self, key: RequestKey) -> None:
        """Take out a question; an unknown key is fine."""
        if (where := self._places.pop(key, None)) is None:
            return
        self._chars_left += where.remove(key)
        if not where.keys:
            del self._partitions[where.name]

    def nearest(self, partition: bytes, vectors: Codes) -> list[SimilarCandidate]:
        """Up to CANDIDATES_MAX questions of the partition with a cosine of COSINE_MIN or more, the nearest first."""
        where = self._partitions.get(partition)
        return [] if where is None else where.nearest(vectors)


class _Partition:
    def __init__(self, name: bytes, dimensions: int) -> None:
        self.name = name
        self.keys: list[RequestKey] = []
        self._texts: list[str] = []
        self._rows: dict[RequestKey, int] = {}
        self._codes = np.empty((2, _ROWS_MIN, dimensions), np.int8)

    def add(self, key: RequestKey, text: str, vectors: Codes) -> None:
        row = len(self.keys)
        if row == self._codes.shape[1]:
            self._codes = np.concatenate((self._codes, np.empty_like(self._codes)), axis=1)
        self._codes[:, row] = vectors
        self._rows[key] = row
        self.keys.append(key)
        self._texts.append(text)

    def remove(self, key: RequestKey) -> int:
        """The last one takes its row; the length of its text."""
        row, last = self._rows.pop(key), len(self.keys) - 1
        chars = len(self._texts[row])
        last_key, last_text = self.keys.pop(), self._texts.pop()
        if row != last:
            self._codes[:, row] = self._codes[:, last]
            self.keys[row], self._texts[row] = last_key, last_text
            self._rows[last_key] = row
        if 4 * last < self._codes.shape[1]:
            self._codes = self._codes[:, : 2 * last + 1].copy()
        return chars

    def nearest(self, vectors: Codes) -> list[SimilarCandidate]:
        count = len(self.keys)
        cosines = np.maximum(*(_cosines(vectors[each], self._codes[each, :count]) for each in range(2)))
        near = np.flatnonzero(cosines >= COSINE_MIN)
        best = near[np.argsort(-cosines[near], kind="stable")[:CANDIDATES_MAX]]
        return [SimilarCandidate(self._texts[row], float(cosines[row]), self.keys[row]) for row in best.tolist()]


def _cosines(vector: Codes, matrix: Codes) -> Floats:
    """float32 [n]"""
    distances: Floats = np.asarray(numkong.cdist(vector[None, :], matrix, "angular"), np.float32)
    cosines: Floats = 1 - distances[0]
    return cosines
