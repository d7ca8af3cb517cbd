"""What supported releases older than the newest lack, under the newest one's names. One dated section each.

Each is found by asking, not by comparing versions. test_older_vllm.py fails when the oldest supported release has the
thing itself, and the section can go.
"""

from collections.abc import Mapping
from enum import StrEnum
from importlib import import_module
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, KVCacheSpec
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from .metadata import PrefixLoad, StepMetadata

__all__ = [
    "FAILED_LOADS_HAVE_NAMES",
    "CacheHitSource",
    "ConnectorBase",
    "KVConnectorTransferResults",
    "block_tables",
    "has_failed",
    "lies_in_host_memory",
    "make_arg_parser",
    "replayed_tokens",
]

# vLLM 0.32 (2026-10) asks connectors which tier the tokens of a hit came from. Earlier releases don't.
try:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
except ImportError:

    class CacheHitSource(StrEnum):  # type: ignore[no-redef]
        """The tiers that we report."""

        HOST = "host"
        DISK = "disk"
        P2P = "p2p"
        EXTERNAL_UNSPECIFIED = "external_unspecified"


def make_arg_parser() -> Any:
    """The parser of `vllm serve`. vLLM 0.33 (2026-11) has moved it. Imported on use: engines don't need it."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        cli_args = import_module("vllm.entrypoints.common.cli_args")
    except ImportError:
        cli_args = import_module("vllm.entrypoints.launchers.cli_args")
    return cli_args.make_arg_parser(FlexibleArgumentParser())


# vLLM 0.30 (2026-09) takes what was sent, received and failed in one answer, and a failed load by its request. vLLM
# 0.29 takes a failed load by its blocks, only for models with one KV cache group: with several, it stops.
try:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

    ConnectorBase = KVConnectorBase_V1
    FAILED_LOADS_HAVE_NAMES = True
except ImportError:
    from dataclasses import dataclass, field

    FAILED_LOADS_HAVE_NAMES = False

    @dataclass
    class KVConnectorTransferResults:  # type: ignore[no-redef]
        """Request ids since the last answer; failed receives are among the finished ones too."""

        finished_sending: set[str] = field(default_factory=set)
        finished_recving: set[str] = field(default_factory=set)
        failed_recving: set[str] = field(default_factory=set)

    class ConnectorBase(KVConnectorBase_V1):  # type: ignore[no-redef,misc]
        """Gives the answers of `get_transfer_results` to a vLLM that asks two other questions."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self._loading: dict[str, PrefixLoad] = {}  # until they are reported
            self._failed_blocks: set[int] = set()

        def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
            """Remember the blocks of this step's loads, which may be reported in a later step."""
            super().bind_connector_metadata(connector_metadata)
            if isinstance(connector_metadata, StepMetadata):
                self._loading.update((load.request_id, load) for load in connector_metadata.loads)

        def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
            """The first question: requests."""
            results = self.get_transfer_results(finished_req_ids)
            for request_id in results.finished_recving:
                load = self._loading.pop(request_id)
                if request_id in results.failed_recving:
                    block_tokens = self._vllm_config.cache_config.block_size
                    (table,) = load.blocks
                    self._failed_blocks.update(table[load.start_token // block_tokens : load.end_token // block_tokens])
            return results.finished_sending or None, results.finished_recving or None

        def get_block_ids_with_load_errors(self) -> set[int]:
            """The second: the blocks that a failed load should have filled."""
            failed, self._failed_blocks = self._failed_blocks, set()
            return failed


def has_failed(output: KVConnectorOutput, request: Request, end_token: int) -> bool:
    """Whether the load of `request` up to `end_token`, which `output` says is over, has failed.

    vLLM 0.30 (2026-09) names it. When vLLM 0.29 reports it, the tokens no longer count as computed.
    """
    failed: set[str] | None = getattr(output, "failed_recving", None)
    return request.request_id in failed if failed is not None else bool(request.num_computed_tokens < end_token)


def block_tables(output: SchedulerOutput, request_id: str) -> tuple[list[int], ...] | None:
    """A scheduled request's block ids by group, or None where vLLM doesn't say.

    vLLM 0.30 (2026-09) gives them for all requests of the step; 0.29 only for those that got new blocks in it, so that
    a segment which a request fills by decoding is not saved there.
    """
    state = output.kv_connector_block_state
    if state is None:
        return None
    known: Mapping[str, tuple[list[int], ...]] | None = getattr(state, "block_ids", None)
    tables: tuple[list[int], ...] | None = state.get_block_ids(request_id) if known is None else known.get(request_id)
    return tables


def lies_in_host_memory(group: KVCacheGroupSpec) -> bool:
    """Whether the group's blocks aren't on the device. vLLM 0.30 (2026-09); in earlier releases all are."""
    return bool(getattr(group, "host_resident", False))


def replayed_tokens(spec: KVCacheSpec) -> int:
    """Tokens that are computed again instead of kept. vLLM 0.31 (2026-10); in earlier releases none are."""
    return int(getattr(spec, "prefix_replay_tokens", 0))
