"""The places where we change vLLM instead of using one of its interfaces. One dated function each."""

import functools
import inspect
import sys
import weakref
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.block_pool import BlockPool

    from .weights_epoch import WeightsWatch

from ..contained import contained

CONNECTOR = "hyperspace"
CONNECTOR_CLASS = "HyperspaceConnector"
CONNECTOR_NAMES = (CONNECTOR, CONNECTOR_CLASS)
MULTI_CONNECTOR = "MultiConnector"
_MARK = "_hyperspace"
_WATCHES, _LOADERS = "_hyperspace_watches", "_hyperspace_loaders"


def register_connector() -> None:
    """Register our connector with vLLM, also under its class name, by which MultiConnector finds its statistics.

    vLLM 0.9 to 0.32 (2026-09). A public interface except for `_registry`: `register_connector` raises for a known name,
    and plugins may load twice. Can go when registering twice is allowed.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    for name in CONNECTOR_NAMES:
        if name not in KVConnectorFactory._registry:
            KVConnectorFactory.register_connector(name, "hyperspace_vllm.vllm_adapter.entry", CONNECTOR_CLASS)


def add_connector_flag(engine_args: "type[EngineArgs]", on_args: Callable[[Namespace], None]) -> None:
    """Add `--kv-connector NAME` to vLLM's own CLI, short for --kv-transfer-config; `on_args` gets the parsed arguments.

    vLLM 0.32 (2026-09): its plugins load before the parser is built, but have no hook into it. Can go when vLLM has
    such a flag or hook. `engine_args` is the class EngineArgs.
    """
    if _marked(engine_args.add_cli_args):
        return
    add_cli_args, bound = engine_args.add_cli_args, cast(Any, engine_args.from_cli_args)
    from_cli_args = bound.__func__

    @functools.wraps(add_cli_args)
    def with_flag(parser: Any) -> Any:
        parser = add_cli_args(parser)
        _add_flag(parser)
        return parser

    @functools.wraps(from_cli_args)
    def with_transfer_config(cls: Any, args: Namespace) -> Any:
        if getattr(args, "kv_connector", None) is not None:
            args.kv_transfer_config = _transfer_config(args.kv_connector, getattr(args, "kv_transfer_config", None))
        on_args(args)
        return from_cli_args(cls, args)

    engine_args.add_cli_args = staticmethod(_mark(with_flag))
    engine_args.from_cli_args = cast(Any, classmethod(with_transfer_config))


@contained()
def _add_flag(parser: Any) -> None:
    if "--kv-connector" not in parser._option_string_actions:
        parser.add_argument(
            "--kv-connector",
            default=None,
            metavar="NAME",
            help="KV connector for loading and saving, e.g. hyperspace; short for --kv-transfer-config.",
        )


def _transfer_config(name: str, given: Any) -> Any:
    from vllm.config import KVTransferConfig

    if given is None:
        policy: Literal["recompute", "fail"] = "recompute" if name == CONNECTOR else "fail"
        return KVTransferConfig(kv_connector=name, kv_role="kv_both", kv_load_failure_policy=policy)
    if given.kv_connector != name:
        raise ValueError(f"--kv-connector {name} contradicts --kv-transfer-config with {given.kv_connector}")
    return given


def after_engine_config(engine_args: "type[EngineArgs]", on_config: Callable[[Any], None]) -> None:
    """Call `on_config(vllm_config)` in every process that makes a configuration, before it starts others.

    vLLM 0.32 (2026-09): there is no hook between the configuration and the engine's processes, and the node and the
    process secret must exist first. `engine_args` is the class EngineArgs.
    """
    create = engine_args.create_engine_config
    if _marked(create):
        return

    @functools.wraps(create)
    def create_and_tell(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = create(self, *args, **kwargs)
        on_config(config)
        return config

    engine_args.create_engine_config = _mark(create_and_tell)


def switch_kv_events_on(config: "VllmConfig") -> None:
    """Let vLLM record which blocks leave its prefix cache, unless its KV events are configured.

    vLLM 0.32 (2026-09): `kv_events_config`, with no publisher. `config` is a VllmConfig. What the operator has
    configured stays, off included.
    """
    from vllm.config import KVEventsConfig

    if config.kv_events_config is None and config.cache_config.enable_prefix_caching:
        config.kv_events_config = KVEventsConfig(enable_kv_cache_events=True, publisher="null")


def kv_event_queue(pool: "BlockPool") -> list[Any]:
    """The KV events that vLLM hasn't taken for publishing yet: it takes them once a step by replacing the list.

    vLLM 0.32 (2026-09): connectors are given the pool, but not its events. Can go when they are given the events.
    """
    queue: list[Any] = pool.kv_event_queue
    return queue


def has_kv_events(pool: Any) -> bool:
    """Whether a pool records events, and keeps them where `kv_event_queue` looks."""
    return bool(getattr(pool, "enable_kv_cache_events", False)) and isinstance(
        getattr(pool, "kv_event_queue", None), list
    )


def events_spell_hashes_as_numbers() -> bool:
    """Whether KV events name a block by the `event_number` of its hash, and not by the hash itself.

    vLLM 0.32 (2026-09): there, the variable is read for every hash, which takes longer than all that we do with it.
    """
    from vllm import envs

    return bool(envs.VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES)


def event_number(block_hash: bytes) -> int:
    """The number that stands for a block's hash in KV events. vLLM 0.32 (2026-09)."""
    return int.from_bytes(block_hash, "big") & ((1 << 64) - 1)


