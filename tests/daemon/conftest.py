"""Node processes that end with their test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.node_processes import Nodes


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    nodes = Nodes(tmp_path / "d")
    yield nodes
    nodes.stop()
