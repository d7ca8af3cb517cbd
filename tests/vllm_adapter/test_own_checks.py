"""Requests that share a key: vLLM's own models make the same of all of them that they take, and the rest is refused."""

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from hyperspace_vllm.core.response.request_fields import ENDPOINTS, FIELDS, POOLING, Endpoint
from hyperspace_vllm.core.response.request_key import Uncacheable, parse_request, request_key
from hyperspace_vllm.vllm_adapter.own_checks import OwnChecks, parses_answers
from tests.core.response.test_request_key import SAMPLES, vllms_models
from tests.support.paths import TINY

pytestmark = pytest.mark.filterwarnings("ignore")

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 0.0, -0.0, 1.0, 64.0, 64, 0.5, 1.5, 2**63, -(2**63), 2**64, 10**30, 1e300,
    "", "x", "0", "1", "true", "auto", "\ud800", "a" * 2000, [], [1], [1.0], [True], ["a"], ["1"], [1, 2], [{}],
    {}, {"a": 1}, {"a": 1.0}, {"a": "b"}, {"type": "text"}, {"include_usage": True}, {"include_usage": None}
]  # fmt: skip


@pytest.fixture(scope="module")
def config() -> VllmConfig:
    return EngineArgs(model=str(TINY)).create_engine_config()


@pytest.fixture(scope="module")
def checks(config: VllmConfig) -> OwnChecks:
    app = FastAPI()
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    pooling = EngineArgs(model=str(TINY), runner="pooling", convert="embed").create_engine_config()
    for task, model in (("generate", config.model_config), ("embed", pooling.model_config)):
        app.routes.extend(build_app(args, (task,), model).routes)
    return OwnChecks(app, config)


def taken(endpoint: Endpoint, raw: bytes) -> Any | None:
    """What one of vLLM's models reads in a body; None if all refuse it."""
    for model in vllms_models(endpoint):
        try:
            return model.model_validate(json.loads(raw))
        except Exception:
            continue
    return None


def meaning(endpoint: Endpoint, request: Any) -> str:
    """What a request that vLLM has read says of its answer; where vLLM means the default by null, both say nothing."""
    fields = FIELDS[endpoint]
    known = set(type(request).model_fields) - fields.neutral.keys() - fields.forbidden  # it ignores all others
    dump = request.model_dump(mode="json", warnings=False, include=known)
    silent = {name: fields.keyed[name] for name in fields.null_is_default}
    said = {name: value for name, value in dump.items() if value is not None and value != silent.get(name)}
    return json.dumps(said, sort_keys=True).replace("-0.0", "0.0")


def bodies(endpoint: Endpoint, field: str) -> Iterator[bytes]:
    yield json.dumps(SAMPLES[endpoint]).encode()
    for more in ({},) if endpoint in POOLING else ({}, {"stream": True}):
        for value in VALUES:
            yield json.dumps({**SAMPLES[endpoint], **more, field: value}).encode()


def fields_of(endpoint: Endpoint) -> list[str]:
    fields = FIELDS[endpoint]
    return sorted({*fields.neutral, *fields.keyed, *fields.forbidden, *fields.verbatim})


def test_a_body_that_passed_is_not_read_again_at_its_own_endpoint(
    checks: OwnChecks, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat, odd = (json.dumps(SAMPLES["chat"] | more).encode() for more in ({"user": "me"}, {"max_tokens": "many"}))
    for _ in range(2):
        assert checks("chat", chat, [])
        assert not checks("completions", chat, [])
        assert not checks("chat", odd, [])
        assert not checks("chat", chat, [(b"x-data-parallel-rank", b"9")])
    monkeypatch.setattr("hyperspace_vllm.vllm_adapter.own_checks.json.loads", None)
    assert checks("chat", chat, [])
    assert not checks("completions", chat, [])


@pytest.mark.parametrize("endpoint", ENDPOINTS.values())
def test_requests_of_one_key_are_one_request_to_vllm_or_are_refused(endpoint: Endpoint, checks: OwnChecks) -> None:
    shared = 0
    for field in fields_of(endpoint):
        read: dict[bytes, dict[str, bytes]] = defaultdict(dict)  # key -> what vLLM reads -> the first such body
        for raw in bodies(endpoint, field):
            parsed = parse_request(raw)
            assert not isinstance(parsed, Uncacheable)
            key = request_key(endpoint, parsed, bytes(32), None, "")
            request = taken(endpoint, raw)
            assert checks(endpoint, raw, []) == (request is not None), raw
            if request is None or isinstance(key, Uncacheable):
                continue
            shared += key in read
            read[key].setdefault(meaning(endpoint, request), raw)
        for meanings in read.values():
            assert len(meanings) == 1, list(meanings.values())
    assert shared > 50


def test_a_request_to_an_endpoint_that_the_server_lacks_is_not_taken(config: VllmConfig) -> None:
    assert not OwnChecks(FastAPI(), config)("chat", json.dumps(SAMPLES["chat"]).encode(), [])


@pytest.mark.parametrize(
    ("flags", "parses"),
    [
        ([], False),
        (["--enable-auto-tool-choice", "--tool-call-parser", "hermes"], True),
        (["--reasoning-parser", "qwen3"], True),
    ],
)
def test_a_parser_that_is_named_reads_answers(flags: list[str], parses: bool, config: VllmConfig) -> None:
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
    assert parses_answers(config, args) is parses
