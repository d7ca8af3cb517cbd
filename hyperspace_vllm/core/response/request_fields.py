"""Every request field of vLLM 0.29 to 0.33 by its effect on the answer, for each endpoint.

A test compares these tables with vLLM's own request models, and fails when a release adds a field that is not in them.
"""

from dataclasses import dataclass
from typing import Literal

Endpoint = Literal["completions", "chat", "responses", "messages", "embeddings", "rerank", "score"]

# By path. vLLM serves some under other paths too, which its API keys don't guard.
ENDPOINTS: dict[str, Endpoint] = {
    "/v1/completions": "completions",
    "/v1/chat/completions": "chat",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
    "/v1/embeddings": "embeddings",
    "/v1/rerank": "rerank",
    "/v1/score": "score",
}

# Other routes that take a `cache_salt`, in vLLM 0.29 to 0.33; SageMaker's /invocations dispatches to all of them.
SALTED = frozenset(
    (
        "/v1/chat/completions/batch", "/v1/systemone", "/v1/decisions", "/generative_scoring", "/inference/v1/generate",
        "/invocations", "/pooling", "/classify", "/score", "/rerank", "/v2/rerank",
    )
)  # fmt: skip

# Other routes whose kv_transfer_params reach the connector.
SCOPED = frozenset(("/inference/v1/generate", "/invocations", "/cohere/v2/chat"))

POOLING: frozenset[Endpoint] = frozenset({"embeddings", "rerank", "score"})

_NULL = type(None)
_Types = tuple[type, ...]


@dataclass(frozen=True, slots=True)
class Fields:
    """`neutral` fields do not reach the output; with the types that vLLM accepts: vLLM refuses other values.

    `forbidden` ones make an answer depend on more than the request. `keyed` are all others that vLLM knows, with their
    defaults. Of those, `null_is_default` also accept null, which means the default; `verbatim` are keyed as given.
    """

    neutral: dict[str, _Types]
    forbidden: frozenset[str]
    keyed: dict[str, object]
    null_is_default: frozenset[str] = frozenset()
    verbatim: frozenset[str] = frozenset()


_ANYTHING: _Types = (object,)
# OpenAI's fields that vLLM 0.32 ignores, with any value, on endpoints that do not have them.
_UNKNOWN = dict.fromkeys(
    (
        "metadata", "service_tier", "store", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
    ),
    _ANYTHING,
)  # fmt: skip
_STREAM: dict[str, _Types] = {"stream": (bool, _NULL), "stream_options": (dict, _NULL)}
_NEUTRAL = {
    **_UNKNOWN,
    **_STREAM,
    "stream_interval": (int, _NULL),
    "user": (str, _NULL),
    "request_id": (str,),
    "session_id": (str, _NULL),
    "priority": (int,),
}
_FORBIDDEN = frozenset({"kv_transfer_params", "ec_transfer_params", "background", "previous_response_id"})

_SAMPLING: dict[str, object] = {
    "frequency_penalty": None,
    "presence_penalty": None,
    "repetition_penalty": None,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "min_p": None,
    "seed": None,
    "n": 1,
    "stop": [],
    "stop_token_ids": [],
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": [],
    "min_tokens": 0,
    "ignore_eos": False,
    "include_stop_str_in_output": False,
    "spaces_between_special_tokens": True,
    "truncate_prompt_tokens": None,
    "truncation_side": None,
    "use_beam_search": False,
    "length_penalty": 1,
    "prompt_logprobs": None,
    "logprob_token_ids": None,
    "response_format": None,
    "structured_outputs": None,
    "repetition_detection": None,
    "thinking_token_budget": None,
    "return_tokens_as_token_ids": None,
    "return_token_ids": None,
    "return_token_offsets": False,
    "return_weight_versions": False,
    "routed_experts_prompt_start": 0,
    "mm_payload": "tensors",
    "return_mm_kwargs": None,
    "cache_salt": None,
    "vllm_xargs": None,
    "echo": False,
    "model": None,
}

_COMPLETIONS = _SAMPLING | {
    "prompt": None,
    "prompt_embeds": None,
    "suffix": None,
    "max_tokens": 16,
    "logprobs": None,
    "add_special_tokens": True,
}

_CHAT = _SAMPLING | {
    "messages": None,
    "max_tokens": None,
    "max_completion_tokens": None,
    "logprobs": False,
    "top_logprobs": 0,
    "tools": None,
    "parallel_tool_calls": True,
    "reasoning_effort": None,
    "include_reasoning": True,
    "add_generation_prompt": True,
    "continue_final_message": False,
    "add_special_tokens": False,
    "documents": None,
    "chat_template": None,
    "chat_template_kwargs": None,
    "media_io_kwargs": None,
    "mm_processor_kwargs": None,
    "return_prompt_text": None,
    "return_assistant_tokens_mask": False,
}

