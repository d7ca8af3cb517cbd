"""A request as the scheduler's half follows it: its segment keys, its lookup, and how far its segments are saved."""

from dataclasses import dataclass, field

from vllm.v1.request import Request

from ..core.local.kv_messages import PrefixAnswer
from ..core.prefix.segment import Multimodal, next_key
from ..core.records.ids import SegmentKey
from ..core.response.scope import RequestScope


@dataclass(slots=True)
class TrackedLookup:
    """A prefix lookup that was sent to the node in session `epoch`, and its answer once that has come."""

    number: int
    epoch: int
    start_token: int
    asked_s: float
    deadline_s: float
    answer: PrefixAnswer | None = None


@dataclass(slots=True)
class TrackedRequest:
    """The state of one request; `settled` once its lookup has ended for this admission."""

    request: Request
    name: str  # to the node: a client may reuse a request id while the earlier one's rows are still in flight
    seed: bytes
    scope: RequestScope
    multimodal: tuple[Multimodal, ...]
    lora: bytes
    keys: list[SegmentKey] = field(default_factory=list)
    waiting_since_s: float | None = None
    promised_from: int = 0  # token from which the last promise counts
    lookup: TrackedLookup | None = None
    loading: bool = False
    settled: bool = False
    load_failed: bool = False
    preemptions: int = 0
    done_segments: int = 0  # segments before this one were loaded, saved or skipped
    filled_segments: int = 0  # segments before this one are complete in its blocks
    unnamed: list[int] = field(default_factory=list)  # saved, but their last token isn't known yet
    spoilt: set[int] = field(default_factory=set)  # saved with tokens that were dropped: never named
    noted: int = 0  # segments before this one are in `CachedSegments`, or have left it since
    node_knows: bool = False  # the node keeps state for this request id

    @property
    def may_leave_node(self) -> bool:
        """Whether other nodes may fetch its segments."""
        return self.scope.scope != "private"

    def spoil_unnamed(self) -> None:
        """The saved segments that have no name yet never get one."""
        self.spoilt.update(self.unnamed)
        self.unnamed.clear()

    def notice_preemption(self) -> None:
        """A preempted request starts from token 0: it may look up again, and resamples what was in flight."""
        if self.request.num_preemptions == self.preemptions:
            return
        self.preemptions = self.request.num_preemptions
        self.spoil_unnamed()
        self.done_segments = self.filled_segments = self.noted = 0
        self.settled = self.load_failed
        self.waiting_since_s = None

    def extend_keys(self, count: int, segment_tokens: int) -> bool:
        """Compute keys up to `count` segments, as far as tokens are known; True if all were computed."""
        while len(self.keys) < count and (len(self.keys) + 1) * segment_tokens <= self.request.num_tokens:
            start = len(self.keys) * segment_tokens
            end = start + segment_tokens
            items = [item for item in self.multimodal if start <= item[1] < end]
            previous = self.keys[-1] if self.keys else self.seed
            self.keys.append(next_key(previous, self.request.all_token_ids[start:end], items))
        return len(self.keys) >= count
