"""The KV connector, which vLLM builds in the scheduler and in every worker. It only delegates.

Context: an exception while vLLM builds or calls a connector stops the engine. Choice: if L2 cannot work (a layout that
it cannot carry, weights that it cannot identify, wrong settings), it is turned off with one line, and both halves
answer "nothing" from then on; an error of Hyperspace has the same effect. Loads that a half which is off has promised
are kept here, outside the halves: vLLM waits for every promised load until every rank has reported it, once. Cost: a
misconfigured server serves without the cache.
"""

import inspect
import logging
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
    PromMetric,
    PromMetricT,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from ..client import NodeClient
from ..config import Config, ConfigError, load_config
from ..contained import contained
from ..core.records.errors import Refused
from ..core.response.scope import DEFAULT_SCOPE, RequestScope, verify_scope
from . import compat
from .adapters import Adapters
from .cached_segments import CachedSegments
from .engine_report import EngineReport
from .fingerprint import kv_fingerprint
from .inherited import Inherited, ensure_node, handed_down
from .kv_layout import plan_kv
from .loaded_files import LoadedFiles
from .metadata import IDLE, PrefixLoad, StepMetadata, WorkerOff
from .older_vllm import CacheHitSource, ConnectorBase, KVConnectorTransferResults
from .scheduler_side import SchedulerSide
from .stats import HyperspacePromMetrics, HyperspaceStats
from .weights_epoch import WeightsEpoch, WeightsWatch
from .worker_side import WorkerSide

if TYPE_CHECKING:
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks

logger = logging.getLogger("vllm.hyperspace")

_NO_PLUGIN = (
    "hyperspace: the response cache (L1) is off, and KV stays on this node: the process that configured this engine "
    "has not loaded the plugin (VLLM_PLUGINS, if it is set, must name hyperspace)"
)


def _all_contained(connector: type) -> type:
    """Decorate the connector: where a method raises, the half switches off, and answers as a half that is off."""

    def answer_off(entry: Callable[..., Any]) -> Callable[..., Any]:
        def answer(self: "HyperspaceConnector", *args: Any, **kwargs: Any) -> Any:
            self._switch_off()
            return entry(self, *args, **kwargs)

        return answer

    for name, entry in vars(connector).copy().items():
        if inspect.isfunction(entry) and not name.startswith("_"):
            setattr(connector, name, contained(answer_off(entry))(entry))
    return connector


