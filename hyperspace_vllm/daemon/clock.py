"""The node's clocks: every other module of the daemon reads the time for the core, and for dates of records, here."""

import time

from ..core.records.now import Now


def now() -> Now:
    """This moment. The monotonic part is asyncio's clock too, in milliseconds."""
    return Now(time.monotonic_ns() // 1_000_000, wall_ms())


def wall_ms() -> int:
    """Milliseconds since 1970: the clock of expiry and proofs, comparable between processes."""
    return time.time_ns() // 1_000_000
