"""Questions like others: embedded, stored and found again, by the embedder and the database that nodes use."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
from nacl.signing import SigningKey

from hyperspace_vllm.core.local.response_cache_messages import StoreResponse
from hyperspace_vllm.core.local.similar_messages import (
    FindSimilar,
    Question,
    RememberQuestion,
    SimilarChecked,
    SimilarFound,
    SimilarNotFound,
)
from hyperspace_vllm.core.records.ids import RequestKey, network_id, sha256
from hyperspace_vllm.core.records.limits import RESPONSE_TTL_MS
from hyperspace_vllm.core.response.cache_proof import make_proof
from hyperspace_vllm.core.response.similar.canonical import ACRONYMS
from hyperspace_vllm.core.response.similar.guards import Mode
from hyperspace_vllm.core.response.similar.semantic import CANDIDATES_MAX, COSINE_MIN
from hyperspace_vllm.daemon.responses.embedding import Embedder, EmbedderMissing, load_embedder
from hyperspace_vllm.daemon.responses.question_index import QuestionIndex, quantized
from hyperspace_vllm.daemon.responses.response_store import ResponseStore
from hyperspace_vllm.daemon.responses.similar import SimilarQuestions
from tests.support.until import until

DIMENSIONS = 384
ENDED, HAMMER = "It ended in 1945, on the second of September.", "Use a hammer, two nails and a piece of wood."


def key(number: int) -> RequestKey:
    return RequestKey(sha256(b"%d" % number))


def vectors_near(center: np.ndarray, count: int, spread: float, rng: np.random.Generator) -> np.ndarray:
    """float32 [count, 2, dimensions] of length 1."""
    found = center + spread * rng.standard_normal((count, 2, DIMENSIONS)).astype(np.float32)
    normed: np.ndarray = found / np.linalg.norm(found, axis=2, keepdims=True)
    return normed


def test_the_nearest_are_those_of_an_exact_search() -> None:
    rng = np.random.default_rng(1)
    center = vectors_near(np.zeros(DIMENSIONS, np.float32), 1, 1.0, rng)[0]
    stored = np.concatenate(
        [vectors_near(center, 100, spread, rng) for spread in (0.01, 0.02, 0.025, 0.03)]
    )  # cosines around 0.98, 0.92, 0.89 and 0.84
    index = QuestionIndex(DIMENSIONS)
    for number, vectors in enumerate(stored):
        index.add(key(number), b"p", str(number), quantized(vectors))
    exact = np.einsum("nij,ij->ni", stored, center).max(axis=1)
    best = [int(candidate.question) for candidate in index.nearest(b"p", quantized(center))]
    assert len(best) == CANDIDATES_MAX
    np.testing.assert_allclose(exact[best], np.sort(exact)[::-1][:CANDIDATES_MAX], atol=0.005)
    for candidate in index.nearest(b"p", quantized(center)):
        assert abs(candidate.similarity - exact[int(candidate.question)]) < 0.005


def test_only_near_questions_of_the_same_partition_are_candidates() -> None:
    rng = np.random.default_rng(2)
    (far, near) = vectors_near(np.zeros(DIMENSIONS, np.float32), 2, 1.0, rng)
    index = QuestionIndex(DIMENSIONS)
    index.add(key(1), b"p", "near", quantized(near))
    index.add(key(2), b"p", "far", quantized(far))
    index.add(key(3), b"q", "elsewhere", quantized(near))
    (candidate,) = index.nearest(b"p", quantized(near))
    assert (candidate.question, candidate.key) == ("near", key(1))
    assert candidate.similarity > 0.99 > COSINE_MIN
    assert index.nearest(b"r", quantized(near)) == []


def test_an_index_that_is_full_forgets_the_oldest_and_removes_by_key() -> None:
    rng = np.random.default_rng(3)
    vectors = [quantized(each) for each in vectors_near(np.zeros(DIMENSIONS, np.float32), 60, 1.0, rng)]
    index = QuestionIndex(DIMENSIONS, questions_max=40)
    for number, each in enumerate(vectors):
        index.add(key(number), b"p" if number % 3 else b"q", str(number), each)
    for number in range(25, 50, 5):
        index.remove(key(number))
    index.remove(key(7))
    assert len(index) == 35
    for number, each in enumerate(vectors):
        found = index.nearest(b"p" if number % 3 else b"q", each)
        gone = number < 20 or number in range(25, 50, 5)
        assert [candidate.question for candidate in found] == ([] if gone else [str(number)])
    for number in range(60):
        index.remove(key(number))
    assert len(index) == 0
    assert index.nearest(b"p", vectors[1]) == []


def test_an_index_keeps_so_much_text_and_no_more_memory_than_its_questions_need() -> None:
    rng = np.random.default_rng(4)
    vectors = [quantized(each) for each in vectors_near(np.zeros(DIMENSIONS, np.float32), 1_000, 1.0, rng)]
    index = QuestionIndex(DIMENSIONS, text_chars_max=10_000)
    for number, each in enumerate(vectors):
        index.add(key(number), b"p", "x" * 9, each)
    assert len(index) == 1_000
    index.add(key(1_000), b"p", "y" * 9_901, vectors[0])
    assert len(index) == 12
    index.add(key(1_000), b"p", "y", vectors[0])
    index.add(key(1_001), b"p", "z" * 9_901, vectors[0])
    assert len(index) == 12, "what was replaced counts no more"
    for number in range(988, 1_000):
        assert bool(index.nearest(b"p", vectors[number])) is (number > 989)
    (partition,) = index._partitions.values()
    assert partition._codes.shape[1] < 100


def test_vectors_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"vectors: expected int8 \[2, 384\], got \[2, 768\]"):
        QuestionIndex(DIMENSIONS).add(key(1), b"p", "x", np.zeros((2, 768), np.int8))


# --- with the embedder and the database ---------------------------------------------------------


class Signer:
    signing_key = SigningKey(bytes(32))


def asked(text: str, partition: bytes = bytes(32), tenant: bytes = bytes(32), is_greedy: bool = True) -> Question:
    return Question(partition, sha256(text.encode()), text, tenant, is_greedy)


class Place:
    """A node's database, with what compares its questions."""

    questions = 0  # that were checked

    def __init__(self, path: Path) -> None:
        self.path = path / "responses.sqlite"
        self.store = ResponseStore(self.path, 1 << 30, RESPONSE_TTL_MS, Signer(), network_id("test"))
        self.store.start()
        self.similar = SimilarQuestions(self.path, load_embedder, ACRONYMS, self.store)
        until(lambda: self.similar.stats()["state"] == "on")

    def remember(self, text: str, number: int, partition: bytes = bytes(32)) -> None:
        question = asked(text, partition)
        stored = self.store.stats()["stored"]
        self.similar.remember(StoreResponse(key(number), "network", bytes(32), "v", RESPONSE_TTL_MS, b"{}", question))
        until(lambda: self.store.stats()["stored"] > stored)

    def find(
        self,
        text: str,
        mode: Mode = "strict",
        partition: bytes = bytes(32),
        max_error: float = 1.0,
        tenant: bytes = bytes(32),
    ) -> SimilarFound | SimilarNotFound:
        answers: list[SimilarFound | SimilarNotFound] = []
        self.similar.find(
            FindSimilar(7, asked(text, partition, tenant), mode, bytes(32), max_error, 60_000), answers.append
        )
        until(lambda: bool(answers))
        (answer,) = answers
        assert answer.lookup == 7
        return answer

    def check(
        self,
        number: int,
        similarity: float,
        stored: str,
        computed: str,
        mode: Mode = "strict",
        tenant: bytes = bytes(32),
    ) -> None:
        self.questions += 1
        question = asked(f"Why is the number {self.questions} odd?", tenant=tenant)
        checked = self.similar.stats()["checked"]
        self.similar.check(SimilarChecked(key(number), question, similarity, mode, stored, computed))
        until(lambda: self.similar.stats()["checked"] != checked)

    def close(self) -> None:
        self.similar.close()
        self.store.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    place.close()