@_all_contained
class HyperspaceConnector(ConnectorBase, SupportsHMA):  # type: ignore[misc]  # vLLM is untyped for us
    """Loads and saves prompt prefixes through the host's Hyperspace node."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._client: NodeClient | None = None
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._report: EngineReport | None = None
        self._cached: CachedSegments | None = None
        self._watch: WeightsWatch | None = None  # vLLM's engine has a weak reference to it
        self._owed: dict[str, PrefixLoad] = {}  # promised in this step, without the rows
        self._unreported: set[str] = set()  # loads that this worker has been told of
        if role == KVConnectorRole.SCHEDULER:
            # vLLM's default fails the request; the scheduler reads this setting after it has built us, so it overrides
            # the operator's.
            self._kv_transfer_config.kv_load_failure_policy = "recompute"
        self._build(vllm_config, role)

    @contained(lambda self, *_: self._switch_off())
    def _build(self, vllm_config: VllmConfig, role: KVConnectorRole) -> None:
        try:
            config = load_config(extra=self._kv_transfer_config.kv_connector_extra_config)
            if not config.kv_cache:
                raise Refused("off", "kv_cache is false")
            _check_supported(vllm_config)
            if role == KVConnectorRole.SCHEDULER:
                if not handed_down():
                    logger.warning(_NO_PLUGIN)
                self._scheduler = self._build_scheduler(config)
            else:
                self._worker = self._build_worker(config)
        except (ConfigError, Refused) as error:
            logger.warning("hyperspace: KV sharing (L2) is off: %s", error)

    def _build_scheduler(self, config: Config) -> SchedulerSide:
        vllm_config, kv_cache_config = self._vllm_config, self._kv_cache_config
        plan = plan_kv(vllm_config, kv_cache_config)
        loaded = LoadedFiles(
            vllm_config,
            config.data_dir,
            "KV sharing (L2)",
            lambda files: kv_fingerprint(vllm_config, kv_cache_config, plan, files),
        )
        loaded.start()
        epoch, adapters = WeightsEpoch(), Adapters(config.data_dir)
        self._watch = WeightsWatch(epoch, loaded.unchanged, self._forget)
        compat.watch_engine(self._watch, adapters.load)
        ensure_node(config)
        self._client = NodeClient(config, "scheduler", _client_name(self._vllm_config))
        return SchedulerSide(
            self._client,
            plan,
            lambda: epoch.key(loaded.digest()),
            adapters,
            config.fetch,
            config.lookup_deadline_ms,
            self._vllm_config.speculative_config is not None,
            self._kv_transfer_config.kv_role or "kv_both",  # its type allows None in vLLM 0.33
            _scope_reader(Inherited.read()),
        )

    def _build_worker(self, config: Config) -> WorkerSide:
        plan = plan_kv(self._vllm_config, self._kv_cache_config)
        self._client = NodeClient(config, "worker", _client_name(self._vllm_config))
        step_tokens = self._vllm_config.scheduler_config.max_num_batched_tokens
        rank = get_tensor_model_parallel_rank()
        return WorkerSide(self._client, plan, rank, -(-step_tokens // plan.segment_tokens), config.encode_device)

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a dropped save is a future miss, and no reason to recompute anything."""
        return False

    # --- scheduler -------------------------------------------------------------------------------

    def bind_gpu_block_pool(self, gpu_block_pool: "BlockPool") -> None:
        """Called once, before the first request: from now on the node can be told what is in vLLM's own cache."""
        if self._scheduler is None or self._client is None:
            return
        if compat.has_kv_events(gpu_block_pool):
            self._cached = self._scheduler.watch(gpu_block_pool)
        requests_at_once = self._vllm_config.scheduler_config.max_num_seqs
        scheduler = self._scheduler
        longest = self._vllm_config.model_config.max_model_len
        self._report = EngineReport(self._client, lambda: scheduler.engine, requests_at_once, longest, self._cached)
        self._report.start()

    def on_new_request(self, request: Request) -> None:
        """Count the request as load."""
        if self._report is not None:
            self._report.added(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """See SchedulerSide.matched_tokens."""
        if self._scheduler is None:
            return 0, False
        return self._scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        """See SchedulerSide.allocated."""
        tables = tuple(map(tuple, blocks.get_block_ids())) if num_external_tokens else ()
        if num_external_tokens:
            self._owed[request.request_id] = PrefixLoad(request.request_id, 0, num_external_tokens, tables, ())
        if self._scheduler is not None:
            self._scheduler.allocated(request, tables, num_external_tokens)

    def get_external_cache_hit_sources(self, request: Request, num_external_tokens: int) -> dict[CacheHitSource, int]:
        """Memory, disk or network, for vLLM's own hit metrics."""
        return self._scheduler.hit_sources(request, num_external_tokens) if self._scheduler is not None else {}

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """This step's loads and saves; a promised load that was lost fails."""
        metadata = self._scheduler.step(scheduler_output) if self._scheduler is not None else IDLE
        owed, self._owed = self._owed, {}
        if lost := owed.keys() - metadata.promised:
            metadata = replace(metadata, loads=(*metadata.loads, *(owed[request_id] for request_id in lost)))
        return metadata

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Take the loads that all ranks have reported."""
        if self._scheduler is None:
            return
        self._scheduler.received(connector_output)
        if isinstance(connector_output.kv_connector_worker_meta, WorkerOff):
            logger.warning("hyperspace: KV sharing (L2) is off: a worker can't load")
            self._switch_off()

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Never delays freeing the blocks: what was saved was copied in the step that filled it."""
        if self._scheduler is not None:
            self._scheduler.finished(request)
        if self._report is not None:
            self._report.finished(request)
        return False, None

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """The same, for a model with one KV cache group."""
        return self.request_finished_all_groups(request, (block_ids,))

    def reset_cache(self) -> bool | None:
        """End everything in progress as a miss. Changed weights are noticed separately (weights_epoch.py)."""
        self._forget()
        return True

    @contained(lambda self: self._switch_off())
    def _forget(self) -> None:
        if self._scheduler is not None:
            self._scheduler.reset()

    # --- worker ----------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take the tensors to copy from and to."""
        if self._worker is not None:
            self._worker.register(kv_caches, self._kv_cache_config.num_blocks)

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        """Runs after the step's forward pass: our loads are for requests that aren't in this step."""
        metadata = self._connector_metadata
        if isinstance(metadata, StepMetadata):
            self._unreported |= metadata.promised
            if self._worker is not None:
                self._worker.load(metadata)

    def wait_for_save(self) -> None:
        """Gather the segments that the step filled: the only thing a step waits for."""
        if self._worker is not None and isinstance(self._connector_metadata, StepMetadata):
            self._worker.save(self._connector_metadata)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Every promised receive, once. Sends are never promised."""
        if self._worker is not None:
            results = self._worker.transfer_results()
        else:
            results = KVConnectorTransferResults(set(), set(self._unreported), set(self._unreported))
        self._unreported -= results.finished_recving
        return results

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """Whether this worker is off, so that the scheduler's half makes no more promises."""
        return WorkerOff() if self._worker is None or self._worker.is_off else None

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: no request runs before its load has been reported."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: "AttentionMetadata", **kwargs: Any
    ) -> None:
        """Nothing per layer: whole segments are gathered after the forward pass."""

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Nothing to do: a save has copied its blocks when the step returns."""

    # --- both ------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """Counts since the last call, which vLLM makes once a step."""
        if self._scheduler is not None:
            self._scheduler.step_ended()
            if self._cached is not None:
                self._cached.look()  # just before vLLM takes the events
            return self._scheduler.stats.take()
        return self._worker.stats.take() if self._worker is not None else None

    @classmethod
    @contained()
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        """The counts that arrived from another process."""
        return HyperspaceStats(data=data or {})

    @classmethod
    @contained()
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics:
        """Our metrics on vLLM's /metrics."""
        compat.register_connector()  # without the plugin MultiConnector would not find the statistics' class
        return HyperspacePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        """Say goodbye to the node, which frees what this process leased."""
        self._switch_off()

    def _switch_off(self) -> None:
        """Answer "nothing" from now on. A worker's copies end first: failed loads' blocks go to other requests."""
        parts = (self._worker, self._report, self._client)
        self._scheduler = self._worker = self._report = self._cached = self._client = None
        for part in parts:
            if part is not None:
                _close(part)


