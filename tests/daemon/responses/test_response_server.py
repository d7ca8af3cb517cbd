"""A node answers its peers: what it may share opens at the other end, all else is a miss, and nothing hangs it."""

import asyncio
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from nacl.signing import SigningKey

from hyperspace_vllm.core.local.message_fields import Scope
from hyperspace_vllm.core.local.response_cache_messages import StoreResponse
from hyperspace_vllm.core.records.ids import RequestKey, network_id
from hyperspace_vllm.core.records.limits import RESPONSE_BYTES_MAX, RESPONSE_TTL_MS
from hyperspace_vllm.core.records.peer_wire import Hit, Miss
from hyperspace_vllm.core.records.signing import member_tag
from hyperspace_vllm.core.response.cache_proof import make_proof, request_hash
from hyperspace_vllm.core.response.sealed_hit import Opened, open_hit
from hyperspace_vllm.daemon.clock import wall_ms
from hyperspace_vllm.daemon.responses import response_server
from hyperspace_vllm.daemon.responses.answer_places import ANSWERS_MAX, OWN_NODE, AskingPeer
from hyperspace_vllm.daemon.responses.response_server import ANSWER_S, ResponseServer
from hyperspace_vllm.daemon.responses.response_store import ResponseStore
from tests.support.until import until_async

pytestmark = pytest.mark.io

NETWORK = network_id("test")
MODEL = bytes([8]) * 32
SECRET = bytes([3]) * 32
STRANGER = AskingPeer("stranger", False, False)
OWN, PEER = SigningKey(bytes([1]) * 32), SigningKey(bytes([2]) * 32)


@dataclass(frozen=True)
class Signer:
    signing_key: SigningKey = field(default_factory=lambda: OWN)


def key(number: int) -> RequestKey:
    return RequestKey(number.to_bytes(32, "big"))


def name(number: int) -> bytes:
    return request_hash(NETWORK, key(number))


def vouch(signer: bytes) -> bytes:
    return member_tag(SECRET, signer)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is there may be as slow as the machine is busy."""
    monkeypatch.setattr(response_server, "ANSWER_S", 30.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "responses.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[ResponseStore]:
    store = ResponseStore(path, 1 << 30, RESPONSE_TTL_MS, Signer(), NETWORK)
    store.start()
    yield store
    store.close()


@pytest.fixture
async def server(path: Path) -> AsyncIterator[ResponseServer]:
    server = ResponseServer(path, NETWORK, vouch)
    yield server
    server.close()


def put(store: ResponseStore, number: int, body: bytes = b"{}", scope: Scope = "network", ttl_ms: int = 60_000) -> None:
    assert store.store(StoreResponse(key(number), scope, MODEL, "vllm 0.32.0", ttl_ms, body))
    assert store.flush(60)


def opened(answer: Hit | Miss, number: int) -> Opened:
    assert isinstance(answer, Hit)
    signers = {signer.verify_key.encode() for signer in (OWN, PEER)}

    def meet(signer: bytes, tag: bytes) -> None:
        assert tag == member_tag(SECRET, signer)

    return open_hit(answer, key(number), NETWORK, MODEL, signers.__contains__, meet, wall_ms())


async def test_what_was_computed_here_opens_at_a_peer(store: ResponseStore, server: ResponseServer) -> None:
    put(store, 1, b'{"a":1}')
    answer = await server.answer(name(1), 48, OWN_NODE)
    assert opened(answer, 1).body == b'{"a":1}'
    assert isinstance(answer, Hit)
    assert answer.popularity == 48
    assert opened(answer, 1).proof.signer == OWN.verify_key.encode()


async def test_what_was_fetched_is_served_on_with_its_original_proof(
    store: ResponseStore, server: ResponseServer
) -> None:
    at_ms = wall_ms() - 1000
    proof = make_proof(PEER, NETWORK, key(1), b"theirs", MODEL, "v", at_ms)
    store.store_fetched(key(1), b"theirs", proof.encode(), at_ms, at_ms + RESPONSE_TTL_MS, "network")
    assert store.flush(60)
    found = opened(await server.answer(name(1), 0, OWN_NODE), 1)
    assert found == Opened(b"theirs", proof, proof.encode(), at_ms + RESPONSE_TTL_MS)


async def test_every_answer_has_a_nonce_of_its_own(store: ResponseStore, server: ResponseServer) -> None:
    put(store, 1)
    answers = [await server.answer(name(1), 0, OWN_NODE) for _ in range(20)]
    assert len({answer.nonce for answer in answers if isinstance(answer, Hit)}) == 20


async def test_the_largest_response_is_served(store: ResponseStore, server: ResponseServer) -> None:
    put(store, 1, bytes(RESPONSE_BYTES_MAX))
    assert len(opened(await server.answer(name(1), 0, OWN_NODE), 1).body) == RESPONSE_BYTES_MAX


async def test_private_expired_and_unknown_ones_are_a_miss(store: ResponseStore, server: ResponseServer) -> None:
    put(store, 1, scope="private")
    put(store, 2, ttl_ms=0)
    for asked in (name(1), name(2), name(3), key(1)):
        assert await server.answer(asked, 0, OWN_NODE) == Miss("unknown")


async def test_a_node_without_database_or_with_garbage_for_one_misses(path: Path, server: ResponseServer) -> None:
    assert await server.answer(name(1), 0, OWN_NODE) == Miss("unknown")
    path.write_bytes(b"not a database" * 1000)  # noqa: ASYNC240 - a test has nothing else to do meanwhile
    assert await server.answer(name(1), 0, OWN_NODE) == Miss("unknown")


@pytest.mark.parametrize("damaged", ["key", "body", "signature", "signer", "engine version"])
async def test_damage_on_the_disk_makes_no_liar_of_the_node(
    path: Path, store: ResponseStore, server: ResponseServer, damaged: str
) -> None:
    put(store, 1, b"The sky is blue.")
    assert isinstance(await server.answer(name(1), 0, OWN_NODE), Hit)
    with sqlite3.connect(path) as database:
        ((proof,),) = database.execute("SELECT proof FROM entries").fetchall()
        at = {"signature": len(proof) - 1, "signer": 110, "engine version": 140}.get(damaged, 0)
        flipped = proof[:at] + bytes([proof[at] ^ 1]) + proof[at + 1 :]
        if damaged == "key":
            database.execute("UPDATE entries SET request_key = ?", (bytes(32),))
        elif damaged == "body":
            database.execute("UPDATE bodies SET body = ?", (b"The sky is glue.",))
        else:
            database.execute("UPDATE entries SET proof = ?", (flipped,))
    database.close()
    assert await server.answer(name(1), 0, OWN_NODE) == Miss("unknown")


@pytest.fixture
def disk(path: Path) -> "HangingDisk":
    return HangingDisk(path)


@dataclass
class HangingDisk:
    """A FIFO in the database's place: who opens it waits until somebody writes to it, as on a dead disk."""

    path: Path

    def hang(self) -> None:
        self.path.rename(self.path.with_suffix(".kept"))
        os.mkfifo(self.path)

    def come_back(self) -> None:
        self.path.rename(self.path.with_suffix(".fifo"))
        self.path.with_suffix(".kept").rename(self.path)
        self.path.with_suffix(".fifo").open("wb").close()


