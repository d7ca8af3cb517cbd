"""Odd requests to a real server with the cache and to one without it: the same status, and memory that stays flat.

One minute in CI, ten as a soak: malformed JSON, wrong types, huge bodies, clients that half-close, leave, read slowly.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.servers import MODELS, Server
from hyperspace_vllm.core.records.limits import REQUEST_BYTES_MAX, MiB
from hyperspace_vllm.core.response.request_fields import FIELDS

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1200)]

QUIET = {"HYPERSPACE_SEMANTIC": "balanced", "HYPERSPACE_ARENA_BYTES": str(64 << 20), "VLLM_LOGGING_LEVEL": "CRITICAL"}
ODD: list[Any] = [
    None, True, -1, 0, 2**70, 1.5, -0.0, "", "x", "\ud800", [], [[]], {}, {"": None}, [{"type": []}], [1, "a", None],
    {"type": "text", "text": 5}, [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "null", [None] * 50,
]  # fmt: skip
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions", "messages": "/v1/messages"}
GOOD: dict[str, dict[str, Any]] = {
    "completions": {"model": "demo", "prompt": "Once", "max_tokens": 1},
    "chat": {"model": "demo", "messages": [{"role": "user", "content": "What is ML?"}], "max_tokens": 1},
    "messages": {"model": "demo", "messages": [{"role": "user", "content": "What is ML?"}], "max_tokens": 1},
}
# Values for which vLLM computes for long, or which say how long a computation takes.
SLOW = {"max_tokens", "max_completion_tokens", "n", "min_tokens", "prompt_logprobs", "use_beam_search", "ignore_eos"}
HEADERS = [
    (
        "Cache-Control",
        ["no-store", "no-cache", "max-age=x", "private, max-age=0", 'a="b', "min-fresh=99999999999999999999"],
    ),
    ("X-Hyperspace-Semantic", ["off", "strict", "loose", "é"]),
    ("X-Hyperspace-Proof", ["1", ""]),
    ("Authorization", ["Bearer x", "x"]),
    ("X-Request-Id", ["r" * 500]),
]


def odd_body(rng: random.Random, endpoint: str) -> bytes:
    body = dict(GOOD[endpoint])
    fields = FIELDS[endpoint]  # type: ignore[index]
    names = sorted((fields.keyed.keys() | fields.neutral.keys() | fields.forbidden) - SLOW)
    for _ in range(rng.randrange(3)):
        body[rng.choice([*names, "vendor_field"])] = rng.choice(ODD)
    if rng.random() < 0.2:
        body.pop(rng.choice(list(body)))
    raw = json.dumps(body).encode()
    match rng.randrange(12):
        case 0:
            return raw[: rng.randrange(len(raw))]
        case 1:
            at = rng.randrange(len(raw))
            return raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]
        case 2:
            return raw[:-1] + b', "model": "demo"}'
        case 3:
            return raw[:-1] + b', "vendor_field": ' + b"[" * 3000 + b"]" * 3000 + b"}"
        case 4:
            return raw[:-1] + b', "temperature": ' + rng.choice([b"NaN", b"1e999", b"-Infinity", b"01"]) + b"}"
        case 5 if rng.random() < 0.1:
            return (
                raw[:-1] + b', "user": "' + b"u" * rng.choice([REQUEST_BYTES_MAX // 2, REQUEST_BYTES_MAX + 9]) + b'"}'
            )
    return raw


def odd_request(rng: random.Random) -> bytes:
    endpoint = rng.choice(list(PATHS))
    body = odd_body(rng, endpoint)
    kind = rng.choice(["application/json"] * 9 + ["text/plain", "application/json; charset=latin-1"])
    chosen = rng.sample(HEADERS, rng.randrange(3))
    lines = [f"{name}: {rng.choice(values)}" for name, values in chosen]
    head = [f"POST {PATHS[endpoint]} HTTP/1.1", "Host: x", "Connection: close", f"Content-Type: {kind}", *lines]
    return "\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode("latin-1") + body


async def status_of(port: int, request: bytes) -> int:
    """The status of a request that is sent as it should be."""
    async with asyncio.timeout(60):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(request)
            line = await reader.readline()
            await reader.read()
        finally:
            writer.close()
        return int(line.split()[1])


async def misbehave(port: int, rng: random.Random) -> None:
    """Send a request and then half-close, leave, or read slowly."""
    body = json.dumps(GOOD["chat"] | {"stream": True, "max_tokens": 20, "seed": rng.randrange(50)}).encode()
    lines = [f"POST {PATHS['chat']} HTTP/1.1", "Host: x", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
    async with asyncio.timeout(60):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=64)
        try:
            match rng.randrange(4):
                case 0:
                    writer.write(head.encode() + body[: rng.randrange(len(body))])
                case 1:
                    writer.write(head.encode() + body)
                    writer.write_eof()
                    await reader.read()
                case 2:
                    writer.write(head.encode() + body)
                    await reader.read(1)
                case _:
                    writer.write(head.encode() + body)
                    for _ in range(20):
                        await reader.read(16)
                        await asyncio.sleep(0.01)
            await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.transport.abort()


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


async def torment(cached: Server, plain: Server, seconds: float, enough: int, seed: int) -> None:
    """Both servers agree and the cached one's memory stays flat, for so long and for as many requests of each kind."""
    rng = random.Random(seed)
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    statuses: Counter[int] = Counter()
    settled = 0
    while loop.time() < until or min(statuses[200], statuses[400]) < enough:
        requests = [odd_request(rng) for _ in range(4)]
        answers, _ = await asyncio.gather(
            asyncio.gather(*(status_of(server.port, request) for server in (cached, plain) for request in requests)),
            misbehave(cached.port, rng),
        )
        for request, with_cache, without in zip(requests, answers[:4], answers[4:8], strict=True):
            assert with_cache == without, (with_cache, without, request[:2000])
            statuses[with_cache] += 1
        if not settled and loop.time() > until - seconds * 2 / 3:
            settled = resident_bytes(cached.process.pid)
    grown = resident_bytes(cached.process.pid) - settled
    assert grown < 64 * MiB, f"{grown / MiB:.0f} MiB in {seconds * 2 / 3:.0f} s"


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    directory = tmp_path_factory.mktemp("fuzz")
    model, quiet = MODELS["tiny"], ("--disable-uvicorn-access-log",)
    cached = Server("cached", model, directory / "cached", arguments=quiet, environment=QUIET)
    plain = Server("plain", model, directory / "plain", connector=False, arguments=quiet, environment=QUIET)
    with cached, plain:
        yield cached.ready(), plain.ready()


def test_odd_requests_get_vllms_own_answer_for_a_minute(servers: tuple[Server, Server]) -> None:
    asyncio.run(torment(*servers, seconds=60, enough=50, seed=1))


@pytest.mark.soak
def test_odd_requests_get_vllms_own_answer_for_ten_minutes(servers: tuple[Server, Server]) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    asyncio.run(torment(*servers, seconds=600, enough=500, seed=seed))
