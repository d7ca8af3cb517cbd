"""What tests of faults ask of real servers, and do to them: prompts, waits, numbers and damage."""

import json
import os
import random
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from bench.machine import dtype
from bench.servers import Completion, Server
from hyperspace_vllm.core.records.limits import TOTAL_CHUNKS, KiB
from hyperspace_vllm.core.records.manifest import chunk_bytes_for
from tests.support.slow_link import SlowLink
from tests.support.until import until

# The core's tests check the stall limit of 250 ms on a simulated clock. Here the clock is that of a machine that may be
# busy: a fault must cost only a small part of the lookup's 20 s.
FAULT_S = 4.0
BACK_S = 20.0
AVOIDED_S = 90.0  # core/peers/avoidance.py: LIAR_MS, and some more
NUMBER_BYTES = 4 if dtype("generate") == "float32" else 2
ROW_BYTES = NUMBER_BYTES * 256 * KiB  # the tiny model's: 256 tokens x 4 layers x 2 heads x 64 x K and V
CHUNK_BYTES = chunk_bytes_for(ROW_BYTES)
SLOW_BYTES_S = 4 * ROW_BYTES
LONG, SHORT = 4000, 1100  # bytes, which are tokens of the tiny model: 15 and 4 segments
# A model of random weights is often undecided, and a loaded prefix differs from a computed one in its last bits (its
# matrices had other shapes), which moves logprobs by up to 0.03. So the prompts used are those for which the plain
# computation decides clearly for each token: by ten times as much.
GAP = 0.3
TOKENS = 2
ATTEMPTS = 3  # with different text each: on a machine with more work than cores, a fetch may rightly end early
# By id: many of the byte tokenizer's tokens are printed alike.
LOGPROBS: dict[str, Any] = {"max_tokens": TOKENS, "logprobs": 2, "return_tokens_as_token_ids": True}


@dataclass
class Servers:
    """A and B, and the link from B's node to A's."""

    a: Server
    b: Server
    link: SlowLink


@dataclass
class Answered:
    """`prefill_at_s` (monotonic) is an upper bound: the client's first token less the engine's own prefill time."""

    answer: Completion
    prefill_at_s: float


def logs(server: Server) -> list[Path]:
    return [path for name in ("vllm.log", "node.log") if (path := server.data_dir / name).exists()]


def status(server: Server) -> dict[str, Any]:
    """The node's own status; {} while there is none."""
    with suppress(Exception):
        return cast(dict[str, Any], server.node_status())
    return {}


def node_pid(server: Server) -> int:
    return int(json.loads((server.data_dir / "node.json").read_text())["pid"])


def failures(server: Server) -> dict[str, float]:
    """hyperspace_failures_total of the server's node, by reason."""
    return {
        sample["labels"]["reason"]: sample["value"]
        for sample in status(server)["metrics"]
        if sample["name"] == "hyperspace_failures_total"
    }


def lookups(server: Server, result: str, reason: str) -> float:
    return server.metric("hyperspace_l2_lookups_total", f'result="{result}"', f'reason="{reason}"')


def requests(server: Server) -> float:
    return server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting")


def wait_quiet(server: Server) -> None:
    until(lambda: requests(server) == 0, what="the end of every request")


def wait_connected(server: Server) -> None:
    until(lambda: any(peer["connected"] for peer in status(server).get("peers", ())), what="the link to A's node")


def wait_hit(pair: Servers, timeout_s: float = 60) -> None:
    """Wait until B gets something from A again.

    Not at once: a new node's KZG worker loads its setup for seconds; a peer that stalled isn't asked for 5 s, one that
    lied for 60 s.
    """
    hits = lookups(pair.b, "hit", "network")

    def hit() -> bool:
        text = document(SHORT)
        publish(pair.a, text)
        pair.b.complete(f"{text} .", max_tokens=1)
        return lookups(pair.b, "hit", "network") > hits

    until(hit, timeout_s, "a hit")


def wait_idle(server: Server) -> None:
    """Wait until the node has coded and kept everything that it was given."""
    until(lambda: status(server).get("publish", {}).get("waiting_rows", 1) == 0, what="the node's writing")


def document(size: int) -> str:
    """Text that no other test has used, `size` tokens of the tiny model."""
    words = random.Random(time.time_ns())
    text = f"{time.time_ns()} "
    while len(text) < size:
        text += "".join(words.choices("abcdefghijklmnopqrstuvwxyz", k=words.randrange(2, 9))) + " "
    return text[:size]


def publish(server: Server, text: str) -> None:
    server.complete(text, max_tokens=1)
    wait_idle(server)


def plain(server: Server, prompt: str) -> Completion:
    """The answer without any cache: a unique salt makes every cache miss."""
    salt, headers = f"plain {time.time_ns()}", {"Cache-Control": "no-store"}
    return server.complete(prompt, **LOGPROBS, cache_salt=salt, headers=headers)


