"""Responses in a fleet's Redis, with a real redis-server: filled with lies, killed, frozen, full and restarted."""

import asyncio
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from hyperspace_vllm.config import Config
from hyperspace_vllm.core.local.messages import ResponseAudited, ResponseNotFound, Scope, StoreResponse
from hyperspace_vllm.core.peers.findings import FINDING_EVERY_MS, FINDINGS_MIN
from hyperspace_vllm.core.records.ids import network_id, peer_id
from hyperspace_vllm.core.records.limits import RESPONSE_TTL_MS, STREAM_FRAME_BYTES_MAX, MiB
from hyperspace_vllm.core.records.peer_wire import Hit, Miss, decode_answer, encode
from hyperspace_vllm.core.records.signing import NO_MEMBER_TAG
from hyperspace_vllm.core.response.cache_proof import make_proof, request_hash
from hyperspace_vllm.core.response.sealed_hit import make_hit
from hyperspace_vllm.daemon import clock
from hyperspace_vllm.daemon.clock import wall_ms
from hyperspace_vllm.daemon.identity import Identity
from hyperspace_vllm.daemon.metrics import Metrics
from hyperspace_vllm.daemon.node.join import load_network_key, make_trust, node_options
from hyperspace_vllm.daemon.responses.answer_places import ANSWERS_MAX, OWN_NODE, AskingPeer
from hyperspace_vllm.daemon.responses.audit_requests import AuditRequests
from hyperspace_vllm.daemon.responses.response_lookups import FoundResponse
from hyperspace_vllm.daemon.responses.response_server import ResponseServer
from hyperspace_vllm.daemon.responses.response_store import ResponseStore
from hyperspace_vllm.response_db import ResponseReader, database_path
from tests.support import network_nodes, redis_server
from tests.support.network_nodes import MODEL, NetworkedNode, body_of, config_of, private_network, request_key
from tests.support.network_shell import NetworkShell
from tests.support.redis_server import RedisServer

if TYPE_CHECKING:
    from redis.asyncio import Redis

redis_link = pytest.importorskip("hyperspace_vllm.daemon.redis.redis_link")
redis_responses = pytest.importorskip("hyperspace_vllm.daemon.redis.redis_responses")
pytestmark = [pytest.mark.io, redis_server.NEEDED]

NETWORK = network_id("default")
WAIT_S = 60.0
DEADLINE_S = 30.0  # of a lookup


def redis_key(name: object) -> str:
    return f"hyperspace:{NETWORK.hex()[:16]}:response:{request_hash(NETWORK, request_key(name)).hex()}"


class FleetNode:
    """All of a node that has to do with Redis, without p2p; it is its own client."""

    def __init__(self, directory: Path, url: str, key_file: Path | None, **settings: object) -> None:
        directory.mkdir(mode=0o700, exist_ok=True)
        self.config = Config(
            data_dir=directory,
            p2p_listen="",
            network_key_file=str(key_file or ""),
            shared_responses=url,
            **settings,  # type: ignore[arg-type]
        )
        self.identity = Identity.load(directory)
        self.metrics = Metrics()
        self.path = database_path(directory)
        self.trust = trust = make_trust(self.config, self.identity, load_network_key(self.config))
        self.store = ResponseStore(self.path, self.config.response_bytes, RESPONSE_TTL_MS, self.identity, NETWORK)
        options, key = node_options(self.config, None), self.identity.signing_key
        shell = NetworkShell(options, key, trust, self, self.store, self.metrics, listens=False)
        self.network = shell.responses
        self.server = ResponseServer(self.path, NETWORK, trust.vouch)
        self.shared = redis_responses.RedisResponses(
            url, NETWORK, "network", self.server, trust, self.metrics, self.network, self, self.store
        )
        self.answers: dict[int, tuple[FoundResponse | None, str]] = {}
        self.lookups = 0

    def start(self) -> None:
        self.store.start(self.shared.heard)

    async def close(self) -> None:
        self.store.close()
        await self.shared.close()
        self.server.close()

    def hint(self, lookup: int, hinted: bool) -> None:
        """Without p2p there is none."""

    def let_try(self, lookup: int, body: bytes, proof: bytes) -> None: ...

    def answer(self, lookup: int, found: FoundResponse | None, reason: str) -> None:
        self.answers[lookup] = found, reason

    def compute(self, name: object, scope: Scope = "network", ttl_ms: int = RESPONSE_TTL_MS) -> None:
        assert self.store.store(StoreResponse(request_key(name), scope, MODEL, "vllm test", ttl_ms, body_of(name)))

    async def share(self, name: object) -> None:
        """Compute it, and wait until it lies in Redis."""
        before = self.written
        self.compute(name)
        await until(lambda: self.written > before)

    def begin(self, name: object) -> int:
        self.lookups += 1
        self.shared.find(self.lookups, request_key(name), MODEL, round(DEADLINE_S * 1000))
        return self.lookups

    async def find(self, name: object) -> FoundResponse | None:
        lookup = self.begin(name)
        await until(lambda: lookup in self.answers)
        return self.answers[lookup][0]

    def stored(self, name: object) -> bytes | None:
        """The proof of what lies in its own database."""
        assert self.store.flush(60)
        reader = ResponseReader(self.path)
        entry = reader.get(request_key(name), wall_ms())
        reader.close()
        return entry.proof if entry else None

    @property
    def written(self) -> int:
        return int(self.shared.status()["written"])

    def failures(self, reason: str) -> float:
        return (
            self.metrics.registry.get_sample_value("hyperspace_failures_total", {"layer": "l1", "reason": reason})
            or 0.0
        )


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110  (what changes is another process)
            await asyncio.sleep(0.002)


