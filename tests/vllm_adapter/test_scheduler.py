"""The scheduler's half of the connector: roles, ends of requests, and what changes keys."""

from vllm.lora.request import LoRARequest
from vllm.v1.outputs import KVConnectorOutput

from hyperspace_vllm.core.local.kv_messages import LookupPrefix, ReleaseLookup, RequestEnded, SegmentNamed
from hyperspace_vllm.vllm_adapter.metadata import IDLE
from tests.support.scheduler_bench import FINGERPRINT, Bench, admitted, keys_of, load, request


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
