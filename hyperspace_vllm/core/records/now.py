"""One moment by both clocks of a node.

`mono_ms` never goes back, means nothing to another node or after a restart, and times everything that waits: deadlines,
back-offs, rates, windows. `wall_ms` may be set at any moment, in either direction, and dates what other nodes or later
runs read: signed records, proofs, announcements, expiries.

Where a machine is handed one clock alone, `now_ms` is the monotonic one and `wall_ms` the other.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Now:
    """Milliseconds. Not a number, so that no time is ever compared with it by mistake."""

    mono_ms: int
    wall_ms: int
