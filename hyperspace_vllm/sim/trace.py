"""A run's canonical trace: every event and effect of every core, in order, hashed.

Equal digests mean that two runs are equal to the last byte. All added values are ints, strings, bytes and tuples, whose
repr is the same in every process.
"""

import hashlib


class Trace:
    """`digest` covers everything that was added so far."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, now_ms: int, host: int, what: object) -> None:
        """Something happened at a host."""
        self._digest.update(f"{now_ms} {host} {what!r}\n".encode())

    @property
    def digest(self) -> str:
        """64 hex digits."""
        return self._digest.hexdigest()
