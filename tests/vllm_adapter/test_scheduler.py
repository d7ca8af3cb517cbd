"""The scheduler's half, asked and answered as vLLM and a node do it: real requests, real messages, a clock by hand."""

from dataclasses import dataclass, field

import pytest
import torch
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import KVConnectorBlockState, SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from hyperspace_vllm.core.local.messages import (
    ClientMessage,
    Heartbeat,
    LoadedRow,
    LookupPrefix,
    NodeMessage,
    PrefixAnswer,
    RegisterLayout,
    ReleaseLookup,
    RequestEnded,
    SegmentNamed,
    Slab,
)
from hyperspace_vllm.core.prefix.segment import chain_seed, segment_keys
from hyperspace_vllm.core.response.scope import DEFAULT_SCOPE, RequestScope
from hyperspace_vllm.vllm_adapter.kv_layout import KVPlan, LayerSlot, PartPlan
from hyperspace_vllm.vllm_adapter.metadata import IDLE, StepMetadata
from hyperspace_vllm.vllm_adapter.older_vllm import CacheHitSource
from hyperspace_vllm.vllm_adapter.scheduler_side import LOOKUPS_MAX, STEP_SAVES_MAX, SchedulerSide

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

    def of(self, kind: type) -> list:
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
            role,  # type: ignore[arg-type]
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
    return Request(name, ids, SamplingParams(max_tokens=8), None, **options)  # type: ignore[arg-type]


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


# --- looking up ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "computed", "asked"),
    [
        (255, 0, 0),
        (256, 0, 0),  # the last token is always computed: it has to be sampled from
        (257, 0, 1),
        (512, 0, 1),
        (513, 0, 2),
        (513, 256, 2),
        (513, 384, 2),
        (513, 512, 0),
        (600, 512, 0),
    ],
)
def test_a_lookup_names_the_whole_segments_before_the_last_token(tokens: int, computed: int, asked: int) -> None:
    bench, r = Bench(), request(tokens)
    expected = (None, False) if asked else (0, False)
    assert bench.side.matched_tokens(r, computed) == expected
    lookups = bench.node.of(LookupPrefix)
    assert [list(lookup.segment_keys) for lookup in lookups] == (
        [keys_of(list(r.all_token_ids))[:asked]] if asked else []
    )
    assert [lookup.start_token for lookup in lookups] == ([computed] if asked else [])


def test_the_node_hears_the_layout_before_anything_else_in_every_session() -> None:
    bench = Bench()
    bench.side.matched_tokens(request(600, "a"), 0)
    bench.side.matched_tokens(request(600, "b"), 0)
    assert [type(m) for m in bench.node.sent] == [RegisterLayout, LookupPrefix, LookupPrefix]
    bench.node.epoch = 2
    bench.side.matched_tokens(request(600, "c"), 0)
    assert [type(m) for m in bench.node.sent[3:]] == [RegisterLayout, LookupPrefix]


def test_a_found_prefix_is_promised_then_loaded_then_released() -> None:
    bench, r = Bench(), request(1000)
    metadata = load(bench, r, 3)
    (planned,) = metadata.loads
    assert (planned.request_id, planned.start_token, planned.end_token, len(planned.rows)) == ("r", 0, 768, 6)
    assert metadata.engine in bench.node.of(RegisterLayout)
    assert metadata.engine.layout == PLAN.layout(FINGERPRINT)
    assert bench.side.hit_sources(r, 768) == {CacheHitSource.P2P: 768}
    bench.side.allocated(r, (), 0)  # vLLM calls again when the load is over
    assert not bench.node.of(ReleaseLookup)
    bench.side.received(KVConnectorOutput(finished_recving={"r"}))
    assert [m.lookup for m in bench.node.of(ReleaseLookup)] == [bench.node.of(LookupPrefix)[0].lookup]
    assert bench.counts()["hyperspace_l2_lookups_total"] == {"hit|network": 1}


