"""The bulk transport over real sockets: who gets in, what garbage costs, and what silence costs."""

import asyncio
import random
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from hyperspace_vllm.core.records import wire
from hyperspace_vllm.core.records.ids import ManifestDigest, RowId
from hyperspace_vllm.core.records.limits import (
    PEER_CONTROL_BYTES_MAX,
    PEER_REQUESTS_MAX,
    MiB,
)
from hyperspace_vllm.core.records.reason import Reason
from hyperspace_vllm.daemon.identity import Identity, curve_public_of
from hyperspace_vllm.daemon.kv import chunk_server, kv_door
from hyperspace_vllm.daemon.peer_failed import PeerFailed
from tests.support.daemons.kv_sides import CHUNK, ROW_ID, Side, fetch, put_object
from tests.support.nodes import peer_of
from tests.support.until import until_async

pytestmark = pytest.mark.io


def raw_client(
    context: zmq.asyncio.Context, identity: Identity, server: Side, reconnects: bool = True
) -> zmq.asyncio.Socket:
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.RECONNECT_IVL, 100 if reconnects else -1)
    socket.setsockopt(zmq.LINGER, 0)
    socket.curve_publickey, socket.curve_secretkey = identity.curve_public, identity.curve_secret
    socket.curve_serverkey = curve_public_of(server.identity.peer_id)
    socket.connect(f"tcp://{server.transport.endpoint}")
    return socket


async def test_what_one_node_holds_another_finds_and_fetches(pair: tuple[Side, Side]) -> None:
    server, client = pair
    record = put_object(server.store)
    peer = server.identity.peer_id
    (offer,) = (await client.transport.find(peer, (RowId(bytes(32)), ROW_ID), 5.0)).offers
    assert (offer.index, offer.row, offer.columns) == (1, 0, b"\xff" * 8)
    reply = await client.transport.manifest(peer, ManifestDigest(offer.manifest), 5.0)
    assert (reply.manifest, reply.digests, reply.proof) == (record.raw, record.digests, record.proof)
    columns = tuple(range(63, -1, -1))
    held = server.store.read_chunks(record.digest, 0, columns)
    assert await fetch(client, server, record.digest, columns) == {column: bytes(chunk) for column, chunk in held}
    assert client.transport.charges == server.transport.charges == {}


