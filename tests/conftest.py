"""Cheap tests first: a mistake in a pure function is found before a server has started."""

from collections.abc import Generator

import pytest

from bench.machine import dtype
from bench.servers import have_machine


def pytest_report_header() -> str:
    """What the set-up found to work."""
    return f"vLLM generates in {dtype('generate')} and pools in {dtype('pool')} on this machine"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order by cost: pure, real IO, real vLLM; within a kind as written."""
    items.sort(key=lambda item: [item.get_closest_marker(kind) is not None for kind in ("vllm", "io")])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Another run's servers are waited for outside pytest-timeout's time for a test."""
    if item.get_closest_marker("vllm"):
        have_machine()
    return (yield)