async def until_found(node: FleetNode, name: object) -> None:
    async with asyncio.timeout(WAIT_S):
        while await node.find(name) is None:  # noqa: ASYNC110  (what changes is another process)
            await asyncio.sleep(0.02)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Redis that is there may be as slow as the machine is busy."""
    monkeypatch.setattr(redis_link, "READ_S", 10.0)
    monkeypatch.setattr(redis_responses, "READ_S", 10.0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server.running(tmp_path) as made:
        yield made


@pytest.fixture
async def client(server: RedisServer) -> "AsyncIterator[Redis]":
    client = server.client()
    yield client
    await client.aclose()


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "network.key"
    path.touch(0o600)
    path.write_text(secrets.token_hex(32))
    return path


MakeNode = Callable[..., Awaitable[FleetNode]]


@pytest.fixture
async def node(tmp_path: Path, server: RedisServer, key_file: Path) -> AsyncIterator[MakeNode]:
    made: list[FleetNode] = []

    async def make(name: str, key: Path | None = key_file, url: str = server.url, **settings: object) -> FleetNode:
        made.append(FleetNode(tmp_path / name, url, key, **settings))
        made[-1].start()
        return made[-1]

    yield make
    for each in made:
        await each.close()


async def test_what_one_node_computed_another_has_from_redis_alone_under_the_same_proof(
    node: MakeNode, client: "Redis"
) -> None:
    a, b = await node("a"), await node("b")
    await a.share("x")
    found = await b.find("x")
    assert found is not None
    assert (found.body, found.proof, found.computed_by) == (body_of("x"), a.stored("x"), a.identity.peer_id)
    assert (found.source, found.verified_by) == ("redis", "ed25519")
    assert b.stored("x") == found.proof
    assert b.shared.status() == {"state": "on", "queued": 0, "written": 0, "dropped": 0, "hits": 1}
    assert await b.find("nobody has this") is None
    left_ms = found.expires_at_ms - wall_ms()
    assert abs(await client.pttl(redis_key("x")) - left_ms) < 2_000


async def test_what_is_private_or_fetched_or_over_is_not_written(node: MakeNode, client: "Redis") -> None:
    a, b = await node("a"), await node("b")
    a.compute("salted", scope="private")
    a.compute("over", ttl_ms=0)
    await a.share("x")
    assert await client.keys() == [redis_key("x").encode()]
    assert await b.find("x") is not None
    assert b.stored("x") is not None
    await b.close()
    await client.delete(redis_key("x"))
    b = await node("b")  # it tells anew what it has
    await b.share("y")
    assert await client.keys() == [redis_key("y").encode()]


async def test_who_sees_all_that_passes_and_lies_in_redis_learns_no_key_and_no_answer(
    node: MakeNode, server: RedisServer, client: "Redis"
) -> None:
    seen = bytearray()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            seen.extend(data)
            writer.write(data)
        writer.close()

    async def on_connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.gather(pump(reader, back), pump(there, writer))

    async with await asyncio.start_server(on_connected, "127.0.0.1", 0) as listener:
        url = f"redis://127.0.0.1:{listener.sockets[0].getsockname()[1]}/0"
        a, b = await node("a", url=url), await node("b", url=url)
        await a.share("x")
        assert await b.find("x") is not None
        for each in (a, b):
            await each.close()
    for key in await client.keys():
        seen += key + await client.get(key)
    assert redis_key("x").encode() in seen
    assert MODEL in seen  # as the proof names it: the bytes of what is here are to be seen
    key = request_key("x")
    for secret in (key, key.hex().encode(), body_of("x"), b"the answer"):
        assert secret not in seen


Lie = Callable[[Hit, FleetNode], bytes]


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def signed(node: FleetNode, name: str, model: bytes = MODEL, age_ms: int = 0) -> bytes:
    """A Hit for the request of that name, by this node's key."""
    key, at_ms = request_key(name), wall_ms() - age_ms
    proof = make_proof(node.identity.signing_key, NETWORK, key, b"forged", model, "v", at_ms).encode()
    tag = node.trust.vouch(node.identity.public_key)
    return encode(make_hit(key, NETWORK, os.urandom(12), b"forged", proof, tag, 0))


