"""The scheduler's half: looks up prefixes, decides what to load and to save, names what was saved.

A request's states: asked (None until the node's answer or a deadline) -> loading -> running, saving each segment in the
step that fills it -> finished. It is `settled` once its lookup has ended for this admission: vLLM asks again every step
while the request waits, and that must not repeat the lookup.
"""

import itertools
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

from vllm.config.kv_transfer import KVRole
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from ..client import NodeClient
from ..contained import contained
from ..core.local.kv_messages import (
    LookupPrefix,
    PrefixAnswer,
    RegisterLayout,
    ReleaseLookup,
    RequestEnded,
    SegmentNamed,
)
from ..core.local.session_messages import Heartbeat, Rejected
from ..core.prefix.segment import chain_seed
from ..core.records.ids import SegmentKey
from ..core.records.limits import FETCH_PREFILL_SHARE, LOOKUP_ROWS_MAX, PROMPT_SEGMENTS_MAX
from ..core.response.scope import RequestScope
from .adapters import Adapters
from .cached_segments import CachedSegments
from .kv_layout import KVPlan
from .metadata import IDLE, BlockTables, PrefixLoad, SegmentSave, StepMetadata
from .older_vllm import CacheHitSource, block_tables, has_failed
from .prefill_rate import PrefillRate
from .stats import HyperspaceStats
from .tracked_request import TrackedLookup, TrackedRequest

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool

logger = logging.getLogger("vllm.hyperspace")

LOOKUPS_MAX = 64  # unfinished ones; each may pin a prefix in the arena
KNOWN_KEYS_MAX = 65_536  # segments the node has from us or gave us: 64 Ki x 32 B = 2 MiB
STEP_SAVES_MAX = 32  # segments gathered in one step: a step waits for 32 x 256 tokens' worth of copies at most
DEADLINE_MS_MIN = 20  # the node answers a local lookup in about 1 ms; this leaves room for a busy host
PROBE_S = 0.1  # while something waits: sending to a dead node fails at once, its lease expires only after 5 s
ANSWER_GRACE_MS = 100  # the node enforces the deadline; without its answer the lookup ends this much later

_HIT_SOURCES = {"memory": CacheHitSource.HOST, "disk": CacheHitSource.DISK, "network": CacheHitSource.P2P}


