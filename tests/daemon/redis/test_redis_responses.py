"""Responses in a fleet's Redis: what is written and read, whose word counts, and lies that Redis may hold."""

import asyncio
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis

from hyperspace_vllm.config import Config
from hyperspace_vllm.core.local.response_cache_messages import ResponseNotFound
from hyperspace_vllm.core.records.ids import peer_id
from hyperspace_vllm.core.records.limits import RESPONSE_TTL_MS, STREAM_FRAME_BYTES_MAX, MiB
from hyperspace_vllm.core.records.peer_wire import Hit, Miss, decode_answer, encode
from hyperspace_vllm.core.records.signing import NO_MEMBER_TAG
from hyperspace_vllm.core.response.cache_proof import make_proof
from hyperspace_vllm.core.response.sealed_hit import make_hit
from hyperspace_vllm.daemon.clock import wall_ms
from hyperspace_vllm.daemon.redis import redis_responses
from tests.support.daemons import redis_server
from tests.support.daemons.redis_fleet import NETWORK, FleetNode, MakeNode, redis_key
from tests.support.daemons.redis_server import RedisServer
from tests.support.network_nodes import MODEL, NetworkedNode, body_of, config_of, private_network, request_key
from tests.support.until import until, until_async

pytestmark = [pytest.mark.io, redis_server.NEEDED, pytest.mark.usefixtures("patience")]


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
        value = await client.get(key)
        assert isinstance(key, bytes)
        assert isinstance(value, bytes)
        seen += key + value
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
    raw = await client.get(redis_key("x"))
    assert isinstance(raw, bytes)
    hit = decode_answer(raw)
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
    choices: list[tuple[dict[str, object], bool]] = [
        ({"key": other_key}, False),
        ({"key": None}, False),
        ({"key": None, "allowed": (a.identity.peer_id,)}, True),
        ({"key": None, "peers": (f"{a.identity.peer_id}@127.0.0.1:1",)}, True),
        ({"trust": "allowlist"}, False),
    ]
    for number, (settings, expected) in enumerate(choices):
        reader = await node(f"reader {number}", **settings)
        assert (await reader.find("x") is not None) == expected
        assert reader.failures("untrusted_signer") == (not expected)


async def test_a_node_that_starts_again_writes_only_what_redis_lacks(node: MakeNode, client: "Redis") -> None:
    a = await node("a")
    await a.share("kept")
    await a.share("lost")
    await a.close()
    await client.delete(redis_key("lost"))
    kept = await client.get(redis_key("kept"))
    again = await node("a")
    await again.share("new")
    await until_async(lambda: again.written == 2)
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
        until(lambda: alone.status()["shared_responses"]["written"] == 2)
        assert mute.status()["shared_responses"] is None
        until(lambda: joined.find("x").body == body_of("x"))  # Redis has 100 ms each time
        assert joined.find("of mute").body is None
        # What Redis doesn't have comes from peers.
        until(lambda: joined.card().get("p2p") and joined.status()["p2p"]["known_peers"] >= 1)
        peer.store("at the peer")
        until(lambda: joined.find("at the peer").body == body_of("at the peer"))

        assert re.search(r"responses in Redis: hits\W+[1-9]", hyperspace(joined, "status"))
        hyperspace(alone, "cache", "purge", "--all")
        until(lambda: joined.find("of alone").body is None)
        server.kill()
        assert isinstance(alone.find("x, again").answer, ResponseNotFound)
    finally:
        for each in nodes:
            each.stop()