def test_a_promise_counts_from_what_the_engine_has_by_then() -> None:
    bench, r = Bench(), request(1000)
    bench.side.matched_tokens(r, 128)
    bench.node.answer(3)
    assert bench.side.matched_tokens(r, 128) == (640, True)
    assert bench.side.matched_tokens(r, 384) == (384, True)  # another request computed some of it meanwhile
    bench.side.allocated(r, tuple(map(tuple, blocks(768))), 384)
    assert bench.step({}).loads[0].start_token == 384


def test_a_promise_is_kept_while_vllm_finds_no_blocks_for_it() -> None:
    bench, r = Bench(), request(1000)
    bench.side.matched_tokens(r, 0)
    bench.node.answer(3)
    assert [bench.side.matched_tokens(r, 0) for _ in range(3)] == [(768, True)] * 3
    assert len(bench.node.of(LookupPrefix)) == 1


def test_blocks_evicted_below_what_was_asked_for_make_it_a_miss() -> None:
    bench, r = Bench(), request(1000)
    bench.side.matched_tokens(r, 256)
    bench.node.answer(3)
    assert bench.side.matched_tokens(r, 128) == (0, False)
    assert bench.node.of(ReleaseLookup)


def test_a_miss_is_asked_once_an_admission() -> None:
    bench, r = Bench(), request(600)
    bench.side.matched_tokens(r, 0)
    bench.node.answer(0, reason="miss")
    assert [bench.side.matched_tokens(r, 0) for _ in range(3)] == [(0, False)] * 3
    assert len(bench.node.of(LookupPrefix)) == 1
    assert bench.counts()["hyperspace_l2_lookups_total"] == {"miss|miss": 1}


def test_a_declined_promise_ends_its_lease() -> None:
    bench, r = Bench(), request(600)
    bench.side.matched_tokens(r, 0)
    bench.node.answer(2)
    bench.side.matched_tokens(r, 0)
    bench.side.allocated(r, (), 0)
    assert bench.node.of(ReleaseLookup)
    assert bench.step({}) is IDLE


def test_waiting_ends_with_the_deadline_whatever_the_node_does() -> None:
    bench, r = Bench(deadline_ms=500), request(600)
    bench.side.matched_tokens(r, 0)
    bench.clock.seconds += 0.59
    assert bench.side.matched_tokens(r, 0) == (None, False)
    bench.clock.seconds += 0.02
    assert bench.side.matched_tokens(r, 0) == (0, False)
    assert bench.node.of(ReleaseLookup)
    bench.node.answer(2)  # too late: released already
    assert bench.side.matched_tokens(r, 0) == (0, False)


@pytest.mark.parametrize("fault", ["lease", "session", "socket"])
def test_a_node_that_goes_away_ends_the_waiting_at_once(fault: str) -> None:
    bench, r = Bench(), request(600)
    bench.side.matched_tokens(r, 0)
    bench.clock.seconds += 0.15
    if fault == "lease":
        bench.node.connected = False
    elif fault == "session":
        bench.node.epoch = 2
    else:
        bench.node.accepting = False
    assert bench.side.matched_tokens(r, 0) == (0, False)


def test_waiting_probes_the_socket_ten_times_a_second_for_all_lookups_together() -> None:
    bench = Bench()
    waiting = [request(600, f"r{i}") for i in range(5)]
    for r in waiting:
        bench.side.matched_tokens(r, 0)
    for _ in range(1000):
        bench.clock.seconds += 0.001
        for r in waiting:
            bench.side.matched_tokens(r, 0)
    assert 8 <= len(bench.node.of(Heartbeat)) <= 11


def test_without_a_node_every_request_runs_at_once() -> None:
    bench = Bench()
    bench.node.connected = False
    assert bench.side.matched_tokens(request(600), 0) == (0, False)
    assert bench.counts()["hyperspace_l2_lookups_total"] == {"miss|no_node": 1}


