"""Messages between nodes: what is valid survives a round trip, and no other bytes do anything but raise."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperspace_vllm.core.records import wire
from hyperspace_vllm.core.records.errors import ProtocolViolation
from hyperspace_vllm.core.records.limits import LOOKUP_ROWS_MAX, PEER_CONTROL_BYTES_MAX

REQUESTS = (
    wire.Have(1, (bytes(32),) * 3),
    wire.GetManifest(7, bytes(32)),
    wire.GetChunks(9, bytes(32), 3, tuple(range(64))),
    wire.Cancel(4),
)
REPLIES = (
    wire.HaveReply(1, (wire.Offer(0, bytes(32), 1, bytes(8)),)),
    wire.ManifestReply(1, bytes(300), bytes(2048), bytes(48)),
    wire.ManifestReply(1, bytes(300), bytes(2048), bytes(48), b"m" * 32),
    wire.Chunk(1, 2, 3),
    wire.NotHere(1, "busy", (1, 2)),
)


def decode(frame: bytes) -> wire.PeerRequest | wire.PeerReply | None:
    for decoder in (wire.decode_request, wire.decode_reply):
        try:
            return decoder(frame)
        except ProtocolViolation:
            continue
    return None


@pytest.mark.parametrize("message", REQUESTS + REPLIES)
def test_messages_survive_the_trip(message: wire.PeerRequest | wire.PeerReply) -> None:
    assert decode(wire.encode(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        wire.Have(1, ()),
        wire.Have(1, (bytes(31),)),
        wire.Have(1 << 32, (bytes(32),)),
        wire.GetChunks(1, bytes(32), 32, (0,)),
        wire.GetChunks(1, bytes(32), 0, (64,)),
        wire.GetChunks(1, bytes(32), 0, (0,) * 65),
        wire.Chunk(1, 0, 0),
        wire.Chunk(1, 0, 1 << 40),
        wire.ManifestReply(1, bytes(5000), b"", bytes(48)),
        wire.ManifestReply(1, b"", b"", bytes(47)),
        wire.ManifestReply(1, b"", b"", bytes(48), bytes(31)),
        wire.NotHere(1, "because"),  # type: ignore[arg-type]
        wire.HaveReply(1, (wire.Offer(LOOKUP_ROWS_MAX, bytes(32), 0, bytes(8)),)),
    ],
)
def test_values_out_of_bounds_are_violations(message: wire.PeerRequest | wire.PeerReply) -> None:
    assert decode(wire.encode(message)) is None


def test_the_largest_question_fits_a_message() -> None:
    frame = wire.encode(wire.Have((1 << 32) - 1, (b"\xff" * 32,) * LOOKUP_ROWS_MAX))
    assert len(frame) <= PEER_CONTROL_BYTES_MAX
    assert decode(frame) is not None
    assert decode(bytes(PEER_CONTROL_BYTES_MAX + 1)) is None


@given(st.binary(max_size=600))
def test_no_bytes_crash_a_decoder(frame: bytes) -> None:
    decode(frame)


@given(st.integers(0, 1 << 32))
def test_no_damaged_message_crashes_a_decoder(seed: int) -> None:
    rng = random.Random(seed)
    frame = bytearray(wire.encode(rng.choice(REQUESTS + REPLIES)))
    for _ in range(rng.randrange(1, 5)):
        frame[rng.randrange(len(frame))] = rng.randrange(256)
    message = decode(bytes(frame))
    assert message is None or decode(wire.encode(message)) == message
