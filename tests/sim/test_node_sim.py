"""Several nodes on a virtual clock, with peers that lose, freeze and lie. A failure prints the seed that replays it."""

import random
from functools import partial

import pytest

from hyperspace_vllm.core.events.prefix_reading import AnswerPrefix
from hyperspace_vllm.core.prefix.segment import chain_seed, segment_keys
from hyperspace_vllm.core.records.ids import SegmentKey, network_id
from hyperspace_vllm.core.records.layout import Layout, Part
from hyperspace_vllm.core.records.limits import FETCH_STALL_MS, KiB, MiB
from hyperspace_vllm.sim.world import Host, World

NETWORK = network_id("sim")
FULL = Layout(b"f" * 32, 256, (Part(0, MiB),), 1)
MIXED = Layout(b"m" * 32, 256, (Part(0, 300 * KiB), Part(512, MiB)), 2)


def prompt(number: int, segments: int) -> tuple[SegmentKey, ...]:
    tokens = [number * 1_000_000 + i for i in range(segments * 256)]
    return tuple(segment_keys(chain_seed(bytes(32), b"", "", ""), tokens, 256))


def two_nodes(layout: Layout = FULL, segments: int = 8, seed: int = 1) -> tuple[World, Host, Host, int]:
    """A has published a prompt and B, which trusts A, wants it."""
    world = World(seed, NETWORK)
    a, b = world.add("A", ()), world.add("B", ("A",))
    world.publish(a, layout, prompt(1, segments))
    world.run(2_000)
    return world, a, b, segments


def only_answer(host: Host, lookup: int) -> AnswerPrefix:
    (answer,) = host.answers[lookup]
    return answer.effect


def test_a_published_prefix_reaches_another_node() -> None:
    for layout in (FULL, MIXED):
        world, a, b, segments = two_nodes(layout)
        assert all(times == 1 for times in a.staged.values())
        lookup = world.want(b, layout, prompt(1, segments))
        world.run(5_000)
        answer = only_answer(b, lookup)
        assert (answer.end_segment, answer.source, answer.reason) == (segments, "network", "hit")
        windows = [row for row in answer.rows if row[1] == 1]
        assert {row[0] for row in windows} <= {segments - 2, segments - 1}


def test_a_longer_prompt_shares_its_prefix_only() -> None:
    world, _, b, _ = two_nodes()
    own = tuple(SegmentKey(bytes([i]) * 32) for i in range(3))
    lookup = world.want(b, FULL, prompt(1, 8)[:5] + own)
    world.run(5_000)
    assert only_answer(b, lookup).end_segment == 5


def test_what_was_fetched_is_local_the_next_time() -> None:
    world, a, b, segments = two_nodes()
    world.want(b, FULL, prompt(1, segments))
    world.run(5_000)
    a.frozen = True
    again = world.want(b, FULL, prompt(1, segments))
    world.run(6_000)
    assert only_answer(b, again).source == "memory"


def test_private_rows_are_offered_to_nobody() -> None:
    world = World(1, NETWORK)
    a, b = world.add("A", ()), world.add("B", ("A",))
    world.publish(a, FULL, prompt(1, 4), shareable=False)
    world.run(2_000)
    lookup, own = world.want(b, FULL, prompt(1, 4)), world.want(a, FULL, prompt(1, 4))
    world.run(5_000)
    assert only_answer(b, lookup).reason == "not_found"
    assert only_answer(a, own).end_segment == 4


@pytest.mark.parametrize("how", ["lost", "withheld"])
def test_fetch_survives_32_lost_chunks(how: str) -> None:
    world, a, b, segments = two_nodes()
    setattr(a, how, sum(1 << c for c in random.Random(7).sample(range(64), 32)))
    lookup = world.want(b, FULL, prompt(1, segments))
    world.run(5_000)
    assert only_answer(b, lookup).end_segment == segments


