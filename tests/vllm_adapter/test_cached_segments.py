"""Which segments lie in vLLM's cache: noted and lost through vLLM's own block pool, and reported to the node."""

from dataclasses import dataclass, field

import pytest
from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256 as vllm_sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock, get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from hyperspace_vllm.core.local.kv_messages import PrefixesInMemory, RegisterLayout
from hyperspace_vllm.core.prefix.segment import chain_seed, segment_keys
from hyperspace_vllm.core.records.ids import SegmentKey
from hyperspace_vllm.core.response.scope import DEFAULT_SCOPE, RequestScope
from hyperspace_vllm.vllm_adapter import cached_segments
from hyperspace_vllm.vllm_adapter.cached_segments import CachedSegments
from hyperspace_vllm.vllm_adapter.engine_report import EngineReport
from hyperspace_vllm.vllm_adapter.kv_layout import KVPlan, LayerSlot, PartPlan
from tests.support.scheduler_bench import FINGERPRINT, PLAN, Bench, NodePeer, S

BLOCK = 128
HASH = 16  # vLLM hashes in smaller runs than the blocks of this plan
FULL = KVPlan(S, BLOCK, PLAN.parts[:1], 1)
WINDOWS = KVPlan(S, BLOCK, (PartPlan(512, BLOCK, (LayerSlot("window", 0, 64, 0),), 64),), 1)


@pytest.fixture(autouse=True)
def hashes() -> None:
    init_none_hash(vllm_sha256)


def request(tokens: int, first: int = 0, **options: object) -> Request:
    ids = [(first + i) % 250 for i in range(tokens)]
    hasher = get_request_block_hasher(HASH, vllm_sha256)
    return Request(f"r{first}", ids, SamplingParams(max_tokens=8), None, block_hasher=hasher, **options)


def keys_of(r: Request) -> list[SegmentKey]:
    return list(segment_keys(chain_seed(FINGERPRINT, b"", "", ""), list(r.all_token_ids), S))


