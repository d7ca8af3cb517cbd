"""What the main process hands down to the processes it starts: the one channel that reaches all of them is environ.

The names start with an underscore, because HYPERSPACE_* are settings, and unknown ones are errors.
"""

import os
import secrets
from dataclasses import dataclass

from ..client import start_node
from ..config import Config

_SECRET = "_HYPERSPACE_PROCESS_SECRET"
_MANY_TENANTS = "_HYPERSPACE_MANY_TENANTS"
_NODE = "_HYPERSPACE_NODE_STARTED"


@dataclass(frozen=True, slots=True)
class Inherited:
    """`secret` signs scopes within one process tree; `many_tenants`: an unsigned request is private.

    Where nothing was handed down (an engine that Ray started elsewhere), there might be several tenants.
    """

    secret: bytes
    many_tenants: bool

    @classmethod
    def read(cls) -> "Inherited":
        """What this process was given, or a new secret for it and its children."""
        secret = bytes.fromhex(os.environ.setdefault(_SECRET, secrets.token_hex(32)))
        return cls(secret, os.environ.get(_MANY_TENANTS) != "0")


def hand_down(config: Config, many_tenants: bool) -> None:
    """In the main process, before it starts others: the secret, and a node (a second one finds the lock taken)."""
    os.environ[_MANY_TENANTS] = "1" if many_tenants else "0"
    Inherited.read()
    os.environ[_NODE] = str(config.data_dir)
    start_node(config)


def ensure_node(config: Config) -> None:
    """Start the data directory's node, unless the main process of this tree did."""
    if os.environ.get(_NODE) != str(config.data_dir):
        start_node(config)