@pytest.mark.io
def test_another_wording_finds_the_answer_also_after_a_restart(place: Place, tmp_path: Path) -> None:
    place.remember("How do I learn to play the guitar?", 1)
    place.remember("How do I cook rice?", 2)
    for _ in range(2):
        found = place.find("How can I learn to play guitar?")
        assert isinstance(found, SimilarFound)
        assert found.request_key == key(1)
        assert COSINE_MIN <= found.similarity <= 1.005
        assert place.find("How do I learn to play the violin?") == SimilarNotFound(7, "far")
        place.close()
        place.__init__(tmp_path)  # type: ignore[misc]


@pytest.mark.io
def test_vectors_of_an_earlier_canonical_form_are_not_compared(place: Place, tmp_path: Path) -> None:
    place.remember("How do I cook rice?", 1)
    place.close()
    with closing(sqlite3.connect(place.path)) as database, database:
        assert database.execute("UPDATE questions SET embedder = 'all-MiniLM-L6-v2'").rowcount == 1
    place.__init__(tmp_path)  # type: ignore[misc]
    assert place.find("How can I cook rice?") == SimilarNotFound(7, "far")
    assert place.similar.stats()["questions"] == 0


@pytest.mark.io
def test_a_guard_that_refuses_the_nearest_is_named(place: Place) -> None:
    place.remember("Is it safe to take ibuprofen?", 1)
    assert place.find("Is it unsafe to take ibuprofen?", "balanced") == SimilarNotFound(7, "negation")
    assert place.find("Is it safe to take ibuprofen now?") == SimilarNotFound(7, "deictic")
    assert place.find("Ist das sicher?") == SimilarNotFound(7, "not_english")


