"""Which servers share answers: all that answer alike, of any release, and no others."""

import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

from hyperspace_vllm.vllm_adapter.fingerprint import model_digest
from hyperspace_vllm.vllm_adapter.loaded_files import LoadedIdentity
from hyperspace_vllm.vllm_adapter.neutral import DEFAULTS
from hyperspace_vllm.vllm_adapter.older_vllm import make_arg_parser
from tests.support.paths import ROOT, TINY

FILES = LoadedIdentity(("model.safetensors 00",), (), ("tokenizer.json 00",), ())


@pytest.fixture(scope="module")
def config() -> VllmConfig:
    return EngineArgs(model=str(TINY)).create_engine_config()


def digest_of(config: VllmConfig, **arguments: object) -> bytes:
    return model_digest(config, Namespace(**arguments), FILES)


def served(*flags: str, model: Path = TINY) -> bytes:
    """The model digest of `vllm serve`, given these."""
    named = ["--served-model-name", "demo", "--max-model-len", "4096"]
    args = make_arg_parser().parse_args([str(model), *named, *flags])
    args.model = args.model_tag
    return model_digest(AsyncEngineArgs.from_cli_args(args).create_engine_config(), args, FILES)


@pytest.mark.feature("answers are shared: by servers that answer alike")
def test_servers_that_answer_alike_have_one_digest(tmp_path: Path) -> None:
    copy = shutil.copytree(TINY, tmp_path / "elsewhere")
    elsewhere = [
        *("--port", "1234", "--host", "::1", "--root-path", "/v2", "--api-key", "secret", "--ssl-keyfile", "/key"),
        *("--gpu-memory-utilization", "0.3", "--max-num-seqs", "7", "--max-num-batched-tokens", "5000"),
        *("--tensor-parallel-size", "2", "--block-size", "64", "--no-enable-prefix-caching", "--stream-interval", "4"),
        *(
            "--tokenizer",
            str(copy),
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
    assert served(*elsewhere, model=copy) == served()


_OTHERS = [ROOT / ".venv", *sorted((ROOT / ".venvs").glob("vllm-*"))]
OTHERS = [place for place in _OTHERS if (place / "setup.json").is_file() and place != Path(sys.prefix)]
_ELSEWHERE = "import sys; from tests.vllm_adapter.test_model_digest import served; print(served(*sys.argv[1:]).hex())"


@pytest.mark.feature("answers are shared: by all releases")
@pytest.mark.skipif(not OTHERS, reason="`make test-vllm` makes environments with other releases of vLLM")
@pytest.mark.parametrize("place", OTHERS, ids=lambda place: place.name)
def test_all_releases_have_one_digest(place: Path) -> None:
    flags = ["--max-logprobs", "5", "--reasoning-parser", "qwen3", "--structured-outputs-config.backend", "xgrammar"]
    command = [str(place / "bin" / "python"), "-c", _ELSEWHERE, *flags]
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
