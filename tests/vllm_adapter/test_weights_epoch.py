"""Whatever may change an engine's weights begins another epoch before it does; the same files loaded again end it."""

import ast
import asyncio
import fcntl
import gc
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vllm
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore

from hyperspace_vllm.vllm_adapter import compat, weights_epoch
from hyperspace_vllm.vllm_adapter.weights_epoch import WeightsEpoch, WeightsWatch, shared_epoch

DIGEST = bytes(range(32))
# Of vLLM's engine client: what its own methods make of `collective_rpc`, and sleep.
_CHANGING = frozenset(
    ["start_weight_update", "start_draft_weight_update", "update_weights", "finish_weight_update", "checkpoint_restore"]
)


class Watched:
    """An engine's epoch, and what is known of its files."""

    def __init__(self) -> None:
        self.epoch, self.files_unchanged, self.forgotten = WeightsEpoch(), True, 0
        self.watch = WeightsWatch(self.epoch, lambda: self.files_unchanged, self._forget)
        self.adapters: list[tuple[int, str]] = []

    def _forget(self) -> None:
        self.forgotten += 1

    def as_loaded(self) -> bool:
        return self.epoch.key(DIGEST) == DIGEST


@pytest.fixture
def watched() -> Watched:
    return Watched()


class Executor:
    """The workers: says what it was asked while the epoch was which."""

    is_sleeping = False

    def __init__(self, watched: Watched) -> None:
        self.watched, self.calls = watched, []  # type: Watched, list[tuple[Any, bytes | None]]
        self.fails = False

    def collective_rpc(self, method: Any, *rest: Any) -> list[object]:
        self.calls.append((method, self.watched.epoch.key(DIGEST)))
        if self.fails:
            raise RuntimeError("half of the weights")
        return []

    def sleep(self, level: int) -> None:
        self.calls.append((level, self.watched.epoch.key(DIGEST)))

    def add_lora(self, request: LoRARequest) -> bool:
        self.calls.append(("add_lora", b"".join(path.encode() for _, path in self.watched.adapters)))
        return True


@pytest.fixture
def engine(watched: Watched) -> Any:
    """A real EngineCore over workers that only take notes."""
    core = object.__new__(EngineCore)
    core.model_executor = Executor(watched)
    core.pause_scheduler = lambda **_: None
    compat.watch_engine(watched.watch, lambda number, path: watched.adapters.append((number, path)))
    return core


@pytest.mark.parametrize("method", ["update_weights", "start_weight_update", "apply_model", "my_extension", len])
def test_a_call_that_may_change_weights_begins_an_epoch_before_it_is_made(
    watched: Watched, engine: Any, method: Any
) -> None:
    engine.collective_rpc(method)
    ((called, key),) = engine.model_executor.calls
    assert called == method
    assert key == watched.epoch.key(DIGEST) != DIGEST
    assert (watched.epoch.count, watched.forgotten) == (1, 1)


def test_two_engines_with_changed_weights_never_meet(engine: Any, watched: Watched) -> None:
    other = Watched()
    compat.watch_engine(other.watch, lambda number, path: None)
    engine.collective_rpc("update_weights")
    assert watched.epoch.key(DIGEST) != other.epoch.key(DIGEST)


@pytest.mark.parametrize("method", ["check_health", "profile", "compute_weight_checksums", "synchronize_device"])
def test_calls_of_vllm_itself_that_leave_weights_alone_change_nothing(
    watched: Watched, engine: Any, method: str
) -> None:
    engine.collective_rpc(method)
    assert watched.as_loaded()
    assert (watched.epoch.count, watched.forgotten) == (0, 0)


def test_no_route_outside_vllms_development_mode_reaches_what_may_change_weights() -> None:
    """vLLM guards only some paths by its API keys, so what others call must leave the weights alone."""
    root = Path(vllm.__file__).parent
    for_developers = ("serve/dev/", "rl/", "llm.py")
    called, slept = set(), []
    for path in (root / "entrypoints").rglob("*.py"):
        if str(path.relative_to(root / "entrypoints")).startswith(for_developers):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr == "collective_rpc":
                    called |= {ast.literal_eval(node.args[0])}
                elif node.func.attr in _CHANGING:
                    slept.append((path.name, node.func.attr))
    assert called == {"release_late_interaction_query_cache"}
    assert called <= weights_epoch._HARMLESS
    assert slept == []


def test_the_same_files_loaded_again_share_again(watched: Watched, engine: Any) -> None:
    engine.sleep(2)
    assert not watched.as_loaded()
    engine.collective_rpc("reload_weights")
    assert watched.as_loaded()
    assert watched.epoch.count == 2  # what was computed meanwhile is of no one epoch