@pytest.mark.io
def test_another_partition_is_another_world(place: Place) -> None:
    place.remember("How do I cook rice?", 1, b"a" * 32)
    assert isinstance(place.find("How can I cook rice?", "strict", b"a" * 32), SimilarFound)
    assert place.find("How can I cook rice?", "strict", b"b" * 32) == SimilarNotFound(7, "far")


@pytest.mark.io
def test_an_entry_that_has_gone_is_no_answer_any_more(place: Place) -> None:
    place.remember("How do I cook rice?", 1)
    assert isinstance(place.find("How can I cook rice?"), SimilarFound)
    place.store.purge([key(1)])
    until(lambda: place.store.stats()["purged"] == 1)
    assert place.find("How can I cook rice?") == SimilarNotFound(7, "far")
    assert place.similar.stats()["questions"] == 0


@pytest.mark.io
def test_a_response_from_elsewhere_answers_other_wordings_once_its_question_is_known(place: Place) -> None:
    body, question = b'{"fetched": 1}', asked("How do I cook rice?")
    now_ms = time.time_ns() // 1_000_000
    proof = make_proof(Signer.signing_key, network_id("test"), key(1), body, bytes(32), "v", now_ms)
    place.store.store_fetched(key(1), body, proof.encode(), now_ms, now_ms + 60_000, "network")
    place.similar.remember_question(RememberQuestion(key(1), question))
    until(lambda: place.similar.stats()["questions"] == 1)
    for _ in range(2):
        found = place.find("How can I cook rice?")
        assert isinstance(found, SimilarFound)
        assert found.request_key == key(1)
        assert place.store.flush(60)
        size = place.store.stats()["bytes"]
        place.close()
        place.__init__(place.path.parent)  # type: ignore[misc]
    assert place.store.flush(60)
    assert place.store.stats()["bytes"] == size > len(body) + 2 * DIMENSIONS
    place.store.purge([key(1)])
    until(lambda: place.store.stats()["purged"] == 1)
    assert place.store.stats()["bytes"] == 0


# --- what is found wrong ------------------------------------------------------------------------


