"""The entry point `vllm.general_plugins`: vLLM calls `register` in each of its processes, perhaps more than once.

Nothing here may stop vLLM: a failure is one line in its log, and vLLM serves as if the plugin were not installed.
"""

import logging
import os
import socket
import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from multiprocessing import parent_process
from typing import TYPE_CHECKING, Any

from ..contained import contained
from . import compat

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from ..api.options import ResponseCacheOptions
    from ..config import Config
    from .loaded_files import LoadedIdentity
    from .weights_epoch import WeightsWatch

logger = logging.getLogger("vllm.hyperspace")

# A server's sampling defaults that change the logits, for greedy answers too.
_BENDING = frozenset(("repetition_penalty", "frequency_penalty", "presence_penalty"))


class _IntoVLLMsLog(logging.Handler):
    """Passes the records of the package's other loggers to vLLM's logger, whose format and level then apply."""

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)


def _log_where_vllm_logs() -> None:
    """vLLM's application raises the root logger's level to ERROR, and with it that of loggers without one."""
    package = logging.getLogger(__name__.partition(".")[0])
    if not any(isinstance(handler, _IntoVLLMsLog) for handler in package.handlers):
        package.addHandler(_IntoVLLMsLog())
        package.setLevel(logging.INFO)
        package.propagate = False  # vLLM's logger may pass records to the root logger itself (VLLM_CONFIGURE_LOGGING=0)


@contained()
def register() -> None:
    """Add the connector and, where command lines are parsed or engines configured, our hooks."""
    _log_where_vllm_logs()
    try:
        compat.register_connector()
        # Engine and worker processes don't parse arguments, and don't need the module that does.
        if parent_process() is None or "vllm.engine.arg_utils" in sys.modules:
            from vllm.engine.arg_utils import EngineArgs

            server = _Server()
            compat.add_connector_flag(EngineArgs, server.on_args)
            compat.after_engine_config(EngineArgs, server.on_config)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        logger.error("hyperspace: not loaded, because this vLLM isn't as expected: %s", error)


