"""What a ZeroMQ socket holds of a peer, counted from outside: whole messages pass, unfinished ones add up."""

import random

import pytest

from hyperspace_vllm.core.records.errors import ProtocolViolation
from hyperspace_vllm.core.records.limits import KiB, MiB
from hyperspace_vllm.daemon.kv.frame_meter import (
    CURVE_BYTES,
    FRAMES_HELD_MAX,
    HANDSHAKE_FRAME_BYTES_MAX,
    HANDSHAKE_FRAMES,
    SMALL_FRAMES_MAX,
    FrameMeter,
)

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)


def frame(size: int, flags: int = 0) -> bytes:
    """As it is on the wire, for a frame whose wire body has `size` bytes."""
    header = bytes((flags | 2,)) + size.to_bytes(8, "big") if size > 255 else bytes((flags, size))
    return header + bytes(size)


HANDSHAKE = GREETING + frame(200, 4) + frame(400, 4)


def meter(frame_bytes_max: int = 1 * MiB, held_bytes_max: int = 2 * MiB) -> FrameMeter:
    made = FrameMeter(frame_bytes_max, held_bytes_max)
    made.put_in(memoryview(HANDSHAKE))
    return made


def test_messages_that_come_out_leave_nothing_behind() -> None:
    counted, rng = meter(held_bytes_max=3 * MiB), random.Random(1)
    for _ in range(1_000):
        sizes = [rng.choice((0, 5, 100, 250, 5_000, 1 * MiB)) for _ in range(rng.randrange(1, 3))]
        counted.put_in(memoryview(b"".join(frame(size + CURVE_BYTES) for size in sizes)))
        assert not counted.full
        counted.came_out(sizes)
    assert (counted.held_frames, counted.held_bytes) == (0, 0)


@pytest.mark.parametrize("piece", [1, 2, 7, 63, 64, 65, 1_000])
def test_it_does_not_matter_where_tcp_cuts(piece: int) -> None:
    whole, cut = FrameMeter(1 * MiB, 2 * MiB), FrameMeter(1 * MiB, 2 * MiB)
    stream = memoryview(HANDSHAKE + frame(100) + frame(40) + frame(70_000) + frame(300)[:-20])
    whole.put_in(stream)
    for at in range(0, len(stream), piece):
        cut.put_in(stream[at : at + piece])
    assert (cut.held_frames, cut.held_bytes) == (whole.held_frames, whole.held_bytes) == (3, 100 + 70_000 + 280)


def test_frames_of_a_message_without_an_end_fill_it_by_bytes_or_by_number() -> None:
    large, many = meter(), meter()
    put = 0
    while not large.full:
        large.put_in(memoryview(frame(1 * MiB)))
        put += 1
    assert put == 3
    for _ in range(FRAMES_HELD_MAX):
        many.put_in(memoryview(frame(65)))
    assert not many.full
    many.put_in(memoryview(frame(65)))
    assert many.full


def test_a_frame_that_is_still_coming_counts_as_far_as_it_has_come() -> None:
    counted = meter(held_bytes_max=100 * KiB)
    counted.put_in(memoryview(frame(1 * MiB)[: 50 * KiB]))
    assert not counted.full
    counted.put_in(memoryview(bytes(60 * KiB)))
    assert counted.full


def test_heartbeats_are_bounded_between_two_messages() -> None:
    counted = meter()
    beat = memoryview(frame(38))
    for _ in range(10):
        for _ in range(SMALL_FRAMES_MAX - HANDSHAKE_FRAMES):
            counted.put_in(beat)
        counted.put_in(memoryview(frame(100 + CURVE_BYTES)))
        counted.came_out([100])
    assert (counted.full, counted.held_frames) == (False, 0)
    for _ in range(SMALL_FRAMES_MAX):
        counted.put_in(beat)
    with pytest.raises(ProtocolViolation, match="frames without a message"):
        counted.put_in(beat)


@pytest.mark.parametrize(
    "stream",
    [
        bytes(64),  # a network key's nonce, TLS, HTTP ...
        b"\xff" + bytes(8) + b"\x7f\x01" + bytes(53),  # ZMTP 2
        GREETING.replace(b"CURVE", b"NULL\0"),
        GREETING + frame(HANDSHAKE_FRAME_BYTES_MAX + 1, 4),
        GREETING + frame(200, 4) + frame(1 * MiB, 4),
        HANDSHAKE + frame(1 * MiB + CURVE_BYTES + 1),
        HANDSHAKE + b"\x02" + b"\xff" * 8,
    ],
)
def test_what_is_not_for_the_socket_is_a_violation_before_it_is_passed_on(stream: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        FrameMeter(1 * MiB, 2 * MiB).put_in(memoryview(stream))