@pytest.mark.parametrize("how", ["lost", "withheld"])
def test_33_lost_chunks_are_a_miss_soon(how: str) -> None:
    world, a, b, segments = two_nodes()
    setattr(a, how, sum(1 << c for c in random.Random(7).sample(range(64), 33)))
    lookup = world.want(b, FULL, prompt(1, segments))
    world.run(5_000)
    (answer,) = b.answers[lookup]
    assert answer.effect.end_segment == 0
    assert answer.effect.reason in ("failed", "stalled")
    assert answer.at_ms - 2_000 <= 3 * FETCH_STALL_MS  # first columns, hedge, further columns, stall


@pytest.mark.parametrize("after_ms", [0, 4, 8, 20, 40, 60])
def test_a_peer_that_freezes_delays_the_answer_by_the_stall_limit_at_most(after_ms: int) -> None:
    world, a, b, segments = two_nodes()
    lookup = world.want(b, FULL, prompt(1, segments), prefill_ms=10_000)
    world.run(2_000 + after_ms)
    a.frozen = True
    world.run(5_000)
    (answer,) = b.answers[lookup]
    assert answer.at_ms <= 2_000 + after_ms + 500
    assert answer.effect.end_segment < segments
    world.run(5_100)
    if answer.effect.reason == "stalled":
        assert b.charged == [(a.peer, "stalled")]


@pytest.mark.parametrize(
    ("lie", "reason"), [("garbage", "bad_digest"), ("forged", "forged"), ("boastful", "false_offer")]
)
def test_a_liar_is_charged_avoided_and_replaced_by_an_honest_holder(lie: str, reason: str) -> None:
    world = World(3, NETWORK)
    liar, honest, b = world.add("L", ()), world.add("H", ()), world.add("B", ("L", "H"))
    world.publish(liar, FULL, prompt(2 if lie == "boastful" else 1, 8))
    world.publish(honest, FULL, prompt(1, 8))
    honest.latency_ms = 10
    world.run(2_000)
    setattr(liar, lie, True)
    lookup = world.want(b, FULL, prompt(1, 8))
    world.run(4_000)
    assert only_answer(b, lookup).end_segment == 8
    assert b.charged == [(liar.peer, reason)]
    b.memory.clear()
    world.want(b, FULL, prompt(1, 8))
    world.run(6_000)
    assert b.charged == [(liar.peer, reason)]


def test_a_frozen_peer_beside_an_honest_one_costs_no_stall() -> None:
    world = World(3, NETWORK)
    frozen, honest, b = world.add("F", ()), world.add("H", ()), world.add("B", ("F", "H"))
    for host in (frozen, honest):
        world.publish(host, FULL, prompt(1, 8))
    honest.latency_ms = 5
    world.run(2_000)
    lookup = world.want(b, FULL, prompt(1, 8))
    world.run(2_006)
    frozen.frozen = True
    world.run(5_000)
    (answer,) = b.answers[lookup]
    assert answer.effect.end_segment == 8
    assert answer.at_ms - 2_000 < FETCH_STALL_MS


def test_a_holder_of_fetched_columns_finishes_what_a_frozen_producer_left() -> None:
    world, a, b, segments = two_nodes()
    c = world.add("C", ("A", "B"))
    b.latency_ms = 3
    world.want(b, FULL, prompt(1, segments))
    world.run(3_000)
    lookup = world.want(c, FULL, prompt(1, segments))
    world.run(3_020)
    a.frozen = True
    world.run(5_000)
    (answer,) = c.answers[lookup]
    assert answer.effect.end_segment == segments
    assert answer.at_ms - 3_000 < FETCH_STALL_MS


def test_a_full_disk_leaves_rows_in_memory_only() -> None:
    world = World(1, NETWORK)
    a = world.add("A", ())
    a.disk_full = True
    world.publish(a, FULL, prompt(1, 4))
    world.run(2_000)
    assert a.node.prefixes.publisher.skipped == {"disk_full": 4}
    lookup = world.want(a, FULL, prompt(1, 4))
    world.run(2_100)
    assert only_answer(a, lookup).source == "memory"


