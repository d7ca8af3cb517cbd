"""What peers send, and make this node send, takes a bounded part of its CPU time; on a virtual clock."""

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from libp2p.peer.id import ID
from nacl.signing import SigningKey

from hyperspace_vllm.core.records.ids import PeerId, peer_id
from hyperspace_vllm.core.records.limits import RESPONSE_BYTES_MAX, KiB, MiB
from hyperspace_vllm.core.records.rank import Tier
from hyperspace_vllm.daemon.libp2p import libp2p_yamux
from hyperspace_vllm.daemon.libp2p.libp2p_streams import Answerer
from hyperspace_vllm.daemon.libp2p.libp2p_time import (
    BURST_S,
    BYTE_S,
    FRAME_S,
    HOST_SHARE,
    KNOWN_SHARE,
    MESSAGE_S,
    PEER_SHARE,
    REQUEST_S,
    SENT_BYTE_S,
    STRANGERS_SHARE,
    STREAM_S,
    Account,
    PeerTime,
)
from hyperspace_vllm.daemon.libp2p.libp2p_yamux import MESSAGE_BYTES, SILENCE_S, YamuxConnection
from hyperspace_vllm.daemon.libp2p.libp2p_yamux_stream import DATA, HEAD, RST, SYN, WINDOW

FOR_S = 6.0
NEW = HEAD.pack(0, WINDOW, SYN, 2, 0)
STRANGERS = [peer_id(SigningKey(bytes([number]) * 32).verify_key.encode()) for number in range(40)]
KNOWN = [peer_id(SigningKey(bytes([number]) * 32).verify_key.encode()) for number in range(100, 140)]
PROVEN = [peer_id(SigningKey(bytes([number]) * 32).verify_key.encode()) for number in range(140, 144)]


def peer_time() -> PeerTime:
    return PeerTime(lambda peer: Tier.PROVEN if peer in PROVEN else Tier.MEMBER if peer in KNOWN else Tier.STRANGER)


class Wire:
    """The peer's side of a secured connection: it sends the same message again and again, as fast as it is taken."""

    is_initiator = True

    def __init__(self, host: str, message: bytes, frames: int) -> None:
        self._host = host
        self._message = message
        self._frames = frames
        self._next = NEW
        self.cost_s = 0.0

    async def read(self) -> bytes:
        if self.cost_s > 2 * FOR_S:  # nothing has held it back
            await trio.sleep_forever()
        message, self._next = self._next, self._message
        self.cost_s += MESSAGE_S + self._frames * FRAME_S + len(message) * BYTE_S
        return message

    async def write(self, data: bytes) -> None: ...

    async def close(self) -> None: ...

    def get_remote_address(self) -> tuple[str, int]:
        return self._host, 1


def flood(wires: list[Wire], peers: list[PeerId]) -> None:
    """Serve what comes on the wires for FOR_S."""

    async def drain(conn: YamuxConnection) -> None:
        stream = await conn.accept_stream()
        while True:
            await stream.read()

    async def main() -> None:
        time, violators = peer_time(), list[ID]()
        with trio.move_on_after(FOR_S):
            async with trio.open_nursery() as nursery:
                for wire, peer in zip(wires, peers, strict=True):
                    conn = YamuxConnection(wire, ID.from_base58(peer), time, violators.append)  # type: ignore[arg-type]
                    nursery.start_soon(conn.start)
                    nursery.start_soon(drain, conn)
        assert not violators

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def frame(kind: int, length: int, data: bytes = b"") -> bytes:
    return HEAD.pack(0, kind, 0, 2, length) + data


@pytest.mark.parametrize(
    ("message", "frames"),
    [
        (frame(WINDOW, 1) * 5000, 5000),
        (frame(WINDOW, 1), 1),
        (frame(DATA, 1, b"x") * 4000, 4000),
        (frame(DATA, 16 * KiB, bytes(16 * KiB)) * 3, 3),
    ],
    ids=["window updates", "one a message", "one byte each", "full ones"],
)
def test_the_frames_of_a_peer_take_a_bounded_part_of_the_time(message: bytes, frames: int) -> None:
    wires = [Wire("192.0.2.1", message, frames) for _ in range(2)]
    flood(wires, STRANGERS[:1] * 2)
    assert PEER_SHARE * FOR_S * 0.9 < sum(wire.cost_s for wire in wires) < PEER_SHARE * FOR_S + 2 * BURST_S