async def test_a_disk_that_hangs_costs_its_askers_a_busy_and_the_next_ones_nothing(
    disk: HangingDisk, store: ResponseStore, server: ResponseServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(response_server, "ANSWER_S", ANSWER_S)
    put(store, 1)
    store.close()
    disk.hang()
    began_s = time.monotonic()
    answers = await asyncio.gather(*(server.answer(name(1), 0, OWN_NODE) for _ in range(ANSWERS_MAX * 2)))
    assert set(answers) == {Miss("busy")}
    assert ANSWER_S <= time.monotonic() - began_s < 20
    disk.come_back()

    async def hit() -> Hit | None:
        answer = await server.answer(name(1), 0, OWN_NODE)
        return answer if isinstance(answer, Hit) else None

    answer = await until_async(hit)
    assert opened(answer, 1).body == b"{}"


async def test_many_askers_at_once_get_an_answer_or_a_busy(store: ResponseStore, server: ResponseServer) -> None:
    put(store, 1, bytes(100_000))
    answers = await asyncio.gather(*(server.answer(name(1), 0, OWN_NODE) for _ in range(100)))
    hits = [answer for answer in answers if isinstance(answer, Hit)]
    assert len(hits) >= 1
    assert all(answer == Miss("busy") for answer in answers if isinstance(answer, Miss))
    assert opened(await server.answer(name(1), 0, OWN_NODE), 1).body == bytes(100_000)


async def test_a_cancelled_asker_leaves_no_place_taken(store: ResponseStore, server: ResponseServer) -> None:
    put(store, 1)
    for _ in range(ANSWERS_MAX * 2):
        asking = asyncio.create_task(server.answer(name(1), 0, OWN_NODE))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    deadline_s = time.monotonic() + 60
    while not isinstance(await server.answer(name(1), 0, OWN_NODE), Hit):
        assert time.monotonic() < deadline_s


async def test_a_closed_server_is_busy(store: ResponseStore, server: ResponseServer) -> None:
    put(store, 1)
    server.close()
    assert await server.answer(name(1), 0, OWN_NODE) == Miss("busy")


async def test_strangers_get_what_is_public_and_nothing_else(store: ResponseStore, server: ResponseServer) -> None:
    put(store, 1, scope="network")
    put(store, 2, scope="public")
    assert await server.answer(name(1), 0, STRANGER) == Miss("unknown")
    assert isinstance(await server.answer(name(2), 0, STRANGER), Hit)
    assert isinstance(await server.answer(name(1), 0, OWN_NODE), Hit)


async def test_what_may_not_go_to_a_stranger_costs_hardly_anything(
    store: ResponseStore, server: ResponseServer
) -> None:
    put(store, 1, os.urandom(RESPONSE_BYTES_MAX))
    await server.answer(name(1), 0, OWN_NODE)

    async def cost_s(asker: AskingPeer, times: int) -> float:
        began_s = time.process_time()
        for _ in range(times):
            await server.answer(name(1), 0, asker)
        return time.process_time() - began_s

    assert await cost_s(STRANGER, 20) < await cost_s(OWN_NODE, 4)


async def test_whatever_strangers_ask_for_a_member_is_answered_soon(
    store: ResponseStore, server: ResponseServer
) -> None:
    put(store, 1, os.urandom(RESPONSE_BYTES_MAX), scope="public")
    put(store, 2)
    strangers = [AskingPeer(f"stranger {number}", False, False) for number in range(8)]
    asked = [asyncio.create_task(server.answer(name(1), 0, each)) for each in strangers for _ in range(8)]
    await asyncio.sleep(0)
    answer = await server.answer(name(2), 0, AskingPeer("member", True, True))
    assert sum(task.done() for task in asked) < len(asked) // 2
    assert opened(answer, 2).body == b"{}"
    assert all(isinstance(each, Hit) for each in await asyncio.gather(*asked))