@dataclass
class Cache:
    """vLLM's block pool, used as its scheduler uses it."""

    plan: KVPlan = PLAN
    blocks: int = 64
    pool: BlockPool = field(init=False)
    held: dict[str, list[list[KVCacheBlock]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.blocks, True, HASH, enable_kv_cache_events=True)
        self.cached = CachedSegments(self.plan, self.pool)
        self.groups = len(self.plan.parts)

    def compute(self, r: Request, tokens: int | None = None) -> None:
        """Every group has the blocks of the request's first `tokens` tokens."""
        full = (tokens or r.num_tokens) // BLOCK
        tables = self.held.setdefault(r.request_id, [[] for _ in range(self.groups)])
        for group, table in enumerate(tables):
            before = len(table)
            table += self.pool.get_new_blocks(full - before)
            self.pool.cache_full_blocks(r, table, before, full, BLOCK, group)

    def free(self, r: Request) -> None:
        """The request is over; its blocks stay until others need theirs, the last ones first."""
        for table in self.held.pop(r.request_id):
            self.pool.free_blocks(reversed(table))

    def use(self, blocks: int) -> None:
        """Others need blocks, for a moment."""
        self.pool.free_blocks(self.pool.get_new_blocks(blocks))

    def present(self) -> set[SegmentKey] | None:
        self.cached.look()
        found = self.cached.present()
        return None if found is None else set(found)


def test_the_whole_segments_of_what_was_computed_are_there() -> None:
    cache, r = Cache(FULL), request(1000)
    cache.compute(r, 600)
    assert cache.cached.note(keys_of(r), 0, r.block_hashes) == 2  # the third isn't computed yet
    assert cache.present() == set(keys_of(r)[:2])
    assert cache.present() is None  # nothing new
    cache.compute(r)
    assert cache.cached.note(keys_of(r), 2, r.block_hashes) == 3
    assert cache.present() == set(keys_of(r))


@pytest.mark.parametrize("as_numbers", ["0", "1"])
def test_a_segment_that_loses_a_block_is_gone_and_those_before_it_stay(
    as_numbers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES", as_numbers)
    cache, r = Cache(FULL, blocks=9), request(1024)
    cache.compute(r)
    cache.cached.note(keys_of(r), 0, r.block_hashes)
    cache.free(r)
    assert cache.present() == set(keys_of(r))
    cache.use(1)
    assert cache.present() == set(keys_of(r)[:3])
    cache.use(5)
    assert cache.present() == set(keys_of(r)[:1])


def test_a_reset_empties_it_even_if_no_step_follows() -> None:
    cache, r = Cache(), request(512)
    cache.compute(r)
    cache.cached.note(keys_of(r), 0, r.block_hashes)
    assert cache.present() == set(keys_of(r))
    cache.free(r)
    assert cache.pool.reset_prefix_cache()
    assert cache.present() == set()


def test_a_publisher_gets_every_event_and_none_is_missed_between_its_looks() -> None:
    cache, r, other = Cache(FULL, blocks=9), request(512), request(512, first=7)
    cache.compute(r)
    cache.cached.note(keys_of(r), 0, r.block_hashes)
    cache.free(r)
    cache.cached.look()
    cache.compute(other)
    cache.use(4)  # takes blocks of the first one, after the last look …
    events = cache.pool.take_events()  # … and before the next
    assert [type(e) for e in events].count(BlockStored) == 2
    assert [type(e) for e in events].count(BlockRemoved) > 0
    assert cache.present() != set(keys_of(r))


def test_what_left_and_came_back_between_two_looks_is_there() -> None:
    cache, r = Cache(FULL, blocks=5), request(512)
    for _ in range(3):
        cache.compute(r)
        cache.cached.note(keys_of(r), 0, r.block_hashes)
        cache.free(r)
        cache.use(4)
    cache.compute(r)
    cache.cached.note(keys_of(r), 0, r.block_hashes)
    assert cache.present() == set(keys_of(r))


def test_with_windows_a_prefix_counts_while_a_request_could_go_on_from_its_end() -> None:
    cache, r = Cache(), request(1024)
    cache.compute(r)
    cache.cached.note(keys_of(r), 0, r.block_hashes)
    table = cache.held[r.request_id][1]
    between, last = table[:4], table[4:]
    cache.pool.evict_blocks({block.block_id for block in between})
    assert cache.present() in (None, set(keys_of(r)))  # outside the last window
    cache.pool.evict_blocks({last[-1].block_id})
    assert cache.present() == set(keys_of(r)[:3])  # the window before the third's end is still whole in it
    cache.pool.evict_blocks({block.block_id for block in last})
    assert cache.present() == set()


def test_a_model_of_windows_alone() -> None:
    cache, r = Cache(WINDOWS), request(1024)
    cache.compute(r)
    assert cache.cached.note(keys_of(r), 0, r.block_hashes) == 4
    assert cache.present() == set(keys_of(r))


def test_the_table_is_bounded_and_keeps_what_was_used_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached_segments, "VRAM_SEGMENTS_MAX", 3)
    cache, old, new = Cache(FULL), request(512), request(512, first=7)
    for r in (old, new):
        cache.compute(r)
        cache.cached.note(keys_of(r), 0, r.block_hashes)
    assert cache.present() == {keys_of(old)[1], *keys_of(new)}


@pytest.mark.parametrize(
    ("scope", "noted"),
    [
        (DEFAULT_SCOPE, 2),
        (RequestScope("public", ""), 2),
        (RequestScope("private", ""), 0),
        (RequestScope("network", "tenant"), 0),
    ],
)
def test_only_what_may_leave_the_node_is_noted(scope: RequestScope, noted: int) -> None:
    bench, cache, r = Bench(), Cache(), request(600)
    bench.scope = scope
    watched = bench.side.watch(cache.pool)
    bench.side.matched_tokens(r, 0)
    cache.compute(r)
    bench.step({r: 600})
    watched.look()
    assert len(watched.present() or ()) == noted


def test_a_prompt_is_noted_as_it_is_computed_and_forgotten_when_weights_may_have_changed() -> None:
    bench, cache, r = Bench(), Cache(), request(1024)
    watched = bench.side.watch(cache.pool)
    bench.side.matched_tokens(r, 0)
    for computed in (400, 800, 1024):
        cache.compute(r, computed)
        bench.step({r: computed - r.num_computed_tokens})
        assert watched.present() == frozenset(keys_of(r)[: computed // S])
    bench.side.reset()
    assert watched.present() == frozenset()


# --- the report ---------------------------------------------------------------------------------


ENGINE = RegisterLayout(PLAN.layout(FINGERPRINT), bytes(range(16)))


@dataclass
class Reported:
    """A report, its node and its cache."""

    node: NodePeer = field(default_factory=NodePeer)
    cache: Cache = field(default_factory=Cache)
    prompt_tokens_max: int = 1000

    def __post_init__(self) -> None:
        self.report = EngineReport(self.node, lambda: ENGINE, 4, self.prompt_tokens_max, self.cache.cached)  # type: ignore[arg-type]

    def told(self) -> list[object]:
        """What the node heard of the next report."""
        self.node.sent.clear()
        self.report.report()
        return list(self.node.sent)


def test_the_node_hears_of_changes_and_of_nothing_else() -> None:
    engine, r = Reported(), request(256)
    (key,) = keys_of(r)
    assert engine.told() == [ENGINE, PrefixesInMemory(0, (), ())]
    assert engine.told() == []
    engine.report.added(r)
    engine.cache.compute(r)
    engine.cache.cached.note([key], 0, r.block_hashes)
    assert engine.told() == [PrefixesInMemory(250, (key,), ())]
    engine.report.finished(r)
    engine.cache.free(r)
    assert engine.told() == [PrefixesInMemory(0, (), ())]
    engine.cache.pool.reset_prefix_cache()
    assert engine.told() == [PrefixesInMemory(0, (), (key,))]


def test_a_new_session_hears_everything_and_a_full_queue_loses_nothing() -> None:
    engine, r = Reported(), request(512)
    engine.cache.compute(r)
    engine.cache.cached.note(keys_of(r), 0, r.block_hashes)
    engine.told()
    engine.node.epoch += 1
    registered, message = engine.told()
    assert registered == ENGINE
    assert isinstance(message, PrefixesInMemory)
    assert set(message.come) == set(keys_of(r))
    engine.cache.free(r)
    engine.cache.pool.reset_prefix_cache()
    engine.node.accepting = False
    assert engine.told() == []
    engine.node.accepting = True
    (message,) = engine.told()
    assert isinstance(message, PrefixesInMemory)
    assert set(message.gone) == set(keys_of(r))


def test_a_session_warns_of_an_arena_that_one_prompt_overflows(caplog: pytest.LogCaptureFixture) -> None:
    page = 64 * 1024
    engine = Reported(prompt_tokens_max=1050)  # four segments: four pages of full attention, two of the window's tail
    for arena_pages, segments, warned in ((6, 4, False), (3, 1, True), (0, 0, True)):
        engine.node.arena_bytes = arena_pages * page
        engine.node.epoch += 1
        caplog.clear()
        engine.report.report()
        engine.report.report()
        assert len(caplog.records) == warned
        if warned:
            assert f"holds {segments * 256} tokens" in caplog.text
            assert "1050" in caplog.text
            assert "arena_bytes to 1 MiB" in caplog.text