def test_a_measured_prefill_bounds_the_waiting_unless_fetching_is_forced() -> None:
    for fetch, longest_ms in (("auto", 25), ("always", 10_000)):
        bench = Bench(fetch)
        warm = request(513, "warm")
        bench.side.matched_tokens(warm, 512)
        bench.step({warm: 512})
        bench.clock.seconds += 0.051  # 511 prompt tokens in 51 ms: 10 a ms
        bench.side.step_ended()
        bench.side.matched_tokens(request(600), 0)
        lookup = bench.node.of(LookupPrefix)[-1]
        assert lookup.prefill_ms == 51
        assert lookup.deadline_ms == longest_ms


def test_lookups_are_bounded_and_the_next_waits_for_its_turn() -> None:
    bench = Bench(deadline_ms=1000)
    waiting = [request(600, f"r{i}") for i in range(LOOKUPS_MAX + 1)]
    for r in waiting:
        assert bench.side.matched_tokens(r, 0) == (None, False)
    assert len(bench.node.of(LookupPrefix)) == LOOKUPS_MAX
    bench.side.finished(waiting[0])
    bench.side.matched_tokens(waiting[-1], 0)
    assert len(bench.node.of(LookupPrefix)) == LOOKUPS_MAX + 1


# --- requests that are not a function of their tokens ---------------------------------------------


def test_embeddings_pooling_and_streamed_input_are_never_looked_up_or_saved() -> None:
    bench = Bench()
    for r in (
        Request("e", None, SamplingParams(max_tokens=1), None, prompt_embeds=torch.zeros(600, 4)),
        request(600, "s", resumable=True),
    ):
        assert bench.side.matched_tokens(r, 0) == (0, False)
        assert bench.step({r: 600}) is IDLE
        bench.side.finished(r)
    assert [type(m) for m in bench.node.sent] == [RegisterLayout]


def test_a_request_that_must_not_read_caches_still_feeds_them() -> None:
    bench, r = Bench(), request(600)
    r.skip_reading_prefix_cache = True
    assert bench.side.matched_tokens(r, 0) == (0, False)
    assert len(bench.step({r: 600}).saves) == 2


def test_salt_tenant_and_scope_reach_the_keys_and_the_node() -> None:
    bench, r = Bench(), request(600, cache_salt="pepper")
    bench.scope = RequestScope("private", "t1")
    bench.side.matched_tokens(r, 0)
    (lookup,) = bench.node.of(LookupPrefix)
    assert lookup.scope == "private"
    assert list(lookup.segment_keys) == keys_of(list(r.all_token_ids), "pepper", "t1")
    bench.node.answer(0)
    bench.side.matched_tokens(r, 0)
    bench.step({r: 600})
    assert {named.scope for named in bench.node.of(SegmentNamed)} == {"private"}


def picture(name: str, offset: int) -> MultiModalFeatureSpec:
    return MultiModalFeatureSpec(None, "image", name, PlaceholderRange(offset, 20), name)


def test_images_are_in_the_keys_of_the_segments_in_which_they_start() -> None:
    digests = ["a" * 64, "b" * 64]
    sent = []
    for number, digest in enumerate(digests):
        bench, r = Bench(), request(600, mm_features=[picture(digest, 250)])
        bench.side.matched_tokens(r, 0)
        (lookup,) = bench.node.of(LookupPrefix)
        sent.append(lookup.segment_keys)
        tokens, items = list(r.all_token_ids), [(digests[number].encode(), 250)]
        assert list(lookup.segment_keys) == list(segment_keys(chain_seed(FINGERPRINT, b"", "", ""), tokens, S, items))
    assert set(sent[0]).isdisjoint(sent[1])


@pytest.mark.parametrize("name", ["cat", "a" * 64])
def test_images_stay_in_the_node_because_clients_may_name_them_themselves(name: str) -> None:
    bench = Bench()
    bench.side.matched_tokens(request(600, mm_features=[picture(name, 0)]), 0)
    assert bench.node.of(LookupPrefix)[0].scope == "private"


