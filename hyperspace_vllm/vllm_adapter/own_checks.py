"""How vLLM's own front end judges a request, and parses its model's output, where the cache would answer instead.

Context: an answer from the cache bypasses vLLM's checks of the request, and a request that vLLM refuses may share its
key with one that it accepts. Choice: the type that vLLM's route declares for its body validates the body, as in
FastAPI; whatever it raises is a refusal. Rejected: rules of our own, which each release would need separately. Cost: a
hit parses its request a second time, because vLLM's validators change what they are given; bytes that passed once are
not parsed again.
"""

import hashlib
import json
from argparse import Namespace
from functools import cache
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import TypeAdapter

from ..api.http_headers import RawHeaders, first_header
from ..core.response.request_fields import ENDPOINTS, Endpoint

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_PATHS = {endpoint: path for path, endpoint in ENDPOINTS.items()}
_INT64 = range(-(1 << 63), 1 << 63)
_PASSED_MAX = 8192  # bodies that passed: their digests take 1 MiB


class OwnChecks:
    """Whether vLLM accepts a request, by the routes of `app` (a FastAPI)."""

    def __init__(self, app: Any, config: "VllmConfig") -> None:
        parallel = config.parallel_config
        local = bool(parallel.local_engines_only)
        self._ranks = range(parallel.data_parallel_size_local if local else parallel.data_parallel_size)
        self._app = app
        self._model = cache(self._find_model)  # routes may be added after the middleware
        self._passed: set[tuple[Endpoint, bytes]] = set()

    def __call__(self, endpoint: Endpoint, body: bytes, headers: RawHeaders) -> bool:
        """Whether a JSON body, and the headers that vLLM reads, pass vLLM's own checks."""
        if (rank := _number(headers, b"x-data-parallel-rank")) is not None and rank not in self._ranks:
            return False
        if (priority := _number(headers, b"x-vllm-priority")) is not None and priority not in _INT64:
            return False
        known = endpoint, hashlib.sha256(body).digest()
        if known in self._passed:
            return True
        try:
            self._model(endpoint).validate_python(json.loads(body))
        except Exception:  # validators raise any exception, and vLLM handles each in its own way
            return False
        if len(self._passed) >= _PASSED_MAX:
            self._passed.clear()
        self._passed.add(known)
        return True

    def _find_model(self, endpoint: Endpoint) -> TypeAdapter[Any]:
        """The body type of the route of `endpoint`; LookupError where it has none."""
        for route in self._app.routes:
            if getattr(route, "path", None) == _PATHS[endpoint] and "POST" in (route.methods or ()):
                return TypeAdapter(get_type_hints(route.endpoint, include_extras=True)["request"])
        raise LookupError(endpoint)


def parses_answers(config: "VllmConfig", args: Namespace) -> bool:
    """Whether a parser reads tool calls or reasoning out of the model's output: a configured one, or harmony's."""
    named = args.tool_call_parser, args.reasoning_parser, config.structured_outputs_config.reasoning_parser
    return any(named) or config.model_config.hf_config.model_type == "gpt_oss"


def _number(headers: RawHeaders, name: bytes) -> int | None:
    """The number as vLLM reads it: what is not a number counts as absent."""
    try:
        return int(first_header(headers, name) or "")
    except ValueError:
        return None
