"""Cheap tests first: a mistake in a pure function is found before a server has started."""

import pytest

from bench.machine import dtype


def pytest_report_header() -> str:
    """What the set-up found to work."""
    return f"vLLM generates in {dtype('generate')} and pools in {dtype('pool')} on this machine"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order by cost: pure, real IO, real vLLM; within a kind as written."""
    items.sort(key=lambda item: [item.get_closest_marker(kind) is not None for kind in ("vllm", "io")])
