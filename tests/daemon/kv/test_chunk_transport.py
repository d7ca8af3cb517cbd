"""The bulk transport over real sockets: who gets in, what garbage costs, and what silence costs."""

import asyncio
import random
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from pathlib import Path

import pytest
import zmq
import zmq.asyncio
from nacl.signing import SigningKey

from hyperspace_vllm.config import Config
from hyperspace_vllm.core.events.network_effects import KvEndpoint
from hyperspace_vllm.core.peers.dials import Dials
from hyperspace_vllm.core.records import wire
from hyperspace_vllm.core.records.ids import ManifestDigest, PeerId, RowId, network_id, peer_id, sha256
from hyperspace_vllm.core.records.limits import (
    DIALS_BURST_S,
    DIALS_OWN_TO_HOST_PER_S,
    DIALS_TO_HOST_PER_S,
    KV_LINKS_MAX,
    PEER_CONTROL_BYTES_MAX,
    PEER_REQUESTS_MAX,
    MiB,
)
from hyperspace_vllm.daemon.identity import Identity, curve_public_of
from hyperspace_vllm.daemon.kv import chunk_server, kv_door
from hyperspace_vllm.daemon.kv.chunk_store import ChunkStore
from hyperspace_vllm.daemon.kv.chunk_transport import ChunkTransport
from hyperspace_vllm.daemon.kv.object_codec import ObjectRecord, encode_row, new_nonce, sign_record
from hyperspace_vllm.daemon.metrics import Metrics
from hyperspace_vllm.daemon.peer_failed import PeerFailed
from hyperspace_vllm.daemon.zmq_pump import HANDSHAKE_MS
from tests.support.nodes import peer_of, trust_of, until

pytestmark = pytest.mark.io
CHUNK = 256 * 301  # large enough to be sent without a copy
ROW_ID = RowId(sha256(b"row"))


def put_object(store: ChunkStore) -> ObjectRecord:
    nonce, row = new_nonce(), secrets.token_bytes(32 * CHUNK)
    with store.new_object(1, CHUNK) as writer:
        digests = encode_row(memoryview(row), bytes(32), nonce, CHUNK, writer.row(0))
        record = sign_record(
            SigningKey(bytes(32)),
            network_id("test"),
            bytes(32),
            CHUNK,
            nonce,
            ((ROW_ID, len(row)),),
            digests,
            bytes(48),
            bytes(48),
            0,
        )
        store.publish(writer, record, shareable=True)
    return record