def is_clear(answer: Completion) -> bool:
    gaps = (max(top.values()) - min(top.values()) for top in answer.logprobs)
    return len(answer.tokens) == TOKENS and all(gap >= GAP for gap in gaps)


def clear_question(server: Server, text: str) -> tuple[str, Completion]:
    """A prompt that begins with `text`, and the server's plain answer to it, with a clear choice of every token."""
    for number in range(20):
        prompt = f"{text} {chr(ord('A') + number)}"  # the last byte affects a small model most
        answer = plain(server, prompt)
        if is_clear(answer):
            wait_idle(server)
            return prompt, answer
    raise AssertionError("no question of 20 has a clear answer")


def ask(server: Server, prompt: str) -> Answered:
    """Ask once, with no other request."""
    prefill, count = "vllm:request_prefill_time_seconds_sum", "vllm:request_prefill_time_seconds_count"
    before_s, before = server.metric(prefill), server.metric(count)
    sent_at_s = time.monotonic()
    answer = server.complete(prompt, **LOGPROBS)
    until(lambda: server.metric(count) == before + 1, what="the request's metrics")
    return Answered(answer, sent_at_s + answer.ttft_ms / 1000 - (server.metric(prefill) - before_s))


def fetch_through(pair: Servers, fault: Callable[[], object]) -> float:
    """B asks for a prompt of A over a slow link; `fault` comes in the middle. Seconds from it to B's prefill."""
    for _ in range(ATTEMPTS):
        wait_hit(pair, AVOIDED_S)
        text = document(LONG)
        prompt, expected = clear_question(pair.b, text)
        publish(pair.a, text)
        pair.link.rate_bytes_s = SLOW_BYTES_S
        middle = pair.link.delivered_bytes + 4 * ROW_BYTES
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask, pair.b, prompt)
            until(lambda: asked.done() or pair.link.delivered_bytes > middle, what="the middle of the fetch")  # noqa: B023
            if asked.done():
                pair.link.rate_bytes_s = 0
                continue
            fault()
            fault_at_s = time.monotonic()
            answered = asked.result(120)
        # Bytes that left A before the fault still arrive, and are used: for B the fault begins when they end.
        quiet_at_s = max(fault_at_s, min(pair.link.last_delivery_s, answered.prefill_at_s))
        after_s = answered.prefill_at_s - quiet_at_s
        print(
            f"prefill {answered.prefill_at_s - fault_at_s:.3f} s after the fault, {after_s:.3f} s after the last byte; "
            f"{answered.answer.cached_tokens} of {answered.answer.prompt_tokens} tokens loaded"
        )
        assert answered.answer.tokens == expected.tokens
        assert answered.answer.cached_tokens < LONG // 256 * 256
        return after_s
    raise AssertionError(f"none of {ATTEMPTS} fetches reached its middle")


def corrupt(path: Path, columns: range) -> None:
    """Change one byte of these chunks in every row of an object, in place."""
    with path.open("r+b") as file:
        for row in range(path.stat().st_size // (TOTAL_CHUNKS * CHUNK_BYTES)):
            for column in columns:
                file.seek((row * TOTAL_CHUNKS + column) * CHUNK_BYTES + 1000)
                byte = file.read(1)[0]
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte ^ 0x10]))


def leave_after(server: Server, prompt: str, wait_s: float) -> None:
    """Send a request and disconnect after `wait_s`."""
    body = json.dumps({"model": "demo", "prompt": prompt, "max_tokens": 6000, "stream": True, "ignore_eos": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"{head}\r\n\r\n{body}".encode())
        time.sleep(wait_s)  # the subject of the test, not a wait for something


def leased_bytes(server: Server) -> int:
    """Arena bytes that hold no row of the cache: leased, or being written."""
    arena = status(server)["arena"]
    return int(arena["capacity_bytes"] - arena["free_bytes"] - arena["rows"] * ROW_BYTES)


@contextmanager
def small_disk(directory: Path) -> Iterator[bool]:
    """1 MiB of disk at `directory`, if the test may mount it: there writes fail with the kernel's own ENOSPC."""
    directory.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "hyperspace-tests", str(directory)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    print("a disk of 1 MiB" if mounted else "a quota of 1 MiB: mounting was refused")
    yield mounted
    if mounted:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def reset(server: Server, reset_external: bool) -> None:
    """Empty vLLM's own prefix cache, and the connector's if asked for."""

    def done() -> bool:
        url = f"{server.url}/reset_prefix_cache?reset_external={str(reset_external).lower()}"
        with urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=30) as response:
            return bool(json.loads(response.read())["success"])

    until(done, what="the reset")


def wait_granted(server: Server) -> None:
    """Wait until the worker holds its maximum of 5 slabs, three quarters of half the arena: writing left it fewer."""
    until(lambda: leased_bytes(server) == 5 * ROW_BYTES, what="5 slabs for the worker")