async def test_a_question_for_many_rows_is_answered_in_slices_between_which_others_are_served(
    pair: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = pair
    put_object(server.store)
    offers, slices = server.store.offers, []

    def counted(row_ids: Sequence[bytes]) -> tuple[wire.Offer, ...]:
        slices.append(len(row_ids))
        return offers(row_ids)

    monkeypatch.setattr(server.store, "offers", counted)
    ids = [RowId(secrets.token_bytes(32)) for _ in range(8_000)]
    ids[7_000] = ROW_ID
    (offer,) = (await client.transport.find(server.identity.peer_id, tuple(ids), 20.0)).offers
    assert offer.index == 7_000
    assert (sum(slices), max(slices)) == (8_000, chunk_server.HAVE_BATCH)


async def test_what_is_not_there_is_said_at_once(pair: tuple[Side, Side]) -> None:
    server, client = pair
    record = put_object(server.store)
    for digest, row in ((ManifestDigest(bytes(32)), 0), (record.digest, 1)):
        with pytest.raises(PeerFailed, match="not_here"):
            await fetch(client, server, digest, (0, 1), row=row)
    with pytest.raises(PeerFailed, match="not_here"):
        await client.transport.manifest(server.identity.peer_id, ManifestDigest(bytes(32)), 5.0)


async def test_a_truncated_file_is_an_io_error_to_the_peer(pair: tuple[Side, Side], tmp_path: Path) -> None:
    server, client = pair
    record = put_object(server.store)
    (tmp_path / "a" / "chunks" / f"{record.digest.hex()}.obj").write_bytes(b"")
    with pytest.raises(PeerFailed, match="io_error"):
        await fetch(client, server, record.digest, (0,))


async def test_strangers_do_not_get_in(pair: tuple[Side, Side], tmp_path: Path) -> None:
    server, client = pair
    (tmp_path / "x").mkdir()
    stranger = Side(tmp_path / "x", server.address)
    with pytest.raises(PeerFailed, match="unreachable"):
        await stranger.transport.find(server.identity.peer_id, (ROW_ID,), 1.0)
    assert not stranger.transport.is_connected(server.identity.peer_id)
    assert server.metrics.failures_total.labels("l2", "unknown_peer")._value.get() >= 1
    await client.transport.find(server.identity.peer_id, (ROW_ID,), 5.0)
    await stranger.transport.close()


async def test_a_server_with_another_key_is_never_asked(pair: tuple[Side, Side], tmp_path: Path) -> None:
    server, _client = pair
    (tmp_path / "x").mkdir()
    impostor_at = server.transport.endpoint
    expected = Identity.load(tmp_path / "x")
    deceived = Side(tmp_path / "b", peer_of(expected, impostor_at))
    with pytest.raises(PeerFailed, match="unreachable"):
        await deceived.transport.find(expected.peer_id, (ROW_ID,), 1.0)
    await deceived.transport.close()


async def test_an_absent_peer_costs_a_wait_once_and_then_nothing(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    gone = Identity.load(tmp_path / "gone")
    client = Side(tmp_path, peer_of(gone))
    for at_most_s in (1.5, 0.1, 0.1):
        began = time.monotonic()
        with pytest.raises(PeerFailed, match="unreachable"):
            await client.transport.find(gone.peer_id, (ROW_ID,), 5.0)
        assert time.monotonic() - began < at_most_s
    await client.transport.close()


async def test_garbage_is_charged_and_the_connection_goes_on(pair: tuple[Side, Side]) -> None:
    server, client = pair
    put_object(server.store)
    rng = random.Random(7)
    good = wire.encode(wire.Have(1, (ROW_ID,)))
    garbage = [
        [b""],
        [b"", b""],
        [good, b"more"],
        [good[:-1]],
        [good + b"\x00"],
        [wire.encode(wire.NotHere(1, "busy"))],
        [b"\xc1" * 100],
        *[[rng.randbytes(rng.randrange(300))] for _ in range(200)],
    ]
    context = zmq.asyncio.Context()
    socket = raw_client(context, client.identity, server)
    for frames in garbage:
        await socket.send_multipart(frames)
    await socket.send(good)
    async with asyncio.timeout(5):
        reply = wire.decode_reply(await socket.recv())
    assert isinstance(reply, wire.HaveReply)
    assert len(reply.offers) == 1
    assert server.transport.charges[client.identity.peer_id, Reason.PROTOCOL] == len(garbage)
    assert server.violations == [client.identity.peer_id] * len(garbage)
    context.destroy(linger=0)


async def test_an_oversized_message_ends_only_its_connection(pair: tuple[Side, Side]) -> None:
    server, client = pair
    context = zmq.asyncio.Context()
    socket = raw_client(context, client.identity, server)
    await socket.send(bytes(PEER_CONTROL_BYTES_MAX + 1))
    assert (await client.transport.find(server.identity.peer_id, (ROW_ID,), 5.0)).offers == ()
    context.destroy(linger=0)


async def test_a_peer_has_a_bounded_number_of_requests_open(pair: tuple[Side, Side]) -> None:
    server, client = pair
    record = put_object(server.store)
    context = zmq.asyncio.Context()
    socket = raw_client(context, client.identity, server)
    asked = 4 * PEER_REQUESTS_MAX
    for number in range(asked):  # nobody reads the answers: they fill every queue
        await socket.send(wire.encode(wire.GetChunks(number, record.digest, 0, tuple(range(64)))))
    busy = server.metrics.failures_total.labels("l2", "peer_busy")._value
    await until_async(lambda: busy.get() >= asked - 2 * PEER_REQUESTS_MAX)
    held = server.metrics.bytes_total.labels("served")._value.get()
    assert held < 200 * MiB  # its own queue, both sockets' and the kernel's
    context.destroy(linger=0)


async def test_chunks_that_nobody_takes_are_bounded_for_one_peer_and_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_server, "PEERS_BYTES_IN_FLIGHT_MAX", 5 * MiB)
    monkeypatch.setattr(chunk_server, "PEER_BYTES_IN_FLIGHT_MAX", 2 * MiB)
    monkeypatch.setattr(chunk_server, "SEND_STALL_S", 2.0)
    asking = []
    for number in range(6):
        (tmp_path / str(number)).mkdir()
        asking.append(Identity.load(tmp_path / str(number)))
    server = Side(tmp_path, *(peer_of(identity) for identity in asking))
    record = put_object(server.store)
    context = zmq.asyncio.Context()
    sockets = [raw_client(context, identity, server, reconnects=False) for identity in asking]
    for socket in sockets:
        for number in range(32):  # 150 MiB, of which nothing is read
            await socket.send(wire.encode(wire.GetChunks(number, record.digest, 0, tuple(range(64)))))
    peers = server.transport._server._peers

    def held() -> list[int]:
        return [peer.bytes_in_flight() for peer in peers.values()]

    await until_async(lambda: sum(held()) > 4 * MiB)
    most = [0, 0]
    while any(held()):  # each is cut off after SEND_STALL_S
        most = [max(most[0], *held()), max(most[1], sum(held()))]
        await asyncio.sleep(0.01)
    assert most[0] <= 2 * MiB
    assert most[1] <= 5 * MiB + len(asking) * CHUNK
    context.destroy(linger=0)
    await server.transport.close()


async def test_a_connection_that_carries_messages_holds_nothing_between_them(pair: tuple[Side, Side]) -> None:
    server, client = pair
    record = put_object(server.store)
    await client.transport.find(server.identity.peer_id, tuple(RowId(bytes([n]) * 32) for n in range(100)), 5.0)
    await fetch(client, server, record.digest, tuple(range(64)))
    (connection,) = server.transport._server._door._connections.values()
    (link,) = client.transport._links.values()
    assert link._passage is not None
    for passage in (connection._passage, link._passage):
        assert (passage._meter.held_frames, passage._meter.held_bytes) == (0, 0)


async def test_the_newest_connections_of_a_peer_and_of_all_peers_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_door, "KV_CONNECTIONS_MAX", 5)
    identities = []
    for number in range(8):
        (tmp_path / str(number)).mkdir()
        identities.append(Identity.load(tmp_path / str(number)))
    server = Side(tmp_path, *(peer_of(identity) for identity in identities))
    places = server.transport._server._door._connections
    context, sockets, order = zmq.asyncio.Context(), [], (*[identities[0]] * 4, *identities[1:])
    for number, identity in enumerate(order):
        before = set(places)
        sockets.append(raw_client(context, identity, server, reconnects=False))
        await until_async(lambda: places.keys() - before)  # noqa: B023 (it has ended when `before` changes)
        assert len(places) <= (2 if number < 4 else 5)
    assert [connection.peer for connection in places.values()] == [identity.peer_id for identity in order[-5:]]
    context.destroy(linger=0)
    await server.transport.close()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda number: [b"\xc1garbage"], "timeout"),  # whose answer it was to be, nobody knows
        (lambda number: [wire.encode(wire.Chunk(number, 0, CHUNK)), bytes(CHUNK - 1)], "protocol"),
        (lambda number: [wire.encode(wire.Chunk(number, 0, 256)), bytes(256)], "protocol"),
        (lambda number: [wire.encode(wire.Chunk(number, 5, CHUNK)), bytes(CHUNK)], "protocol"),
        (lambda number: [wire.encode(wire.Chunk(number, 0, CHUNK))], "protocol"),
        (lambda number: [wire.encode(wire.Chunk(number, 0, CHUNK)), bytes(CHUNK), b""], "protocol"),
        (lambda number: [wire.encode(wire.HaveReply(number, ()))], "protocol"),
    ],
)
async def test_a_lying_server_costs_one_request_and_is_charged(
    tmp_path: Path, answer: Callable[[int], list[bytes]], reason: str
) -> None:
    assert await reason_of(tmp_path, answer) == (reason, 1)


