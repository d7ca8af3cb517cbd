"""What separates KV and responses of different models, and what must not."""

import shutil
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

from hyperspace_vllm.core.records.errors import Refused
from hyperspace_vllm.core.response.scope import sign_scope
from hyperspace_vllm.vllm_adapter.connector import _check_supported, _scope_reader
from hyperspace_vllm.vllm_adapter.fingerprint import kv_fingerprint, model_digest
from hyperspace_vllm.vllm_adapter.inherited import Inherited
from hyperspace_vllm.vllm_adapter.kv_layout import plan_kv
from hyperspace_vllm.vllm_adapter.loaded_files import Identity
from hyperspace_vllm.vllm_adapter.neutral import DEFAULTS
from hyperspace_vllm.vllm_adapter.older_vllm import make_arg_parser
from tests.test_adapter_kv_layout import hybrid_cache
from tests.test_adapter_scheduler import request

TINY = Path(__file__).parents[1] / ".models" / "tiny"
FILES = Identity(("model.safetensors 00",), (), ("tokenizer.json 00",), ())


@pytest.fixture(scope="module")
def config() -> VllmConfig:
    return EngineArgs(model=str(TINY)).create_engine_config()


def copy_of(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "elsewhere"))


def fingerprint(config: VllmConfig) -> bytes:
    cache = hybrid_cache()
    return kv_fingerprint(config, cache, plan_kv(config, cache), FILES)


def at(model: Path, **options: object) -> VllmConfig:
    return EngineArgs(model=str(model), **options).create_engine_config()  # type: ignore[arg-type]


def digest_of(config: VllmConfig, files: Identity = FILES, **arguments: object) -> bytes:
    return model_digest(config, Namespace(**arguments), files)


def served(*flags: str, model: Path = TINY) -> bytes:
    """The model digest of `vllm serve`, given these."""
    named = ["--served-model-name", "demo", "--max-model-len", "4096"]
    args = make_arg_parser().parse_args([str(model), *named, *flags])
    args.model = args.model_tag
    return model_digest(AsyncEngineArgs.from_cli_args(args).create_engine_config(), args, FILES)


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