@contained()
def _close(part: WorkerSide | EngineReport | NodeClient) -> None:
    part.close()


def _check_supported(config: VllmConfig) -> None:
    parallel, cache = config.parallel_config, config.cache_config
    for what, wrong in (
        ("pipeline parallelism", parallel.pipeline_parallel_size > 1),
        ("decode context parallelism", parallel.decode_context_parallel_size > 1),
        ("prefill context parallelism", parallel.prefill_context_parallel_size > 1),
        ("an engine across several hosts", parallel.nnodes > 1),
        ("a pooling model", config.model_config.runner_type == "pooling"),
        ("KV scales computed at run time", bool(getattr(cache, "calculate_kv_scales", False))),
    ):
        if wrong:
            raise Refused("unsupported", what)


def _client_name(config: VllmConfig) -> str:
    """One name for the scheduler and the workers of one engine: vLLM's engine id, which is new at every start."""
    rank = config.parallel_config.data_parallel_index
    return f"{socket.gethostname()}-{config.kv_transfer_config.engine_id}-{rank}"


def _scope_reader(inherited: Inherited) -> Callable[[Request], RequestScope]:
    def scope_of(request: Request) -> RequestScope:
        signed = (request.kv_transfer_params or {}).get("hyperspace")
        if signed is None:
            scope = RequestScope("private", "") if inherited.many_tenants else DEFAULT_SCOPE
        else:
            scope = verify_scope(inherited.secret, signed, request.cache_salt) or _unverified(signed)
        if request.cache_salt:
            return RequestScope("private", scope.tenant)
        return scope

    return scope_of


def _unverified(signed: object) -> RequestScope:
    """The scope of a request whose signed scope does not verify: another process tree signed it (an API server on
    another host), or a client forged it. Its tenant separates it from other tenants, and "unverified" from all verified
    requests.
    """
    return RequestScope("private", f"unverified {signed.get('tenant') if isinstance(signed, dict) else ''}")
