"""The response cache in figures: hits end to end and inside, hits a second, the cost of a miss, growth with entries.

    python -m bench.response_cache [--json] [--peers]

A real vLLM with the connector and one without, on loopback, with a small random model: the cache is what is measured.
`--peers` also measures LiteLLM's proxy (local and Redis cache) and GPTCache, each in its own environment under build/,
in front of the same server. All ratios are of one run.
"""

import argparse
import asyncio
import json
import os
import random
import resource
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.machine import ROOT, dtype
from bench.servers import MODELS, Server, free_port
from bench.ttft import bootstrap_interval

BUILD = ROOT / "build" / "response-cache"
PROMPTS = 100
HITS = 2_000
CONNECTIONS = 64
MISSES = 150
ENTRIES = (10_000, 100_000, 1_000_000)
QUESTIONS = (10_000, 200_000)
# With any connector vLLM's CPU build reserves one core more. On two cores that leaves none, so it takes both and its
# threads wait for each other: decoding slows by half. The servers must differ in the cache alone.
EQUAL_THREADS = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "1"}
LIMITS = {"hit_inside_ms_p50": 1.0, "miss_added_ms_p50": 1.0, "semantic_ms_p50_200000": 20.0}

Figures = dict[str, float]


def chat(number: int, **fields: object) -> dict[str, Any]:
    """A request of about 50 tokens, greedy: proxies cache these by default too."""
    text = f"Question {number}: why is the sky blue, and why is it red when the sun goes down over the sea?"
    return {
        "model": "demo",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 8,
        "temperature": 0,
        **fields,
    }


