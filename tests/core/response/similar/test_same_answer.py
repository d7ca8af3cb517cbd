"""Pairs of answers that say the same, or not, judged with the node's own embedder."""

import json

import pytest

from hyperspace_vllm.core.response.similar.same_answer import say_the_same
from hyperspace_vllm.daemon.responses.embedding import Embedder, load_embedder
from tests.support.paths import DATA

PAIRS = [json.loads(line) for line in (DATA / "answer_pairs.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return load_embedder()


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair["a"][:30])
def test_answers_are_told_apart(embedder: Embedder, pair: dict[str, object]) -> None:
    def cosine(one: str, other: str) -> float:
        first, second = embedder.embed([one, other])
        return float(first @ second)

    for one, other in ((pair["a"], pair["b"]), (pair["b"], pair["a"])):
        assert say_the_same(str(one), str(other), cosine) is pair["same"]


def test_the_same_text_needs_no_embedder() -> None:
    def cosine(one: str, other: str) -> float:
        raise AssertionError("asked for")

    assert say_the_same("Paris is  the\ncapital.", " Paris is the capital. ", cosine)
    assert not say_the_same("Yes, of course it is, as everybody knows.", "No.", cosine)
