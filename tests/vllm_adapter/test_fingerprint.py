"""What separates KV and responses of different models, and what must not."""

import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from hyperspace_vllm.core.records.errors import Refused
from hyperspace_vllm.core.response.scope import sign_scope
from hyperspace_vllm.vllm_adapter.connector import _check_supported, _scope_reader
from hyperspace_vllm.vllm_adapter.fingerprint import kv_fingerprint, model_digest
from hyperspace_vllm.vllm_adapter.inherited import Inherited
from hyperspace_vllm.vllm_adapter.kv_layout import plan_kv
from hyperspace_vllm.vllm_adapter.loaded_files import LoadedIdentity
from tests.support.paths import TINY
from tests.support.scheduler_bench import request
from tests.vllm_adapter.test_kv_layout import hybrid_cache

FILES = LoadedIdentity(("model.safetensors 00",), (), ("tokenizer.json 00",), ())


@pytest.fixture(scope="module")
def config() -> VllmConfig:
    return EngineArgs(model=str(TINY)).create_engine_config()


def copy_of(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "elsewhere"))


def fingerprint(config: VllmConfig) -> bytes:
    cache = hybrid_cache()
    return kv_fingerprint(config, cache, plan_kv(config, cache), FILES)


def at(model: Path, **options: object) -> VllmConfig:
    return EngineArgs(model=str(model), **options).create_engine_config()


def digest_of(config: VllmConfig, files: LoadedIdentity = FILES, **arguments: object) -> bytes:
    return model_digest(config, Namespace(**arguments), files)


@pytest.mark.parametrize(
    ("role", "counts_for_kv", "counts_for_responses"),
    [("weights", True, True), ("draft", True, False), ("code", True, True), ("texts", False, True)],
)
def test_a_file_counts_for_what_it_can_change(
    config: VllmConfig, role: str, counts_for_kv: bool, counts_for_responses: bool
) -> None:
    cache, other = hybrid_cache(), replace(FILES, **{role: ("a 11",)})
    other_kv = kv_fingerprint(config, cache, plan_kv(config, cache), other)
    assert (other_kv != fingerprint(config)) is counts_for_kv
    assert (digest_of(config, other) != digest_of(config)) is counts_for_responses


def test_the_same_model_at_another_path_is_the_same(config: VllmConfig, tmp_path: Path) -> None:
    assert fingerprint(at(copy_of(tmp_path))) == fingerprint(config)


def test_speculation_without_a_draft_model_shares_kv_with_servers_that_have_none(config: VllmConfig) -> None:
    ngram = {"method": "ngram", "num_speculative_tokens": 3}
    assert fingerprint(at(TINY, speculative_config=ngram)) == fingerprint(config)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"hf_overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}},
        {"speculative_config": {"model": str(TINY), "method": "draft_model", "num_speculative_tokens": 3}},
    ],
)
def test_what_changes_kv_changes_the_fingerprint(config: VllmConfig, options: dict[str, object]) -> None:
    assert fingerprint(at(TINY, **options)) != fingerprint(config)


def test_the_context_length_counts_where_it_scales_the_positions() -> None:
    factors = [1.0] * 8
    rope = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "rope_theta": 1e4}
    long = {"hf_overrides": {"rope_parameters": rope | {"original_max_position_embeddings": 1024}}}
    assert fingerprint(at(TINY, max_model_len=512)) == fingerprint(at(TINY, max_model_len=1024))
    assert fingerprint(at(TINY, max_model_len=512, **long)) != fingerprint(at(TINY, max_model_len=1024, **long))


def test_what_attention_may_run_on_is_part_of_it(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fingerprint(config)
    monkeypatch.setattr("hyperspace_vllm.vllm_adapter.fingerprint.version", lambda package: "9.9")
    assert fingerprint(config) != plain


def test_groups_and_their_windows_are_part_of_it(config: VllmConfig) -> None:
    cache = hybrid_cache()
    narrow = hybrid_cache()
    for group in narrow.kv_cache_groups[:2]:
        group.kv_cache_spec = replace(group.kv_cache_spec, sliding_window=256)
    seen = {kv_fingerprint(config, c, plan_kv(config, c), FILES) for c in (cache, narrow)}
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("part", "change", "what"),
    [
        ("parallel_config", {"pipeline_parallel_size": 2}, "pipeline"),
        ("parallel_config", {"decode_context_parallel_size": 2}, "decode context"),
        ("parallel_config", {"nnodes": 2}, "several hosts"),
        ("model_config", {"runner_type": "pooling"}, "pooling"),
    ],
)
def test_engines_whose_kv_we_cant_carry_are_named(part: str, change: dict[str, object], what: str) -> None:
    parallel = {
        "pipeline_parallel_size": 1, "decode_context_parallel_size": 1, "prefill_context_parallel_size": 1, "nnodes": 1
    }  # fmt: skip
    parts = {
        "parallel_config": SimpleNamespace(**parallel),
        "cache_config": SimpleNamespace(),
        "model_config": SimpleNamespace(runner_type="generate"),
    }
    _check_supported(SimpleNamespace(**parts))
    vars(parts[part]).update(change)
    with pytest.raises(Refused, match=what):
        _check_supported(SimpleNamespace(**parts))


@pytest.mark.parametrize(
    ("many_tenants", "signed", "salt", "expected"),
    [
        (False, None, None, ("network", "")),
        (True, None, None, ("private", "")),
        (True, ("network", "t1"), None, ("network", "t1")),
        (False, ("public", ""), None, ("public", "")),
        (False, ("network", "t1"), "pepper", ("private", "t1")),
        (False, None, "pepper", ("private", "")),
        (True, "forged", None, ("private", "unverified t9")),
        (False, "forged", None, ("private", "unverified t9")),
    ],
)
def test_a_scope_counts_when_this_server_signed_it(
    many_tenants: bool, signed: tuple[str, str] | str | None, salt: str | None, expected: tuple[str, str]
) -> None:
    secret = b"s" * 32
    r = request(10, cache_salt=salt)
    if signed is not None:
        scope, tenant = ("public", "t9") if isinstance(signed, str) else signed
        key = b"another" if signed == "forged" else secret
        r.kv_transfer_params = {"hyperspace": sign_scope(key, scope, tenant, salt)}  # type: ignore[arg-type]
    found = _scope_reader(Inherited(secret, many_tenants))(r)
    assert (found.scope, found.tenant) == expected
