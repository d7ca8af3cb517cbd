"""Cheap tests first: a mistake in a pure function is found before a server has started.

Tests of real processes hold bounds on real time, on machines that also do other things: one that fails is run once
more, and the last line of the report counts it as a rerun.
"""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order by cost: pure, real IO, real vLLM; within a kind as written. The latter two may be run again."""
    items.sort(key=lambda item: [item.get_closest_marker(kind) is not None for kind in ("vllm", "io")])
    for item in items:
        if item.get_closest_marker("io") or item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.flaky(reruns=1))