@pytest.mark.parametrize(
    ("arguments", "unchanged"), [((), False), ((None, (), {"weights_path": "/other"}), True), ((None, ("/x",)), True)]
)
def test_other_files_do_not(watched: Watched, engine: Any, arguments: tuple[Any, ...], unchanged: bool) -> None:
    watched.files_unchanged = unchanged
    engine.collective_rpc("reload_weights", *arguments)
    assert not watched.as_loaded()


@pytest.mark.parametrize("before", [("reload_weights", None, (), {"weights_path": "/other"}), ("update_weights",)])
def test_once_anything_else_was_called_the_same_files_do_not_count_as_the_same_weights(
    watched: Watched, engine: Any, before: tuple[Any, ...]
) -> None:
    engine.collective_rpc(*before)  # vLLM loads from the other path from then on
    engine.collective_rpc("reload_weights")
    engine.sleep(2)
    engine.collective_rpc("reload_weights")
    assert not watched.as_loaded()


def test_a_reload_that_fails_leaves_weights_that_are_nothing_known(watched: Watched, engine: Any) -> None:
    engine.model_executor.fails = True
    with pytest.raises(RuntimeError, match="half of the weights"):
        engine.collective_rpc("reload_weights")
    assert not watched.as_loaded()


def test_sleep_at_level_1_keeps_the_weights(watched: Watched, engine: Any) -> None:
    for arguments in ({}, {"level": 1}, {"level": 0}):
        engine.sleep(**arguments)
    assert watched.as_loaded()


def test_an_adapter_is_noted_before_the_engine_reads_it(watched: Watched, engine: Any) -> None:
    assert engine.add_lora(LoRARequest("lora", 3, "/adapter")) is True
    assert watched.adapters == [(3, "/adapter")]
    assert engine.model_executor.calls == [("add_lora", b"/adapter")]


def test_an_engine_that_is_gone_is_not_told() -> None:
    gone, stays = Watched(), Watched()
    for each in (gone, stays):
        compat.watch_engine(each.watch, lambda number, path: None)
    epoch = gone.epoch
    del gone, each
    gc.collect()
    core = object.__new__(EngineCore)
    core.model_executor = Executor(stays)
    core.collective_rpc("update_weights")
    assert epoch.count == 0
    assert stays.epoch.count == 1


async def test_an_api_servers_client_tells_before_it_asks_the_engine(watched: Watched) -> None:
    seen: list[tuple[Any, bool]] = []

    async def rpc(method: Any, *rest: Any) -> list[object]:
        await asyncio.sleep(0)
        seen.append((method, watched.as_loaded()))
        return []

    async def sleep(level: int, mode: str) -> None:
        seen.append((level, watched.as_loaded()))

    async def nothing() -> None:
        pass

    client = object.__new__(AsyncLLM)
    client.engine_core = SimpleNamespace(collective_rpc_async=rpc, sleep_async=sleep)
    client.logger_manager = None
    client.renderer = SimpleNamespace(clear_mm_cache_async=nothing, shutdown=lambda: None)
    compat.watch_client(watched.watch)
    await client.collective_rpc("reload_weights")
    assert watched.as_loaded()
    await client.sleep(level=1)
    await client.sleep(2)
    await client.start_weight_update()
    assert seen == [("reload_weights", False), (1, True), (2, False), ("start_weight_update", False)]


def test_all_api_servers_of_a_server_see_one_epoch(tmp_path: Path) -> None:
    path, _ = shared_epoch(tmp_path)
    first, second = WeightsEpoch(path), WeightsEpoch(path)
    assert first.key(DIGEST) == second.key(DIGEST) == DIGEST
    assert first.key(None) is None
    first.begin(strays=False)
    assert first.key(DIGEST) == second.key(DIGEST) != DIGEST
    assert second.count == 1
    second.end()
    assert first.key(DIGEST) == DIGEST
    assert first.count == 1
    first.begin(strays=True)
    second.end()
    assert first.key(DIGEST) == second.key(DIGEST) != DIGEST


def test_the_epochs_of_servers_that_are_gone_leave_the_directory(tmp_path: Path) -> None:
    path, keeps = shared_epoch(tmp_path)
    other, _ = shared_epoch(tmp_path)
    assert path.exists()
    os.close(keeps)
    last, _ = shared_epoch(tmp_path)
    assert {each.name for each in (tmp_path / "epochs").iterdir()} == {other.name, last.name}


def test_a_server_that_starts_leaves_the_epoch_of_one_that_is_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = fcntl.flock
    others: list[Any] = []

    def late(descriptor: Any, operation: int) -> None:
        if operation & fcntl.LOCK_SH and not others:
            others.append(None)
            others[0] = shared_epoch(tmp_path)
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    path, _ = shared_epoch(tmp_path)
    assert others[0]
    assert path.exists()
