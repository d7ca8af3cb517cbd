"""What an engine loaded, identified by the bytes of its files; known some time after it starts serving.

    before_load    in the process that configures the engine: notes the state of the files
    LoadedFiles    in the engine and in API servers, once the model is loaded: the files must still be in that state,
                   and are read in the background; `digest` is None until then, and L1 and L2 are off

A file that is replaced later changes nothing, because the engine continues with what it has. Files in the hub's cache
may arrive while vLLM loads: their state counts from then on.
"""

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vllm.config import LoadConfig, ModelConfig, VllmConfig

from ..core.records.errors import Refused
from ..file_digests import FileDigests, FileState, in_progress
from .model_files import FileSource, model_source, source_of, states_of

logger = logging.getLogger("vllm.hyperspace")

_NOTE = "_HYPERSPACE_LOADED_FILES"  # in the environment: {model: digest of its files' states}
_START_S = 1.0  # a server's start waits this long at most, its requests don't
_QUIET_S = 2.0  # for a small model nothing is logged
_PROGRESS_S = 30.0


@dataclass(frozen=True, slots=True)
class LoadedIdentity:
    """The files of one engine, each as `<name> <SHA-256>`; names don't depend on where the model is stored."""

    weights: tuple[str, ...]
    draft: tuple[str, ...]  # a speculator's
    texts: tuple[str, ...]  # tokenizer, chat template, configuration
    code: tuple[str, ...]  # that came with the model and was allowed to run


@dataclass(frozen=True, slots=True)
class _Files:
    """One role's files and where they are."""

    role: str
    source: FileSource
    paths: tuple[str, ...]


def before_load(config: VllmConfig) -> None:
    """Note the states of the local files in the environment, for this process and those that it starts."""
    files = []
    for role in _roles(config):
        with suppress(Refused, OSError):  # not downloaded yet, or an error that LoadedFiles will find and log
            files.append(role())
    with suppress(Refused):
        os.environ[_NOTE] = json.dumps({**_notes(), _note_name(config): _note(files)})


class LoadedFiles:
    """Makes a digest from the identity of what was loaded. `what` names, in the log, the cache that waits for it."""

    def __init__(
        self, config: VllmConfig, data_dir: Path, what: str, derive: Callable[[LoadedIdentity], bytes]
    ) -> None:
        self._config, self._digests, self._data_dir = config, FileDigests(data_dir), data_dir
        self._what, self._derive = what, derive
        self._states: tuple[FileState, ...] | None = None
        self._digest: bytes | None = None
        self._over = threading.Event()

    def start(self) -> None:
        """Identify the files in the background; a result of an earlier start is there at once."""
        for run in (self._run, self._report):
            threading.Thread(target=run, name="hyperspace-identify", daemon=True).start()
        self._over.wait(_START_S)

    def digest(self) -> bytes | None:
        """The digest (32 bytes); None while the files are being read, and for good where they can't be identified."""
        return self._digest

    def unchanged(self) -> bool:
        """Whether vLLM would load now exactly what it loaded then, and holds nothing else."""
        if self._config.lora_config is not None or self._config.speculative_config is not None:
            return False  # adapters and speculators are not loaded again with the model
        try:
            return self._states is not None and self._states == _states(role() for role in _roles(self._config))
        except (Refused, OSError):
            return False

    def _run(self) -> None:
        try:
            self._digest = self._derive(self._identify())
        except Refused as error:
            logger.warning("hyperspace: %s is off: %s", self._what, error)
        except Exception:
            logger.exception("hyperspace: %s is off, please report why", self._what)
        finally:
            self._over.set()

    def _report(self) -> None:
        began_s = time.monotonic()
        if self._over.wait(_QUIET_S):
            return
        while True:
            read = [entry for entry in in_progress(self._data_dir) if entry["title"] == self._config.model_config.model]
            done, size = (read[0]["done_bytes"], read[0]["total_bytes"]) if read else (0, 0)
            so_far = f" ({int(str(done)) / 1e9:.1f} of {int(str(size)) / 1e9:.1f} GB read)" if size else ""
            logger.info("hyperspace: identifying the model's files%s; %s comes on then", so_far, self._what)
            if self._over.wait(_PROGRESS_S):
                break
        if self._digest is not None:
            logger.info("hyperspace: %s is on, after %.0f s", self._what, time.monotonic() - began_s)

    def _identify(self) -> LoadedIdentity:
        files = [role() for role in _roles(self._config)]
        self._states = _states(files)
        noted = _notes().get(_note_name(self._config))
        if noted is None:
            raise Refused("weights", "this process was not told in which state the files were before they were loaded")
        if noted != _note(files):
            raise Refused("changed", "the model's files changed while vLLM was starting; start it again")
        title = self._config.model_config.model
        digests = self._digests.digest(title, self._states)
        lines = {one.role: tuple(f"{one.source.name(p)} {digests[p]}" for p in one.paths) for one in files}
        weights = lines.get("weights", ("dummy", str(self._config.model_config.seed)))
        return LoadedIdentity(weights, lines.get("draft", ()), lines.get("texts", ()), lines.get("code", ()))


def _notes() -> dict[str, str]:
    return dict(json.loads(os.environ.get(_NOTE, "{}")))


def _roles(config: VllmConfig) -> Iterator[Callable[[], _Files]]:
    model, load = config.model_config, config.load_config
    if load.load_format != "dummy":  # random weights from the seed
        yield lambda: _weights("weights", model_source(model, load), str(load.load_format))
        if model.trust_remote_code:
            yield lambda: _code(model, load)
    speculative = config.speculative_config
    draft = speculative.draft_model_config if speculative is not None else None
    if speculative is not None and draft is not None and draft.model != model.model:
        yield lambda: _weights("draft", model_source(draft, speculative.draft_load_config or load), "auto")
    if model.tokenizer and not model.skip_tokenizer_init:
        yield lambda: _texts(source_of(str(model.tokenizer), model.tokenizer_revision))


def _weights(role: str, source: FileSource, load_format: str) -> _Files:
    return _Files(role, source, source.weights(load_format))


def _code(model: ModelConfig, load: LoadConfig) -> _Files:
    if "--" in str(getattr(model.hf_config, "auto_map", "")):  # transformers' form of "from another repository"
        raise Refused("weights", "the model's code comes from another repository, at a commit that is not known")
    source = model_source(model, load)
    return _Files("code", source, tuple(path for path in source.texts() if path.endswith(".py")))


def _texts(source: FileSource) -> _Files:
    return _Files("texts", source, source.texts())


def _states(files: Iterable[_Files]) -> tuple[FileState, ...]:
    return states_of(tuple(sorted({path for one in files for path in one.paths})))


def _note(files: Iterable[_Files]) -> str:
    """The states of the files that could be replaced; those of the hub's cache may still be arriving."""
    return _hex(repr(_states(one for one in files if not one.source.fixed)))


def _note_name(config: VllmConfig) -> str:
    """The name of a model's note: a process may start several engines."""
    model = config.model_config
    return _hex(repr((model.model, model.tokenizer, str(config.load_config.load_format))))


def _hex(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
