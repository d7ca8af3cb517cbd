"""Cheap tests first: a mistake in a pure function is found before a server has started."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order by cost: pure, real IO, real vLLM; within a kind as written."""
    items.sort(key=lambda item: [item.get_closest_marker(kind) is not None for kind in ("vllm", "io")])
