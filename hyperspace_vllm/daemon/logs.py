"""The node's log: standard error; for an embedded node a file, and errors to the server that started it.

Any record may contain text of peers, clients, Redis and libraries. So every record is one line of printable characters
(and the indented lines of its traceback), truncated, and no place in the code writes more than SPARING_BURST lines at
once and one in SPARING_S, nor for one peer more than PEER_BURST and one in PEER_S; the next line counts the omitted
ones. With log_level = "debug" no line is omitted.
"""

import logging
import logging.handlers
import os
import sys
from collections import OrderedDict
from types import TracebackType

from ..config import CHOOSE_DATA_DIR, Config
from ..core.records.errors import printable
from ..core.records.limits import KiB, MiB
from .start_error import needed
from .token_bucket import TokenBucket

logger = logging.getLogger(__name__)

_LOG_BYTES_MAX = 4 * MiB  # and one older file of that size
LINE_CHARS_MAX = 2 * KiB
TRACEBACK_LINES_MAX = 100
SPARING_BURST, SPARING_S = 20, 10.0
PEER_BURST, PEER_S = 3, 60.0
_PLACES_MAX = 1024  # in the code, and peers


class Lines(logging.Formatter):
    """One line per record, with any content; the lines of a traceback are indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line."""
        unsaid = getattr(record, "unsaid", 0)
        record.message = printable(record.message, LINE_CHARS_MAX) + (f" ({unsaid} like it left out)" if unsaid else "")
        return super().formatMessage(record)

    def formatException(
        self, ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
    ) -> str:
        """A traceback."""
        lines = super().formatException(ei).split("\n")[-TRACEBACK_LINES_MAX:]
        return "\n".join(f"    {printable(line, LINE_CHARS_MAX)}" for line in lines)


class _Message(Lines):
    """Just the message: the file has the rest."""

    def format(self, record: logging.LogRecord) -> str:
        record.message = record.getMessage()
        return self.formatMessage(record)


class Sparing(logging.Filter):
    """Lets a handler write a bounded number of lines in any time; a record's `peer`, if it has one, is counted too."""

    def __init__(self) -> None:
        super().__init__()
        self._places: OrderedDict[object, TokenBucket] = OrderedDict()
        self._unsaid: dict[object, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write it."""
        place, peer = (record.pathname, record.lineno), getattr(record, "peer", None)
        passes = peer is None or self._bucket((place, peer), PEER_BURST, PEER_S).take(1)
        if not (passes and self._bucket(place, SPARING_BURST, SPARING_S).take(1)):
            self._unsaid[place] = self._unsaid.get(place, 0) + 1
            return False
        record.unsaid = self._unsaid.pop(place, 0)
        return True

    def _bucket(self, key: object, burst: int, every_s: float) -> TokenBucket:
        bucket = self._places.setdefault(key, TokenBucket(1 / every_s, burst))
        self._places.move_to_end(key)
        if len(self._places) > _PLACES_MAX:
            self._places.popitem(last=False)
        return bucket


_FORMAT = Lines("%(asctime)s %(levelname)s %(name)s: %(message)s")


def log_to_stderr(config: Config, embedded: bool) -> None:
    """From now on the node's log, and the error of a crash, go to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Message("%(message)s") if embedded else _FORMAT)
    _spare(handler, config)
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
    _spare(handler, config)
    logging.getLogger().addHandler(handler)


def _spare(handler: logging.Handler, config: Config) -> None:
    if config.log_level != "debug":
        handler.addFilter(Sparing())
