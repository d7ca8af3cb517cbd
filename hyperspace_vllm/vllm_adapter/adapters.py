"""LoRA adapters, identified by the bytes of their files as the engine holds them.

vLLM may read an adapter's files again at any time: when the adapter was evicted from memory and is needed again. So an
adapter counts as long as its files are what they were when it was loaded; an adapter whose files were replaced is not
cached until it is loaded again.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from pathlib import Path

from ..core.records.errors import Refused, printable
from ..core.records.ids import sha256
from ..file_digests import FileDigests, FileState
from .model_files import source_of, states_of

logger = logging.getLogger("vllm.hyperspace")

ADAPTERS_MAX = 4096
LOOK_S = 0.25  # for one check of the files, usually 0.1 ms; a file system that hangs costs this once


@dataclass(slots=True)
class _Adapter:
    path: str
    states: tuple[FileState, ...]
    digest: bytes | None = None  # None: being read, or unavailable


class Adapters:
    """The adapters of one process, keyed by vLLM's id or by name."""

    def __init__(self, data_dir: Path) -> None:
        self._digests = FileDigests(data_dir)
        self._known: OrderedDict[Hashable, _Adapter] = OrderedDict()
        self._missing: set[str] = set()  # paths that did not exist when they were first checked
        self._looks = ThreadPoolExecutor(1, "hyperspace-adapters")
        self._look: Future[tuple[FileState, ...]] | None = None

    def load(self, key: Hashable, path: str) -> None:
        """Read the files, which vLLM is about to load or has loaded, in the background."""
        try:
            adapter = self._known[key] = _Adapter(path, _states(path))
        except (Refused, OSError) as error:
            self._known.pop(key, None)
            if path not in self._missing and len(self._missing) < ADAPTERS_MAX:
                self._missing.add(path)
                logger.info("hyperspace: answers of the adapter %s are not cached yet: %s", printable(path), error)
            return
        while len(self._known) > ADAPTERS_MAX:
            self._known.popitem(last=False)
        threading.Thread(target=self._identify, args=(adapter,), name="hyperspace-identify", daemon=True).start()

    def digest(self, key: Hashable, path: str) -> bytes | None:
        """The digest (32 bytes) of the files that were loaded; None while they are read, or once they were replaced."""
        adapter = self._known.get(key)
        if adapter is None or adapter.path != path:
            self.load(key, path)
            return None
        return adapter.digest if adapter.digest is not None and self._states_now(path) == adapter.states else None

    def _states_now(self, path: str) -> tuple[FileState, ...] | None:
        if self._look is not None and not self._look.done():
            return None  # the last check still hangs
        self._look = self._looks.submit(_states, path)
        try:
            return self._look.result(LOOK_S)
        except (NotYet, Refused, OSError):
            return None

    def _identify(self, adapter: _Adapter) -> None:
        try:
            digests = self._digests.digest(adapter.path, adapter.states)
        except Refused as error:
            logger.warning("hyperspace: answers of the adapter %s are not cached: %s", printable(adapter.path), error)
            return
        names = sorted((Path(path).name.encode("utf-8", "surrogateescape"), value) for path, value in digests.items())
        adapter.digest = sha256(*(name + b"\0" + bytes.fromhex(value) for name, value in names))


class NamedAdapters(Mapping[str, bytes]):
    """A server's own adapters (`--lora-modules`) by name; it contains only those that have a digest now."""

    def __init__(self, adapters: Adapters, paths: Mapping[str, str]) -> None:
        self._adapters, self._paths = adapters, dict(paths)
        for name, path in self._paths.items():
            adapters.load(name, path)

    def __getitem__(self, name: str) -> bytes:
        digest = self._adapters.digest(name, self._paths[name])
        if digest is None:
            raise KeyError(name)
        return digest

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def _states(path: str) -> tuple[FileState, ...]:
    return states_of(source_of(path, None).all_files())
