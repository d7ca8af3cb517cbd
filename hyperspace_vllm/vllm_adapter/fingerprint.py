"""What must agree before two nodes share KV (the KV fingerprint) or responses (the model digest).

Context: other systems' silent corruptions were mostly a layout or a weight file that was not in the key. Choice: put
everything in that can change KV bytes or their meaning, vLLM's version included, because it decides which attention
backend and block layout "auto" means. Rejected: asking workers for the chosen backend, which the scheduler can't do
before the first step. Cost: a fleet in the middle of a vLLM upgrade shares only among equal versions.
"""

import os
import re
from argparse import Namespace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.config import ModelConfig, VllmConfig
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVCacheConfig

from ..core.prefix.segment import fingerprint_digest
from ..core.records.errors import Refused
from .kv_layout import KVPlan, describe_group
from .loaded_files import Identity
from .model_files import source_of

FORMAT_VERSION = 1  # of the row payload that kv_layout.py describes

_TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")
_VOLATILE = frozenset({"_name_or_path", "_commit_hash", "transformers_version", "name_or_path"})
# vLLM's "auto" takes the best backend that is installed, and backends lay their blocks out differently.
_ATTENTION_PACKAGES = ("flashinfer-python", "flash-attn", "triton", "aiter")
# Server options that change what a request is answered with, beyond the model itself.
_OUTPUT_ARGS = (
    "chat_template",
    "chat_template_content_format",
    "default_chat_template_kwargs",
    "trust_request_chat_template",
    "enable_auto_tool_choice",
    "exclude_tools_when_tool_choice_none",
    "tool_call_parser",
    "tool_parser_plugin",
    "reasoning_parser",
    "generation_config",
    "override_generation_config",
    "return_tokens_as_token_ids",
    "response_role",
    "logits_processors",
    "structured_outputs_config",
    "mm_processor_kwargs",
    "tokenizer_mode",
    "seed",
    "logprobs_mode",
    "kv_cache_dtype",
    "kv_cache_dtype_skip_layers",
    "model_impl",
    "default_mm_loras",
    "lora_dtype",
    "media_io_kwargs",
    "interleave_mm_strings",
    "video_pruning_rate",
    "trust_request_mm_kwargs",
    "tool_strict_level",
    "reasoning_parser_plugin",
    "reasoning_config",
    "watermark_config",
    "diffusion_config",
    "enable_prompt_tokens_details",
    "return_sampling_mask",
)


def kv_fingerprint(config: VllmConfig, kv_cache: KVCacheConfig, plan: KVPlan, files: Identity) -> bytes:
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


def model_digest(config: VllmConfig, args: Namespace, files: Identity) -> bytes:
    """Digest (32 bytes) of everything that a response depends on besides the request."""
    model = config.model_config
    options: dict[str, Any] = {name: getattr(args, name, None) for name in _OUTPUT_ARGS}
    template = options["chat_template"]
    if template and os.path.isfile(template):
        options["chat_template"] = Path(template).read_text()
    fields = {
        "vllm": vllm.__version__,
        "model": _model_identity(model),
        "files": [files.weights, files.code, files.texts],
        "generation_config": _jsonable(model.try_get_generation_config()),
        "default_sampling": _jsonable(model.get_diff_sampling_param()),
        "max_model_len": model.max_model_len,
        "options": _jsonable(options),
    }
    return fingerprint_digest(fields)


def tells_time(model: ModelConfig, args: Namespace) -> bool:
    """Whether the chat template may put the date into prompts: the answer of one day is none of the next one's."""
    given = str(args.chat_template or "")
    texts = [Path(given)]
    if not os.path.isfile(given):
        try:
            directory = source_of(str(model.tokenizer), model.tokenizer_revision).path
        except Refused:  # then nothing is cached at all
            return False
        texts = [directory / name for name in _TEMPLATE_FILES]
    return "strftime" in given or any(file.is_file() and b"strftime" in file.read_bytes() for file in texts)


def _model_identity(model: ModelConfig) -> dict[str, Any]:
    config = {k: v for k, v in model.hf_config.to_dict().items() if k not in _VOLATILE}
    return {
        "config": _jsonable(config),
        "dtype": str(model.dtype),
        # The length of the whole context chooses between LongRoPE's factors, for every position.
        "long_rope": model.max_model_len if "longrope" in repr(config) else None,
        "quantization": [str(model.quantization), _jsonable(model.quantization_config)],
        "disable_sliding_window": model.disable_sliding_window,
    }


def _draft_identity(config: VllmConfig) -> Any:
    """A speculator's layers may share the KV groups, so its configuration counts as the model's does."""
    speculative = config.speculative_config
    if speculative is None or speculative.draft_model_config is None:
        return None
    return [str(speculative.method), _model_identity(speculative.draft_model_config)]


def _installed(package: str) -> str:
    """Its version, '' if it isn't there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _device() -> list[str]:
    """What decides kernels and block layout: on a CPU its instruction set, on a GPU its compute capability."""
    if current_platform.is_cpu():
        amx = torch.cpu._is_amx_tile_supported()
        return ["cpu", str(current_platform.get_cpu_architecture()), torch.backends.cpu.get_cpu_capability(), str(amx)]
    return [str(current_platform.device_type), str(current_platform.get_device_capability())]


def _jsonable(value: Any) -> Any:
    """`value` in JSON's own types, deterministically; what has none is named by its repr."""
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in sorted(value.items(), key=lambda kv: str(kv[0]))}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
