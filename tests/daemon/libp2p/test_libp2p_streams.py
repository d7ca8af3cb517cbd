"""The bytes that peers make a node hold for their requests and for answers that they don't take."""

import pytest
import trio
import trio.testing
from libp2p.peer.id import ID

from hyperspace_vllm.core.records.limits import STREAM_FRAME_BYTES_MAX, MiB
from hyperspace_vllm.core.records.rank import Tier
from hyperspace_vllm.daemon.libp2p.libp2p_streams import (
    ANSWER_BYTES_MAX,
    ANSWER_BYTES_PER_PEER_MAX,
    FRAME_BYTES_IN_MAX,
    FRAME_BYTES_IN_PER_PEER_MAX,
    Answerer,
)

SIZE = STREAM_FRAME_BYTES_MAX


class Stream:
    """One request; what is written to it is never taken, or at once."""

    def __init__(self, peer: ID, request: bytes, takes: bool) -> None:
        self.muxed_conn = self
        self.peer_id = peer
        self.written: list[int] = []
        self.is_reset = False
        self._takes = takes
        self._data = len(request).to_bytes(4, "big") + request

    async def read(self, size: int) -> bytes:
        piece, self._data = self._data[:size], self._data[size:]
        if not piece:
            await trio.sleep_forever()
        return piece

    async def write(self, data: bytes) -> None:
        self.written.append(len(data) - 4)
        if not self._takes:
            await trio.sleep_forever()

    async def reset(self) -> None:
        self.is_reset = True


async def no_wait(peer: ID, cost_s: float) -> None: ...


def serve(
    peers: int,
    each: int,
    request: bytes,
    answer: bytes | None,
    takes: bool,
    violators: list[ID] | None = None,
    taken_up: list[ID] | None = None,
) -> list[Stream]:
    """Streams of so many peers, after a moment; without an answer the requests are being handled for ever."""
    heard = [] if violators is None else violators
    streams = [Stream(ID(b"%d" % peer), request, takes) for peer in range(peers) for _ in range(each)]
    handled = [] if taken_up is None else taken_up

    async def handle(peer: ID, protocol: str, frame: bytes) -> bytes | None:
        handled.append(peer)
        if answer is None:
            await trio.sleep_forever()
        return answer

    async def main() -> None:
        answerer = Answerer(handle, heard.append, no_wait, lambda peer: Tier.MEMBER)
        async with trio.open_nursery() as nursery:
            for stream in streams:
                nursery.start_soon(answerer.serve, stream, "protocol")
            await trio.testing.wait_all_tasks_blocked(0.05)
            nursery.cancel_scope.cancel()

    trio.run(main)
    return streams


@pytest.mark.parametrize(("peers", "each"), [(1, 6), (20, 1)])
def test_requests_that_peers_have_sent_are_bounded_for_one_and_for_all(peers: int, each: int) -> None:
    violators: list[ID] = []
    taken_up: list[ID] = []
    streams = serve(peers, each, bytes(SIZE), None, True, violators, taken_up)
    held = len(taken_up) * SIZE
    bound = FRAME_BYTES_IN_PER_PEER_MAX if peers == 1 else FRAME_BYTES_IN_MAX
    assert bound - SIZE < held <= bound
    assert bool(violators) is (peers == 1)  # what all have sent together is the fault of none of them
    if peers > 1:
        assert not any(stream.is_reset for stream in streams)
        assert sum(stream.written == [0] for stream in streams) == peers - len(taken_up)  # busy


@pytest.mark.parametrize(("peers", "each"), [(1, 8), (20, 1)])
def test_answers_that_peers_do_not_take_are_bounded_for_one_and_for_all(peers: int, each: int) -> None:
    streams = serve(peers, each, b"?", bytes(SIZE), takes=False)
    held = sum(size for stream in streams for size in stream.written)
    bound = ANSWER_BYTES_PER_PEER_MAX if peers == 1 else ANSWER_BYTES_MAX
    assert bound - SIZE < held <= bound


class Unfinished(Stream):
    """A request of which half comes."""

    def __init__(self, peer: ID) -> None:
        super().__init__(peer, b"", True)
        self._data = SIZE.to_bytes(4, "big") + bytes(SIZE // 2)


@pytest.mark.parametrize("takes", [True, False], ids=["requests", "answers"])
@pytest.mark.parametrize(
    ("tier", "holders"),
    [
        (Tier.STRANGER, Tier.STRANGER),
        (Tier.MEMBER, Tier.STRANGER),
        (Tier.MEMBER, Tier.MEMBER),
        (Tier.PROVEN, Tier.MEMBER),
    ],
)
def test_what_others_hold_keeps_no_request_out(takes: bool, tier: Tier, holders: Tier) -> None:
    honest = Stream(ID(b"honest"), b"?", True)
    others: list[Stream] = []
    for number in range(8):
        peer = ID(b"%d" % number)
        others += [Unfinished(peer) if takes else Stream(peer, b"?", False) for _ in range(4)]
    violators: list[ID] = []

    async def handle(peer: ID, protocol: str, frame: bytes) -> bytes:
        return bytes(MiB if peer == honest.peer_id else SIZE)

    async def main() -> None:
        own = honest.peer_id.to_base58()
        answerer = Answerer(handle, violators.append, no_wait, lambda peer: tier if peer == own else holders)
        async with trio.open_nursery() as nursery:
            for stream in others:
                nursery.start_soon(answerer.serve, stream, "protocol")
            await trio.testing.wait_all_tasks_blocked(0.05)
            nursery.start_soon(answerer.serve, honest, "protocol")
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert honest.written == [MiB]
            assert not honest.is_reset
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert not violators