class SchedulerSide:
    """One per engine. `scope_of` reads a request's scope; `now_s` is a monotonic clock in seconds.

    `fingerprint` is None until the model's files are identified, and another value once its weights have changed.
    """

    def __init__(
        self,
        client: NodeClient,
        plan: KVPlan,
        fingerprint: Callable[[], bytes | None],
        adapters: Adapters,
        fetch: Literal["auto", "always", "never"],
        lookup_deadline_ms: int,
        speculative: bool,
        role: KVRole,
        scope_of: Callable[[Request], RequestScope],
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client, self._plan, self._now_s, self._scope_of = client, plan, now_s, scope_of
        self._fingerprint, self._adapters, self._speculative = fingerprint, adapters, speculative
        self._token = os.urandom(16)
        self._engine: RegisterLayout | None = None
        self._fetch, self._deadline_ms = fetch, lookup_deadline_ms
        self._loading, self._saving = role != "kv_producer", role != "kv_consumer"
        self._segments_max = min(PROMPT_SEGMENTS_MAX, LOOKUP_ROWS_MAX // (len(plan.parts) * plan.ranks))
        self._tracked: dict[str, TrackedRequest | None] = {}  # None: declined for good
        self._lookups: dict[int, TrackedRequest] = {}
        self._unreleased: list[int] = []  # lookups that could not be released because the node's queue was full
        self._numbers = itertools.count(1)
        self._loads: list[PrefixLoad] = []
        self._known: OrderedDict[SegmentKey, bool] = OrderedDict()  # key -> others may fetch it
        self._epoch = 0
        self._probe_at_s = 0.0
        self._rate = PrefillRate()
        self._cached: CachedSegments | None = None
        self.stats = HyperspaceStats()

    def watch(self, pool: "BlockPool") -> CachedSegments:
        """Note from now on which segments that others may know of are in vLLM's cache."""
        self._cached = CachedSegments(self._plan, pool)
        return self._cached

    @property
    def engine(self) -> RegisterLayout | None:
        """How this engine is registered with the node; None until its fingerprint is known."""
        if self._engine is None and (fingerprint := self._fingerprint()) is not None:
            self._engine = RegisterLayout(self._plan.layout(fingerprint), self._token)
        return self._engine

    # --- reading ---------------------------------------------------------------------------------

    def matched_tokens(self, request: Request, start_token: int) -> tuple[int | None, bool]:
        """Tokens beyond `start_token` that can be loaded: a multiple of the block size, or None while we ask."""
        tracked = self._track(request)
        if tracked is None or not self._loading:
            return 0, False
        tracked.notice_preemption()
        tokens = self._matched(tracked, start_token)
        return tokens, bool(tokens)

    def allocated(self, request: Request, blocks: BlockTables, tokens: int) -> None:
        """vLLM took (tokens > 0) or declined the promise. It calls again, with 0, when the load is over."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None or tracked.loading:
            return
        lookup = tracked.lookup
        if lookup is None or lookup.answer is None:
            return
        if not tokens:
            self._settle(tracked, "unused")
            return
        start, end = tracked.promised_from, tracked.promised_from + tokens
        self._loads.append(PrefixLoad(request.request_id, start, end, blocks, lookup.answer.rows))
        tracked.loading = tracked.settled = True
        self.stats.count("hyperspace_l2_lookups_total", "hit", lookup.answer.source)
        self.stats.count("hyperspace_l2_tokens_total", "hit", by=tokens)

    def hit_sources(self, request: Request, tokens: int) -> dict[CacheHitSource, int]:
        """The tier that the promised tokens came from."""
        tracked = self._tracked.get(request.request_id)
        if not tokens or tracked is None or tracked.lookup is None or tracked.lookup.answer is None:
            return {}
        source = _HIT_SOURCES.get(tracked.lookup.answer.source, CacheHitSource.EXTERNAL_UNSPECIFIED)
        return {source: tokens}

    def received(self, output: KVConnectorOutput) -> None:
        """All ranks have reported these loads: end the leases, remember what failed."""
        for request_id in output.finished_recving or ():
            tracked = self._tracked.get(request_id)
            if tracked is None or not tracked.loading:
                continue
            tracked.loading = False
            assert tracked.lookup is not None
            answer = tracked.lookup.answer
            assert answer is not None
            end_token = answer.end_segment * self._plan.segment_tokens
            tracked.load_failed = has_failed(output, tracked.request, end_token)
            if not tracked.load_failed:
                self._remember(tracked, range(answer.end_segment))
            self._release(tracked)

    def _matched(self, tracked: TrackedRequest, start_token: int) -> int | None:
        if tracked.settled:
            return 0
        self._receive()
        if tracked.lookup is None:
            return self._ask(tracked, start_token)
        lookup, segment = tracked.lookup, self._plan.segment_tokens
        reason = self._lost(lookup)
        if reason is None and lookup.answer is None:
            return None
        if reason is None and start_token // segment < lookup.start_token // segment:
            reason = "local_blocks_evicted"  # rows before those we asked for are needed now
        end_token = lookup.answer.end_segment * segment if lookup.answer and reason is None else 0
        if end_token <= start_token:
            self._settle(tracked, reason or (lookup.answer.reason if lookup.answer else ""))
            return 0
        tracked.promised_from = start_token
        return end_token - start_token

    def _ask(self, tracked: TrackedRequest, start_token: int) -> int | None:
        request, segment = tracked.request, self._plan.segment_tokens
        count = min((request.num_tokens - 1) // segment, self._segments_max)
        if count * segment <= start_token or request.skip_reading_prefix_cache:
            tracked.settled = True
            return 0
        if not self._in_session():
            self._settle(tracked, "no_node")
            return 0
        now_s = self._now_s()
        if tracked.waiting_since_s is None:
            tracked.waiting_since_s = now_s
        if len(self._lookups) >= LOOKUPS_MAX:
            if now_s - tracked.waiting_since_s < self._deadline_ms / 1000:
                return None
            self._settle(tracked, "busy")
            return 0
        prefill_ms = self._rate.estimate_ms(count * segment - start_token)
        deadline_ms = self._deadline_ms
        if self._fetch == "auto" and prefill_ms:
            deadline_ms = min(deadline_ms, max(int(prefill_ms * FETCH_PREFILL_SHARE), DEADLINE_MS_MIN))
        tracked.extend_keys(count, self._plan.segment_tokens)
        number = next(self._numbers) & 0xFFFFFFFF
        message = LookupPrefix(
            number,
            tracked.name,
            tuple(tracked.keys[:count]),
            start_token,
            prefill_ms,
            deadline_ms,
            tracked.scope.scope,
        )
        if not self._client.send(message):
            self._settle(tracked, "node_busy")
            return 0
        deadline_s = now_s + (deadline_ms + ANSWER_GRACE_MS) / 1000
        tracked.lookup = TrackedLookup(number, self._epoch, start_token, now_s, deadline_s)
        tracked.node_knows = True
        self._lookups[number] = tracked
        self.stats.count("hyperspace_l2_tokens_total", "asked", by=count * segment - start_token)
        return None

    def _lost(self, lookup: TrackedLookup) -> str | None:
        """Why this lookup's answer can't be used or waited for any longer; None if it can."""
        if not self._client.connected or self._client.epoch != lookup.epoch:
            return "node_gone"
        now_s = self._now_s()
        if lookup.answer is None and now_s >= lookup.deadline_s:
            return "deadline"
        if lookup.answer is None and now_s >= self._probe_at_s:
            self._probe_at_s = now_s + PROBE_S
            if not self._client.send(Heartbeat()):
                return "node_gone"
        return None

    def _receive(self) -> None:
        for message in self._client.receive():
            if isinstance(message, PrefixAnswer):
                tracked = self._lookups.get(message.lookup)
                if tracked is None or tracked.lookup is None:
                    continue  # the lookup was given up; its ReleaseLookup is in flight
                tracked.lookup.answer = message
                self.stats.observe_lookup(self._now_s() - tracked.lookup.asked_s)
                for key in tracked.keys[message.end_segment :]:
                    self._known.pop(key, None)  # evicted, or never arrived: save it again
            elif isinstance(message, Rejected):
                logger.error("hyperspace: the node rejected a message of the scheduler: %s", message.detail)

    def _settle(self, tracked: TrackedRequest, reason: str) -> None:
        """This admission computes its own prefill."""
        self.stats.count("hyperspace_l2_lookups_total", "miss", reason)
        tracked.settled = True
        self._release(tracked)

    def _release(self, tracked: TrackedRequest) -> None:
        lookup, tracked.lookup = tracked.lookup, None
        if lookup is None:
            return
        del self._lookups[lookup.number]
        if lookup.epoch == self._client.epoch and not self._client.send(ReleaseLookup(lookup.number)):
            self._unreleased.append(lookup.number)

    def _in_session(self) -> bool:
        """Whether the node is there; a new session gets our layout first and knows none of our segments."""
        engine = self.engine
        if not self._client.connected or engine is None:
            return False
        epoch = self._client.epoch
        if epoch != self._epoch:
            if not self._client.send(engine):
                return False
            self._epoch = epoch
            self._known.clear()
            self._unreleased.clear()
        while self._unreleased and self._client.send(ReleaseLookup(self._unreleased[-1])):
            self._unreleased.pop()
        return True

    # --- writing ---------------------------------------------------------------------------------

    def step(self, output: SchedulerOutput) -> StepMetadata:
        """What workers do in this step. In the idle case: nothing, in O(1)."""
        prompt_tokens = output.total_num_scheduled_tokens - len(output.num_scheduled_tokens)
        self._rate.started(self._now_s(), prompt_tokens)
        loads, self._loads = tuple(self._loads), []
        may_save = self._saving and output.num_scheduled_tokens and self._in_session()
        saves = tuple(self._saves(output)) if may_save else ()
        if not loads and not saves:
            return IDLE
        return StepMetadata(self.engine, loads, saves)

    def step_ended(self) -> None:
        """The oldest step's output came back."""
        self._rate.ended(self._now_s())

    def _saves(self, output: SchedulerOutput) -> Iterator[SegmentSave]:
        planned = 0
        for request_id, scheduled in output.num_scheduled_tokens.items():
            tracked = self._tracked.get(request_id)
            if tracked is None:
                continue
            tracked.notice_preemption()
            if tracked.unnamed:
                self._name_known(tracked)
            end_token = tracked.request.num_computed_tokens + scheduled
            if self._speculative:
                # Drafts may be rejected, also in steps still in flight: their KV is saved once they are accepted
                # tokens.
                drafts = len(output.scheduled_spec_decode_tokens.get(request_id, ()))
                end_token = min(end_token - drafts, tracked.request.num_tokens)
            end_segment = end_token // self._plan.segment_tokens
            if self._cached is not None and tracked.noted < end_segment:
                self._note_cached(self._cached, tracked, end_segment)
            tracked.filled_segments = max(tracked.filled_segments, end_segment)
            if end_segment <= tracked.done_segments or planned == STEP_SAVES_MAX:
                continue
            tables = block_tables(output, request_id)
            if tables is None:
                continue
            # The request's next steps save what this step has no room for: its blocks are held until it ends.
            while tracked.done_segments < end_segment and planned < STEP_SAVES_MAX:
                save = self._save(tracked, tracked.done_segments, tables)
                tracked.done_segments += 1
                if save is not None:
                    planned += 1
                    yield save

    def _note_cached(self, cached: CachedSegments, tracked: TrackedRequest, end_segment: int) -> None:
        """Note the step's segments: vLLM has already put its blocks into its cache, as far as it knows their tokens."""
        if tracked.scope.scope == "private" or tracked.scope.tenant:
            tracked.noted = PROMPT_SEGMENTS_MAX
            return
        tracked.extend_keys(end_segment, self._plan.segment_tokens)
        tracked.noted = cached.note(tracked.keys[:end_segment], tracked.noted, tracked.request.block_hashes)

    def _save(self, tracked: TrackedRequest, segment: int, tables: tuple[list[int], ...]) -> SegmentSave | None:
        if segment in tracked.spoilt:
            return None
        named = tracked.extend_keys(segment + 1, self._plan.segment_tokens)
        if named and self._node_has(tracked, tracked.keys[segment]):
            return None
        start, end = segment * self._plan.segment_tokens, (segment + 1) * self._plan.segment_tokens
        parts, blocks = [], [()] * len(tables)  # type: list[int], list[tuple[int, ...]]
        for number, part in enumerate(self._plan.parts):
            first, last = start // part.block_tokens, end // part.block_tokens
            needed = max(part.first_needed_block(end), first)
            for group in {layer.group for layer in part.layers}:
                blocks[group] = tuple(tables[group][first:last])
                if len(blocks[group]) != last - first or 0 in blocks[group][needed - first :]:
                    self.stats.count("hyperspace_l2_saves_total", "skipped", "blocks_freed")
                    break
            else:
                parts.append(number)
        if not parts:
            return None
        tracked.node_knows = True
        tracked.unnamed.append(segment)
        if named:
            self._name_known(tracked)
        return SegmentSave(tracked.name, segment, tuple(parts), tuple(blocks))

    def _node_has(self, tracked: TrackedRequest, key: SegmentKey) -> bool:
        """Whether the node has the segment, and shares it with other nodes if this request's scope allows that."""
        is_shared = self._known.get(key)
        return is_shared is not None and (is_shared or not tracked.may_leave_node)

    def _name_known(self, tracked: TrackedRequest) -> None:
        """Name the saved segments whose last token is known (under async scheduling it lags a step)."""
        # vLLM may have read an adapter's files again since this request arrived.
        if tracked.unnamed and tracked.lora and self._adapter(tracked.request) != tracked.lora:
            tracked.spoil_unnamed()
        while tracked.unnamed and tracked.extend_keys(tracked.unnamed[0] + 1, self._plan.segment_tokens):
            segment = tracked.unnamed.pop(0)
            scope = tracked.scope.scope
            self._client.send(SegmentNamed(tracked.name, segment, tracked.keys[segment], scope))
            self._remember(tracked, range(segment, segment + 1))

    def _remember(self, tracked: TrackedRequest, segments: range) -> None:
        for key in tracked.keys[segments.start : segments.stop]:
            self._known[key] = tracked.may_leave_node or self._known.get(key, False)
            self._known.move_to_end(key)
        while len(self._known) > KNOWN_KEYS_MAX:
            self._known.popitem(last=False)

    # --- requests --------------------------------------------------------------------------------

    def finished(self, request: Request) -> None:
        """The request is over; it may never have run, and its load may still be in progress."""
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is None:
            return
        self._name_known(tracked)
        if left := max(tracked.filled_segments - tracked.done_segments, 0):
            self.stats.count("hyperspace_l2_saves_total", "skipped", "step_full", by=left)
        self._release(tracked)
        if tracked.node_knows:
            self._client.send(RequestEnded(tracked.name))

    def reset(self) -> None:
        """End saving and loading for current requests: vLLM drops its caches, or the weights change."""
        self._known.clear()
        if self._cached is not None:
            self._cached.clear()
        for request_id, tracked in self._tracked.items():
            if tracked is not None:
                self._release(tracked)
                self._tracked[request_id] = None

    def _track(self, request: Request) -> TrackedRequest | None:
        if request.request_id not in self._tracked:
            self._tracked[request.request_id] = self._admit(request)
        return self._tracked[request.request_id]

    @contained()  # a client's or a file's data must not affect other requests: this request is left to vLLM
    def _admit(self, request: Request) -> TrackedRequest | None:
        """None for requests whose KV isn't a function of their tokens (embeddings), or doesn't stay so (sessions)."""
        if request.prompt_embeds is not None or request.pooling_params is not None or request.resumable:
            return None
        fingerprint, lora = self._fingerprint(), self._adapter(request)
        if fingerprint is None or lora is None:
            if self._loading:
                reason = "unidentified" if fingerprint is None else "lora"
                self.stats.count("hyperspace_l2_lookups_total", "miss", reason)
            return None
        scope = self._scope_of(request)
        seed = chain_seed(fingerprint, lora, request.cache_salt or "", scope.tenant)
        items = tuple((f.mm_hash or f.identifier, f.mm_position.offset) for f in request.mm_features)
        if items:
            # A client may set the hash of its images itself, also to that of another image: others must not load what
            # it saves.
            scope = RequestScope("private", scope.tenant)
        multimodal = tuple((name.encode(), offset) for name, offset in items)
        return TrackedRequest(request, str(next(self._numbers)), seed, scope, multimodal, lora)

    def _adapter(self, request: Request) -> bytes | None:
        """The digest of the request's LoRA adapter, b"" without one; None: its files are unknown, or were replaced."""
        lora = request.lora_request
        return b"" if lora is None else self._adapters.digest(lora.lora_int_id, lora.lora_path)
