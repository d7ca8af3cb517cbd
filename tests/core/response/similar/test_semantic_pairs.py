"""Our own near-misses and paraphrases, through the embedder that the node runs."""

import json
from collections import Counter
from functools import cache

import numpy as np
import pytest

from hyperspace_vllm.core.records.ids import RequestKey
from hyperspace_vllm.core.response.similar.canonical import canonical_question, compared_question
from hyperspace_vllm.core.response.similar.guards import Mode, eligible
from hyperspace_vllm.core.response.similar.semantic import Match, SimilarCandidate, best_match, similarity
from hyperspace_vllm.daemon.responses.embedding import DEFAULT_DIMENSIONS, Embedder, load_embedder
from tests.support.paths import DATA

pytestmark = pytest.mark.io

PAIRS = [json.loads(line) for line in (DATA / "semantic_pairs.jsonl").read_text().splitlines()]
NEAR_MISSES = [pair for pair in PAIRS if not pair["same"]]
PARAPHRASES = [pair for pair in PAIRS if pair["same"]]


@cache
def embedder() -> Embedder:
    return load_embedder()


def is_served(stored: str, asked: str, mode: Mode) -> bool:
    """Whether a node that holds the answer to `stored` gives it to `asked`."""
    if canonical_question(stored) == canonical_question(asked):
        return True
    if eligible(stored) or eligible(asked):
        return False
    vectors = embedder().embed([asked, compared_question(asked), stored, compared_question(stored)])
    score = similarity(*vectors)
    return isinstance(best_match(asked, [SimilarCandidate(stored, score, RequestKey(b""))], mode), Match)


def test_the_set_is_as_large_as_it_says() -> None:
    kinds = Counter(pair["kind"] for pair in NEAR_MISSES)
    assert kinds.keys() == {
        *("numbers", "units", "negation", "antonyms", "roles", "order", "entities", "languages", "time")
    }
    assert len(NEAR_MISSES) >= 100
    assert len(PARAPHRASES) >= 50


@pytest.mark.parametrize("mode", ["balanced", "strict"])
def test_two_near_misses_in_a_hundred_are_served_at_the_most(mode: Mode) -> None:
    served = [(pair["a"], pair["b"]) for pair in NEAR_MISSES if is_served(pair["a"], pair["b"], mode)]
    assert len(served) <= 0.02 * len(NEAR_MISSES), served


def test_most_paraphrases_are_served_when_balanced() -> None:
    missed = [(pair["a"], pair["b"]) for pair in PARAPHRASES if not is_served(pair["a"], pair["b"], "balanced")]
    assert len(missed) <= 0.45 * len(PARAPHRASES), missed


def test_vectors_have_length_one_and_do_not_depend_on_their_neighbours() -> None:
    texts = ["What is ML?", "", "Why is the sky blue? " * 200]
    together = embedder().embed(texts)
    assert together.shape == (3, DEFAULT_DIMENSIONS)
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(together[1], embedder().embed([""])[0])


def test_no_text_is_no_vector() -> None:
    assert embedder().embed([]).shape == (0, DEFAULT_DIMENSIONS)
