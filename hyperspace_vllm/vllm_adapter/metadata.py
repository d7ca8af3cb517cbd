"""The messages between the scheduler's half of the connector and the workers' halves, once a step."""

from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from ..core.local.kv_messages import RegisterLayout
from ..core.local.slab import LoadedRow

BlockTables = tuple[tuple[int, ...], ...]  # block ids by KV cache group; 0 is vLLM's null block


@dataclass(frozen=True, slots=True)
class PrefixLoad:
    """Copy `rows` into the blocks of tokens [start_token, end_token); both are multiples of every block size.

    `blocks` are the request's whole block tables. Every rank reports the request exactly once; without `rows`, as
    failed.
    """

    request_id: str
    start_token: int
    end_token: int
    blocks: BlockTables
    rows: tuple[LoadedRow, ...]


@dataclass(frozen=True, slots=True)
class SegmentSave:
    """Stage these `parts` of one segment; `blocks` are the segment's own, by group, valid in this step only.

    `name` is the request's name between the scheduler and the node.
    """

    name: str
    segment: int
    parts: tuple[int, ...]
    blocks: BlockTables


@dataclass(frozen=True, slots=True)
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]  # vLLM is untyped for us
    """The work of one step. `engine`, set whenever there is any, is the layout that both halves tell the node.

    Workers check their tensors against its layout.
    """

    engine: RegisterLayout | None = None
    loads: tuple[PrefixLoad, ...] = ()
    saves: tuple[SegmentSave, ...] = ()

    @property
    def promised(self) -> set[str]:
        """The requests that every rank has to report, once."""
        return {load.request_id for load in self.loads}


IDLE = StepMetadata()  # one object for all steps without work


@dataclass(frozen=True, slots=True)
class WorkerOff(KVConnectorWorkerMetadata):  # type: ignore[misc]  # vLLM is untyped for us
    """At least one rank no longer loads or saves, so every promise of a load would fail."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """One is enough."""
        return self
