"""The scheduler's half saves: which segments, in which step, and under which names."""

from vllm.v1.outputs import KVConnectorOutput

from hyperspace_vllm.core.local.kv_messages import LookupPrefix, RequestEnded, SegmentNamed
from hyperspace_vllm.core.response.scope import DEFAULT_SCOPE, RequestScope
from hyperspace_vllm.vllm_adapter.metadata import IDLE
from hyperspace_vllm.vllm_adapter.scheduler_side import STEP_SAVES_MAX
from tests.support.scheduler_bench import Bench, S, admitted, blocks, keys_of, load, request


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
