"""What peers send takes a bounded part of this node's CPU time, whatever it says, on connections fed by hand."""

import pytest
import trio
import trio.testing
from libp2p.peer.id import ID
from nacl.signing import SigningKey

from hyperspace_vllm.core.records.ids import PeerId, peer_id
from hyperspace_vllm.core.records.limits import RESPONSE_BYTES_MAX, KiB, MiB
from hyperspace_vllm.daemon.libp2p_yamux import _DATA, _HEAD, _SYN, _WINDOW, MESSAGE_BYTES, YamuxConnection
from hyperspace_vllm.daemon.peer_time import (
    ALL_SHARE,
    BURST_S,
    BYTE_S,
    CONNECTION_SHARE,
    FRAME_S,
    HOST_SHARE,
    MESSAGE_S,
    PeerTime,
    Share,
)

FOR_S = 30.0
NEW = _HEAD.pack(0, _WINDOW, _SYN, 2, 0)
LISTED = peer_id(SigningKey(bytes([7]) * 32).verify_key.encode())
STRANGER = peer_id(SigningKey(bytes([8]) * 32).verify_key.encode())


class Wire:
    """The peer's side of a secured connection: it sends the same message again and again, as fast as it is taken."""

    is_initiator = True

    def __init__(self, host: str, message: bytes, frames: int) -> None:
        self._host = host
        self._message = message
        self._frames = frames
        self._next = NEW
        self.read_bytes = 0
        self.cost_s = 0.0

    async def read(self) -> bytes:
        message, self._next = self._next, self._message
        self.read_bytes += len(message)
        self.cost_s += MESSAGE_S + self._frames * FRAME_S + len(message) * BYTE_S
        return message

    async def write(self, data: bytes) -> None: ...

    async def close(self) -> None: ...

    def get_remote_address(self) -> tuple[str, int]:
        return self._host, 1


async def drain(conn: YamuxConnection) -> None:
    stream = await conn.accept_stream()
    while True:
        await stream.read()


def flood(*wires: Wire, peer: PeerId = STRANGER) -> None:
    """Serve what comes on the wires for FOR_S of a virtual clock."""

    async def main() -> None:
        time = PeerTime(lambda peer: peer == LISTED)
        violators: list[ID] = []
        with trio.move_on_after(FOR_S):
            async with trio.open_nursery() as nursery:
                for wire in wires:
                    conn = YamuxConnection(wire, ID.from_base58(peer), time, violators.append)  # type: ignore[arg-type]
                    nursery.start_soon(conn.start)
                    nursery.start_soon(drain, conn)
        assert not violators

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def frame(kind: int, length: int, data: bytes = b"") -> bytes:
    return _HEAD.pack(0, kind, 0, 2, length) + data


@pytest.mark.parametrize(
    ("message", "frames"),
    [
        (frame(_WINDOW, 1) * 5000, 5000),
        (frame(_WINDOW, 1), 1),
        (frame(_DATA, 1, b"x") * 4000, 4000),
        (frame(_DATA, 16 * KiB, bytes(16 * KiB)) * 3, 3),
    ],
)
def test_the_frames_of_a_connection_take_a_bounded_part_of_the_time(message: bytes, frames: int) -> None:
    wire = Wire("192.0.2.1", message, frames)
    flood(wire)
    assert CONNECTION_SHARE * FOR_S * 0.9 < wire.cost_s < CONNECTION_SHARE * FOR_S + 2 * BURST_S


@pytest.mark.parametrize(("hosts", "share"), [(1, HOST_SHARE), (6, ALL_SHARE)])
def test_the_connections_of_one_host_and_all_together_take_a_bounded_part_of_the_time(hosts: int, share: float) -> None:
    message = frame(_WINDOW, 1) * 1000
    wires = [Wire(f"192.0.2.{host}", message, 1000) for host in range(hosts) for _ in range(12 // hosts)]
    flood(*wires)
    each = [wire.cost_s for wire in wires]
    assert share * FOR_S * 0.9 < sum(each) < share * FOR_S + 2 * BURST_S
    assert max(each) < 2 * min(each)  # and none takes it from the others


def test_a_new_connection_brings_its_host_no_new_time() -> None:
    async def spent_s() -> float:
        time = PeerTime(lambda peer: False)
        with trio.move_on_after(FOR_S):
            for spent in range(1_000_000):
                await time.spend(0.01, Share(CONNECTION_SHARE), STRANGER, "192.0.2.1")
        return spent * 0.01

    assert trio.run(spent_s, clock=trio.testing.MockClock(autojump_threshold=0)) < HOST_SHARE * FOR_S + 2 * BURST_S


def test_strangers_take_no_time_from_a_peer_on_this_nodes_lists() -> None:
    async def waited_s() -> float:
        time = PeerTime(lambda peer: peer == LISTED)

        async def spend_all() -> None:
            while True:
                await time.spend(0.001, Share(CONNECTION_SHARE), STRANGER, "192.0.2.1")

        async with trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon(spend_all)
            await trio.sleep(5)
            began_s = trio.current_time()
            await time.spend(0.001, Share(CONNECTION_SHARE), LISTED, "192.0.2.1")
            waited_s = trio.current_time() - began_s
            nursery.cancel_scope.cancel()
        return waited_s

    assert trio.run(waited_s, clock=trio.testing.MockClock(autojump_threshold=0)) == 0


def test_honest_transfers_are_not_held_up() -> None:
    """64 KiB windows of responses at 20 MB/s, and the largest response at once."""

    async def waited_s() -> float:
        time, own = PeerTime(lambda peer: False), Share(CONNECTION_SHARE)

        async def transfer(size: int) -> None:
            for _ in range(size // MESSAGE_BYTES + 1):
                await time.spend(MESSAGE_S + MESSAGE_BYTES * BYTE_S + 4 * FRAME_S, own, STRANGER, "192.0.2.1")

        began_s = trio.current_time()
        await transfer(RESPONSE_BYTES_MAX)
        for _ in range(10):
            await trio.sleep(1)
            await transfer(20 * MiB)
        return trio.current_time() - began_s - 10

    assert trio.run(waited_s, clock=trio.testing.MockClock(autojump_threshold=0)) == 0
