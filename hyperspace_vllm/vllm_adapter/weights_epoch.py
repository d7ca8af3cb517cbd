"""Whether an engine still holds the weights that it loaded from its files.

A call that may change the weights starts another epoch *before* it runs: a random value, folded into every key, so that
nothing from before it serves what comes after, on any node. Sleep and wake-up at level 1 keep the weights; so do cache
resets. When weights that were discarded (level 2) are loaded again from the same files, the epoch ends; but not once
any other call was made, since that may have given the engine another path to load from.
"""

import fcntl
import hashlib
import mmap
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..contained import contained
from ..regular_files import open_regular, remove_drafts

_EPOCH_BYTES, _COUNT_BYTES = 16, 8
_STRAYED = _EPOCH_BYTES + _COUNT_BYTES  # place of the byte that says that no epoch ends any more
_STATE_BYTES = _STRAYED + 1
_AS_LOADED = bytes(_EPOCH_BYTES)
# Methods of workers that vLLM itself calls and that leave the weights alone. All others may do anything.
_HARMLESS = frozenset(
    [
        "check_health",
        "compute_weight_checksums",
        "get_encoder_timing_stats",
        "get_model_inspection",
        "init_weight_transfer_engine",
        "profile",
        "release_late_interaction_query_cache",
        "shutdown_weight_transfer_engine",
        "synchronize_device",
        "update_max_model_len",
    ]
)


class WeightsEpoch:
    """One process's view: an epoch (16 bytes, zero for the weights of the files) and how many have begun.

    `shared` is a file that all API servers of one server map.
    """

    def __init__(self, shared: Path | None = None) -> None:
        self._state: bytearray | mmap.mmap = bytearray(_STATE_BYTES)
        if shared is not None:
            with shared.open("r+b") as file:
                self._state = mmap.mmap(file.fileno(), _STATE_BYTES)

    @property
    def count(self) -> int:
        """Epochs begun so far: what was computed while it changed belongs to no single epoch."""
        return int.from_bytes(self._state[_EPOCH_BYTES:_STRAYED], "little")

    def key(self, digest: bytes | None) -> bytes | None:
        """`digest` of what was loaded, folded with the current epoch of the weights; None stays None."""
        epoch = self._state[:_EPOCH_BYTES]
        return digest if epoch == _AS_LOADED or digest is None else hashlib.sha256(digest + epoch).digest()

    def begin(self, strays: bool) -> None:
        """The weights are about to change; `strays`: loading the files again need not restore them."""
        if strays:
            self._state[_STRAYED] = 1
        self._state[_EPOCH_BYTES:_STRAYED] = (self.count + 1).to_bytes(_COUNT_BYTES, "little")
        self._state[:_EPOCH_BYTES] = secrets.token_bytes(_EPOCH_BYTES)

    def end(self) -> None:
        """The weights were loaded again from the files that were loaded first."""
        if not self._state[_STRAYED]:
            self._state[:_EPOCH_BYTES] = _AS_LOADED


class WeightsWatch:
    """Starts an epoch for each call that may change an engine's weights. `unchanged` compares the files' states."""

    def __init__(self, epoch: WeightsEpoch, unchanged: Callable[[], bool], began: Callable[[], None]) -> None:
        self._epoch, self._unchanged, self._began = epoch, contained(lambda: False)(unchanged), contained()(began)

    @contextmanager
    def rpc(self, method: Any, arguments: tuple[Any, ...]) -> Iterator[None]:
        """Wraps `collective_rpc(method, *arguments)` of the workers."""
        if isinstance(method, str) and method in _HARMLESS:
            yield
            return
        reloads = method == "reload_weights" and not any(arguments)
        as_loaded = reloads and self._unchanged()
        self._begin(strays=not reloads)
        yield
        if as_loaded and self._unchanged():
            self._epoch.end()

    def sleeps(self, level: int) -> None:
        """From level 2 on the weights are discarded, and unknown until they are loaded again."""
        if level >= 2:
            self._begin(strays=False)

    def _begin(self, strays: bool) -> None:
        self._epoch.begin(strays)
        self._began()


def shared_epoch(data_dir: Path) -> tuple[Path, int]:
    """A new file for a server's API servers, and the descriptor that keeps it; files of dead servers are removed."""
    directory = data_dir / "epochs"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    remove_drafts(directory, ".*")
    for path in directory.glob("[!.]*"):
        with suppress(OSError), open_regular(path) as file:  # BlockingIOError: its server is alive
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    descriptor, draft = tempfile.mkstemp(dir=directory, prefix=".")  # a server that starts now ignores it
    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    os.ftruncate(descriptor, _STATE_BYTES)
    path = directory / Path(draft).name[1:]
    os.rename(draft, path)
    return path, descriptor
