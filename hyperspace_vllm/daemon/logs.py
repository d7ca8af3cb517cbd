"""Where a node's log goes: standard error; of an embedded one a file, and the errors to the server that started it."""

import logging
import logging.handlers
import os
import sys

from ..config import CHOOSE_DATA_DIR, Config
from ..core.records.limits import MiB
from .start_error import needed

logger = logging.getLogger(__name__)

_LOG_BYTES_MAX = 4 * MiB  # and one older file of that size
_FORMAT = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")


class _OneLine(logging.Formatter):
    """Just the message: the file has the rest."""

    def format(self, record: logging.LogRecord) -> str:
        return " ".join(record.getMessage().split())


def log_to_stderr(config: Config, embedded: bool) -> None:
    """From here on the node's log is heard, and what it dies of."""
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine() if embedded else _FORMAT)
    if embedded:
        handler.setLevel(logging.ERROR)
        os.set_blocking(2, False)  # the starter may be frozen: then its line is lost
        logging.raiseExceptions = False
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler], force=True)
    sys.excepthook = lambda kind, error, trace: logger.critical(
        "the node crashed: %r; please report it", error, exc_info=(kind, error, trace)
    )


def log_to_file(config: Config) -> None:
    """To node.log as well; `StartError`."""
    path = config.data_dir / "node.log"
    with needed(path, CHOOSE_DATA_DIR):
        handler = logging.handlers.RotatingFileHandler(path, maxBytes=_LOG_BYTES_MAX, backupCount=1)
    handler.setFormatter(_FORMAT)
    logging.getLogger().addHandler(handler)