def test_two_engines_and_two_requests_of_one_id_share_no_name() -> None:
    first, second = Bench(), Bench()
    names = []
    for bench in (first, second, first):
        r = admitted(bench, request(600, "r" * 300))
        (one, two) = bench.step({r: 600}).saves
        bench.side.finished(r)
        assert {one.name, two.name} == {m.request_id for m in bench.node.of(SegmentNamed)[-2:]}
        assert bench.node.of(RequestEnded)[-1].request_id == one.name
        names.append((bench.node.of(RegisterLayout)[0].engine, one.name))
    assert len(set(names)) == 3


# --- saving -------------------------------------------------------------------------------------


def admitted(bench: Bench, r: Request) -> Request:
    """A request that found nothing."""
    if bench.side.matched_tokens(r, 0) == (None, False):
        bench.node.answer(0, reason="miss")
        bench.side.matched_tokens(r, 0)
    return r


def test_each_step_saves_the_segments_that_it_fills_and_names_them() -> None:
    bench, r = Bench(), request(1000)
    admitted(bench, r)
    saved = [[s.segment for s in bench.step({r: n}).saves] for n in (200, 400, 400)]
    assert saved == [[], [0, 1], [2]]
    assert [m.segment_key for m in bench.node.of(SegmentNamed)] == keys_of(list(r.all_token_ids))


def test_a_save_carries_the_blocks_of_its_segment_by_group() -> None:
    bench, r = Bench(), request(600)
    (first, second) = bench.step({admitted(bench, r): 600}).saves
    assert (first.blocks, second.blocks) == (((1, 2), (101, 102)), ((3, 4), (103, 104)))
    assert first.parts == second.parts == (0, 1)


def test_a_segment_is_saved_once_whoever_computes_it_again() -> None:
    bench = Bench()
    assert len(bench.step({admitted(bench, request(600, "a")): 600}).saves) == 2
    assert bench.step({admitted(bench, request(600, "b")): 600}).saves != ()  # the lookup missed: the node lost them
    bench.side.matched_tokens(r := request(600, "c"), 512)
    assert bench.step({r: 600}) is IDLE


def test_a_loaded_prefix_is_not_saved_again() -> None:
    bench, r = Bench(), request(1000)
    load(bench, r, 2)
    bench.side.received(KVConnectorOutput(finished_recving={"r"}))
    r.num_computed_tokens = 512
    assert [s.segment for s in bench.step({r: 488}).saves] == [2]


def test_what_was_shared_privately_is_saved_again_for_everybody() -> None:
    bench = Bench()
    bench.scope = RequestScope("private", "")
    bench.step({admitted(bench, request(300, "a")): 300})
    bench.scope = DEFAULT_SCOPE
    bench.side.matched_tokens(r := request(300, "b"), 256)
    assert len(bench.step({r: 300}).saves) == 1
    bench.scope = RequestScope("private", "")
    bench.side.matched_tokens(r := request(300, "c"), 256)
    assert bench.step({r: 300}) is IDLE


def test_generated_tokens_fill_segments_too_and_are_named_when_they_are_known() -> None:
    bench = Bench()
    r = admitted(bench, request(255))
    bench.step({r: 255})
    r.append_output_token_ids(7)
    assert [s.segment for s in bench.step({r: 1}).saves] == [0]
    assert [m.segment_key for m in bench.node.of(SegmentNamed)] == keys_of(list(r.all_token_ids))


def test_under_async_scheduling_the_name_follows_the_token() -> None:
    bench = Bench()
    r = admitted(bench, request(255))
    bench.step({r: 255})
    assert [s.segment for s in bench.step({r: 1}).saves] == [0]  # token 255 is being sampled while this is planned
    assert not bench.node.of(SegmentNamed)
    r.append_output_token_ids(7)
    bench.step({r: 1})
    assert [m.segment_key for m in bench.node.of(SegmentNamed)] == keys_of(list(r.all_token_ids))


def test_the_last_step_of_a_request_is_named_when_it_ends() -> None:
    bench = Bench()
    r = admitted(bench, request(255))
    bench.step({r: 255})
    bench.step({r: 1})
    r.append_output_token_ids(7)
    bench.side.finished(r)
    assert [type(m) for m in bench.node.sent[-2:]] == [SegmentNamed, RequestEnded]