@pytest.mark.parametrize(
    ("hosts", "peers", "share"), [(1, STRANGERS, HOST_SHARE), (6, STRANGERS, STRANGERS_SHARE), (6, KNOWN, KNOWN_SHARE)]
)
def test_peers_of_one_host_and_all_together_take_a_bounded_part_of_the_time(
    hosts: int, peers: list[PeerId], share: float
) -> None:
    message = frame(DATA, 16 * KiB, bytes(16 * KiB)) * 3
    wires = [Wire(f"192.0.2.{number % hosts}", message, 3) for number in range(12)]
    flood(wires, peers[:12])
    each = [wire.cost_s for wire in wires]
    assert share * FOR_S * 0.9 < sum(each) < share * FOR_S + 2 * BURST_S
    assert max(each) < 2 * min(each)  # none of them takes it from the others


@pytest.mark.parametrize("streams", [True, False], ids=["streams", "requests"])
def test_requests_and_new_streams_take_a_bounded_part_of_the_time(
    streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libp2p_yamux, "OPENED_PER_S", 1e6)  # of the real clock
    ended: list[float] = []

    class Opening(Wire):
        async def read(self) -> bytes:
            if len(ended) > FOR_S / STREAM_S:  # nothing has held it back
                await trio.sleep_forever()
            ended.append(trio.current_time())
            number = 2 * len(ended)
            return HEAD.pack(0, WINDOW, SYN, number, 0) + HEAD.pack(0, WINDOW, RST, number, 0)

    async def handle(peer: ID, protocol: str, request: bytes) -> bytes:
        ended.append(trio.current_time())
        return b"!"

    async def main() -> None:
        time, peer, wire = peer_time(), ID.from_base58(STRANGERS[0]), Opening("192.0.2.1", b"", 0)
        conn = YamuxConnection(wire, peer, time, lambda peer: None)  # type: ignore[arg-type]
        account = time.account(STRANGERS[0], "192.0.2.1")
        answerer = answering(handle, account)
        with trio.move_on_after(FOR_S):
            async with trio.open_nursery() as nursery:
                if streams:
                    nursery.start_soon(conn.start)
                    while True:
                        await conn.accept_stream()
                for _ in range(64):
                    nursery.start_soon(answerer.serve, Asking(peer), "protocol")

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    price_s = STREAM_S + MESSAGE_S + 2 * FRAME_S + 24 * BYTE_S if streams else REQUEST_S
    assert PEER_SHARE * FOR_S * 0.9 < len(ended) * price_s < PEER_SHARE * FOR_S + 2 * BURST_S


@pytest.mark.parametrize("takes", [True, False], ids=["taken", "not taken"])
def test_the_bytes_that_a_peer_asks_for_take_a_bounded_part_of_the_time(takes: bool) -> None:
    answered: list[int] = []

    async def handle(peer: ID, protocol: str, request: bytes) -> bytes:
        answered.append(RESPONSE_BYTES_MAX)
        return bytes(RESPONSE_BYTES_MAX)

    async def main() -> None:
        peer, time = ID.from_base58(STRANGERS[0]), peer_time()
        answerer = answering(handle, time.account(STRANGERS[0], "192.0.2.1"))
        with trio.move_on_after(FOR_S):
            async with trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(answerer.serve, Asking(peer, takes), "protocol")

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    cost_s = sum(REQUEST_S + size * SENT_BYTE_S for size in answered)
    assert PEER_SHARE * FOR_S * 0.9 < cost_s < PEER_SHARE * FOR_S + 2 * BURST_S


def answering(handle: Callable[[ID, str, bytes], Awaitable[bytes]], account: Account) -> Answerer:
    return Answerer(handle, lambda peer: None, lambda peer, cost_s: account.spend(cost_s), lambda peer: Tier.STRANGER)


class Asking:
    """A stream with requests without an end; with `takes` false it takes only `busy` for an answer."""

    def __init__(self, peer: ID, takes: bool = True) -> None:
        self.muxed_conn = self
        self.peer_id = peer
        self._left = FOR_S / REQUEST_S
        self._takes = takes

    async def read(self, size: int) -> bytes:
        self._left -= 1
        if self._left < 0:  # nothing has held it back
            await trio.sleep_forever()
        return b"\0\0\0\1?"[:size] if size == 4 else b"?"

    async def write(self, data: bytes) -> None:
        if not self._takes and len(data) > 4:
            await trio.sleep_forever()

    async def reset(self) -> None: ...


def test_a_new_identity_brings_its_host_no_new_time() -> None:
    async def spent_s() -> float:
        time, spent = peer_time(), 0.0
        with trio.move_on_after(FOR_S):
            for number in range(10_000):
                await time.account(PeerId(f"peer {number}"), "192.0.2.1").spend(0.01)
                spent += 0.01
        return spent

    assert trio.run(spent_s, clock=trio.testing.MockClock(autojump_threshold=0)) < HOST_SHARE * FOR_S + 2 * BURST_S


