"""One moment by both clocks of a node.

`mono_ms` never goes back, means nothing to another node or after a restart, and times every wait: deadlines, back-offs,
rates, windows. `wall_ms` may be set at any moment, in either direction, and dates data for other nodes or later runs:
signed records, proofs, announcements, expiries.

Where a machine gets only one clock, `now_ms` is the monotonic one and `wall_ms` the wall clock.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Now:
    """Milliseconds. Not a number, so that it is never compared with a time by mistake."""

    mono_ms: int
    wall_ms: int