def test_rejected_drafts_are_never_saved() -> None:
    bench = Bench(speculative=True)
    r = admitted(bench, request(253))
    bench.step({r: 253})
    r.append_output_token_ids(7)  # token 253
    r.spec_token_ids = [1, 2, 3]
    assert bench.step({r: 4}) is IDLE  # computes up to 256, of which 3 are drafts
    r.num_computed_tokens = 254  # all three were rejected
    r.append_output_token_ids(8)
    assert bench.step({r: 4}) is IDLE
    r.append_output_token_ids(9)
    r.append_output_token_ids(10)
    assert [s.segment for s in bench.step({r: 4}).saves] == [0]
    assert bench.node.of(SegmentNamed)[0].segment_key == keys_of(list(r.all_token_ids))[0]


def test_tokens_dropped_by_a_preemption_never_name_what_was_saved_for_them() -> None:
    bench = Bench()
    r = admitted(bench, request(255))
    bench.step({r: 255})
    bench.step({r: 1})  # saved for the token in flight, which the preemption drops
    r.num_preemptions, r.num_computed_tokens = 1, 0
    r.append_output_token_ids(9)
    assert bench.side.matched_tokens(r, 0) == (0, False)  # 256 tokens: still no whole segment before the last
    assert bench.step({r: 256}) is IDLE
    bench.side.finished(r)
    assert not bench.node.of(SegmentNamed)


def test_a_preempted_request_may_ask_again_for_its_output_too() -> None:
    bench = Bench()
    r = admitted(bench, request(300))
    bench.step({r: 300})
    r.append_output_token_ids([5] * 300)
    r.num_preemptions, r.num_computed_tokens = 1, 0
    assert bench.side.matched_tokens(r, 0) == (None, False)
    assert len(bench.node.of(LookupPrefix)[-1].segment_keys) == 2


def test_freed_window_blocks_are_fine_outside_the_window_and_skip_the_part_inside() -> None:
    bench = Bench()
    r = admitted(bench, request(1600))
    full_table, window_table = blocks(1600)
    r.num_computed_tokens = 1280
    (tracked,) = bench.side._tracked.values()
    assert tracked is not None
    tracked.done_segments = 5
    # Segment 5 is tokens 1280..1535, whose end needs 1025 on (block 8): everything it has must be there.
    window_table[:10] = [0] * 10
    (save,) = bench.step({r: 320}, {"r": (full_table, window_table)}).saves
    assert save.parts == (0, 1)
    tracked.done_segments, r.num_computed_tokens = 5, 1280
    bench.side._known.clear()
    window_table[10] = 0
    (save,) = bench.step({r: 320}, {"r": (full_table, window_table)}).saves
    assert save.parts == (0,)
    assert bench.counts()["hyperspace_l2_saves_total"] == {"skipped|blocks_freed": 1}


def test_what_a_step_has_no_place_for_is_saved_by_the_next_ones_in_order() -> None:
    bench = Bench()
    count = 2 * STEP_SAVES_MAX + 3
    long = admitted(bench, request(count * S + 1, "long"))
    short = admitted(bench, request(3 * S + 1, "short", cache_salt="other"))
    steps = [bench.step({long: count * S, short: 3 * S}).saves]
    while len(steps) < 4:
        steps.append(bench.step({long: 1, short: 1}).saves)
        for r in (long, short):
            r.append_output_token_ids(7)
    assert [len(saves) for saves in steps] == [STEP_SAVES_MAX, STEP_SAVES_MAX, 6, 0]
    saved = [(save.name, save.segment, save.blocks) for saves in steps for save in saves]
    full, window = blocks(count * S)
    whole = [((full[i], full[i + 1]), (window[i], window[i + 1])) for i in range(0, 2 * count, 2)]
    assert [(segment, held) for _, segment, held in saved] == [*enumerate(whole), *enumerate(whole[:3])]
    assert len({name for name, _, _ in saved}) == 2
    assert "hyperspace_l2_saves_total" not in bench.counts()
    assert len(bench.node.of(SegmentNamed)) == count + 3