@pytest.mark.io
def test_an_entry_that_erred_answers_only_what_is_nearer_and_after_another_error_nothing_else(place: Place) -> None:
    place.remember("When did World War II end?", 1)
    near = place.find("In what year did World War II end?", "balanced")
    assert isinstance(near, SimilarFound)
    place.check(1, near.similarity, ENDED, HAMMER)
    nearest = place.find("When did World War II end, please?")
    assert isinstance(nearest, SimilarFound)
    for _ in range(2):
        assert place.find("In what year did World War II end?", "balanced") == SimilarNotFound(7, "far")
        assert place.store.flush(60)
        place.close()
        place.__init__(place.path.parent)  # type: ignore[misc]
    place.check(1, nearest.similarity, ENDED, HAMMER)
    for _ in range(2):
        assert place.find("When did World War II end, please?") == SimilarNotFound(7, "far")
        assert place.store.flush(60)
        place.close()
        place.__init__(place.path.parent)  # type: ignore[misc]
    assert place.similar.stats()["questions"] == 0
    assert place.store.stats()["entries"] == 1, "its own question it answers as before"


@pytest.mark.io
def test_the_same_response_fetched_again_forgives_no_error_and_takes_no_more_room(place: Place) -> None:
    place.remember("When did World War II end?", 1)
    assert place.store.flush(60)
    size = place.store.stats()["bytes"]
    again = RememberQuestion(key(1), asked("When did World War II end?"))
    for similarity in (0.94, 1.0):
        place.check(1, similarity, ENDED, HAMMER)
        for _ in range(3):
            place.similar.remember_question(again)
        found = place.find("In what year did World War II end?", "balanced")
        assert isinstance(found, SimilarFound) is (similarity == 0.94)
        assert place.store.flush(60)
        assert place.store.stats()["bytes"] == size
    assert place.find("When did World War II end, please?") == SimilarNotFound(7, "far")
    place.close()
    place.__init__(place.path.parent)  # type: ignore[misc]
    place.similar.remember_question(again)
    assert place.find("When did World War II end, please?") == SimilarNotFound(7, "far")


@pytest.mark.io
def test_a_bound_holds_for_each_mode_by_itself_also_after_a_restart(place: Place) -> None:
    place.remember("When did World War II end?", 1)
    for _ in range(20):
        place.check(1, 0.95, ENDED, ENDED, mode="strict")
    for _ in range(2):
        strict = place.find("When did World War II end, please?", "strict", max_error=0.2)
        balanced = place.find("When did World War II end, please?", "balanced", max_error=0.2)
        unbound = place.find("When did World War II end, please?", "balanced")
        assert [found.verdict for found in (strict, balanced, unbound) if isinstance(found, SimilarFound)][
            1
        ] == "compute"
        assert isinstance(strict, SimilarFound)
        assert strict.verdict != "compute"
        assert isinstance(unbound, SimilarFound)
        assert unbound.verdict != "compute"
        assert place.store.flush(60)
        place.close()
        place.__init__(place.path.parent)  # type: ignore[misc]


@pytest.mark.io
def test_a_bound_holds_for_each_tenant_by_itself(place: Place) -> None:
    place.remember("When did World War II end?", 1)
    ours, theirs = bytes(32), b"t" * 32
    for _ in range(20):
        place.check(1, 0.95, ENDED, ENDED, tenant=theirs)
    for tenant, is_known in ((theirs, True), (ours, False)):
        found = place.find("When did World War II end, please?", max_error=0.2, tenant=tenant)
        assert isinstance(found, SimilarFound)
        assert (found.verdict != "compute") is is_known
    for _ in range(20):
        place.check(1, 0.95, ENDED, ENDED, tenant=ours)
    for _ in range(20):
        place.check(2, 0.95, ENDED, HAMMER, tenant=theirs)
    found = place.find("When did World War II end, please?", max_error=0.2, tenant=ours)
    assert isinstance(found, SimilarFound)
    assert found.verdict != "compute", "one tenant's errors switch off no other's matches"