@pytest.mark.parametrize(
    "answer", [lambda number: [], lambda number: [wire.encode(wire.Chunk(number + 1, 0, CHUNK)), bytes(CHUNK)]]
)
async def test_no_answer_or_a_stray_one_costs_the_deadline_and_is_no_crime(
    tmp_path: Path, answer: Callable[[int], list[bytes]]
) -> None:
    assert await reason_of(tmp_path, answer) == ("timeout", 0)


async def reason_of(tmp_path: Path, answer: Callable[[int], list[bytes]]) -> tuple[str, int]:
    """How a fetch from a server that answers so fails, and what the server is charged."""
    (tmp_path / "liar").mkdir()
    liar = Identity.load(tmp_path / "liar")
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.ROUTER)
    socket.curve_server, socket.curve_secretkey = True, liar.curve_secret
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    client = Side(tmp_path, peer_of(liar, f"127.0.0.1:{port}"))

    async def lie() -> None:
        route, request = await socket.recv_multipart()
        frames = answer(wire.decode_request(request).request)
        if frames:
            await socket.send_multipart([route, *frames])

    lying = asyncio.create_task(lie())
    chunks = client.transport.chunks(liar.peer_id, ManifestDigest(bytes(32)), 0, (0, 1), CHUNK, 0.5)
    with pytest.raises(PeerFailed) as failed:
        async with aclosing(chunks):
            await anext(chunks)
    await lying
    context.destroy(linger=0)
    await client.transport.close()
    return failed.value.reason, client.transport.charges[liar.peer_id, Reason.PROTOCOL]
