"""Logs once that the node cannot write to the disk and what to do, and once that it writes again."""

import logging
from pathlib import Path

logger = logging.getLogger(__name__)


class DiskComplaint:
    """For one file or directory; another error is logged again. Used from one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._said = ""

    def failed(self, error: Exception) -> None:
        """A write has failed."""
        reason = getattr(error, "strerror", None) or str(error)
        if reason != self._said:
            self._said = reason
            logger.error(
                "%s: %s; nothing new is stored there until that disk has room and lets this user write, "
                "what is stored is served on",
                self._path,
                reason,
            )

    def works(self) -> None:
        """A write has succeeded."""
        if self._said:
            self._said = ""
            logger.warning("%s: written again", self._path)
