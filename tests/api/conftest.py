"""A response cache in front of a real server, as the tests of this room want it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.cached_server import Bench, MakeBench, benches


@pytest.fixture
async def make_bench(tmp_path: Path) -> AsyncIterator[MakeBench]:
    async with benches(tmp_path) as make:
        yield make


@pytest.fixture
async def bench(make_bench: MakeBench) -> Bench:
    return await make_bench()
