"""What a node says that it serves: how it reaches others, how often, and what isn't worth a new record."""

from dataclasses import replace

import pytest

from hyperspace_vllm.core.events.node_state import ServedChanged
from hyperspace_vllm.core.events.peer_requests import Send
from hyperspace_vllm.core.peers.own_record import RENEW_MS
from hyperspace_vllm.core.peers.record_renewal import LOAD_STEP_PERMILLE, should_renew_record
from hyperspace_vllm.core.records.ids import sha256
from hyperspace_vllm.core.records.limits import PEER_RECORD_AGAIN_MS, PEER_RECORD_BYTES_MAX, VRAM_SEGMENTS_MAX
from hyperspace_vllm.core.records.peer_record import DIGESTS_MAX, PeerRecord, decode_peer_record
from hyperspace_vllm.core.records.peer_wire import Greet
from hyperspace_vllm.core.records.vram_digest import make_digest, overlap
from tests.support.network_world import NOW_MS, SECOND_MS, Identity, World


def ids(count: int) -> list[bytes]:
    return [sha256(f"segment {number}".encode()) for number in range(count)]


MODEL, OTHER_MODEL = sha256(b"model"), sha256(b"other model")
BEFORE = ServedChanged((MODEL,), (sha256(b"fingerprint"),), 200, make_digest(ids(100)))


def record_of(served: ServedChanged) -> PeerRecord:
    me = decode_peer_record(Identity(0).record())
    return replace(
        me,
        models=served.models,
        fingerprints=served.fingerprints,
        load_permille=served.load_permille,
        vram_digest=served.vram_digest,
    )


@pytest.mark.parametrize(
    ("change", "tells"),
    [
        ({}, False),
        ({"models": (MODEL, OTHER_MODEL)}, True),
        ({"models": ()}, True),
        ({"fingerprints": ()}, True),
        ({"load_permille": 200 + LOAD_STEP_PERMILLE - 1}, False),
        ({"load_permille": 200 + LOAD_STEP_PERMILLE}, True),
        ({"load_permille": 200 - LOAD_STEP_PERMILLE}, True),
        ({"vram_digest": make_digest(ids(98))}, False),
        ({"vram_digest": make_digest(ids(60))}, True),
        ({"vram_digest": b""}, True),
    ],
)
def test_only_what_matters_is_told_before_its_time(change: dict[str, object], tells: bool) -> None:
    assert should_renew_record(record_of(BEFORE), replace(BEFORE, **change)) == tells  # type: ignore[arg-type]


def known_of(world: World, number: int, other: int) -> PeerRecord:
    known = world.nodes[number].members.get(Identity(other).peer)
    assert known is not None
    assert known.record is not None
    return known.record


def greetings(world: World, number: int) -> int:
    """Records that a node has sent so far, by their sequence."""
    sent = [e.message for n, e in world.effects if n == number and isinstance(e, Send) and isinstance(e.message, Greet)]
    return len({decode_peer_record(each.record).sequence for each in sent})


def test_what_a_node_serves_is_known_to_its_neighbours_and_theirs_within_seconds() -> None:
    world = World()
    world.boot(1)
    for number in (2, 3):
        world.boot(number, (1,))
    world.run(10 * SECOND_MS)
    world.tell(2, BEFORE)
    world.run(2 * PEER_RECORD_AGAIN_MS)
    for number in (1, 3):
        record = known_of(world, number, 2)
        assert (record.models, record.fingerprints, record.load_permille) == (BEFORE.models, BEFORE.fingerprints, 200)
        assert overlap(record.vram_digest, ids(100)) == 100


def test_however_much_changes_a_record_is_renewed_every_few_seconds_at_most() -> None:
    world = World()
    world.boot(1)
    world.boot(2, (1,))
    world.run(10 * SECOND_MS)
    before = greetings(world, 2)
    for second in range(20):
        world.tell(2, replace(BEFORE, load_permille=second % 2 * 1000))
        world.run(SECOND_MS)
    assert 2 <= greetings(world, 2) - before <= 20 * SECOND_MS / PEER_RECORD_AGAIN_MS + 1


def test_what_isnt_worth_telling_is_in_the_next_record() -> None:
    world = World()
    world.boot(1)
    world.boot(2, (1,))
    world.tell(2, BEFORE)
    world.run(10 * SECOND_MS)
    world.tell(2, replace(BEFORE, load_permille=210))
    world.run(2 * PEER_RECORD_AGAIN_MS)
    assert known_of(world, 1, 2).load_permille == 200
    world.run(RENEW_MS)
    assert known_of(world, 1, 2).load_permille == 210


def test_the_fullest_record_fits() -> None:
    digests = tuple(sha256(bytes([number])) for number in range(DIGESTS_MAX))
    served = ServedChanged(digests, digests, 65_535, make_digest(ids(VRAM_SEGMENTS_MAX)))
    record = replace(record_of(served), address="a" * 255, endpoint="e" * 255, expires_at_ms=NOW_MS).sign(
        Identity(0).key
    )
    assert len(record.encode()) <= PEER_RECORD_BYTES_MAX
    assert decode_peer_record(record.encode()) == record