def innermost_middleware(add: Callable[[Any], None]) -> bool:
    """Call `add(app)` after vLLM has added its own middleware, to append to `app.user_middleware` (last = innermost).

    False, with nothing done, in a process that doesn't serve HTTP: an API server has loaded its application's module
    before it configures an engine, and no other process needs it.

    vLLM 0.32 (2026-09): its --middleware list is outermost, outside authentication. `build_app` calls the function by
    the name it imported, so that name is what we replace. Can go when vLLM lets plugins add middleware inside its own.
    """
    if "vllm.entrypoints.launchers.app" not in sys.modules:
        return False
    from vllm.entrypoints.launchers import app as launcher

    initialise = launcher.init_entrypoints_middleware
    if _marked(initialise):
        return True
    if list(inspect.signature(initialise).parameters)[:2] != ["args", "app"]:
        raise AttributeError(f"init_entrypoints_middleware{inspect.signature(initialise)}")

    @functools.wraps(initialise)
    def initialise_and_add(args: Namespace, app: Any, *rest: Any, **kwargs: Any) -> Any:
        result = initialise(args, app, *rest, **kwargs)
        add(app)
        return result

    launcher.init_entrypoints_middleware = _mark(initialise_and_add)
    return True


def watch_engine(watch: "WeightsWatch", load_adapter: Callable[[int, str], None]) -> None:
    """Tell `watch` of every call that may change an engine's weights, and `load_adapter(id, path)` of LoRA adapters.

    vLLM 0.29 to 0.33 (2026-11): connectors are told of none of these calls, nor of a reset unless they ask for it. Can
    go when there is such an event. Applies to every engine of this process, for as long as the caller keeps both.
    """
    from vllm.v1.engine.core import EngineCore

    _watch_weights(EngineCore, watch)
    loaders = getattr(EngineCore, _LOADERS, None)
    if loaders is None:
        add_lora, loaders = EngineCore.add_lora, weakref.WeakKeyDictionary()
        setattr(EngineCore, _LOADERS, loaders)

        @functools.wraps(add_lora)
        def load_and_add(self: Any, lora_request: Any) -> Any:
            for load in list(loaders.values()):
                load(lora_request.lora_int_id, lora_request.lora_path)
            return add_lora(self, lora_request)

        EngineCore.add_lora = load_and_add
    loaders[watch] = contained()(load_adapter)


def watch_client(watch: "WeightsWatch") -> None:
    """Report the same calls in an API server, where they are made: `watch` is told before the engine is.

    vLLM 0.29 to 0.33 (2026-11).
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    _watch_weights(AsyncLLM, watch)


def _watch_weights(engine: Any, watch: "WeightsWatch") -> None:
    watches = getattr(engine, _WATCHES, None)
    if watches is None:
        watches = weakref.WeakSet()
        setattr(engine, _WATCHES, watches)
        rpc, sleep = engine.collective_rpc, engine.sleep

        def around(method: Any, arguments: tuple[Any, ...]) -> ExitStack:
            stack = ExitStack()
            for each in list(watches):
                stack.enter_context(each.rpc(method, arguments))
            return stack

        def call(self: Any, method: Any, *rest: Any, **named: Any) -> Any:
            with around(method, _arguments(*rest, **named)):
                return rpc(self, method, *rest, **named)

        async def acall(self: Any, method: Any, *rest: Any, **named: Any) -> Any:
            with around(method, _arguments(*rest, **named)):
                return await rpc(self, method, *rest, **named)

        @functools.wraps(sleep)
        def tell_and_sleep(self: Any, level: int = 1, *rest: Any, **kwargs: Any) -> Any:
            for each in list(watches):
                each.sleeps(level)
            return sleep(self, level, *rest, **kwargs)

        engine.collective_rpc = functools.wraps(rpc)(acall if inspect.iscoroutinefunction(rpc) else call)
        engine.sleep = tell_and_sleep
    watches.add(watch)


def _arguments(timeout: Any = None, args: Any = (), kwargs: Any = None) -> tuple[Any, ...]:
    """The arguments that `collective_rpc` passes to the workers' method."""
    return args, kwargs


def notice_aborts(note: Callable[[], None]) -> bool:
    """Call `note()` in the task that makes a Response when the engine has aborted it; False if that is impossible.

    vLLM 0.32 (2026-09): such a Response is "completed" (`SimpleContext`). Can go when its status says so.
    """
    from vllm import envs
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

    raise_if_error = getattr(OpenAIServingResponses, "_raise_if_error", None)
    if raise_if_error is None or envs.VLLM_USE_EXPERIMENTAL_PARSER_CONTEXT:  # its context doesn't call this
        return False
    if not _marked(raise_if_error):
        note_safely = contained()(note)

        @functools.wraps(raise_if_error)
        def note_and_raise(self: Any, finish_reason: str | None, *rest: Any) -> None:
            if finish_reason == "abort":
                note_safely()
            raise_if_error(self, finish_reason, *rest)

        OpenAIServingResponses._raise_if_error = _mark(note_and_raise)
    return True


def _mark(function: Any) -> Any:
    setattr(function, _MARK, True)
    return function


def _marked(function: Any) -> bool:
    return hasattr(function, _MARK)