def test_segments_left_over_when_a_request_ends_are_counted_as_skipped() -> None:
    bench = Bench()
    r = admitted(bench, request((STEP_SAVES_MAX + 3) * S + 1))
    assert len(bench.step({r: (STEP_SAVES_MAX + 3) * S}).saves) == STEP_SAVES_MAX
    bench.side.finished(r)
    assert bench.counts()["hyperspace_l2_saves_total"] == {"skipped|step_full": 3}


def test_a_preempted_request_has_nothing_left_over() -> None:
    bench = Bench()
    r = admitted(bench, request((STEP_SAVES_MAX + 3) * S + 1))
    bench.step({r: (STEP_SAVES_MAX + 3) * S})
    r.num_preemptions, r.num_computed_tokens = 1, 0
    assert bench.step({r: 1}) is IDLE
    bench.side.finished(r)
    assert "hyperspace_l2_saves_total" not in bench.counts()


def test_window_blocks_freed_before_their_turn_skip_that_part_alone() -> None:
    bench, count = Bench(), STEP_SAVES_MAX + 2
    r = admitted(bench, request(count * S + 1))
    bench.step({r: count * S})
    full, window = blocks(count * S + 1)
    window[: 2 * count - 4] = [0] * (2 * count - 4)
    window[2 * count - 4] = 0  # of segment count - 2, the first that is left over
    (first, second) = bench.step({r: 1}, {r.request_id: (full, window)}).saves
    assert (first.segment, first.parts, second.segment, second.parts) == (count - 2, (0,), count - 1, (0, 1))
    assert bench.counts()["hyperspace_l2_saves_total"] == {"skipped|blocks_freed": 1}


# --- roles --------------------------------------------------------------------------------------


def test_a_producer_saves_and_never_looks_up_nor_counts_misses() -> None:
    bench, r = Bench(role="kv_producer"), request(600)
    assert bench.side.matched_tokens(r, 0) == (0, False)
    assert [save.segment for save in bench.step({r: 600}).saves] == [0, 1]
    assert not bench.node.of(LookupPrefix)
    bench.fingerprint = None
    assert bench.side.matched_tokens(request(600, "unidentified"), 0) == (0, False)
    assert bench.counts() == {}


def test_a_consumer_loads_and_never_saves() -> None:
    bench, r = Bench(role="kv_consumer"), request(1000)
    assert len(load(bench, r, 2).loads) == 1
    bench.side.received(KVConnectorOutput(finished_recving={"r"}))
    r.num_computed_tokens = 512
    assert bench.step({r: 488}) is IDLE
    bench.side.finished(r)
    assert not bench.node.of(SegmentNamed)


def test_a_new_node_is_given_everything_again() -> None:
    bench = Bench()
    bench.step({admitted(bench, request(600, "a")): 600})
    bench.node.epoch = 2
    bench.side.matched_tokens(r := request(600, "b"), 512)
    assert len(bench.step({r: 600}).saves) == 2


# --- ends ---------------------------------------------------------------------------------------


def test_a_request_that_ends_while_it_waits_releases_its_lookup() -> None:
    bench, r = Bench(), request(600)
    bench.side.matched_tokens(r, 0)
    bench.side.finished(r)
    assert [type(m) for m in bench.node.sent[-2:]] == [ReleaseLookup, RequestEnded]
    bench.node.answer(2)
    bench.side.matched_tokens(request(600, "other"), 0)  # reads the late answer, which nobody wants


def test_a_release_that_finds_the_queue_full_is_sent_again() -> None:
    bench, r = Bench(), request(600)
    bench.side.matched_tokens(r, 0)
    bench.node.accepting = False
    bench.side.finished(r)
    bench.node.accepting = True
    bench.side.matched_tokens(request(600, "next"), 0)
    assert [m.lookup for m in bench.node.of(ReleaseLookup)] == [bench.node.of(LookupPrefix)[0].lookup]