@pytest.mark.io
def test_what_was_sampled_or_is_a_word_long_or_was_asked_before_does_not_count(place: Place) -> None:
    sampled, greedy = asked("What is ML?", is_greedy=False), asked("What is ML?")
    for question, answers in ((sampled, (ENDED, HAMMER)), (greedy, ("The", "The"))):
        place.similar.check(SimilarChecked(key(1), question, 0.95, "strict", *answers))
    for partition in (bytes(32), b"other parameters".ljust(32)):
        again = asked("What is ML?", partition)
        place.similar.check(SimilarChecked(key(1), again, 0.95, "strict", ENDED, ENDED))
    place.check(1, 0.95, ENDED, ENDED)
    assert place.similar.stats()["checked"] == 2
    assert place.store.flush(60)
    place.close()
    place.__init__(place.path.parent)  # type: ignore[misc]
    assert (place.similar.stats()["checked"], place.similar.stats()["wrong_ratio"]) == (2, 0)


@pytest.mark.io
def test_answers_that_say_the_same_in_other_words_are_no_error(place: Place) -> None:
    place.remember("How do I cook rice?", 1)
    place.check(
        1,
        0.95,
        "Paris is the old capital of the Republic of France.",
        " Paris  is the old capital of the\nRepublic of France.",
    )
    place.check(
        1,
        0.95,
        "Paris is the old capital of the Republic of France.",
        "The old capital of the Republic of France is Paris.",
    )
    assert place.similar.stats()["wrong_ratio"] == 0
    place.check(1, 0.95, "Paris is the old capital of the Republic of France.", "Boil the rice for twelve minutes.")
    for _ in range(2):
        stats = place.similar.stats()
        assert stats["checked"] == 3
        assert stats["wrong_ratio"] == 0.3333
        assert stats["wrong_ratio_low"] == 0.0615
        assert stats["wrong_ratio_high"] == 0.7923
        assert place.store.flush(60)
        place.close()
        place.__init__(place.path.parent)  # type: ignore[misc]


@pytest.mark.io
def test_without_its_packages_responses_are_stored_all_the_same(tmp_path: Path) -> None:
    def load() -> Embedder:
        raise EmbedderMissing("onnxruntime")

    store = ResponseStore(tmp_path / "responses.sqlite", 1 << 30, RESPONSE_TTL_MS, Signer(), network_id("test"))
    store.start()
    similar = SimilarQuestions(tmp_path / "responses.sqlite", load, ACRONYMS, store)
    question = asked("What is ML?")
    for number in range(2):
        similar.remember(StoreResponse(key(number), "network", bytes(32), "v", RESPONSE_TTL_MS, b"{}", question))
    until(lambda: store.stats()["stored"] == 2)
    similar.remember_question(RememberQuestion(key(0), question))
    answers: list[SimilarFound | SimilarNotFound] = []
    until(lambda: similar.stats()["state"] == "off")
    similar.find(FindSimilar(1, question, "strict", bytes(32), 1.0, 1000), answers.append)
    assert answers == [SimilarNotFound(1, "off")]
    similar.close()
    store.close()


@pytest.mark.io
def test_a_question_that_fails_is_a_miss_and_those_after_it_are_compared(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(text: str) -> None:
        if "ZERO" in text:
            raise ZeroDivisionError

    monkeypatch.setattr("hyperspace_vllm.contained._reported", set())
    monkeypatch.setattr("hyperspace_vllm.daemon.responses.similar.eligible", broken)
    place.remember("What is the capital of ZERO?", 1)
    place.remember("How do I learn to play the guitar?", 2)
    place.similar.remember_question(RememberQuestion(key(1), asked("What is a ZERO?")))
    for _ in range(2):
        assert place.find("What is the capital of ZERO?") == SimilarNotFound(7, "failed")
    assert place.find("How can I learn to play the guitar?") == SimilarFound(7, key(2), ANY, "serve")
    assert caplog.text.count("Traceback") == 1