def test_64_mib_over_the_network_take_at_most_200_events() -> None:
    world, _, b, segments = two_nodes(segments=64)
    world.want(b, FULL, prompt(1, segments), prefill_ms=60_000)
    world.run(20_000)
    assert b.events <= 200


def chaos(seed: int) -> World:
    """A few nodes with random faults that come and go, publishing and wanting a few prompts; everything checked."""
    rng = random.Random(seed)
    world = World(seed, NETWORK)
    names = [f"N{i}" for i in range(rng.randint(2, 4))]
    for name in names:
        mode = rng.choice(["auto", "auto", "always", "never"])
        host = world.add(name, tuple(n for n in names if n != name), mode)  # type: ignore[arg-type]
        host.latency_ms = rng.choice([0, 1, 5, 40])
        host.bytes_per_ms = rng.choice([5_000, 100_000, 1_000_000])
        host.lost = rng.choice([0, 0, rng.getrandbits(64) & rng.getrandbits(64)])
        host.withheld = rng.choice([0, 0, 0, rng.getrandbits(64) & rng.getrandbits(64)])
        setattr(host, rng.choice(["garbage", "forged", "boastful"]), rng.random() < 0.2)
        host.disk_full = rng.random() < 0.1
        host.arena_rows = rng.choice([1 << 30, 1 << 30, 3])
    hosts = list(world.hosts.values())
    layout = rng.choice([FULL, MIXED])
    lookups: list[tuple[Host, int, int]] = []

    def want(host: Host) -> None:
        deadline_ms = rng.choice([50, 1_000, 10_000])
        keys = prompt(rng.randint(1, 2), rng.randint(1, 6))
        prefill_ms, start = rng.choice([0, 50, 1_000, 20_000]), rng.choice([0, 100, 300])
        lookup = world.want(host, layout, keys, prefill_ms, deadline_ms, start, rng.random() < 0.9)
        lookups.append((host, lookup, world.now_ms + deadline_ms))
        if rng.random() < 0.2:
            world.at(rng.randint(0, 300), lambda: world.release(host, lookup))

    def publish(host: Host) -> None:
        world.publish(host, layout, prompt(rng.randint(1, 2), rng.randint(1, 6)))

    def turn(host: Host) -> None:
        host.frozen = not host.frozen

    for _ in range(rng.randint(2, 5)):
        host = rng.choice(hosts)
        world.at(
            rng.randint(0, 2_000),
            partial(publish, host),
        )
    for _ in range(rng.randint(2, 6)):
        host = rng.choice(hosts)
        world.at(rng.randint(0, 4_000), partial(want, host))
    for _ in range(rng.randint(0, 3)):
        world.at(rng.randint(0, 4_000), rng.choice(hosts).memory.clear)
    for _ in range(rng.randint(0, 2)):
        host = rng.choice(hosts)
        world.at(rng.randint(0, 4_000), partial(turn, host))
    world.run(200_000)
    for host, lookup, deadline_ms in lookups:
        answers = host.answers[lookup]
        if lookup in host.ended:
            assert len(answers) <= 1
        else:
            assert len(answers) == 1
        assert all(answer.at_ms <= deadline_ms for answer in answers)
    for host in hosts:
        assert all(times == 1 for times in host.staged.values())
        assert host.node.next_deadline_ms() is None
    return world


def test_every_lookup_gets_exactly_one_answer_in_time_whatever_peers_do() -> None:
    for seed in range(500):
        try:
            chaos(seed)
        except Exception as error:
            error.add_note(f"replay with chaos({seed})")
            raise


def test_a_seed_replays_exactly() -> None:
    def trace(seed: int) -> list[object]:
        world = chaos(seed)
        return [(host.answers, host.charged, host.events) for host in world.hosts.values()]

    assert trace(11) == trace(11)
