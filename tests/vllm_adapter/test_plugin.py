"""The plugin inside vLLM's own command line and application."""

import fcntl
import json
import logging
import multiprocessing
import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.ray.ray_env import get_env_vars_to_copy
from vllm.utils.argparse_utils import FlexibleArgumentParser

from hyperspace_vllm import arena_size
from hyperspace_vllm.api.middleware import response_cache
from hyperspace_vllm.config import Config
from hyperspace_vllm.core.records.limits import MiB
from hyperspace_vllm.vllm_adapter import entry, inherited, plugin
from hyperspace_vllm.vllm_adapter.connector import HyperspaceConnector
from tests.support.engines import spawned
from tests.support.paths import TINY


def parse(*arguments: str) -> Namespace:
    plugin.register()
    parsed: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", str(TINY), *arguments])
    return parsed


@pytest.fixture
def locked_directory(tmp_path: Path) -> Iterator[Path]:
    """A data directory whose node is elsewhere: an embedded one finds the lock taken and leaves."""
    lock = os.open(tmp_path / "node.lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield tmp_path
    os.close(lock)


HANDED_DOWN = (
    "_HYPERSPACE_PROCESS_SECRET", "_HYPERSPACE_MANY_TENANTS", "_HYPERSPACE_NODE_STARTED", "_HYPERSPACE_EPOCH_FILE",
    "_HYPERSPACE_LOADED_FILES", "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY",
)  # fmt: skip


@pytest.fixture
def own_environ(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in HANDED_DOWN:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    """What we log: vLLM, once an engine was configured, keeps its loggers' records from pytest."""
    monkeypatch.setattr(plugin.logger, "propagate", False)
    plugin.logger.addHandler(caplog.handler)
    yield caplog
    plugin.logger.removeHandler(caplog.handler)


def test_what_the_package_logs_is_in_vllms_log_whatever_the_root_loggers_level(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.register()
    plugin.register()
    monkeypatch.setattr(logging.root, "level", logging.ERROR)  # as vLLM's application does
    logging.root.manager._clear_cache()  # type: ignore[attr-defined]
    monkeypatch.setattr(plugin.logger, "level", logging.INFO)
    said: list[str] = []
    seen = logging.Handler()
    seen.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    plugin.logger.addHandler(seen)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # as with VLLM_CONFIGURE_LOGGING=0
    logging.root.addHandler(seen)
    logging.getLogger("hyperspace_vllm.client").warning("no shared memory")
    plugin.logger.removeHandler(seen)
    logging.root.removeHandler(seen)
    assert said == ["no shared memory"] * 2


def test_registering_twice_changes_nothing_the_second_time() -> None:
    plugin.register()
    before = (EngineArgs.add_cli_args, EngineArgs.from_cli_args.__func__, EngineArgs.create_engine_config)
    plugin.register()
    assert before == (EngineArgs.add_cli_args, EngineArgs.from_cli_args.__func__, EngineArgs.create_engine_config)


def test_the_flag_stands_for_a_transfer_config_that_recomputes_what_failed() -> None:
    transfer = AsyncEngineArgs.from_cli_args(parse("--kv-connector", "hyperspace")).kv_transfer_config
    assert transfer is not None
    assert (transfer.kv_connector, transfer.kv_role) == ("hyperspace", "kv_both")
    assert transfer.kv_load_failure_policy == "recompute"


def test_without_the_flag_nothing_changes() -> None:
    assert AsyncEngineArgs.from_cli_args(parse()).kv_transfer_config is None


def test_the_flag_serves_other_connectors_too_and_may_not_contradict() -> None:
    transfer = AsyncEngineArgs.from_cli_args(parse("--kv-connector", "OffloadingConnector")).kv_transfer_config
    assert transfer is not None
    assert (transfer.kv_connector, transfer.kv_load_failure_policy) == ("OffloadingConnector", "fail")
    config = json.dumps({"kv_connector": "NixlConnector", "kv_role": "kv_both"})
    with pytest.raises(ValueError, match="contradicts"):
        AsyncEngineArgs.from_cli_args(parse("--kv-connector", "hyperspace", "--kv-transfer-config", config))


def alone(directory: Path) -> dict[str, Any]:
    settings = {"data_dir": str(directory), "arena_bytes": "1MiB"}
    return {"kv_connector": "hyperspace", "kv_role": "kv_both", "kv_connector_extra_config": settings}


def beside_others(directory: Path) -> dict[str, Any]:
    example = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    children = {"connectors": [example, alone(directory)]}
    return {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": children}


def application(directory: Path, *arguments: str, transfer: Callable[[Path], dict[str, Any]] = alone) -> Any:
    args = parse("--kv-transfer-config", json.dumps(transfer(directory)), "--api-key", "k1", *arguments)
    engine_args = AsyncEngineArgs.from_cli_args(args)
    engine = engine_args.create_engine_config()
    assert engine.kv_transfer_config is not None
    assert engine.kv_transfer_config.kv_load_failure_policy == "recompute"
    return build_app(args, ("generate",), engine.model_config)


@pytest.mark.parametrize("transfer", [alone, beside_others])
async def test_the_response_cache_is_innermost_so_a_request_without_the_key_never_reaches_it(
    locked_directory: Path, own_environ: None, transfer: Callable[[Path], dict[str, Any]]
) -> None:
    app = application(locked_directory, "--enable-request-id-headers", transfer=transfer)
    classes = [middleware.cls for middleware in app.user_middleware]
    assert classes[-1] is response_cache
    assert classes.count(response_cache) == 1
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        answer = await client.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
    assert answer.status_code == 401
    assert "cache-status" not in answer.headers


@pytest.mark.parametrize(("allowed", "names"), [(None, False), ("*", False), ("10.0.0.1", True)])
def test_a_server_knows_whether_the_operator_names_proxies(
    locked_directory: Path, own_environ: None, monkeypatch: pytest.MonkeyPatch, allowed: str | None, names: bool
) -> None:
    monkeypatch.delenv("FORWARDED_ALLOW_IPS", raising=False)
    if allowed is not None:
        monkeypatch.setenv("FORWARDED_ALLOW_IPS", allowed)
    app = application(locked_directory)
    (options,) = [each.kwargs["options"] for each in app.user_middleware if each.cls is response_cache]
    assert options.names_proxies is names


@pytest.mark.parametrize(
    ("template", "said", "tells"),
    [
        ("{{ messages }}", None, lambda: ""),
        ("{{ strftime_now('%Y') }}", "prompts tell the date (%Y)", lambda: f"{datetime.now():%Y}"),
        ("{{ strftime_now('%H:%M') }}", "the chat template tells the time", lambda: None),
    ],
)
def test_what_prompts_tell_of_the_date_is_in_their_keys_and_said_once(
    locked_directory: Path, own_environ: None, log: pytest.LogCaptureFixture,
    template: str, said: str | None, tells: Callable[[], str | None],
) -> None:  # fmt: skip
    app = application(locked_directory, "--chat-template", template)
    (options,) = [each.kwargs["options"] for each in app.user_middleware if each.cls is response_cache]
    assert options.dates() == tells()
    assert options.audits == (said is None)
    lines = [line for line in log.text.splitlines() if "prompts tell" in line or "template tells" in line]
    assert (len(lines), said is None or said in lines[0]) == (int(said is not None), True)


def test_several_keys_make_unsigned_requests_private(locked_directory: Path, own_environ: None) -> None:
    application(locked_directory)
    assert os.environ["_HYPERSPACE_MANY_TENANTS"] == "0"
    application(locked_directory, "k2")
    assert os.environ["_HYPERSPACE_MANY_TENANTS"] == "1"


@pytest.mark.parametrize("setting", [None, "3MiB"])
def test_a_server_starts_its_node_with_an_arena_for_its_prompts_unless_a_setting_says_its_size(
    own_environ: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str | None
) -> None:
    started: list[Config] = []
    monkeypatch.setattr(inherited, "start_node", started.append)
    monkeypatch.setattr(arena_size, "LEAST_BYTES", 0)
    extra = {"data_dir": str(tmp_path)} | ({"arena_bytes": setting} if setting else {})
    transfer = {"kv_connector": "hyperspace", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    engine = AsyncEngineArgs.from_cli_args(parse("--kv-transfer-config", json.dumps(transfer))).create_engine_config()
    model, hf = engine.model_config, engine.model_config.hf_text_config
    token_bytes = 2 * hf.num_hidden_layers * hf.num_key_value_heads * hf.head_dim * model.dtype.itemsize
    expected = 3 * MiB if setting else max(4 * token_bytes * model.max_model_len, MiB)
    assert [config.arena_bytes for config in started] == [expected]


def test_an_engine_whose_requests_come_from_another_host_takes_unsigned_ones_as_private(
    locked_directory: Path, own_environ: None, log: pytest.LogCaptureFixture
) -> None:
    application(locked_directory, "--headless")
    assert os.environ["_HYPERSPACE_MANY_TENANTS"] == "1"
    assert "KV of this engine stays on this host" in log.text


@pytest.mark.parametrize(
    "broken",
    ["config.load_config", "vllm_adapter.inherited.hand_down", "vllm_adapter.plugin._sized", "client.NodeClient"],
)
def test_an_error_of_ours_while_a_server_starts_leaves_it_a_server_without_us(
    locked_directory: Path, own_environ: None, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.setattr(f"hyperspace_vllm.{broken}", lambda *_, **__: 1 / 0)
    app = application(locked_directory)
    assert response_cache not in [middleware.cls for middleware in app.user_middleware]


def test_multi_connector_finds_our_statistics_by_the_name_of_our_class() -> None:
    plugin.register()
    stats = MultiConnector.build_kv_connector_stats({"HyperspaceConnector": {"hyperspace_l2_tokens_total": {"hit": 1}}})
    assert stats is not None
    assert stats.reduce() == {"HyperspaceConnector": {"L2 tokens hit": 1}}


@pytest.mark.parametrize("name", ["hyperspace", "HyperspaceConnector"])
def test_the_connector_is_found_by_its_module_too(name: str) -> None:
    transfer = KVTransferConfig(kv_connector=name, kv_role="kv_both", kv_connector_module_path=entry.__name__)
    assert KVConnectorFactory.get_connector_class(transfer) is HyperspaceConnector


def test_workers_that_ray_starts_are_given_our_settings_but_no_secret(
    locked_directory: Path, own_environ: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", "MINE")
    monkeypatch.setenv("HYPERSPACE_ENCODE_DEVICE", "cpu")
    monkeypatch.setenv("HYPERSPACE_REGISTRY", "redis://user:password@host:6379/0")
    application(locked_directory)
    copied = get_env_vars_to_copy()
    assert {"MINE", "HYPERSPACE_ENCODE_DEVICE"} <= copied
    assert not copied & {"HYPERSPACE_REGISTRY", "_HYPERSPACE_PROCESS_SECRET"}


@pytest.mark.io
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("kind", "handed_down", "expected"),
    [
        pytest.param("LLM", None, ("0", False), marks=pytest.mark.slow),  # offline: its own requests alone
        pytest.param("API server", "1", ("1", True), marks=pytest.mark.slow),
        (
            "API server",
            None,
            ("1", True),
        ),  # of a server that started it for an engine of its own: its keys aren't known
    ],
)
def test_a_spawned_process_is_told_from_the_head_of_a_server(
    locked_directory: Path, own_environ: None, monkeypatch: pytest.MonkeyPatch,
    kind: str, handed_down: str | None, expected: tuple[str, bool],
) -> None:  # fmt: skip
    args = parse("--kv-transfer-config", json.dumps(alone(locked_directory)))
    if handed_down is not None:
        AsyncEngineArgs.from_cli_args(args).create_engine_config()
        monkeypatch.setenv("_HYPERSPACE_MANY_TENANTS", handed_down)
    context = multiprocessing.get_context("spawn")
    answers: multiprocessing.Queue[tuple[str, bool]] = context.Queue()
    process = context.Process(target=spawned.configure, args=(kind, args, answers))
    process.start()
    assert answers.get(timeout=500) == expected
    process.join()


def test_wrong_settings_are_named_and_vllm_serves_without_us(own_environ: None, log: pytest.LogCaptureFixture) -> None:
    extra = {"kv_connector": "hyperspace", "kv_role": "kv_both", "kv_connector_extra_config": {"data_dri": "/x"}}
    args = parse("--kv-transfer-config", json.dumps(extra))
    engine = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    app = build_app(args, ("generate",), engine.model_config)
    assert response_cache not in [middleware.cls for middleware in app.user_middleware]
    assert "_HYPERSPACE_PROCESS_SECRET" not in os.environ
    assert "did you mean data_dir?" in log.text


@pytest.mark.parametrize(
    ("arguments", "on", "publisher"),
    [
        ((), True, "null"),
        (("--kv-events-config", json.dumps({"enable_kv_cache_events": False})), False, "null"),
        (("--kv-events-config", json.dumps({"enable_kv_cache_events": True, "publisher": "zmq"})), True, "zmq"),
        (("--no-enable-prefix-caching",), None, None),
    ],
)
def test_vllm_notes_kv_events_for_us_alone_unless_somebody_configured_them(
    locked_directory: Path, own_environ: None, arguments: tuple[str, ...], on: bool | None, publisher: str | None
) -> None:
    args = parse("--kv-transfer-config", json.dumps(alone(locked_directory)), *arguments)
    events = AsyncEngineArgs.from_cli_args(args).create_engine_config().kv_events_config
    assert (getattr(events, "enable_kv_cache_events", None), getattr(events, "publisher", None)) == (on, publisher)


def test_a_node_that_shares_nothing_needs_no_kv_events(locked_directory: Path, own_environ: None) -> None:
    extra = alone(locked_directory)
    extra["kv_connector_extra_config"]["share"] = "private"
    args = parse("--kv-transfer-config", json.dumps(extra))
    assert AsyncEngineArgs.from_cli_args(args).create_engine_config().kv_events_config is None
