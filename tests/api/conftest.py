"""A server and a client around a cache whose node is scripted."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hyperspace_vllm.api import node_lookup
from tests.support.cached_server import Bench, MakeBench, benches

PATIENT_S = 30.0  # a deadline that no test reaches


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that speaks is heard in time, also on a busy machine."""
    monkeypatch.setattr(node_lookup, "HINT_S", 1.0)


@pytest.fixture
async def make_bench(tmp_path: Path) -> AsyncIterator[MakeBench]:
    async with benches(tmp_path) as make:
        yield make


@pytest.fixture
async def bench(make_bench: MakeBench) -> Bench:
    return await make_bench(network_deadline_s=PATIENT_S)