@dataclass(slots=True)
class _Server:
    """What one process learns about its server, from the arguments to the application.

    API servers that vLLM spawns have read their arguments before they load plugins: `args` is None there.
    """

    args: Namespace | None = None
    engine: "VllmConfig | None" = None
    config: "Config | None" = None
    watch: "WeightsWatch | None" = None  # vLLM's engine client has a weak reference to it

    @contained()
    def on_args(self, args: Namespace) -> None:
        """Take the parsed arguments."""
        self.args = args

    @contained()
    def on_config(self, engine: "VllmConfig") -> None:
        """Prepare for an engine that was configured: it will be started, or this API server talks to it."""
        from vllm import envs

        from ..config import ConfigError, load_config
        from .inherited import Inherited, hand_down, handed_down
        from .loaded_files import before_load

        self.engine = self.config = None
        transfer = engine.kv_transfer_config
        if transfer is None or (settings := _our_settings(transfer)) is None:
            return
        if transfer.kv_connector == compat.MULTI_CONNECTOR and transfer.kv_load_failure_policy != "recompute":
            logger.info("hyperspace: prefixes that can't be loaded are computed, those of the other connectors too")
        transfer.kv_load_failure_policy = "recompute"  # a cache failure is a miss, never an error to the user
        self.engine = engine
        try:
            self.config = load_config(extra=settings)
        except ConfigError as error:
            logger.error("hyperspace: off, because of its settings: %s", error)
            return
        if self.config.kv_cache and self.config.p2p_listen and self.config.share != "private":
            compat.switch_kv_events_on(engine)  # for the digest of prefixes in VRAM, which others may see
        serves = self._expect_application()
        spawned_by_one = parent_process() is not None and handed_down()
        if spawned_by_one and serves:
            return  # one of several API servers: it has inherited what they share, and the engine loads already
        before_load(engine)
        if envs.VLLM_USE_RUST_FRONTEND and self.config.response_cache:
            logger.warning("hyperspace: the response cache (L1) is off: vLLM's Rust frontend runs no middleware")
        headless = bool(getattr(self.args, "headless", False))
        if headless:
            logger.warning("hyperspace: KV of this engine stays on this host: it can't check what the head signs")
        many = len(self._tenant_keys(self.args)) > 1 or (spawned_by_one and Inherited.read().many_tenants)
        hand_down(_sized(self.config, engine), many or headless or (serves and self.args is None))

    def _expect_application(self) -> bool:
        """Whether this process serves HTTP; the application that it builds gets the response cache."""
        try:
            return compat.innermost_middleware(self.add_middleware)
        except (ImportError, AttributeError) as error:
            logger.error("hyperspace: the response cache (L1) is off, this vLLM isn't as expected: %s", error)
            return True

    @contained()
    def add_middleware(self, app: Any) -> None:
        """Add the response cache, inside everything that vLLM and the operator put around the application."""
        from starlette.middleware import Middleware

        from ..api.middleware import response_cache
        from ..core.records.errors import Refused

        if self.config is None or self.engine is None:
            return  # not enabled, or its settings were wrong and were logged
        try:
            options = self._options(self.config, self.engine, app)
        except Refused as error:
            logger.warning("hyperspace: the response cache (L1) is off: %s", error)
            return
        app.user_middleware.append(Middleware(response_cache, options=options))

    def _options(self, config: "Config", engine: "VllmConfig", app: Any) -> "ResponseCacheOptions":
        import vllm
        from vllm import envs

        from ..api import aborts
        from ..api.client_source import names_proxies
        from ..api.options import ResponseCacheOptions
        from ..async_client import AsyncNodeClient
        from ..client import NodeClient
        from ..core.records.ids import network_id
        from ..core.response.similar.canonical import ACRONYMS
        from ..response_db import database_path
        from .adapters import Adapters, NamedAdapters
        from .dated import dates, printed_dates
        from .fingerprint import model_digest
        from .inherited import Inherited, server_epoch
        from .loaded_files import LoadedFiles
        from .own_checks import OwnChecks, parses_answers
        from .weights_epoch import WeightsWatch

        args: Namespace = app.state.args

        def digest_of(files: "LoadedIdentity") -> bytes:
            return model_digest(engine, args, files)

        formats = printed_dates(engine.model_config, args)
        if formats is None:
            logger.warning("hyperspace: the chat template tells the time: what is rendered by it is not cached (L1)")
        elif formats:
            logger.info("hyperspace: prompts tell the date (%s): answers are cached by it", ", ".join(formats))
        epoch = server_epoch()
        loaded = LoadedFiles(engine, config.data_dir, "the response cache (L1)", digest_of)
        loaded.start()
        self.watch = WeightsWatch(epoch, loaded.unchanged, lambda: None)
        compat.watch_client(self.watch)
        # Where adapters may be replaced at run time, a name doesn't identify files: their answers are not cached.
        modules = () if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING else args.lora_modules or ()
        adapters = NamedAdapters(Adapters(config.data_dir), {module.name: module.path for module in modules})
        return ResponseCacheOptions(
            db_path=database_path(config.data_dir) if config.response_cache else None,
            model_digest=lambda: epoch.key(loaded.digest()),
            weights_changes=lambda: epoch.count,
            dates=lambda: dates(formats),
            accepts=OwnChecks(app, engine),
            parses=parses_answers(engine, args),
            client=AsyncNodeClient(NodeClient(config, "api", f"{socket.gethostname()}-{os.getpid()}")),
            served_models=frozenset(args.served_model_name or [args.model]),
            loras=adapters,
            api_keys=self._tenant_keys(args),
            # Tenants' entries never leave their node, so their names needn't be secret, only the same everywhere.
            fleet_secret=network_id(config.network),
            process_secret=Inherited.read().secret,
            engine_version=f"vllm {vllm.__version__}",
            force_include_usage=bool(args.enable_force_include_usage),
            store_streams=not getattr(args, "enable_return_routed_experts", False),
            sees_aborts=compat.notice_aborts(aborts.note),
            keeps_responses=bool(envs.VLLM_ENABLE_RESPONSES_API_STORE),
            audits=not (
                _BENDING & engine.model_config.get_diff_sampling_param().keys()
                or args.logits_processors
                or entry_points(group="vllm.logits_processors")
                or args.reasoning_parser  # removes tokens from answers
                or formats != ()
            ),
            names_proxies=names_proxies(os.environ.get("FORWARDED_ALLOW_IPS")),  # vLLM has no option for it
            cache_sampled=config.sampled == "cache",
            semantic=config.semantic,
            max_error=config.max_error,
            acronyms={**ACRONYMS, **config.acronym_table},
            ttl_ms=config.response_ttl_s * 1000,
            network_deadline_s=config.network_deadline_ms / 1000,
        )

    def _tenant_keys(self, args: Namespace | None) -> tuple[str, ...]:
        keys = tuple(dict.fromkeys(key for key in getattr(args, "api_key", None) or () if key))
        shared = self.config is not None and self.config.tenants == "shared"
        return () if shared else keys


def _sized(config: "Config", engine: "VllmConfig") -> "Config":
    """The settings of the node to start: its arena fits the model, unless a setting gives its size."""
    from ..arena_size import arena_bytes, memory_bytes
    from .kv_layout import estimate_prompt_bytes

    if config.arena_bytes:
        return config
    try:
        size = arena_bytes(estimate_prompt_bytes(engine), memory_bytes())
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # an unknown cache dtype or architecture
        logger.debug("hyperspace: the arena isn't sized by the model: %s", error)
        return config
    return replace(config, arena_bytes=size)


def _our_settings(transfer: Any) -> Mapping[str, Any] | None:
    """Our connector's kv_connector_extra_config, where it is the only connector or one of several; None elsewhere."""
    settings: Mapping[str, Any] = transfer.kv_connector_extra_config
    if transfer.kv_connector in compat.CONNECTOR_NAMES:
        return settings
    if transfer.kv_connector == compat.MULTI_CONNECTOR:
        for child in settings.get("connectors", ()):
            if child.get("kv_connector") in compat.CONNECTOR_NAMES:
                found: Mapping[str, Any] = child.get("kv_connector_extra_config", {})
                return found
    return None
