"""Moments for tests: both clocks of a node, far apart, so that one is never taken for the other."""

from hyperspace_vllm.core.records.now import Now

BOOTED_MS = 1_700_000_000_000  # when the monotonic clock was 0, by a wall clock that nobody sets


def at(mono_ms: int, set_by_ms: int = 0) -> Now:
    """So long after the machine's start; the wall clock was set forward by `set_by_ms`, or back."""
    return Now(mono_ms, BOOTED_MS + mono_ms + set_by_ms)


def dated(wall_ms: int) -> Now:
    """When a clock that nobody has set shows this."""
    return at(wall_ms - BOOTED_MS)
