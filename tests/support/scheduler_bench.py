"""A scheduler's half of the connector against a node that the test plays, step by step."""

from dataclasses import dataclass, field
from typing import TypeVar

from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import KVConnectorBlockState, SchedulerOutput
from vllm.v1.request import Request

from hyperspace_vllm.core.local.kv_messages import LookupPrefix, PrefixAnswer
from hyperspace_vllm.core.local.messages import ClientMessage, NodeMessage
from hyperspace_vllm.core.local.slab import LoadedRow, Slab
from hyperspace_vllm.core.prefix.segment import chain_seed, segment_keys
from hyperspace_vllm.core.response.scope import DEFAULT_SCOPE
from hyperspace_vllm.vllm_adapter.kv_layout import KVPlan, LayerSlot, PartPlan
from hyperspace_vllm.vllm_adapter.metadata import StepMetadata
from hyperspace_vllm.vllm_adapter.scheduler_side import SchedulerSide

M = TypeVar("M")

S = 256


FINGERPRINT = b"\x01" * 32


PLAN = KVPlan(
    segment_tokens=S,
    scheduler_block_tokens=128,
    parts=(
        PartPlan(0, 128, (LayerSlot("full", 0, 64, 0),), 64),
        PartPlan(512, 128, (LayerSlot("window", 1, 64, 0),), 64),
    ),
    ranks=1,
)


@dataclass
class NodePeer:
    """The node's end of the socket: what was said to it, and what it says next."""

    sent: list[ClientMessage] = field(default_factory=list)
    inbox: list[NodeMessage] = field(default_factory=list)
    connected: bool = True
    accepting: bool = True
    epoch: int = 1
    arena_bytes: int = 1 << 40

    def send(self, message: ClientMessage) -> bool:
        if self.connected and self.accepting:
            self.sent.append(message)
        return self.connected and self.accepting

    def receive(self) -> list[NodeMessage]:
        messages, self.inbox = self.inbox, []
        return messages

    def of(self, kind: type[M]) -> list[M]:
        return [message for message in self.sent if isinstance(message, kind)]

    def answer(self, end_segment: int, source: str = "network", reason: str = "hit") -> None:
        lookup = self.of(LookupPrefix)[-1]
        rows = tuple(
            LoadedRow(segment, part, 0, Slab(segment * 2 + part, 0, 64, 5))
            for segment in range(lookup.start_token // S, end_segment)
            for part in (0, 1)
        )
        source = source if end_segment else "none"
        self.inbox.append(PrefixAnswer(lookup.lookup, end_segment, rows, source, "blake3", reason))  # type: ignore[arg-type]


class Clock:
    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


class LoadedAdapters:
    """Adapters by vLLM's id; one whose files were replaced has no digest any more."""

    def __init__(self) -> None:
        self.digests: dict[int, bytes | None] = {}

    def digest(self, number: int, path: str) -> bytes | None:
        return self.digests.get(number)


class Bench:
    """One scheduler half, its node and its clock."""

    def __init__(
        self, fetch: str = "auto", deadline_ms: int = 10_000, speculative: bool = False, role: str = "kv_both"
    ) -> None:
        self.node, self.clock, self.scope = NodePeer(), Clock(), DEFAULT_SCOPE
        self.fingerprint: bytes | None = FINGERPRINT
        self.adapters = LoadedAdapters()
        self.side = SchedulerSide(
            self.node,  # type: ignore[arg-type]
            PLAN,
            lambda: self.fingerprint,
            self.adapters,  # type: ignore[arg-type]
            fetch,  # type: ignore[arg-type]
            deadline_ms,
            speculative,
            role,
            lambda request: self.scope,
            self.clock,
        )

    def step(
        self, scheduled: dict[Request, int], tables: dict[str, tuple[list[int], ...]] | None = None
    ) -> StepMetadata:
        """One step of vLLM's scheduler: metadata is built, then the tokens count as computed."""
        output = SchedulerOutput.make_empty()
        output.num_scheduled_tokens = {request.request_id: n for request, n in scheduled.items()}
        output.total_num_scheduled_tokens = sum(scheduled.values())
        tables = tables or {r.request_id: blocks(r.num_computed_tokens + n) for r, n in scheduled.items()}
        output.kv_connector_block_state = KVConnectorBlockState(
            set(output.num_scheduled_tokens), lambda request_id: tables[request_id], {}
        )
        for request in scheduled:
            if request.spec_token_ids:
                output.scheduled_spec_decode_tokens[request.request_id] = request.spec_token_ids
        metadata = self.side.step(output)
        for request, n in scheduled.items():
            request.num_computed_tokens += n
        return metadata

    def counts(self) -> dict[str, dict[str, int]]:
        return {name: values for name, values in self.side.stats.data.items() if isinstance(values, dict)}


def blocks(tokens: int) -> tuple[list[int], ...]:
    """Tables of both groups with nothing freed; ids differ between the groups."""
    count = -(-tokens // 128)
    return [1 + i for i in range(count)], [101 + i for i in range(count)]


def request(tokens: int, name: str = "r", **options: object) -> Request:
    ids = [i % 250 for i in range(tokens)]
    return Request(name, ids, SamplingParams(max_tokens=8), None, **options)


def keys_of(tokens: list[int], salt: str = "", tenant: str = "", lora: bytes = b"") -> list[bytes]:
    return list(segment_keys(chain_seed(FINGERPRINT, lora, salt, tenant), tokens, S))


def load(bench: Bench, r: Request, end_segment: int, source: str = "network") -> StepMetadata:
    """A request whose prefix was found, promised and taken."""
    assert bench.side.matched_tokens(r, 0) == (None, False)
    bench.node.answer(end_segment, source)
    n, is_async = bench.side.matched_tokens(r, 0)
    assert (n, is_async) == (end_segment * S, True)
    assert n is not None
    bench.side.allocated(r, tuple(map(tuple, blocks(n))), n)
    return bench.step({})


def admitted(bench: Bench, r: Request) -> Request:
    """A request that found nothing."""
    if bench.side.matched_tokens(r, 0) == (None, False):
        bench.node.answer(0, reason="miss")
        bench.side.matched_tokens(r, 0)
    return r
