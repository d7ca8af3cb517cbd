"""Which files vLLM loads for a model, however it is named: a hub id, a directory, a path into the hub's cache.

The files are chosen as vLLM's default loader chooses them, or more of them: a file too many prevents sharing between
two copies of a model, a file too few would let two models share one key.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from vllm import envs
from vllm.config import LoadConfig, ModelConfig

from ..core.records.errors import Refused
from ..file_digests import FileState
from ..regular_files import read_regular

# The values of `--load-format` that load the files in the model's directory.
_LOAD_FORMATS = frozenset(
    [
        "auto",
        "hf",
        "safetensors",
        "fastsafetensors",
        "instanttensor",
        "mistral",
        "pt",
        "npcache",
        "sharded_state",
        "bitsandbytes",
        "gguf",
        "runai_streamer",
        "runai_streamer_sharded",
    ]
)
# The default loader takes the first kind that exists; some formats name theirs.
_KINDS = ((".safetensors",), (".bin",), (".pt", ".pth"), (".gguf",))
_KINDS_OF_FORMAT = {"pt": ((".pt",),), "npcache": ((".bin",),), "gguf": ((".gguf",),)}
_SUFFIXES = tuple(suffix for kind in _KINDS for suffix in kind)
_OTHER_RUNTIMES = frozenset(("original", "onnx", "openvino", "metal"))  # folders with copies that vLLM doesn't load
_TEXT_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_NOT_READ = re.compile(r"(license|readme|notice|use_policy)|.*\.index\.json$", re.IGNORECASE)
_REF_BYTES_MAX = 256
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class FileSource:
    """One directory (or GGUF file) that a model, a tokenizer or an adapter is loaded from.

    `fixed`: it is the hub's cache, where files are added and never changed; its files may arrive while vLLM loads.
    """

    path: Path
    fixed: bool

    def weights(self, load_format: str) -> tuple[str, ...]:
        """Paths of the weight files; `Refused` if there are none."""
        if self.path.is_file():
            return (str(self.path),)
        kinds = _KINDS_OF_FORMAT.get(load_format, _KINDS)
        top = [path for path in self.path.iterdir() if path.is_file()]
        chosen = next((c for kind in kinds if (c := [p for p in top if p.suffix in kind])), [])
        # A few models load weights from subfolders as well.
        below = (
            path
            for folder in self._folders()
            for path in folder.rglob("*")
            if path.suffix in _SUFFIXES and path.is_file()
        )
        files = sorted(str(path) for path in (*chosen, *below))
        if not files:
            raise Refused("weights", f"no weight files in {self.path}")
        return tuple(files)

    def texts(self) -> tuple[str, ...]:
        """Paths of tokenizer, chat template, configuration and code."""
        if self.path.is_file():
            return (str(self.path),)  # a GGUF file contains everything
        suffixes = (*_TEXT_SUFFIXES, ".py")
        found = (p for p in self.path.iterdir() if p.suffix in suffixes and p.is_file() and not _NOT_READ.match(p.name))
        templates = self.path.glob("additional_chat_templates/*.jinja")
        named = (path for path in templates if path.is_file())  # a request, or its tools, may choose one of these
        return tuple(sorted(map(str, (*found, *named))))

    def all_files(self) -> tuple[str, ...]:
        """Paths of all files in the directory, not below it; `Refused` if there are none."""
        files = tuple(sorted(entry.path for entry in os.scandir(self.path) if entry.is_file()))
        if not files:
            raise Refused("lora", f"{self.path} holds no files")
        return files

    def name(self, path: str) -> str:
        """A file's name inside the source, which doesn't depend on where the source is."""
        return os.path.relpath(path, self.path) if self.path.is_dir() else "model.gguf"

    def _folders(self) -> Iterator[Path]:
        for folder in self.path.iterdir():
            if folder.is_dir() and folder.name not in _OTHER_RUNTIMES and not folder.name.startswith("."):
                yield folder


def model_source(model: ModelConfig, load: LoadConfig) -> FileSource:
    """Where a model's weights are; `Refused` says why that is unknown, or that they aren't there (yet)."""
    load_format = str(load.load_format)
    if load_format not in _LOAD_FORMATS:
        raise Refused("weights", f"weights that --load-format {load_format} loads can't be identified")
    if getattr(model, "model_weights", "") not in ("", model.model):  # vLLM streams them from an object store
        raise Refused("weights", f"{model.model_weights} is not a local file")
    return source_of(str(model.model), model.revision, load.download_dir)


def source_of(name: str, revision: str | None, cache: str | None = None) -> FileSource:
    """What `name` refers to: a local path, or a snapshot in the hub's cache; `Refused` if it is neither."""
    path = Path(name).expanduser()
    if path.exists():
        return FileSource(path, _is_snapshot(path))
    if envs.VLLM_USE_MODELSCOPE:
        raise Refused("weights", f"{name} comes from ModelScope: name the directory that it was downloaded to instead")
    snapshot = _snapshot(name, revision, Path(cache or constants.HF_HUB_CACHE))
    if snapshot is None:
        raise Refused("weights", f"{name} is neither a local path nor in the hub's cache")
    return FileSource(snapshot, fixed=True)


def _snapshot(repo: str, revision: str | None, cache: Path) -> Path | None:
    """The directory `snapshots/<commit>` of a repository in the hub's cache, as huggingface_hub lays it out."""
    try:
        root = cache / repo_folder_name(repo_id=repo, repo_type="model")
    except HFValidationError:
        return None  # the path of something that doesn't exist
    # vLLM 0.32's revision is the string that was asked for, and carries the commit it resolved to at start.
    commit = getattr(revision, "resolved", None) or str(revision or "main")
    if not _COMMIT.fullmatch(commit):
        try:
            commit = read_regular(root / "refs" / commit, _REF_BYTES_MAX).decode().strip()
        except (OSError, ValueError):
            return None
    found = root / "snapshots" / commit
    return found if _COMMIT.fullmatch(commit) and found.is_dir() else None


def _is_snapshot(path: Path) -> bool:
    """Whether a path given by the operator leads into the hub's cache: .../snapshots/<commit>."""
    return path.parent.name == "snapshots" and _COMMIT.fullmatch(path.name) is not None


def states_of(paths: tuple[str, ...]) -> tuple[FileState, ...]:
    """The files' states now; `Refused` if one is unavailable."""
    try:
        return tuple(map(FileState.of, paths))
    except OSError as error:
        raise Refused("unreadable", f"{error.filename}: {error.strerror}") from error
