"""Cheap tests first: a mistake in a pure function is found before a server has started."""

import logging
import os
import signal
from collections.abc import Generator, Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import pytest

from bench.machine import dtype
from bench.servers import have_machine
from tests.support_table import add_results

_outcomes: dict[str, dict[str, dict[str, str]]] = {}  # release -> feature -> test -> outcome


def pytest_report_header() -> str:
    """What the set-up found to work."""
    return f"vLLM generates in {dtype('generate')} and pools in {dtype('pool')} on this machine"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order by cost: pure, real IO, real vLLM; within a kind as written."""
    items.sort(key=lambda item: [item.get_closest_marker(kind) is not None for kind in ("vllm", "io")])
    for item in items:
        for marker in item.iter_markers("feature"):
            item.user_properties.append(("feature", (*marker.args, marker.kwargs.get("release"))))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Another run's servers are waited for outside pytest-timeout's time for a test."""
    if item.get_closest_marker("vllm"):
        have_machine()
    return (yield)


@pytest.fixture(autouse=True)
def no_node_stays() -> Iterator[None]:
    """An engine that is configured in this process starts a node, which would otherwise stay as long as pytest does."""
    before = embedded_nodes()
    yield
    for pid in embedded_nodes() - before:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


@pytest.fixture(autouse=True)
def own_log() -> None:
    """An earlier test that registered the plugin handed our records to vLLM's log, which pytest can't always read."""
    package = logging.getLogger("hyperspace_vllm")
    package.handlers.clear()
    package.setLevel(logging.NOTSET)
    package.propagate = True
    logging.root.setLevel(logging.WARNING)  # vLLM's application raises it for good


def embedded_nodes() -> set[int]:
    """Those that this process has started itself."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):
            for pid in (task / "children").read_text().split():
                if b"--embedded" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.add(int(pid))
    return found


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note what the last try of a test says of its features; a set-up that failed or skipped counts too."""
    if str(report.outcome) == "rerun" or (  # of a plugin
        report.when != "call" and report.passed
    ):
        return
    for name, value in report.user_properties:
        if name == "feature":
            assert isinstance(value, tuple)
            feature, of_release = value
            release = of_release or version("vllm").partition("+")[0]
            _outcomes.setdefault(release, {}).setdefault(feature, {})[report.nodeid] = report.outcome


def pytest_sessionfinish() -> None:
    """Write it where `make support-table` looks."""
    for release, outcomes in _outcomes.items():
        add_results(release, outcomes)