@pytest.mark.parametrize(("peers", "bound_s"), [(STRANGERS, 0.0), (KNOWN[:-1], 0.2)])
def test_a_peer_with_standing_waits_for_no_stranger_and_little_for_its_equals(
    peers: list[PeerId], bound_s: float
) -> None:
    async def waited_s() -> float:
        time = peer_time()

        async def ask(peer: PeerId) -> None:
            while True:
                await time.account(peer, "192.0.2.1").spend(REQUEST_S)

        async with trio.open_nursery() as nursery:
            kept = [time.account(peer, "192.0.2.1") for peer in peers]
            for peer in peers * 64:  # requests at once
                nursery.start_soon(ask, peer)
            await trio.sleep(2)
            began_s = trio.current_time()
            await time.account(KNOWN[-1], "192.0.2.1").spend(REQUEST_S)
            nursery.cancel_scope.cancel()
        assert kept
        return trio.current_time() - began_s

    assert trio.run(waited_s, clock=trio.testing.MockClock(autojump_threshold=0)) <= bound_s


class Bursts(Wire):
    """64 new streams and their resets, again and again: 64 ms of work in one message."""

    def __init__(self, host: str) -> None:
        super().__init__(host, b"", 0)
        self._number = 0

    async def read(self) -> bytes:
        ids = range(self._number + 2, self._number + 130, 2)
        self._number += 128
        return b"".join(HEAD.pack(0, WINDOW, flags, each, 0) for flags in (SYN, RST) for each in ids)


@pytest.mark.parametrize(
    ("peers", "hosts", "honest"),
    [
        (KNOWN[:12], 3, KNOWN[-1]),
        (KNOWN[:12], 3, PROVEN[0]),
        (KNOWN[:4], 2, KNOWN[-1]),
        (STRANGERS[:12], 3, STRANGERS[-1]),
        (KNOWN[:2], 0, KNOWN[-1]),
        (STRANGERS[:2], 0, STRANGERS[-1]),
    ],
    ids=["members", "members and one proven", "two hosts", "strangers", "members of its host", "strangers of its host"],
)
def test_bursts_of_others_keep_no_peer_waiting(
    peers: list[PeerId], hosts: int, honest: PeerId, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libp2p_yamux, "OPENED_PER_S", 1e6)  # of the real clock

    async def drain(conn: YamuxConnection) -> None:
        while True:
            await conn.accept_stream()

    async def main() -> list[float]:
        time, waits = peer_time(), list[float]()
        async with trio.open_nursery() as nursery:
            for number, peer in enumerate(peers):
                wire = Bursts(f"192.0.2.{number % hosts + 2}" if hosts else "192.0.2.1")
                conn = YamuxConnection(wire, ID.from_base58(peer), time, lambda peer: None)  # type: ignore[arg-type]
                nursery.start_soon(conn.start)
                nursery.start_soon(drain, conn)
            account = time.account(honest, "192.0.2.1")
            await trio.sleep(3)
            for _ in range(10):
                began_s = trio.current_time()
                for cost_s in (MESSAGE_S, STREAM_S, MESSAGE_S, REQUEST_S):  # a query on a stream of its own
                    await account.spend(cost_s)
                waits.append(trio.current_time() - began_s)
                await trio.sleep(0.1)
            nursery.cancel_scope.cancel()
        return waits

    assert max(trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))) < 0.1


def test_a_peer_that_this_node_does_not_read_is_not_called_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libp2p_yamux, "MESSAGE_S", PEER_SHARE * 2 * SILENCE_S)
    ended: list[float] = []

    class Quiet(Wire):
        reads = 0

        async def read(self) -> bytes:
            self.reads += 1
            if self.reads > 1:
                await trio.sleep_forever()
            return NEW

    async def main() -> None:
        time = peer_time()
        conn = YamuxConnection(Quiet("192.0.2.1", b"", 0), ID.from_base58(KNOWN[0]), time, lambda peer: None)  # type: ignore[arg-type]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(conn.start)
            await trio.sleep(1.5 * SILENCE_S)
            assert not conn.is_closed
            await conn.event_closed.wait()  # it is silent indeed once it is read
            ended.append(trio.current_time())

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert ended


def test_honest_transfers_are_not_held_up() -> None:
    async def waited_s() -> float:
        account = peer_time().account(STRANGERS[0], "192.0.2.1")

        async def transfer(size: int) -> None:
            for _ in range(size // MESSAGE_BYTES + 1):
                await account.spend(MESSAGE_S + MESSAGE_BYTES * BYTE_S + 4 * FRAME_S)

        began_s = trio.current_time()
        await transfer(RESPONSE_BYTES_MAX)  # the largest response
        for _ in range(10):
            await trio.sleep(1)
            await transfer(20 * MiB)  # what the windows allow for over 50 ms
        return trio.current_time() - began_s - 10

    assert trio.run(waited_s, clock=trio.testing.MockClock(autojump_threshold=0)) == 0
