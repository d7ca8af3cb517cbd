"""What must be equal before two nodes share KV (the KV fingerprint) or responses (the model digest).

Context: most silent corruption in other systems was a layout or a weight file that was not in the key. Choice: include
everything that can change KV bytes or their meaning, vLLM's version included, because it decides which attention
backend and block layout "auto" means. Rejected: asking workers for the chosen backend, which the scheduler can't do
before the first step. Cost: during an upgrade of vLLM, a fleet shares KV only among equal versions.

A response is text: the version is in its CacheProof, not in the model digest, so that releases share answers. Every
option counts there unless neutral.py lists it or it has the release's own default.
"""

import dataclasses
import hashlib
import os
import re
from argparse import Namespace
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import vllm
from vllm.config import ModelConfig, VllmConfig
from vllm.envs import environment_variables
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVCacheConfig

from ..core.prefix.segment import fingerprint_digest
from ..regular_files import open_regular
from .kv_layout import KVPlan, describe_group
from .loaded_files import LoadedIdentity
from .neutral import DEFAULTS, NEUTRAL_OPTIONS, NEUTRAL_VARIABLES
from .older_vllm import make_arg_parser

FORMAT_VERSION = 1  # of the row payload that kv_layout.py describes

_VOLATILE = frozenset({"_name_or_path", "_commit_hash", "transformers_version", "name_or_path"})
# vLLM's "auto" takes the best backend that is installed, and backends lay their blocks out differently.
_ATTENTION_PACKAGES = ("flashinfer-python", "flash-attn", "triton", "aiter")
# Options whose value is the path of a file or directory (or the text itself): the content counts.
_PATHS = frozenset(
    ["chat_template", "default_mm_loras", "mm_encoder_fp8_scale_path", "reasoning_parser_plugin", "tool_parser_plugin"]
)


def kv_fingerprint(config: VllmConfig, kv_cache: KVCacheConfig, plan: KVPlan, files: LoadedIdentity) -> bytes:
    """Digest (32 bytes) of everything that KV bytes depend on."""
    cache, attention = config.cache_config, config.attention_config
    fields = {
        "format": FORMAT_VERSION,
        "vllm": vllm.__version__,
        "model": _model_identity(config.model_config),
        "draft": _draft_identity(config),
        "files": [files.weights, files.draft, files.code],
        "cache_dtype": str(cache.cache_dtype),
        "cache_dtype_skip_layers": sorted(map(str, cache.kv_cache_dtype_skip_layers)),
        "kv_cache_layout": str(kv_cache.kv_cache_layout),
        "attention_backend": [str(attention.backend), _jsonable(attention.backend_per_kind)],
        "attention_packages": [_installed(name) for name in _ATTENTION_PACKAGES],
        "device": _device(),
        "groups": [[describe_group(g.kv_cache_spec), g.layer_names] for g in kv_cache.kv_cache_groups],
        "parts": [[p.window_tokens, p.block_tokens, [layer.name for layer in p.layers]] for p in plan.parts],
        "segment_tokens": plan.segment_tokens,
        "ranks": plan.ranks,
        "expert_parallel": config.parallel_config.enable_expert_parallel,
    }
    return fingerprint_digest(fields)


def model_digest(config: VllmConfig, args: Namespace, files: LoadedIdentity) -> bytes:
    """Digest (32 bytes) of everything that a response depends on besides the request; the same in all releases."""
    model = config.model_config
    fields = {
        "model": _model_identity(model),
        "name": model.served_model_name,  # answers carry it, whichever of the server's names the request uses
        "task": [str(model.runner_type), str(model.convert_type), _counted("pooler_config", model.pooler_config)],
        "files": [files.weights, files.code, files.texts],
        "generation_config": [
            model.generation_config == "vllm",  # then part of the model's own config still applies
            _jsonable(_lasting(model.try_get_generation_config())),
        ],
        "default_sampling": _jsonable(model.get_diff_sampling_param()),
        "max_model_len": model.max_model_len,
        "options": _options(args),
        "variables": {
            name: os.environ[name] for name in environment_variables.keys() - NEUTRAL_VARIABLES if name in os.environ
        },
    }
    return fingerprint_digest(fields)


def _options(args: Namespace) -> dict[str, Any]:
    """The server's options that may affect an answer and don't have the release's defaults."""
    found = {}
    for name, default in vars(make_arg_parser().parse_args([])).items():
        value = _counted(name, getattr(args, name, default))
        if name not in NEUTRAL_OPTIONS and value != _counted(name, DEFAULTS.get(name, default)):
            found[name] = value
    return found


def _counted(name: str, value: Any) -> Any:
    """The part of an option's value that counts, in JSON types; `name` includes the names of its parent options."""
    if _is_config(value):
        value = _without_defaults(value)
    if isinstance(value, dict):
        inner = {f"{name}.{key}": item for key, item in value.items() if f"{name}.{key}" not in NEUTRAL_OPTIONS}
        return _jsonable({key: _counted(key, item) for key, item in inner.items()}) or None
    if isinstance(value, str) and _PATHS.intersection(name.split(".")):
        return _content(value)
    return _jsonable(value)


def _content(path: str) -> Any:
    """The SHA-256 of a file, or of the files in a directory; any other value stands for itself."""
    if os.path.isdir(path):
        return {entry.name: _content(entry.path) for entry in os.scandir(path) if entry.is_file()}
    if not os.path.isfile(path):
        return path
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _model_identity(model: ModelConfig) -> dict[str, Any]:
    config = _lasting(model.hf_config.to_dict())
    return {
        "config": _jsonable(config),
        "dtype": str(model.dtype),
        # The maximum context length chooses between LongRoPE's factors, for every position.
        "long_rope": model.max_model_len if "longrope" in repr(config) else None,
        "quantization": [str(model.quantization), _jsonable(model.quantization_config)],
        "disable_sliding_window": model.disable_sliding_window,
    }


def _lasting(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in _VOLATILE}


def _draft_identity(config: VllmConfig) -> Any:
    """A speculator's layers may share the KV groups, so its configuration counts as the model's does.

    N-gram speculators have no layers; vLLM names the model itself as their draft model.
    """
    speculative = config.speculative_config
    if speculative is None or speculative.draft_model_config is None or speculative.method in ("ngram", "ngram_gpu"):
        return None
    return [str(speculative.method), _model_identity(speculative.draft_model_config)]


def _installed(package: str) -> str:
    """The version of a package, '' if it isn't installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _device() -> list[str]:
    """What decides kernels and block layout: the instruction set of a CPU, the compute capability of a GPU."""
    if current_platform.is_cpu():
        amx = torch.cpu._is_amx_tile_supported()
        return ["cpu", str(current_platform.get_cpu_architecture()), torch.backends.cpu.get_cpu_capability(), str(amx)]
    return [str(current_platform.device_type), str(current_platform.get_device_capability())]


def _is_config(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _without_defaults(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults: a field that a release adds changes nothing."""
    try:
        plain = type(value)()
    except Exception:  # it has required arguments
        plain = None
    names = (field.name for field in dataclasses.fields(value) if not field.name.startswith("_"))
    given = {name: getattr(value, name) for name in names}
    return {name: item for name, item in given.items() if plain is None or item != getattr(plain, name)}


def _jsonable(value: Any) -> Any:
    """`value` in JSON's own types, deterministically; a value without one becomes its repr."""
    if _is_config(value):
        value = _without_defaults(value)
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in sorted(value.items(), key=lambda kv: str(kv[0]))}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