def test_a_request_aborted_while_loading_is_over_and_its_report_is_ignored() -> None:
    bench, r = Bench(), request(600)
    load(bench, r, 2)
    bench.side.finished(r)
    assert bench.node.of(ReleaseLookup)
    bench.side.received(KVConnectorOutput(finished_recving={"r"}, failed_recving={"r"}))


def test_bytes_that_failed_are_not_promised_again() -> None:
    bench, r = Bench(), request(600)
    load(bench, r, 2)
    bench.side.received(KVConnectorOutput(finished_recving={"r"}, failed_recving={"r"}))
    assert bench.side.matched_tokens(r, 0) == (0, False)
    r.num_preemptions = 1
    assert bench.side.matched_tokens(r, 0) == (0, False)


def test_a_request_that_never_ran_needs_no_tracking() -> None:
    bench = Bench()
    bench.side.finished(request(600))
    assert not bench.node.sent


def test_after_a_reset_running_requests_save_nothing_and_the_same_weights_match_again() -> None:
    bench = Bench()
    running = admitted(bench, request(600, "a"))
    before = bench.node.of(LookupPrefix)[0].segment_keys
    bench.side.reset()
    assert bench.step({running: 600}) is IDLE
    bench.side.matched_tokens(request(600, "b"), 0)
    assert bench.node.of(LookupPrefix)[-1].segment_keys == before


def test_other_weights_have_other_keys() -> None:
    bench = Bench()
    bench.side.matched_tokens(request(600, "a"), 0)
    bench.fingerprint = bytes(32)
    bench.side.matched_tokens(request(600, "b"), 0)
    first, second = (set(m.segment_keys) for m in bench.node.of(LookupPrefix))
    assert first.isdisjoint(second)


def test_nothing_is_asked_or_saved_until_the_models_files_are_identified() -> None:
    bench = Bench()
    bench.fingerprint = None
    early = request(600, "early")
    assert bench.side.matched_tokens(early, 0) == (0, False)
    assert bench.step({early: 600}) is IDLE
    assert not bench.node.sent
    assert bench.side.engine is None
    assert bench.counts()["hyperspace_l2_lookups_total"] == {"miss|unidentified": 1}
    bench.fingerprint = FINGERPRINT
    assert bench.side.matched_tokens(request(600, "later"), 0) == (None, False)
    assert bench.side.matched_tokens(early, 0) == (0, False)


def test_an_adapter_that_is_not_known_is_a_miss_and_one_that_is_has_keys_of_its_own() -> None:
    bench = Bench()
    for name, digest in (("a", None), ("b", b"1" * 32), ("c", b"2" * 32)):
        r = request(600, name)
        r.lora_request = LoRARequest("lora", 7, "/adapter")
        bench.adapters.digests[7] = digest
        bench.side.matched_tokens(r, 0)
    assert bench.counts()["hyperspace_l2_lookups_total"] == {"miss|lora": 1}
    asked = [list(message.segment_keys) for message in bench.node.of(LookupPrefix)]
    assert asked == [keys_of([*request(600).all_token_ids], lora=digest)[:2] for digest in (b"1" * 32, b"2" * 32)]


def test_what_an_adapter_computed_is_not_named_once_its_files_were_replaced() -> None:
    bench, r = Bench(), request(600)
    r.lora_request = LoRARequest("lora", 7, "/adapter")
    bench.adapters.digests[7] = b"1" * 32
    admitted(bench, r)
    bench.adapters.digests[7] = None
    bench.step({r: 600})
    bench.side.finished(r)
    assert not bench.node.of(SegmentNamed)


def test_an_idle_step_has_no_work_and_makes_no_object() -> None:
    bench = Bench()
    assert bench.step({}) is IDLE
    r = admitted(bench, request(100))
    bench.step({r: 100})
    assert all(bench.step({r: 1}) is IDLE for _ in range(50))
