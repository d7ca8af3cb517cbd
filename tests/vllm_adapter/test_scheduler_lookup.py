"""The scheduler's half looks prefixes up: what it asks, promises and waits for."""

import pytest
import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from hyperspace_vllm.core.local.kv_messages import (
    LookupPrefix,
    RegisterLayout,
    ReleaseLookup,
    RequestEnded,
    SegmentNamed,
)
from hyperspace_vllm.core.local.session_messages import Heartbeat
from hyperspace_vllm.core.prefix.segment import chain_seed, segment_keys
from hyperspace_vllm.core.response.scope import RequestScope
from hyperspace_vllm.vllm_adapter.metadata import IDLE
from hyperspace_vllm.vllm_adapter.older_vllm import CacheHitSource
from hyperspace_vllm.vllm_adapter.scheduler_side import LOOKUPS_MAX
from tests.support.scheduler_bench import FINGERPRINT, PLAN, Bench, S, admitted, blocks, keys_of, load, request


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
    assert metadata.engine is not None
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
