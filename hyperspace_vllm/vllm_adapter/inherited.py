"""What the process that configures an engine passes on to the engine's processes: environ alone reaches all of them.

The names start with an underscore, because HYPERSPACE_* are settings, and unknown ones cause a warning.
"""

import logging
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from ..client import start_node
from ..config import ENVIRONMENT_PREFIX, Config
from ..core.records.errors import Refused
from .weights_epoch import WeightsEpoch, shared_epoch

logger = logging.getLogger("vllm.hyperspace")

_SECRET = "_HYPERSPACE_PROCESS_SECRET"
_MANY_TENANTS = "_HYPERSPACE_MANY_TENANTS"
_NODE = "_HYPERSPACE_NODE_STARTED"
_EPOCH = "_HYPERSPACE_EPOCH_FILE"
_RAY_COPIES = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"  # names the variables that vLLM copies to the workers that Ray starts


@dataclass(frozen=True, slots=True)
class Inherited:
    """`secret` signs scopes within one process tree; `many_tenants`: an unsigned request is private.

    Where nothing was passed on (an engine that Ray started elsewhere), there might be several tenants.
    """

    secret: bytes
    many_tenants: bool

    @classmethod
    def read(cls) -> "Inherited":
        """What this process was given, or a new secret for it and its children."""
        secret = bytes.fromhex(os.environ.setdefault(_SECRET, secrets.token_hex(32)))
        return cls(secret, os.environ.get(_MANY_TENANTS) != "0")


def handed_down() -> bool:
    """Whether this process, or one above it, has called `hand_down`."""
    return _MANY_TENANTS in os.environ


def hand_down(config: Config, many_tenants: bool) -> None:
    """Before the engine's processes start, create the secret and a node (a second node finds the lock taken)."""
    os.environ[_MANY_TENANTS] = "1" if many_tenants else "0"
    Inherited.read()
    # Neither the secret nor URLs, which may contain passwords: workers need none of them.
    ours = {name for name, value in os.environ.items() if name.startswith(ENVIRONMENT_PREFIX) and "://" not in value}
    os.environ[_RAY_COPIES] = ",".join(sorted({*filter(None, os.environ.get(_RAY_COPIES, "").split(",")), *ours}))
    os.environ[_NODE] = str(config.data_dir)
    start_node(config)
    try:
        path, _ = shared_epoch(config.data_dir)  # its descriptor stays open, and with it the file, until we end
        os.environ[_EPOCH] = str(path)
    except OSError as error:
        logger.warning("hyperspace: the response cache (L1) is off: %s: %s", error.filename, error.strerror)


def server_epoch() -> WeightsEpoch:
    """The weights epoch that all API servers of this server share; `Refused` where nothing was passed on."""
    path = os.environ.get(_EPOCH)
    try:
        if path is None:
            raise Refused("epoch", "the main process left no file for its API servers")
        return WeightsEpoch(Path(path))
    except OSError as error:
        raise Refused("epoch", f"{path}: {error.strerror}") from error


def ensure_node(config: Config) -> None:
    """Start the data directory's node, unless a process above this one has started it."""
    if os.environ.get(_NODE) != str(config.data_dir):
        start_node(config)
