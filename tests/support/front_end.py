"""vLLM's real front end (routes, validation, templates, parsers, detokenizer) over a scripted engine core.

No model runs. It is served twice on loopback, alone and with the response cache inside, as the plugin puts it there. A
prompt that contains SAY[[text]] is answered with that text, a token per step, and any other with the end token alone. A
pooling model's vector is drawn from its prompt, with a NaN in it where the prompt contains NAN. vLLM 0.32.
"""

import asyncio
import inspect
import json
import os
import random
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import httpx
import numpy as np
import torch
from anyio.from_thread import start_blocking_portal
from fastapi import FastAPI
from starlette.middleware import Middleware
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers import app as launcher
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.outputs import LogprobsLists
from vllm.v1.serial_utils import MsgpackEncoder

from hyperspace_vllm.api.middleware import ResponseCacheMiddleware
from hyperspace_vllm.async_client import AsyncNodeClient
from hyperspace_vllm.config import load_config
from hyperspace_vllm.core.records.ids import network_id
from hyperspace_vllm.core.records.limits import RESPONSE_TTL_MS
from hyperspace_vllm.daemon.responses.response_store import ResponseStore
from hyperspace_vllm.vllm_adapter import compat
from hyperspace_vllm.vllm_adapter.loaded_files import before_load
from hyperspace_vllm.vllm_adapter.plugin import _Server
from hyperspace_vllm.vllm_adapter.weights_epoch import shared_epoch
from tests.support.cached_server import Node, Signer, served
from tests.support.paths import TINY

FLAGS = ("--served-model-name", "demo", "--max-model-len", "4096", "--enforce-eager", "--disable-log-stats")
VECTOR_NUMBERS = 64
_STEP = 3  # turns of the loop between two tokens, so that each reaches the parsers separately
_HOOK = "init_entrypoints_middleware"
_SAID = re.compile(r"SAY\[\[(.*)\]\]", re.DOTALL)


