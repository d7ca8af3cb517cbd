"""The plugin inside vLLM's own command line and application."""

import fcntl
import json
import os
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from hyperspace_vllm import arena_size
from hyperspace_vllm.api.middleware import ResponseCacheMiddleware
from hyperspace_vllm.config import Config
from hyperspace_vllm.core.records.limits import MiB
from hyperspace_vllm.vllm_adapter import inherited, plugin

TINY = Path(__file__).parents[1] / ".models" / "tiny"


def parse(*arguments: str) -> Namespace:
    plugin.register()
    return make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", str(TINY), *arguments])


@pytest.fixture
def locked_directory(tmp_path: Path) -> Iterator[Path]:
    """A data directory whose node is elsewhere: an embedded one finds the lock taken and leaves."""
    lock = os.open(tmp_path / "node.lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield tmp_path
    os.close(lock)


@pytest.fixture
def own_environ(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_HYPERSPACE_PROCESS_SECRET", "_HYPERSPACE_MANY_TENANTS", "_HYPERSPACE_NODE_STARTED"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


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


def application(directory: Path, *arguments: str) -> object:
    extra = {
        "kv_connector": "hyperspace",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"data_dir": str(directory)},
    }
    args = parse("--kv-transfer-config", json.dumps(extra), "--api-key", "k1", *arguments)
    engine_args = AsyncEngineArgs.from_cli_args(args)
    engine = engine_args.create_engine_config()
    assert engine.kv_transfer_config is not None
    assert engine.kv_transfer_config.kv_load_failure_policy == "recompute"
    return build_app(args, ("generate",), engine.model_config)


async def test_the_response_cache_is_innermost_so_a_request_without_the_key_never_reaches_it(
    locked_directory: Path, own_environ: None
) -> None:
    app = application(locked_directory, "--enable-request-id-headers")
    classes = [middleware.cls for middleware in app.user_middleware]
    assert classes[-1] is ResponseCacheMiddleware
    assert classes.count(ResponseCacheMiddleware) == 1
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        answer = await client.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
    assert answer.status_code == 401
    assert "cache-status" not in answer.headers


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


def test_wrong_settings_are_named_and_vllm_serves_without_us(
    own_environ: None, caplog: pytest.LogCaptureFixture
) -> None:
    extra = {"kv_connector": "hyperspace", "kv_role": "kv_both", "kv_connector_extra_config": {"data_dri": "/x"}}
    args = parse("--kv-transfer-config", json.dumps(extra))
    engine = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    app = build_app(args, ("generate",), engine.model_config)
    assert ResponseCacheMiddleware not in [middleware.cls for middleware in app.user_middleware]
    assert "_HYPERSPACE_PROCESS_SECRET" not in os.environ
    assert "did you mean data_dir?" in caplog.text


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
    extra = {"kv_connector": "hyperspace", "kv_role": "kv_both"}
    extra |= {"kv_connector_extra_config": {"data_dir": str(locked_directory)}}  # type: ignore[dict-item]
    args = parse("--kv-transfer-config", json.dumps(extra), *arguments)
    events = AsyncEngineArgs.from_cli_args(args).create_engine_config().kv_events_config
    assert (getattr(events, "enable_kv_cache_events", None), getattr(events, "publisher", None)) == (on, publisher)


def test_a_node_that_shares_nothing_needs_no_kv_events(locked_directory: Path, own_environ: None) -> None:
    settings = {"data_dir": str(locked_directory), "share": "private"}
    extra = {"kv_connector": "hyperspace", "kv_role": "kv_both", "kv_connector_extra_config": settings}
    args = parse("--kv-transfer-config", json.dumps(extra))
    assert AsyncEngineArgs.from_cli_args(args).create_engine_config().kv_events_config is None