@pytest.mark.parametrize(
    "options",
    [{"dtype": "float32"}, {"hf_overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}}],
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


@pytest.mark.feature("answers are shared: by servers that answer alike")
def test_servers_that_answer_alike_have_one_digest(tmp_path: Path) -> None:
    elsewhere = [
        *("--port", "1234", "--host", "::1", "--root-path", "/v2", "--api-key", "secret", "--ssl-keyfile", "/key"),
        *("--gpu-memory-utilization", "0.3", "--max-num-seqs", "7", "--max-num-batched-tokens", "5000"),
        *("--tensor-parallel-size", "2", "--block-size", "64", "--no-enable-prefix-caching", "--stream-interval", "4"),
        *(
            "--tokenizer",
            str(copy_of(tmp_path)),
            "--enforce-eager",
            "--disable-log-stats",
            "--allowed-origins",
            '["a"]',
        ),
        *("--served-model-name", "demo", "another", "--load-format", "safetensors", "--dtype", "bfloat16"),
        *("--kv-transfer-config", '{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}'),
        *("--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}'),
        *("--structured-outputs-config", "{}", "--tool-parser-plugin", ""),
    ]
    assert served(*elsewhere, model=tmp_path / "elsewhere") == served()


ROOT = Path(__file__).parents[1]
_OTHERS = [ROOT / ".venv", *sorted((ROOT / ".venvs").glob("vllm-*"))]
OTHERS = [place for place in _OTHERS if (place / "setup.json").is_file() and place != Path(sys.prefix)]
_ELSEWHERE = "import sys; from tests.test_adapter_fingerprint import served; print(served(*sys.argv[1:]).hex())"


@pytest.mark.feature("answers are shared: by all releases")
@pytest.mark.skipif(not OTHERS, reason="`make test-vllm` makes environments with other releases of vLLM")
@pytest.mark.parametrize("place", OTHERS, ids=lambda place: place.name)
def test_all_releases_have_one_digest(place: Path) -> None:
    flags = ["--max-logprobs", "5", "--reasoning-parser", "qwen3", "--structured-outputs-config.backend", "xgrammar"]
    command = [place / "bin" / "python", "-c", _ELSEWHERE, *flags]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.splitlines()[-1] == served(*flags).hex()


EMBEDS = ("--runner", "pooling", "--convert", "embed", "--pooler-config", '{"seq_pooling_type": "LAST"}')


@pytest.mark.feature("answers are shared: by no others")
@pytest.mark.parametrize(
    ("base", "more"),
    [
        ((), ("--max-model-len", "2048")),
        ((), ("--max-logprobs", "5")),
        ((), ("--logprobs-mode", "processed_logprobs")),
        ((), ("--fingerprint-mode", "none")),
        ((), ("--fingerprint-mode", "custom", "--fingerprint-value", "x")),
        ((), ("--served-model-name", "other", "demo")),
        ((), ("--enable-prompt-embeds",)),
        ((), ("--enable-per-request-metrics",)),
        ((), ("--enable-prompt-tokens-details",)),
        ((), ("--response-role", "bot")),
        ((), ("--tool-call-parser", "hermes", "--enable-auto-tool-choice")),
        ((), ("--reasoning-parser", "qwen3")),
        ((), ("--default-chat-template-kwargs", '{"enable_thinking": false}')),
        ((), ("--chat-template", "{{ messages }}")),
        ((), ("--generation-config", "vllm")),
        ((), ("--override-generation-config", '{"top_k": 1}')),
        ((), ("--seed", "7")),
        ((), ("--dtype", "float32")),
        ((), ("--kv-cache-dtype", "fp8")),
        ((), ("--hf-overrides", '{"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}')),
        ((), ("--io-processor-plugin", "x")),
        ((), ("--cohere-format", "cmd3")),
        ((), ("--use-fp64-gumbel",)),
        ((), ("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}')),
        ((), ("--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3, '
              '"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": [0.9, 0.8]}')),
        ((), ("--logits-processors", "a.module:Processor")),
        (EMBEDS[:4], ("--pooler-config", '{"seq_pooling_type": "MEAN"}')),
        (EMBEDS[:4], ("--convert", "classify")),
        (EMBEDS, ("--pooler-config", '{"seq_pooling_type": "MEAN"}')),
        (EMBEDS, ("--pooler-config", '{"seq_pooling_type": "LAST", "use_activation": false}')),
    ],
)  # fmt: skip
def test_an_option_that_reaches_answers_changes_the_digest(base: tuple[str, ...], more: tuple[str, ...]) -> None:
    assert served(*base, *more) != served(*base)


def test_a_template_and_plugins_count_by_what_is_in_their_files(config: VllmConfig, tmp_path: Path) -> None:
    for option in ("chat_template", "tool_parser_plugin", "reasoning_parser_plugin", "mm_encoder_fp8_scale_path"):
        file, other = tmp_path / "file", tmp_path / "other"
        file.write_text("one")
        other.write_text("one")
        one = digest_of(config, **{option: str(file)})
        assert one == digest_of(config, **{option: str(other)}) != digest_of(config)
        file.write_text("another")
        assert digest_of(config, **{option: str(file)}) != one
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_text("one")
    one = digest_of(config, default_mm_loras={"image": str(adapter)})
    (adapter / "adapter_model.safetensors").write_text("another")
    assert digest_of(config, default_mm_loras={"image": str(adapter)}) != one


def test_the_release_and_what_isnt_set_dont_count(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A release's new options change no digest: what is its default is as if it weren't there."""
    plain = digest_of(config)
    assert model_digest(config, make_arg_parser().parse_args([]), FILES) == plain
    monkeypatch.setattr("vllm.__version__", "9.9")
    assert digest_of(config) == plain


def test_a_default_that_means_something_else_in_a_release_can_be_told_apart(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = digest_of(config)
    monkeypatch.setitem(DEFAULTS, "max_logprobs", 10)  # what it was, had this release raised it
    assert digest_of(config) != plain
    assert digest_of(config, max_logprobs=10) == plain


def test_vllms_variables_count_but_for_those_that_reach_no_answer(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = digest_of(config)
    for name in ("VLLM_HOST_IP", "VLLM_LOGGING_LEVEL", "VLLM_FLOAT32_MATMUL_PRECISION", "ANOTHERS"):
        monkeypatch.setenv(name, "high")
    assert digest_of(config) == plain
    monkeypatch.setenv("VLLM_SYSTEM_START_DATE", "2026-01-01")
    assert digest_of(config) != plain


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