class ScriptedCore:
    """Takes the place of vLLM's EngineCoreClient; `requests` counts the requests to compute."""

    engine_ranks_managed = (0,)
    resources = SimpleNamespace(engine_dead=False)

    def __init__(self, tasks: tuple[str, ...]) -> None:
        self.requests = 0
        self.tokenizer: Any = None
        self._tasks = tasks
        self._outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        self._encoder = MsgpackEncoder()
        self._saying: set[asyncio.Task[None]] = set()

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return self._tasks

    async def get_output_async(self) -> EngineCoreOutputs:
        return await self._outputs.get()

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        self.requests += 1
        self._encoder.encode(request)  # as on its way to an engine: numbers of 64 bits at most
        prompt = self.tokenizer.decode(request.prompt_token_ids)
        outputs = _pooled(request, prompt) if request.pooling_params is not None else self._generated(request, prompt)
        task = asyncio.create_task(self._say(outputs))
        self._saying.add(task)
        task.add_done_callback(self._saying.discard)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Do nothing: everything has been sent by then."""

    async def is_sleeping_async(self) -> bool:
        return False

    async def get_weight_version_async(self) -> None:
        return None

    def get_kv_event_sources(self) -> list[Any]:
        return []

    def dp_engines_running(self) -> bool:
        return True

    def shutdown(self, timeout: float | None = None) -> None:
        """Do nothing: nothing runs."""

    async def _say(self, outputs: Iterator[EngineCoreOutput]) -> None:
        for output in outputs:
            self._outputs.put_nowait(EngineCoreOutputs(outputs=[output]))
            for _ in range(_STEP):
                await asyncio.sleep(0)

    def _generated(self, request: EngineCoreRequest, prompt: str) -> Iterator[EngineCoreOutput]:
        said = _SAID.findall(prompt)
        text = self.tokenizer.encode(said[-1], add_special_tokens=False) if said else []
        tokens = [*text, self.tokenizer.eos_token_id]
        limit = request.sampling_params.max_tokens or len(tokens)
        reason = FinishReason.LENGTH if limit < len(tokens) else FinishReason.STOP
        tokens = tokens[:limit]
        others = request.sampling_params.logprobs
        for at, token in enumerate(tokens, 1):
            logprobs = None if others is None else _logprobs(token, max(others, 0))
            ends = reason if at == len(tokens) else None
            yield EngineCoreOutput(request.request_id, [token], new_logprobs=logprobs, finish_reason=ends)


def _logprobs(token: int, others: int) -> LogprobsLists:
    """The token first, then the others, decreasingly likely."""
    values = np.arange(others + 1) / -2 - 0.25
    return LogprobsLists(np.array([[token, *range(others)]]), values[np.newaxis], np.array([1]))


def _pooled(request: EngineCoreRequest, prompt: str) -> Iterator[EngineCoreOutput]:
    rng = random.Random(prompt)
    vector = torch.tensor([rng.uniform(-1, 1) for _ in range(VECTOR_NUMBERS)])
    vector /= vector.norm()
    if "NAN" in prompt:
        vector[3] = torch.nan
    yield EngineCoreOutput(request.request_id, [], pooling_output=vector, finish_reason=FinishReason.STOP)


@dataclass
class FrontEnds:
    """Clients of both servers, and the core behind them."""

    plain: httpx.Client
    cached: httpx.Client
    core: ScriptedCore
    node: Node


@contextmanager
def front_ends(
    directory: Path, *flags: str, model: Path = TINY, tasks: tuple[str, ...] = ("generate",)
) -> Iterator[FrontEnds]:
    """Both servers of a model with these flags of `vllm serve`, in a thread with its own loop."""
    serving = _serve(directory, ("--model", str(model), *flags), tasks)
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(serving) as both:
        ports, core, node = both
        with _client(ports[0]) as plain, _client(ports[1]) as cached:
            yield FrontEnds(plain, cached, core, node)


def with_tokens(directory: Path, *tokens: str) -> Path:
    """The tiny model with these tokens in place of its spare ones, for parsers that need them."""
    for file in TINY.iterdir():
        (directory / file.name).symlink_to(file)
    tokenizer = json.loads((TINY / "tokenizer.json").read_text())
    spare = [token for token in tokenizer["added_tokens"] if token["content"].startswith("<r")]
    for token, content in zip(spare, tokens, strict=True):
        token.update(content=content, special=False)
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    return directory


@asynccontextmanager
async def _serve(
    directory: Path, flags: tuple[str, ...], tasks: tuple[str, ...]
) -> AsyncIterator[tuple[list[int], ScriptedCore, Node]]:
    async with AsyncExitStack() as stack:
        epoch, descriptor = shared_epoch(directory)
        stack.callback(os.close, descriptor)
        # What the process that starts an engine passes on to its API servers.
        stack.enter_context(patch.dict(os.environ, {"_HYPERSPACE_EPOCH_FILE": str(epoch)}))
        args = make_arg_parser(FlexibleArgumentParser()).parse_args([*FLAGS, *flags])
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
        before_load(config)
        core = ScriptedCore(tasks)
        with patch.object(EngineCoreClient, "make_async_mp_client", lambda **_: core):
            engine = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
        stack.callback(engine.shutdown)
        core.tokenizer = engine.renderer.tokenizer
        store = ResponseStore(directory / "responses.sqlite", 1 << 30, RESPONSE_TTL_MS, Signer(), network_id("test"))
        store.start()
        stack.callback(store.close)
        node = Node(store)

        def add_cache(app: FastAPI) -> None:
            ours = load_config({}, {"data_dir": str(directory)})
            options = _Server(args, config, ours)._options(ours, config, app)
            assert isinstance(options.client, AsyncNodeClient)
            options.client.close()
            options = replace(options, client=node, read_deadline_s=5.0, body_deadline_s=60.0)
            app.user_middleware.append(Middleware(ResponseCacheMiddleware, options=options))

        ports = []
        for add in (lambda app: None, add_cache):
            with patch.object(launcher, _HOOK, inspect.unwrap(getattr(launcher, _HOOK))):
                compat.innermost_middleware(add)
                app = launcher.build_app(args, tasks, config.model_config)
            await init_app_state(engine, app.state, args, tasks)
            ports.append(await stack.enter_async_context(served(app)))
        yield ports, core, node


def _client(port: int) -> httpx.Client:
    return httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
