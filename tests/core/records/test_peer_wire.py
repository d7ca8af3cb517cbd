"""Messages on libp2p streams: what an answer may be at most."""

import pytest

from hyperspace_vllm.core.records.limits import (
    PEER_RECORD_BYTES_MAX,
    PEX_RECORDS_MAX,
    REGISTRY_OWNERS_MAX,
    REGISTRY_REPLY_BYTES_MAX,
    KiB,
)
from hyperspace_vllm.core.records.peer_wire import (
    DELTAS_MAX,
    SEALED_BYTES_MAX,
    Deltas,
    Greet,
    Greeting,
    Hit,
    PeerAnswer,
    PeerRequest,
    Peers,
    Ping,
    Pong,
    Query,
    Refusal,
    RegistryHead,
    WantDeltas,
    WantPeers,
    encode,
    expected_answer,
)

RECORD = bytes(PEER_RECORD_BYTES_MAX)
DELTAS = (bytes(REGISTRY_REPLY_BYTES_MAX // DELTAS_MAX),) * DELTAS_MAX
HEADS = (RegistryHead(bytes(32), (1 << 63) - 1, (1 << 63) - 1),) * REGISTRY_OWNERS_MAX


@pytest.mark.parametrize(
    ("request_", "largest", "slack_bytes"),
    [
        (Ping(), Pong(), 64),
        (Greet(RECORD), Greeting(RECORD), 64),
        (WantPeers(b""), Peers((RECORD,) * PEX_RECORDS_MAX), KiB),
        (WantDeltas(()), Deltas(DELTAS, HEADS, more=True), 32 * KiB),
        (Query(bytes(32)), Hit(bytes(12), bytes(SEALED_BYTES_MAX), bytes(512), bytes(32), (1 << 32) - 1), 64 * KiB),
    ],
)
def test_the_largest_honest_answer_is_expected_and_little_more(
    request_: PeerRequest, largest: PeerAnswer, slack_bytes: int
) -> None:
    bytes_max = expected_answer(request_).bytes_max
    assert 0 <= bytes_max - len(encode(largest)) <= slack_bytes
    assert len(encode(Refusal("protocol"))) <= bytes_max


def test_records_are_expected_of_a_peer_that_was_asked_for_some() -> None:
    assert expected_answer(WantPeers(b"")).records_max == PEX_RECORDS_MAX
    assert expected_answer(Ping()).records_max == 0
