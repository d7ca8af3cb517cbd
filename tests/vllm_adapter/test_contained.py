"""An error of ours anywhere below an entry from vLLM: vLLM gets what a connector that is off answers, and serves on."""

import fcntl
import inspect
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import Counter, Gauge, Histogram
from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput

from hyperspace_vllm import contained
from hyperspace_vllm.client import NodeClient
from hyperspace_vllm.config import Config
from hyperspace_vllm.core.local.session_messages import Heartbeat
from hyperspace_vllm.vllm_adapter import connector as connector_module
from hyperspace_vllm.vllm_adapter import engine_report, plugin, worker_side
from hyperspace_vllm.vllm_adapter.connector import HyperspaceConnector
from hyperspace_vllm.vllm_adapter.metadata import IDLE, PrefixLoad, SegmentSave, StepMetadata, WorkerOff
from tests.support.paths import TINY
from tests.support.scheduler_bench import request
from tests.support.until import until
from tests.vllm_adapter.test_kv_layout import caches, hybrid_cache
from tests.vllm_adapter.test_plugin import HANDED_DOWN

ROLES = (KVConnectorRole.SCHEDULER, KVConnectorRole.WORKER)
ENTRIES = [name for name, m in vars(HyperspaceConnector).items() if inspect.isfunction(m) and not name.startswith("_")]
WORK = StepMetadata(
    loads=(PrefixLoad("r1", 0, 256, ((1, 2),) * 3, ()), PrefixLoad("r2", 0, 256, ((3, 4),) * 3, ())),
    saves=(SegmentSave("r3", 0, (0,), ((5, 6),) * 3),),
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmConfig]:
    """Of a data directory whose lock is taken, so that no node comes."""
    directory = tmp_path_factory.mktemp("locked")
    settings = {"data_dir": str(directory), "arena_bytes": "1MiB"}
    transfer = KVTransferConfig(kv_connector="hyperspace", kv_role="kv_both", kv_connector_extra_config=settings)
    plugin.register()
    with (directory / "node.lock").open("w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in HANDED_DOWN:
            patch.setenv(name, "")
            patch.delenv(name)
        yield EngineArgs(model=str(TINY), kv_transfer_config=transfer).create_engine_config()


@pytest.fixture
def build(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., HyperspaceConnector]]:
    """Connectors, each at work."""
    built: list[HyperspaceConnector] = []
    monkeypatch.setattr(connector_module, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(worker_side, "STARTUP_WAIT_S", 0)  # no node comes

    def make(role: KVConnectorRole, off: bool = False) -> HyperspaceConnector:
        made = HyperspaceConnector(config, role, hybrid_cache())
        built.append(made)
        if off:
            made._switch_off()
        elif role == KVConnectorRole.SCHEDULER:
            made.bind_gpu_block_pool(pool())
            assert None not in (made._scheduler, made._report, made._client)
        else:
            made.register_kv_caches(caches(hybrid_cache()))
            made.bind_connector_metadata(WORK)
            assert None not in (made._worker, made._client)
        return made

    yield make
    for made in built:
        made.shutdown()


def pool() -> BlockPool:
    return BlockPool(10, True, 128, enable_kv_cache_events=True)


def arguments_of(entry: str) -> dict[str, Any]:
    """What vLLM passes; an entry with a parameter that isn't here has to be thought of."""
    known: dict[str, Any] = {
        "gpu_block_pool": pool(),
        "request": request(600),
        "num_computed_tokens": 0,
        "num_external_tokens": 256,
        "blocks": KVCacheBlocks(tuple([KVCacheBlock(1), KVCacheBlock(2)] for _ in range(3))),
        "scheduler_output": SchedulerOutput.make_empty(),
        "connector_output": KVConnectorOutput(finished_recving={"r"}),
        "block_ids": ([1], [2], [3]),
        "kv_caches": caches(hybrid_cache()),
        "forward_context": None,
        "finished_req_ids": set(),
        "layer_name": "layer",
        "kv_layer": torch.empty(0),
        "attn_metadata": None,
        "kv_connector_metadata": IDLE,
    }
    parameters = list(inspect.signature(getattr(HyperspaceConnector, entry)).parameters.values())[1:]
    return {p.name: known[p.name] for p in parameters if p.kind != p.VAR_KEYWORD}


def collaborators(connector: HyperspaceConnector) -> list[object]:
    parts = [p for p in vars(connector).values() if type(p).__module__.startswith("hyperspace_vllm.")]
    return [p for p in parts if not isinstance(p, StepMetadata)] + [p.stats for p in parts if hasattr(p, "stats")]


def break_all(part: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise AssertionError("a bug")

    for name, member in list(vars(type(part)).items()):
        if isinstance(member, property):
            monkeypatch.setattr(type(part), name, property(broken))
        elif inspect.isfunction(member) and not name.startswith("_"):
            monkeypatch.setattr(type(part), name, broken)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("entry", ENTRIES)
def test_whatever_raises_below_an_entry_vllm_gets_the_answer_of_a_connector_that_is_off(
    build: Callable[..., HyperspaceConnector], entry: str, role: KVConnectorRole
) -> None:
    off = getattr(build(role, off=True), entry)(**arguments_of(entry))
    for number in range(len(collaborators(build(role)))):
        connector = build(role)
        with pytest.MonkeyPatch.context() as patch:
            break_all(collaborators(connector)[number], patch)
            answer = getattr(connector, entry)(**arguments_of(entry))
        if connector._client is None:  # it was broken, and has switched off
            assert answer == off
        for other in ENTRIES:
            getattr(connector, other)(**arguments_of(other))


@pytest.mark.parametrize("role", ROLES)
def test_a_half_that_cant_be_built_is_off(
    config: VllmConfig,
    build: Callable[..., HyperspaceConnector],
    role: KVConnectorRole,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for part in ("NodeClient", "plan_kv", "load_config"):
        with monkeypatch.context() as patch:
            patch.setattr(connector_module, part, lambda *_, **__: 1 / 0)
            connector = HyperspaceConnector(config, role, hybrid_cache())
        assert (connector._scheduler, connector._worker, connector._client) == (None, None, None)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    """What we log: vLLM, once an engine was configured, keeps its loggers' records from pytest."""
    monkeypatch.setattr(plugin.logger, "propagate", False)
    plugin.logger.addHandler(caplog.handler)
    yield caplog
    plugin.logger.removeHandler(caplog.handler)


def test_an_error_is_logged_once_an_entry_with_its_traceback(
    build: Callable[..., HyperspaceConnector], monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(contained, "_reported", set())
    for _ in range(3):
        connector = build(KVConnectorRole.SCHEDULER)
        monkeypatch.setattr(connector._report, "added", lambda _: 1 / 0)
        connector.on_new_request(request(10))
    assert [record.exc_info is not None for record in log.records if "please report it" in record.message] == [True]


def test_a_connector_without_its_plugin_says_what_is_off(
    build: Callable[..., HyperspaceConnector], monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    build(KVConnectorRole.SCHEDULER)
    assert "VLLM_PLUGINS" not in log.text
    monkeypatch.delenv("_HYPERSPACE_MANY_TENANTS")
    build(KVConnectorRole.SCHEDULER)
    assert "VLLM_PLUGINS" in log.text


def test_the_report_to_the_node_goes_on_after_an_error(
    build: Callable[..., HyperspaceConnector], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = threading.Semaphore(0)

    def connected(_: NodeClient) -> bool:
        asked.release()
        raise AssertionError("a bug")

    monkeypatch.setattr(engine_report, "REPORT_S", 0.01)
    build(KVConnectorRole.SCHEDULER)
    monkeypatch.setattr(NodeClient, "connected", property(connected))
    assert all(asked.acquire(timeout=10) for _ in range(2))


def test_a_client_whose_heartbeat_fails_is_without_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperspace_vllm.client._NodeSession.tick", lambda *_: 1 / 0)
    client = NodeClient(Config(data_dir=tmp_path), "scheduler", "engine")
    until(lambda: client._closed)
    assert not client.connected
    assert not client.send(Heartbeat())


@pytest.mark.parametrize("broken", ["allocated", "step"])
def test_a_load_that_was_promised_before_the_scheduler_broke_is_reported_as_failed_once(
    build: Callable[..., HyperspaceConnector], broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, worker = (build(role) for role in ROLES)
    monkeypatch.setattr(scheduler._scheduler, broken, lambda *_: 1 / 0)
    scheduler.update_state_after_alloc(**arguments_of("update_state_after_alloc"))
    metadata = [scheduler.build_connector_meta(SchedulerOutput.make_empty()) for _ in range(2)]
    assert scheduler._scheduler is None
    assert metadata == [StepMetadata(loads=(PrefixLoad("r", 0, 256, ((1, 2),) * 3, ()),)), IDLE]
    results = []
    for each in metadata:
        worker.bind_connector_metadata(each)
        worker.start_load_kv(None)
        results.append(worker.get_transfer_results(set()))
    assert [each.finished_recving for each in results] == [{"r"}, set()]
    assert [each.failed_recving for each in results] == [{"r"}, set()]


@pytest.mark.parametrize("broken", ["_load", "_settle", "load", "save", "transfer_results", "close"])
def test_a_worker_that_breaks_reports_every_load_once_and_tells_the_scheduler(
    build: Callable[..., HyperspaceConnector], broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, scheduler = build(KVConnectorRole.WORKER), build(KVConnectorRole.SCHEDULER)
    monkeypatch.setattr(worker._worker, broken, lambda *_: 1 / 0)
    reported: list[str] = []
    for metadata in (WORK, IDLE):
        worker.bind_connector_metadata(metadata)
        worker.start_load_kv(None)
        worker.wait_for_save()
        results = worker.get_transfer_results(set())
        assert results.failed_recving == results.finished_recving
        reported += results.finished_recving
    assert sorted(reported) == ["r1", "r2"]
    off = worker.build_connector_worker_meta()
    assert off == (None if broken == "close" else WorkerOff())
    scheduler.update_connector_output(KVConnectorOutput(kv_connector_worker_meta=off))
    assert (scheduler._scheduler is None) is (off is not None)


def test_an_adapter_that_makes_its_digest_fail_costs_its_own_requests_alone(
    build: Callable[..., HyperspaceConnector], monkeypatch: pytest.MonkeyPatch
) -> None:
    connector = build(KVConnectorRole.SCHEDULER)
    assert connector._scheduler is not None
    monkeypatch.setattr(connector._scheduler, "_scope_of", lambda request: {}[request.request_id])
    assert connector.get_num_new_matched_tokens(request(600, "odd"), 0) == (0, False)
    monkeypatch.undo()
    connector.get_num_new_matched_tokens(request(600, "plain"), 0)
    assert [tracked is None for tracked in connector._scheduler._tracked.values()] == [True, False]


def test_metrics_and_statistics_never_raise_into_vllm(config: VllmConfig) -> None:
    metrics = {Counter: Counter, Gauge: Gauge, Histogram: Histogram}
    first = HyperspaceConnector.build_prom_metrics(config, metrics, ["engine"], {0: ["0"]})  # type: ignore[arg-type]
    first.observe({"hyperspace_l2_no_such_total": {"a|b": 1}})
    first.observe({}, engine_idx=7)
    again = HyperspaceConnector.build_prom_metrics(config, metrics, ["engine"], {0: ["0"]})  # type: ignore[arg-type]
    assert again is None, "the registry takes each name once"
    stats = HyperspaceConnector.build_kv_connector_stats({"hyperspace_l2_tokens_total": "no counts"})
    assert stats is not None
    assert stats.reduce() == {}
    assert stats.aggregate(stats) is stats
