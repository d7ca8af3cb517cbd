"""Lookups of prefixes without a socket: who is told what, and what is left to release."""

import pytest

from hyperspace_vllm.core.local.kv_messages import PrefixAnswer
from hyperspace_vllm.core.local.messages import NodeMessage
from hyperspace_vllm.core.local.slab import LoadedRow, Slab
from hyperspace_vllm.core.records.errors import ProtocolViolation
from hyperspace_vllm.daemon.local.prefix_lookups import PrefixLookups

ROWS = (LoadedRow(0, 0, 0, Slab(0, 1, 0, 4096)),)


class Socket:
    """Where answers go; `is_full` while a client doesn't read."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, NodeMessage]] = []
        self.is_full = False

    def send(self, route: bytes, message: NodeMessage) -> bool:
        if not self.is_full:
            self.sent.append((route, message))
        return not self.is_full


@pytest.fixture
def socket() -> Socket:
    return Socket()


@pytest.fixture
def lookups(socket: Socket) -> PrefixLookups:
    return PrefixLookups(socket.send)


def test_clients_that_number_alike_are_told_apart(lookups: PrefixLookups, socket: Socket) -> None:
    first, second = lookups.numbers.begin(b"a", 7), lookups.numbers.begin(b"b", 7)
    assert None not in (first, second)
    assert first != second
    assert lookups.answer(second or 0, 0, (), "none", "", "miss")
    assert socket.sent == [(b"b", PrefixAnswer(7, 0, (), "none", "", "miss"))]
    with pytest.raises(ProtocolViolation):
        lookups.numbers.begin(b"a", 7)
    assert lookups.numbers.begin(b"b", 7) is not None  # a miss has ended it


def test_a_hit_is_the_clients_to_release(lookups: PrefixLookups) -> None:
    lookup = lookups.numbers.begin(b"a", 7)
    assert lookup is not None
    assert lookups.answer(lookup, 1, ROWS, "memory", "memory", "hit")
    assert lookups.numbers.release(b"a", 7) == lookup
    assert lookups.numbers.release(b"a", 7) is None


def test_an_answer_that_cannot_be_sent_leaves_the_client_nothing_to_release(
    lookups: PrefixLookups, socket: Socket
) -> None:
    lookup = lookups.numbers.begin(b"a", 7)
    assert lookup is not None
    socket.is_full = True
    assert not lookups.answer(lookup, 1, ROWS, "memory", "memory", "hit")
    assert lookups.numbers.release(b"a", 7) is None
    assert lookups.numbers.end(b"a") == []


def test_an_answer_to_a_client_that_has_gone_is_no_failure(lookups: PrefixLookups, socket: Socket) -> None:
    lookup = lookups.numbers.begin(b"a", 7)
    assert lookup is not None
    assert lookups.numbers.end(b"a") == [lookup]
    assert lookups.answer(lookup, 1, ROWS, "memory", "memory", "hit")
    assert socket.sent == []