class Side:
    """One end: a transport with its store."""

    def __init__(self, directory: Path, *peers: str) -> None:
        self.identity = Identity.load(directory)
        self.store = ChunkStore(directory / "chunks", 64 * MiB)
        self.metrics = Metrics()
        self.violations: list[PeerId] = []
        self.trust = trust_of(self.identity, peers)
        self.transport = ChunkTransport(
            Config(data_dir=directory, peers=peers),
            self.identity,
            self.store,
            self.metrics,
            self.trust,
            Dials(time.time_ns() // 1_000_000),
            self.violations.append,
        )

    @property
    def address(self) -> str:
        return f"{self.identity.peer_id}@{self.transport.endpoint}"


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[tuple[Side, Side]]:
    """A server and a client that know each other."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    server = Side(tmp_path / "a", peer_of(Identity.load(tmp_path / "b")))
    client = Side(tmp_path / "b", server.address)
    yield server, client
    await client.transport.close()
    await server.transport.close()


async def fetch(
    client: Side, server: Side, digest: ManifestDigest, columns: tuple[int, ...], timeout_s: float = 5.0, row: int = 0
) -> dict[int, bytes]:
    chunks: dict[int, bytes] = {}
    peer = server.identity.peer_id
    async with aclosing(client.transport.chunks(peer, digest, row, columns, CHUNK, timeout_s)) as arriving:
        async for batch in arriving:
            chunks |= {column: bytes(chunk) for column, chunk in batch}
    return chunks


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


# --- peers that come and go ---------------------------------------------------------------------


@pytest.fixture
async def strangers(tmp_path: Path) -> AsyncIterator[tuple[Side, Side]]:
    """A server and a client that have never heard of each other."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    server, client = Side(tmp_path / "a"), Side(tmp_path / "b")
    yield server, client
    await client.transport.close()
    await server.transport.close()


def own(peer: PeerId, address: str) -> KvEndpoint:
    return KvEndpoint(peer, address, own=True)


def introduce(server: Side, client: Side) -> PeerId:
    server.transport.admit([client.identity.peer_id])
    client.transport.set_peers([own(server.identity.peer_id, server.transport.endpoint)])
    return server.identity.peer_id


async def test_a_discovered_peer_is_asked_and_served_like_a_configured_one(strangers: tuple[Side, Side]) -> None:
    server, client = strangers
    record = put_object(server.store)
    peer = introduce(server, client)
    assert client.transport.peers == (peer,)
    await until(lambda: client.transport.is_connected(peer))
    assert len((await client.transport.find(peer, (ROW_ID,), 5.0)).offers) == 1
    assert len(await fetch(client, server, record.digest, tuple(range(64)))) == 64


async def test_a_peer_that_dials_before_it_is_admitted_gets_in_soon_after(strangers: tuple[Side, Side]) -> None:
    server, client = strangers
    peer = server.identity.peer_id
    client.transport.set_peers([own(peer, server.transport.endpoint)])
    refused = server.metrics.failures_total.labels("l2", "unknown_peer")._value
    await until(lambda: refused.get() >= 1)
    assert not client.transport.is_connected(peer)
    server.transport.admit([client.identity.peer_id])
    await until(lambda: client.transport.is_connected(peer), 2 * HANDSHAKE_MS / 1000)
    await client.transport.find(peer, (ROW_ID,), 1.0)


async def test_who_is_admitted_no_more_is_answered_no_more(strangers: tuple[Side, Side]) -> None:
    server, client = strangers
    peer = introduce(server, client)
    await client.transport.find(peer, (ROW_ID,), 5.0)
    server.transport.admit(())
    with pytest.raises(PeerFailed, match="timeout"):
        await client.transport.find(peer, (ROW_ID,), 0.3)
    server.transport.admit([client.identity.peer_id])
    await client.transport.find(peer, (ROW_ID,), 5.0)
    assert server.transport.charges == {}


async def test_a_peer_that_nobody_knows_is_not_connected_and_fails_at_once(strangers: tuple[Side, Side]) -> None:
    _, client = strangers
    unknown = peer_id(SigningKey(bytes(32)).verify_key.encode())
    assert not client.transport.is_connected(unknown)
    with pytest.raises(PeerFailed, match="unreachable"):
        await client.transport.find(unknown, (ROW_ID,), 5.0)
    with pytest.raises(PeerFailed, match="unreachable"):
        client.transport.chunks(unknown, ManifestDigest(bytes(32)), 0, (0,), CHUNK, 5.0)


async def test_what_is_under_way_to_a_peer_that_vanishes_fails_at_once(strangers: tuple[Side, Side]) -> None:
    server, client = strangers
    record = put_object(server.store)
    peer = introduce(server, client)
    arrived: list[int] = []

    async def take() -> None:
        async with aclosing(client.transport.chunks(peer, record.digest, 0, (*range(64),), CHUNK, 30.0)) as arriving:
            async for batch in arriving:
                arrived.extend(column for column, _ in batch)
                client.transport.set_peers(())

    began = time.monotonic()
    with pytest.raises(PeerFailed, match="unreachable"):
        await take()
    assert time.monotonic() - began < 15  # of 30
    assert 0 < len(arrived) < 64
    assert client.transport.peers == ()
    introduce(server, client)
    waiting = asyncio.create_task(client.transport.find(peer, (ROW_ID,), 30.0))  # for the connection
    await asyncio.sleep(0)
    client.transport.set_peers(())
    with pytest.raises(PeerFailed, match="unreachable"):
        await waiting


async def test_a_peer_that_has_moved_is_asked_where_it_is_now(strangers: tuple[Side, Side]) -> None:
    server, client = strangers
    server.transport.admit([client.identity.peer_id])
    client.transport.set_peers([own(server.identity.peer_id, "127.0.0.1:1")])
    await asyncio.sleep(0.05)
    introduce(server, client)
    await client.transport.find(server.identity.peer_id, (ROW_ID,), 5.0)


async def test_configured_peers_stay_whatever_is_discovered(pair: tuple[Side, Side]) -> None:
    server, client = pair
    peer = server.identity.peer_id
    for discovered in ([], [own(peer, "127.0.0.1:1")], [own(client.identity.peer_id, client.transport.endpoint)]):
        client.transport.set_peers(discovered)
        server.transport.admit(())
        assert client.transport.peers == (peer,)
        assert client.transport.endpoint_of(peer) == server.transport.endpoint
        await client.transport.find(peer, (ROW_ID,), 5.0)


class Counter(asyncio.Protocol):
    """A third party, which counts who calls."""

    calls = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        type(self).calls += 1
        transport.close()


@pytest.fixture
async def third_party() -> AsyncIterator[str]:
    Counter.calls = 0
    server = await asyncio.get_running_loop().create_server(Counter, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


@pytest.mark.parametrize("met", [False, True])
async def test_a_third_party_that_peers_name_as_theirs_is_seldom_called(
    strangers: tuple[Side, Side], third_party: str, met: bool
) -> None:
    """By 64 invented peers, which are asked as often as one likes; and by peers at whose host it lies."""
    _, client = strangers
    others = [peer_id(SigningKey(bytes([n]) * 32).verify_key.encode()) for n in range(1, 65)]
    began = time.monotonic()
    client.transport.set_peers([KvEndpoint(peer, third_party, own=met) for peer in others])
    await asyncio.sleep(0)
    assert Counter.calls == 0 if not met else True  # who isn't met is called when it is needed
    while time.monotonic() - began < 3:
        for peer in others:
            with suppress(PeerFailed):
                await client.transport.find(peer, (ROW_ID,), 0.001)
    took_s = time.monotonic() - began
    per_s = DIALS_OWN_TO_HOST_PER_S if met else DIALS_TO_HOST_PER_S
    assert 0 < Counter.calls <= per_s * (DIALS_BURST_S + took_s) + 1


async def test_an_endpoint_elsewhere_is_the_peers_once_it_has_answered_there(strangers: tuple[Side, Side]) -> None:
    server, client = strangers
    peer = server.identity.peer_id
    server.transport.admit([client.identity.peer_id])
    elsewhere = [KvEndpoint(peer, server.transport.endpoint, own=False)]
    client.transport.set_peers(elsewhere)
    assert client.transport._links == {}
    await client.transport.find(peer, (ROW_ID,), 5.0)
    client.transport._drop_link()
    client.transport.set_peers(elsewhere)
    await until(lambda: client.transport.is_connected(peer))


async def test_links_are_bounded_and_the_least_recently_useful_makes_room(strangers: tuple[Side, Side]) -> None:
    server, client = strangers
    others = [peer_id(SigningKey(bytes([n]) * 32).verify_key.encode()) for n in range(1, 2 * KV_LINKS_MAX)]
    server.transport.admit([client.identity.peer_id])
    absent = [own(other, "127.0.0.1:1") for other in others]
    client.transport.set_peers([*absent, own(server.identity.peer_id, server.transport.endpoint)])
    assert len(client.transport.peers) == 2 * KV_LINKS_MAX
    assert len(client.transport._links) == KV_LINKS_MAX
    await client.transport.find(server.identity.peer_id, (ROW_ID,), 5.0)  # had no link
    for other in others[KV_LINKS_MAX:]:
        assert not client.transport.is_connected(other)
        with pytest.raises(PeerFailed):
            await client.transport.find(other, (ROW_ID,), 0.001)
    assert len(client.transport._links) == KV_LINKS_MAX
    assert client.transport.is_connected(server.identity.peer_id)


async def test_good_and_bad_service_make_a_reputation_for_service_and_lies_cost_belief_too(
    pair: tuple[Side, Side],
) -> None:
    server, client = pair
    peer, trust = server.identity.peer_id, client.trust
    now_ms = time.time_ns() // 1_000_000
    newcomer = trust.service.score(peer, now_ms)
    client.transport.credit(peer)
    assert trust.service.score(peer, now_ms) > newcomer
    assert trust.word.score(peer, now_ms) == newcomer
    client.transport.charge(peer, "stalled")
    assert trust.word.score(peer, now_ms) == newcomer
    client.transport.charge(peer, "bad_digest")
    assert trust.service.score(peer, now_ms) < newcomer * 1.1
    assert trust.word.score(peer, now_ms) < newcomer


# --- bad manners --------------------------------------------------------------------------------


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
    assert server.transport.charges[client.identity.peer_id, "protocol"] == len(garbage)
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
    await until(lambda: busy.get() >= asked - 2 * PEER_REQUESTS_MAX)
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

    await until(lambda: sum(held()) > 4 * MiB)
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
        await until(lambda: places.keys() - before)  # noqa: B023 (it has ended when `before` changes)
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
    return failed.value.reason, client.transport.charges[liar.peer_id, "protocol"]