class Client:
    """HTTP/1.1 over one connection, with minimal parsing: the client must not dominate the measurement."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def __aenter__(self) -> "Client":
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def post(self, body: dict[str, Any]) -> tuple[dict[str, str], float, float]:
        """(headers, ms to the first byte of the body, ms to its end) of one answer; RuntimeError unless it is a 200."""
        raw = json.dumps(body).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Authorization: Bearer sk-bench\r\nContent-Length: {len(raw)}\r\n\r\n"
        began = time.perf_counter()
        self._writer.write(head.encode() + raw)
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:-2])}
        first = await self._reader.readexactly(1)
        first_s = time.perf_counter() - began
        if "content-length" in headers:
            first += await self._reader.readexactly(int(headers["content-length"]) - 1)
        else:
            while (line := await self._reader.readline()) != b"0\r\n":
                first += line
            await self._reader.readline()
        if " 200 " not in lines[0]:
            raise RuntimeError(f"{lines[0]}: {first[:500]!r}")
        return headers, first_s * 1000, (time.perf_counter() - began) * 1000


def quantiles(values: list[float], name: str) -> Figures:
    """p50 and p99."""
    cuts = statistics.quantiles(values, n=100)
    return {f"{name}_p50": round(cuts[49], 3), f"{name}_p99": round(cuts[98], 3)}


async def measure_hits(port: int, is_hit: Callable[[dict[str, str]], bool]) -> tuple[Figures, list[dict[str, str]]]:
    """Latency over one connection, then answers a second over 64; all requests are stored before."""
    async with Client(port) as client:
        for number in range(PROMPTS):
            await client.post(chat(number))
        await asyncio.sleep(1)  # proxies and nodes store after they answer
        times, headers = [], []
        for at in range(HITS):
            found, _, total_ms = await client.post(chat(at % PROMPTS))
            times.append(total_ms)
            headers.append(found)
    share = sum(map(is_hit, headers)) / HITS

    async def keep_asking(count: int) -> None:
        async with Client(port) as client:
            for _ in range(count):
                await client.post(chat(random.randrange(PROMPTS)))

    began = time.perf_counter()
    await asyncio.gather(*(keep_asking(HITS // CONNECTIONS) for _ in range(CONNECTIONS)))
    rate = HITS // CONNECTIONS * CONNECTIONS / (time.perf_counter() - began)
    return {**quantiles(times, "hit_ms"), "hits_per_s": round(rate, 1), "hit_share": round(share, 3)}, headers


async def measure_misses(cached: int, plain: int) -> Figures:
    """Extra milliseconds of a miss to its first frame and to its end, in turn with the plain server."""
    first, total = [], []
    async with Client(cached) as with_cache, Client(plain) as without:
        for number in range(-20, MISSES):
            body = chat(1_000_000 + number, stream=True)
            pairs = [(with_cache, 1), (without, -1)]
            added = [0.0, 0.0]
            for client, sign in pairs if number % 2 else reversed(pairs):
                _, first_ms, total_ms = await client.post(body)
                added[0] += sign * first_ms
                added[1] += sign * total_ms
            if number >= 0:
                first.append(added[0])
                total.append(added[1])
    low, high = bootstrap_interval(first)
    return {
        "miss_added_ms_p50": round(statistics.median(first), 3),
        "miss_added_ms_low": round(low, 3),
        "miss_added_ms_high": round(high, 3),
        "miss_added_to_end_ms_p50": round(statistics.median(total), 3),
    }


def measure_entries(count: int) -> Figures:
    """A database with `count` entries: its size, the time of a lookup, and the memory of a process that reads."""
    from hyperspace_vllm.core.records.ids import RequestKey, sha256
    from hyperspace_vllm.core.response.cache_proof import CacheProof
    from hyperspace_vllm.response_db import SCHEMA, ResponseReader, packed

    def rows() -> Iterator[tuple[object, ...]]:
        for number in track(range(count), description=f"{count:,} entries", transient=True):
            key = sha256(b"%d" % number)
            proof = CacheProof(key, response_hash, 1, bytes(32), bytes(32), "bench", bytes(64)).encode()
            yield number + 1, key, proof, 1, 1 << 50, len(body), 1, 0, "network", 1

    body = json.dumps(
        chat(0) | {"choices": [{"message": {"content": "The sky is blue because of air. " * 20}}]}
    ).encode()
    response_hash = sha256(body)
    with tempfile.TemporaryDirectory(dir=BUILD) as directory:
        path = Path(directory) / "responses.sqlite"
        database = sqlite3.connect(path)
        database.execute("PRAGMA journal_mode = WAL")
        database.executescript(SCHEMA)
        columns = "id, request_key, proof, computed_at_ms, expires_at_ms, size, last_used_ms, hits, scope, worth_ms"
        database.executemany(f"INSERT INTO entries ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows())
        stored = packed(body)
        database.executemany("INSERT INTO bodies VALUES (?, ?)", ((number + 1, stored) for number in range(count)))
        database.commit()
        database.close()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        reader = ResponseReader(path)
        rng, times = random.Random(1), []
        for _ in range(5_000):
            key = RequestKey(sha256(b"%d" % rng.randrange(count)))
            began = time.perf_counter()
            found = reader.get(key, 2)
            times.append((time.perf_counter() - began) * 1000)
            assert found is not None
        reader.close()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        size = path.stat().st_size / count
    return {
        **{f"{name}_{count}": value for name, value in quantiles(times, "lookup_ms").items()},
        f"disk_bytes_an_entry_{count}": round(size),
        f"reader_mib_{count}": round(grown, 1),
    }


def measure_questions(count: int) -> Figures:
    """One question against `count` others of its partition: both wordings, exact."""
    import numpy as np

    from hyperspace_vllm.core.records.ids import RequestKey, sha256
    from hyperspace_vllm.daemon.responses.question_index import QuestionIndex, quantized

    rng = np.random.default_rng(1)
    index = QuestionIndex(384)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in track(range(count), description=f"{count:,} questions", transient=True):
        vectors = quantized(rng.standard_normal((2, 384), dtype=np.float32))
        index.add(RequestKey(sha256(b"%d" % number)), b"p", "a question of some forty characters or so", vectors)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    times = []
    for _ in range(30):
        asked = quantized(rng.standard_normal((2, 384), dtype=np.float32))
        began = time.perf_counter()
        index.nearest(b"p", asked)
        times.append((time.perf_counter() - began) * 1000)
    return {f"semantic_ms_p50_{count}": round(statistics.median(times), 2), f"semantic_mib_{count}": round(grown, 1)}


# --- peers ----------------------------------------------------------------------------------------


def environment(name: str, *packages: str) -> Path:
    """The `bin` of a virtual environment with these packages, made once."""
    directory = BUILD / name
    if not (directory / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
        subprocess.run([directory / "bin" / "pip", "install", "-qq", *packages], check=True)
        (directory / "ready").touch()
    return directory / "bin"


@contextmanager
def redis() -> Iterator[int]:
    """The port of a private Redis."""
    executable = shutil.which("redis-server")
    command = [executable] if executable else ["redis-server"]
    port = free_port()
    binary = executable or shutil.which("redis-check-rdb")
    if binary is None:
        raise RuntimeError("Redis is missing: sudo apt-get install -y redis-tools")
    arguments = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    process = subprocess.Popen([*command, *arguments], executable=binary, stdout=subprocess.DEVNULL)
    try:
        yield port
    finally:
        process.terminate()
        process.wait()


@contextmanager
def litellm(plain: Server, cache: dict[str, object]) -> Iterator[int]:
    """The port of LiteLLM's proxy in front of a server, with its response cache on."""
    port = free_port()
    model = {"model": "openai/demo", "api_base": f"{plain.url}/v1", "api_key": "sk-bench"}
    settings = {
        "model_list": [{"model_name": "demo", "litellm_params": model}],
        "litellm_settings": {"cache": True, "cache_params": cache},
        "general_settings": {"master_key": "sk-bench"},
    }
    with tempfile.TemporaryDirectory(dir=BUILD) as directory:
        path = Path(directory) / "config.yaml"
        path.write_text(json.dumps(settings))  # YAML includes JSON
        command = [environment("litellm", "litellm[proxy]", "redis") / "litellm", "--config", path, "--port", str(port)]
        with (BUILD / "litellm.log").open("wb") as log:
            own = {**os.environ, "LITELLM_LOG": "ERROR"}
            process = subprocess.Popen([*map(str, command), "--host", "127.0.0.1"], stdout=log, stderr=log, env=own)
        try:
            deadline = time.monotonic() + 180
            while not _answers(port):
                if time.monotonic() > deadline or process.poll() is not None:
                    raise RuntimeError(f"LiteLLM did not start: see {BUILD / 'litellm.log'}")
                time.sleep(0.5)
            yield port
        finally:
            process.terminate()
            process.wait()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