# https://platform.openai.com/docs/api-reference/responses
# The answer repeats metadata and user (api/stored_answer.py).
_RESPONSES: dict[str, object] = {
    "include": None,
    "input": None,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "model": None,
    "logit_bias": None,
    "parallel_tool_calls": True,
    "reasoning": None,
    "include_reasoning": True,
    "service_tier": "auto",
    "temperature": None,
    "text": None,
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": None,
    "top_k": None,
    "min_p": None,
    "truncation": "disabled",
    "include_stop_str_in_output": False,
    "presence_penalty": None,
    "frequency_penalty": None,
    "media_io_kwargs": None,
    "mm_processor_kwargs": None,
    "mm_payload": "tensors",
    "return_mm_kwargs": None,
    "cache_salt": None,
    "prompt_cache_options": None,
    "spaces_between_special_tokens": True,
    "enable_response_messages": False,
    "previous_input_messages": None,
    "structured_outputs": None,
    "repetition_penalty": None,
    "seed": None,
    "stop": [],
    "stop_token_ids": [],
    "ignore_eos": False,
    "vllm_xargs": None,
    "chat_template_kwargs": None,
}

# https://docs.anthropic.com/en/api/messages
_MESSAGES: dict[str, object] = {
    "model": None,
    "messages": None,
    "max_tokens": None,
    "output_config": None,
    "thinking": None,
    "stop_sequences": None,
    "system": None,
    "temperature": None,
    "tool_choice": None,
    "tools": None,
    "top_k": None,
    "top_p": None,
    "mm_payload": "tensors",
    "return_mm_kwargs": None,
    "cache_salt": None,
    "watermarking": None,
    "vllm_xargs": None,
    "chat_template_kwargs": None,
}

_POOLING: dict[str, object] = {
    "model": None,
    "truncate_prompt_tokens": None,
    "padding": None,
    "truncation_side": None,
    "mm_processor_kwargs": None,
    "cache_salt": None,
    "use_activation": None,
}

_EMBEDDINGS: dict[str, object] = _POOLING | {
    "input": None,
    "add_special_tokens": True,
    "embed_dtype": "float32",
    "dimensions": None,
}

_SCORING: dict[str, object] = _POOLING | {
    "max_tokens_per_query": 0,
    "max_tokens_per_doc": 0,
    "instruction": None,
    "chat_template_kwargs": None,
}

# Without this field: true, from vLLM 0.33 on the value of the model's generation config; for the server's field, before
# vLLM 0.32 true. So absent is neither true nor null.
_SERVERS_DEFAULT = frozenset({"skip_special_tokens", "watermarking"})

_POOLING_NEUTRAL = {**_UNKNOWN, "user": (str, _NULL), "request_id": (str,), "priority": (int,)}

FIELDS: dict[Endpoint, Fields] = {
    "completions": Fields(
        _NEUTRAL,
        _FORBIDDEN,
        _COMPLETIONS,
        frozenset({"stop", "stop_token_ids", "echo", "max_tokens", "return_token_offsets"}),
        _SERVERS_DEFAULT,
    ),
    # tool_choice: absent means "auto" with tools and "none" without, and null is neither.
    "chat": Fields(
        _NEUTRAL,
        _FORBIDDEN,
        _CHAT,
        frozenset({"stop", "stop_token_ids", "logprobs", "top_logprobs", "return_token_offsets"}),
        _SERVERS_DEFAULT | {"tool_choice"},
    ),
    "responses": Fields(
        {
            **{name: types for name, types in _NEUTRAL.items() if name != "service_tier"},
            "metadata": (dict, _NULL),
            "store": (bool, _NULL),
            "prompt_cache_key": (str, _NULL),
        },
        _FORBIDDEN | {"prompt"},
        _RESPONSES,
        verbatim=_SERVERS_DEFAULT,
    ),
    "messages": Fields(
        {**_UNKNOWN, **_STREAM, "metadata": (dict, _NULL)},
        _FORBIDDEN,
        _MESSAGES,
    ),
    # `messages` in place of `input` is another embedding API, of which only whole answers could be kept.
    "embeddings": Fields(
        {**_POOLING_NEUTRAL, "encoding_format": (str,), "endianness": (str,)},
        _FORBIDDEN | {"messages"},
        _EMBEDDINGS,
    ),
    "rerank": Fields(
        _POOLING_NEUTRAL,
        _FORBIDDEN,
        _SCORING | {"query": None, "documents": None, "top_n": 0},
    ),
    "score": Fields(
        _POOLING_NEUTRAL,
        _FORBIDDEN,
        _SCORING | dict.fromkeys(("data_1", "data_2", "queries", "documents", "items", "text_1", "text_2")),
    ),
}