LIES: dict[str, tuple[str, Lie]] = {
    "altered body": ("bad_seal", lambda hit, a: encode(msgspec.structs.replace(hit, sealed=flipped(hit.sealed)))),
    "altered proof": ("bad_signature", lambda hit, a: encode(msgspec.structs.replace(hit, proof=flipped(hit.proof)))),
    "no tag": ("untrusted_signer", lambda hit, a: encode(msgspec.structs.replace(hit, member=NO_MEMBER_TAG))),
    "another request's": ("wrong_request", lambda hit, a: signed(a, "another")),
    "another model's": ("wrong_model", lambda hit, a: signed(a, "x", model=bytes(32))),
    "expired": ("expired", lambda hit, a: signed(a, "x", age_ms=RESPONSE_TTL_MS + 1)),
    "expired long ago": ("long_expired", lambda hit, a: signed(a, "x", age_ms=2 * RESPONSE_TTL_MS)),
    "too large": ("too_large", lambda hit, a: bytes(STREAM_FRAME_BYTES_MAX + 1)),
    "rubbish": ("protocol", lambda hit, a: b"rubbish"),
    "another message": ("protocol", lambda hit, a: encode(Miss("unknown"))),
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_value_that_does_not_hold_is_a_miss(node: MakeNode, client: "Redis", lie: str) -> None:
    a, b = await node("a"), await node("b")
    await a.share("x")
    hit = decode_answer(await client.get(redis_key("x")))
    assert isinstance(hit, Hit)
    reason, make = LIES[lie]
    await client.set(redis_key("x"), make(hit, a))
    assert await b.find("x") is None
    assert b.failures(reason) == 1
    assert b.stored("x") is None
    await client.set(redis_key("x"), encode(hit))
    assert await b.find("x") is not None


async def test_of_a_huge_value_no_more_is_read_than_an_answer_has(node: MakeNode, client: "Redis") -> None:
    b = await node("b")
    await client.setrange(redis_key("x"), 40 * MiB, b"x")
    assert await b.find("x") is None
    assert b.failures("too_large") == 1
    assert (await client.info("stats"))["total_net_output_bytes"] < STREAM_FRAME_BYTES_MAX + MiB


async def test_a_value_of_another_type_is_a_miss_and_redis_is_asked_on(node: MakeNode, client: "Redis") -> None:
    a, b = await node("a"), await node("b")
    await a.share("x")
    await client.rpush(redis_key("a list"), "x")
    assert await b.find("a list") is None
    assert b.failures("redis_error") == 1
    assert await b.find("x") is not None


async def test_whose_word_counts_is_each_nodes_own_choice(node: MakeNode, tmp_path: Path) -> None:
    other_key = tmp_path / "other.key"
    other_key.touch(0o600)
    other_key.write_text(secrets.token_hex(32))
    a = await node("a")
    await a.share("x")
    for number, (settings, expected) in enumerate(
        [
            ({"key": other_key}, False),
            ({"key": None}, False),
            ({"key": None, "allowed": (a.identity.peer_id,)}, True),
            ({"key": None, "peers": (f"{a.identity.peer_id}@127.0.0.1:1",)}, True),
            ({"trust": "allowlist"}, False),
        ]
    ):
        reader = await node(f"reader {number}", **settings)
        assert (await reader.find("x") is not None) == expected
        assert reader.failures("untrusted_signer") == (not expected)


async def test_a_killed_redis_is_a_quick_miss_and_its_return_brings_what_was_computed_meanwhile(
    node: MakeNode, server: RedisServer
) -> None:
    a, b = await node("a"), await node("b")
    await a.share("before")
    server.kill()
    assert [await b.find("before") for _ in range(100)] == [None] * 100
    assert b.shared._link._failures < 10  # it isn't asked each time
    assert b.shared.status()["state"] == "away"
    a.compute("meanwhile")
    server.start()
    await until(lambda: a.written == 2)
    await until_found(b, "meanwhile")
    assert b.shared.status()["state"] == "on"


async def test_what_a_busy_disk_could_not_read_is_shared_later(node: MakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = await node("a"), await node("b")
    asked: list[bytes] = []
    answer = a.server.answer

    async def counted(request_hash: bytes, popularity: int, asker: AskingPeer) -> Hit | Miss:
        asked.append(request_hash)
        return await answer(request_hash, popularity, asker)

    monkeypatch.setattr(a.server, "answer", counted)
    for _ in range(ANSWERS_MAX):
        await a.server._places.take(OWN_NODE)
    a.compute("x")
    await until(lambda: len(asked) >= 1)
    for _ in range(ANSWERS_MAX):
        a.server._places.free(OWN_NODE)
    await until(lambda: a.written == 1)
    assert await b.find("x") is not None


async def test_a_frozen_redis_costs_one_lookup_its_deadline_and_the_next_ones_nothing(
    node: MakeNode, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await node("a"), await node("b")
    await a.share("x")
    assert await b.find("nothing") is None  # it is connected
    await until(lambda: not b.shared._reading)
    monkeypatch.setattr(redis_responses, "READ_S", 0.1)
    server.signal(signal.SIGSTOP)
    began = time.monotonic()
    lookups = [b.begin("x") for _ in range(50)]
    passed_by = [lookup for lookup in lookups if lookup in b.answers]
    assert len(passed_by) == 50 - redis_responses.READS_MAX
    await until(lambda: b.answers.keys() >= set(lookups))
    assert time.monotonic() - began < DEADLINE_S
    assert b.begin("x") in b.answers  # at once
    monkeypatch.setattr(redis_responses, "READ_S", 10.0)
    server.signal(signal.SIGCONT)
    await until_found(b, "x")


async def test_only_a_redis_that_is_away_lets_the_api_server_stop_asking(node: MakeNode, server: RedisServer) -> None:
    b = await node("b")
    lookup = b.begin("x")
    await until(lambda: lookup in b.answers)
    assert b.answers[lookup] == (None, "not_found")
    server.kill()
    lookup = b.begin("x")
    await until(lambda: lookup in b.answers)
    assert b.answers[lookup] == (None, "off")


async def test_a_released_lookup_is_over_and_mixes_no_answers(node: MakeNode) -> None:
    a, b = await node("a"), await node("b")
    await a.share("x")
    await a.share("y")
    for turn in range(50):
        lookup = b.begin("x")
        for _ in range(turn % 5):
            await asyncio.sleep(0)
        was_answered = lookup in b.answers
        b.shared.release(lookup)
        found = await b.find("y")
        assert found is not None
        assert found.body == body_of("y")
        assert (lookup in b.answers) == was_answered
    assert b.shared.status()["state"] == "on"


async def test_without_redis_the_queue_is_bounded_and_the_newest_stay(
    node: MakeNode, server: RedisServer, client: "Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_responses, "QUEUE_MAX", 10)
    server.kill()
    a = await node("a")
    for number in range(50):
        a.compute(number)
    await until(lambda: a.shared.status()["dropped"] == 40)
    assert a.shared.status()["queued"] == 10
    server.start()
    await until(lambda: a.shared.status()["queued"] == 0)
    await until(lambda: a.written == 10)
    assert set(await client.keys()) == {redis_key(number).encode() for number in range(40, 50)}


async def test_a_purged_entry_leaves_redis_too_and_an_evicted_one_stays(node: MakeNode, client: "Redis") -> None:
    a = await node("a", response_bytes=4096)
    await a.share("purged")
    await a.share("evicted")
    a.store.purge([request_key("purged")])
    a.shared.purge([request_key("purged")])
    for number in range(4):
        await a.share(number)
    assert a.stored("evicted") is None
    assert await client.exists(redis_key("purged")) == 0
    assert await client.exists(redis_key("evicted")) == 1


@pytest.mark.parametrize("turns", [0, 1, 2, 4, 8, 16])
async def test_a_read_under_way_brings_back_nothing_that_is_purged(node: MakeNode, turns: int) -> None:
    a, b = await node("a"), await node("b")
    await a.share("x")
    await a.share("y")
    assert await b.find("y") is not None  # it is connected
    lookup = b.begin("x")
    for _ in range(turns):
        await asyncio.sleep(0)
    was_answered = lookup in b.answers
    b.store.purge([request_key("x")])
    b.shared.purge([request_key("x")])
    after = b.begin("x")
    await until(lambda: {lookup, after} <= b.answers.keys())
    assert b.answers[after] == (None, "not_found")
    assert was_answered or b.answers[lookup] == (None, "not_found")
    await until(lambda: b.shared.status()["queued"] == 0)
    assert await b.find("x") is None
    assert b.stored("x") is None
    assert b.stored("y") is not None


async def test_what_is_purged_while_redis_is_frozen_is_not_brought_back(node: MakeNode, server: RedisServer) -> None:
    a, b = await node("a"), await node("b")
    await a.share("x")
    assert await b.find("nothing") is None  # it is connected
    server.signal(signal.SIGSTOP)
    lookup = b.begin("x")
    await asyncio.sleep(0)
    b.store.purge([request_key("x")])
    b.shared.purge([request_key("x")])
    assert b.answers[lookup] == (None, "not_found")
    server.signal(signal.SIGCONT)
    await until(lambda: b.shared.status()["queued"] == 0)
    assert await b.find("x") is None
    assert b.stored("x") is None


@pytest.mark.parametrize("busy", [False, True])
async def test_what_is_computed_after_a_purge_takes_the_place_of_what_was_purged(
    node: MakeNode, server: RedisServer, client: "Redis", busy: bool
) -> None:
    a = await node("a")
    await a.share("x")
    purged = await client.get(redis_key("x"))
    server.signal(signal.SIGSTOP)
    if busy:  # the deletion has to wait
        a.compute("y")
        await until(lambda: a.shared.status()["queued"] == 1)
    a.store.purge([request_key("x")])
    a.shared.purge([request_key("x")])
    a.compute("x")
    assert a.stored("x") is not None
    await asyncio.sleep(0)  # it has been told
    server.signal(signal.SIGCONT)
    await until(lambda: a.shared.status()["queued"] == 0)
    await until(lambda: a.written == 2 + busy)
    assert await client.get(redis_key("x")) not in (None, purged)


async def test_whom_a_node_that_has_only_redis_convicts_is_believed_no_more(
    node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await node("a"), await node("b")
    await a.share("x")
    await a.share("y")
    found = await b.find("x")
    assert found is not None
    audits = AuditRequests(NETWORK, b.identity.public_key, b.store, b.network.audited, b.metrics)
    now = clock.now()
    for number in range(FINDINGS_MIN):
        ago_ms = (FINDINGS_MIN - 1 - number) * FINDING_EVERY_MS
        earlier = replace(now, mono_ms=now.mono_ms - ago_ms)
        monkeypatch.setattr(clock, "now", lambda earlier=earlier: earlier)
        audits.heard(ResponseAudited(request_key("x"), found.proof, 40, 40, bytes([number])))
    assert await b.find("y") is None
    assert b.failures("untrusted_signer") == 1
    assert b.stored("x") is None


async def test_a_node_that_starts_again_writes_only_what_redis_lacks(node: MakeNode, client: "Redis") -> None:
    a = await node("a")
    await a.share("kept")
    await a.share("lost")
    await a.close()
    await client.delete(redis_key("lost"))
    kept = await client.get(redis_key("kept"))
    again = await node("a")
    await again.share("new")
    await until(lambda: again.written == 2)
    assert await client.exists(redis_key("lost")) == 1
    assert await client.get(redis_key("kept")) == kept


async def test_a_newer_answer_replaces_the_older_one(
    node: MakeNode, client: "Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_responses, "SAME_MS", -1)
    a = await node("a")
    await a.share("x")
    first = await client.get(redis_key("x"))
    await a.share("x")
    assert await client.get(redis_key("x")) != first


async def test_a_full_redis_takes_nothing_and_is_read_on(node: MakeNode, client: "Redis") -> None:
    a, b = await node("a"), await node("b")
    await a.share("x")
    await client.config_set("maxmemory", 1)
    a.compute("y")
    await until(lambda: a.failures("redis_error") == 1)
    assert a.shared.status()["state"] == "on"
    assert await b.find("x") is not None
    await client.config_set("maxmemory", 0)
    await a.share("z")


NONSENSE = [
    b"$abc\r\n",
    b"$-7\r\n",
    b"*1\r\n" * 5000,
    b"hello\r\n",
    b"*99999999999\r\n",
    b":5\r\n" * 99,
    b"\xff" * 100_000,
]


@pytest.mark.parametrize("nonsense", NONSENSE, ids=range(len(NONSENSE)))
async def test_what_speaks_no_redis_is_a_miss(node: MakeNode, nonsense: bytes) -> None:
    async def on_connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            writer.write(nonsense)
        writer.close()

    async with await asyncio.start_server(on_connected, "127.0.0.1", 0) as listener:
        a = await node("a", url=f"redis://127.0.0.1:{listener.sockets[0].getsockname()[1]}/0")
        a.compute("x")
        for name in ("y", "z"):
            began = time.monotonic()
            assert await a.find(name) is None
            assert time.monotonic() - began < DEADLINE_S
        assert not a.shared._writer.done()
        await a.close()


LISTED = f"{peer_id(bytes(32))}@127.0.0.1:1"


@pytest.mark.parametrize(
    ("settings", "with_key", "warning"),
    [
        ({"share": "private"}, True, 'shared_responses is off: share = "private"'),
        ({}, False, "set network_key_file (or peers, bootstrap, allowed)"),
        ({"trust": "allowlist"}, True, "set allowed"),
        ({}, True, ""),
        ({"peers": (LISTED,)}, False, ""),
        ({"trust": "reputation"}, False, ""),
    ],
)
def test_a_node_that_shares_in_vain_says_once_what_to_set(
    tmp_path: Path, key_file: Path, settings: dict[str, Any], with_key: bool, warning: str
) -> None:
    key = str(key_file) if with_key else ""
    config = Config(
        data_dir=tmp_path,
        network_key_file=key,
        p2p_listen="",
        kv_cache=False,
        shared_responses="redis://127.0.0.1:1/0",
        **settings,
    )
    node = NetworkedNode(config)
    try:
        node.status()
    finally:
        node.stop()
    warned = [line for line in (tmp_path / "log").read_text().splitlines() if "shared_responses" in line]
    assert len(warned) == bool(warning)
    assert all("WARNING" in line and warning in line for line in warned)


def hyperspace(node: NetworkedNode, *command: str) -> str:
    """What the command prints."""
    line = [sys.executable, "-m", "hyperspace_vllm.cli", *command, "--data-dir", str(node.config.data_dir)]
    return subprocess.run(
        line, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "200"}, timeout=30
    ).stdout


def test_whole_nodes_share_through_redis_and_ask_peers_for_the_rest(tmp_path: Path, server: RedisServer) -> None:
    nodes = private_network(tmp_path, 1)  # a peer that has no Redis
    (peer,) = nodes
    key = Path(peer.config.network_key_file)

    def start(name: str, **settings: object) -> NetworkedNode:
        directory = tmp_path / name
        directory.mkdir(mode=0o700)
        nodes.append(NetworkedNode(config_of(directory, key, [peer], shared_responses=server.url, **settings)))
        return nodes[-1]

    try:
        alone, joined, mute = start("alone", p2p_listen=""), start("joined"), start("mute", share="private")
        for each in (alone, mute):
            each.store("x")
            each.store(f"of {each.config.data_dir.name}")
        network_nodes.until(lambda: alone.status()["shared_responses"]["written"] == 2, 60)
        assert mute.status()["shared_responses"] is None
        network_nodes.until(lambda: joined.find("x").body == body_of("x"), 60)  # Redis has 100 ms each time
        assert joined.find("of mute").body is None
        # What Redis doesn't have comes from peers.
        network_nodes.until(lambda: joined.card().get("p2p") and joined.status()["p2p"]["known_peers"] >= 1, 60)
        peer.store("at the peer")
        network_nodes.until(lambda: joined.find("at the peer").body == body_of("at the peer"), 60)

        assert re.search(r"responses in Redis: hits\W+[1-9]", hyperspace(joined, "status"))
        hyperspace(alone, "cache", "purge", "--all")
        network_nodes.until(lambda: joined.find("of alone").body is None, 60)
        server.kill()
        assert isinstance(alone.find("x, again").answer, ResponseNotFound)
    finally:
        for each in nodes:
            each.stop()