GPTCACHE = """
import json, statistics, sys, time
from gptcache import cache
from gptcache.adapter.api import get, put
from gptcache.manager import get_data_manager
from gptcache.processor.pre import get_prompt
cache.init(pre_embedding_func=get_prompt, data_manager=get_data_manager(data_path=sys.argv[1]))
texts = [f"Question {number}: why is the sky blue?" for number in range(100)]
for text in texts:
    put(text, "The sky is blue because of air. " * 20)
times = []
for at in range(2000):
    began = time.perf_counter()
    assert get(texts[at % 100])
    times.append((time.perf_counter() - began) * 1000)
cuts = statistics.quantiles(times, n=100)
print(json.dumps({"inside_ms_p50": round(cuts[49], 3), "inside_ms_p99": round(cuts[98], 3)}))
"""


def measure_peers(plain: Server) -> dict[str, Figures]:
    """The same requests through LiteLLM; GPTCache is a library, so only its own time."""

    def hit(headers: dict[str, str]) -> bool:
        return "x-litellm-cache-key" in headers

    found: dict[str, Figures] = {}
    with litellm(plain, {"type": "local"}) as port:
        found["LiteLLM, local"], _ = asyncio.run(measure_hits(port, hit))
    with redis() as redis_port, litellm(plain, {"type": "redis", "host": "127.0.0.1", "port": redis_port}) as port:
        found["LiteLLM, Redis"], _ = asyncio.run(measure_hits(port, hit))
    python = environment("gptcache", "gptcache", "cachetools") / "python"
    with tempfile.TemporaryDirectory(dir=BUILD) as directory:
        command = [str(python), "-c", GPTCACHE, str(Path(directory) / "map.txt")]
        output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=directory).stdout
        found["GPTCache, in process"] = json.loads(output.splitlines()[-1])
    return found


# --- all of it --------------------------------------------------------------------------------------


def measure(with_peers: bool, console: Console) -> dict[str, Figures]:
    """Figures by measured system."""
    data = BUILD / "servers"
    shutil.rmtree(data, ignore_errors=True)
    flags = ("--disable-uvicorn-access-log",)
    cached = Server("cached", MODELS["tiny"], data / "cached", arguments=flags, environment=EQUAL_THREADS)
    plain = Server("plain", MODELS["tiny"], data / "plain", connector=False, arguments=flags, environment=EQUAL_THREADS)
    with cached, plain, console.status("Two servers start"):
        cached.ready()
        plain.ready()
        console.print(f"the tiny model in {dtype('generate')}; asking for the same, over one connection and over 64")
        ours, headers = asyncio.run(measure_hits(cached.port, lambda found: "hit" in found["cache-status"].split("; ")))
        inside = [float(found["server-timing"].partition("dur=")[2]) for found in headers if "server-timing" in found]
        ours |= {name.replace("hit_ms", "hit_inside_ms"): n for name, n in quantiles(inside, "hit_ms").items()}
        ours |= asyncio.run(measure_misses(cached.port, plain.port))
        found = {"Hyperspace": ours}
        if with_peers:
            console.print("the same through LiteLLM, and GPTCache")
            found |= measure_peers(plain)
    for count in ENTRIES:
        ours |= measure_entries(count)
    for count in QUESTIONS:
        ours |= measure_questions(count)
    return found


def main() -> int:
    """Measure, print a table or JSON, and fail if a limit is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--peers", action="store_true", help="measure LiteLLM and GPTCache too (installs them)")
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    found = measure(options.peers, Console(stderr=True))
    ours = found["Hyperspace"]
    missed = [f"{name} is {ours[name]}, not {most}" for name, most in LIMITS.items() if ours[name] > most]
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        table = Table(title="the response cache")
        for column in ("figure", *found):
            table.add_column(column, justify="left" if column == "figure" else "right")
        for name in dict.fromkeys(name for figures in found.values() for name in figures):
            table.add_row(name, *(f"{figures[name]:,}" if name in figures else "" for figures in found.values()))
        Console().print(table)
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
