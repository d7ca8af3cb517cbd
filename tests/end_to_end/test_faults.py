"""Faults of a real `vllm serve`'s node, its peer, the link between them, its disk or its memory.

A computes prompts and publishes them; B gets them from A's node over a link that the test can slow, freeze and cut. C
has little room: 40 KV blocks, 16 rows of shared memory, 1 MiB of disk (a file system of that size where the tests may
mount one, else a quota). A fault must end in the text of a plain computation, a prefill that begins soon after it, no
crash, and a metric that names it. What peers can forge (every field of manifest, table, proof and signature, too few
chunks, absurd lengths) is refused one by one between whole nodes in test_two_nodes_lies.py and isn't repeated here.
"""

import itertools
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from bench.servers import MODELS, Server, free_port, introduce
from hyperspace_vllm.core.records.limits import MiB
from tests.support.engines.fault_servers import (
    ATTEMPTS,
    AVOIDED_S,
    BACK_S,
    CHUNK_BYTES,
    FAULT_S,
    LOGPROBS,
    LONG,
    ROW_BYTES,
    SHORT,
    SLOW_BYTES_S,
    TOKENS,
    Servers,
    ask,
    clear_question,
    corrupt,
    document,
    failures,
    fetch_through,
    leased_bytes,
    leave_after,
    logs,
    lookups,
    node_pid,
    publish,
    reset,
    small_disk,
    status,
    wait_connected,
    wait_granted,
    wait_hit,
    wait_idle,
    wait_quiet,
)
from tests.support.slow_link import SlowLink
from tests.support.until import until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [tmp_path_factory.mktemp(name) for name in "abc"]


@pytest.fixture(scope="module")
def environments(directories: list[Path]) -> list[dict[str, str]]:
    common = {"HYPERSPACE_ARENA_BYTES": str(256 * ROW_BYTES), "HYPERSPACE_FETCH": "always", "VLLM_SERVER_DEV_MODE": "1"}
    made = introduce(directories, [free_port() for _ in directories])
    return [common | {"HYPERSPACE_LOOKUP_DEADLINE_MS": "20000"} | each for each in made]


@pytest.fixture(scope="module")
def servers(directories: list[Path], environments: list[dict[str, str]]) -> Iterator[Servers]:
    a_port = int(environments[0]["HYPERSPACE_LISTEN"].rpartition(":")[2])
    with SlowLink(a_port) as link, ExitStack() as running:
        [to_a] = [p for p in environments[1]["HYPERSPACE_PEERS"].split(",") if p.endswith(f":{a_port}")]
        through_link = to_a.replace(f":{a_port}", f":{link.port}")
        a, b = (
            running.enter_context(Server(name, MODELS["tiny"], directory, environment=environment))
            for name, directory, environment in zip(
                "AB",
                directories,
                (environments[0] | {"HYPERSPACE_FETCH": "never"}, environments[1] | {"HYPERSPACE_PEERS": through_link}),
                strict=False,
            )
        )
        for server in (a.ready(), b.ready()):
            server.complete("warm up " * 40, max_tokens=2)
        yield Servers(a, b, link)


@pytest.fixture
def pair(servers: Servers) -> Iterator[Servers]:
    """The servers, connected; afterwards restored, with no errors in their logs."""
    marks = {log: log.stat().st_size for server in (servers.a, servers.b) for log in logs(server)}
    wait_connected(servers.b)
    yield servers
    servers.link.rate_bytes_s = 0
    servers.link.thaw()
    for server in (servers.a, servers.b):
        assert server.process.poll() is None, server.log_tail()
        assert server.complete(f"still there? {time.time_ns()}", max_tokens=1).prompt_tokens
        wait_quiet(server)
    for log, mark in marks.items():
        written = log.read_bytes()[mark:].decode(errors="replace")
        assert "Traceback" not in written, written[-3000:]
        assert "crashed" not in written, written[-3000:]


# --- without a fault ------------------------------------------------------------------------------


def test_what_a_slow_link_brings_is_used(pair: Servers) -> None:
    whole, loaded = LONG // 256 * 256, 0
    for _ in range(ATTEMPTS):
        text = document(LONG)
        prompt, expected = clear_question(pair.b, text)
        publish(pair.a, text)
        pair.link.rate_bytes_s = SLOW_BYTES_S
        hits = lookups(pair.b, "hit", "network")
        answered = ask(pair.b, prompt)
        pair.link.rate_bytes_s = 0
        loaded = answered.answer.cached_tokens
        assert answered.answer.tokens == expected.tokens
        assert lookups(pair.b, "hit", "network") == hits + (loaded > 0)
        if loaded == whole:
            return
        wait_hit(pair, AVOIDED_S)
    raise AssertionError(f"{loaded} of {whole} tokens at the most")


# --- the peer and the link ------------------------------------------------------------------------


def test_a_link_that_freezes_in_the_middle_costs_a_stall(pair: Servers) -> None:
    stalled = failures(pair.b).get("peer_stalled", 0)
    assert fetch_through(pair, pair.link.freeze) < FAULT_S
    assert failures(pair.b)["peer_stalled"] > stalled


def test_a_peer_that_freezes_in_the_middle_costs_a_stall(pair: Servers) -> None:
    stalled = failures(pair.b).get("peer_stalled", 0)
    frozen = node_pid(pair.a)
    try:
        assert fetch_through(pair, lambda: os.kill(frozen, signal.SIGSTOP)) < FAULT_S
    finally:
        os.kill(frozen, signal.SIGCONT)
    assert failures(pair.b)["peer_stalled"] > stalled


def test_a_peer_that_dies_in_the_middle_costs_a_stall_and_comes_back(pair: Servers) -> None:
    stalled = failures(pair.b).get("peer_stalled", 0)
    killed = node_pid(pair.a)
    assert fetch_through(pair, lambda: os.kill(killed, signal.SIGKILL)) < FAULT_S
    died_at_s = time.monotonic()
    assert failures(pair.b)["peer_stalled"] > stalled
    until(lambda: status(pair.a).get("pid") not in (None, killed), what="A's node")
    wait_connected(pair.b)
    print(f"A's node was back within {time.monotonic() - died_at_s:.1f} s of the answer")


# --- clients that leave ---------------------------------------------------------------------------


def test_clients_that_leave_at_any_moment_leave_nothing_behind(pair: Servers) -> None:
    waits_s = (0, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
    texts = [document(SHORT) for _ in waits_s]
    for text in texts:
        publish(pair.a, text)
    wait_idle(pair.b)
    leased = leased_bytes(pair.b)
    finished = pair.b.metric("vllm:request_success_total")
    rounds = {"a slow link": SLOW_BYTES_S // 4, "less slow": SLOW_BYTES_S, "fast": 0, "own memory": 0}
    with ThreadPoolExecutor(len(waits_s)) as pool:
        for name, rate_bytes_s in rounds.items():
            pair.link.rate_bytes_s = rate_bytes_s
            reset(pair.b, reset_external=False)
            prompts = [f"{text} {name}" for text in texts]
            list(pool.map(leave_after, itertools.repeat(pair.b), prompts, waits_s))
            wait_quiet(pair.b)
    assert pair.b.metric("vllm:request_success_total") == finished  # every one was aborted
    wait_idle(pair.b)
    until(lambda: leased_bytes(pair.b) <= leased, 20, f"the leases: {leased_bytes(pair.b)} bytes, {leased} before")
    prompt, expected = clear_question(pair.b, texts[-1])
    reset(pair.b, reset_external=False)
    assert ask(pair.b, prompt).answer.tokens == expected.tokens


# --- a peer that lies, and this node ------------------------------------------------------------------


def test_a_peer_whose_disk_lies_is_refused(pair: Servers) -> None:
    wait_hit(pair, AVOIDED_S)
    text = document(LONG)
    before = set((pair.a.data_dir / "chunks").glob("*.obj"))
    prompt, expected = clear_question(pair.b, text)
    publish(pair.a, text)
    for path in set((pair.a.data_dir / "chunks").glob("*.obj")) - before:
        corrupt(path, range(10, 43))
    refused = failures(pair.b).get("peer_bad_digest", 0)
    misses = pair.b.metric("hyperspace_l2_lookups_total", 'result="miss"')
    before_bytes, asked_at_s = pair.link.delivered_bytes, time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, pair.b, prompt)
        # Columns go in order: ten good chunks come before the first lie, so the fault isn't earlier than this.
        until(lambda: pair.link.delivered_bytes > before_bytes + 10 * CHUNK_BYTES, what="the first lie")
        fault_at_s = time.monotonic()
        answered = asked.result(120)
    after_s = answered.prefill_at_s - fault_at_s
    print(f"prefill {after_s:.3f} s after the first lie, {answered.prefill_at_s - asked_at_s:.3f} s after the question")
    assert answered.answer.tokens == expected.tokens
    assert answered.answer.cached_tokens == 0
    assert after_s < FAULT_S
    assert failures(pair.b)["peer_bad_digest"] > refused
    assert pair.b.metric("hyperspace_l2_lookups_total", 'result="miss"') == misses + 1


@pytest.mark.slow
def test_a_node_that_dies_in_the_middle_costs_no_wait_and_comes_back(pair: Servers) -> None:
    # A lied in the test before: B's next node doesn't know that.
    killed = node_pid(pair.b)
    os.kill(killed, signal.SIGKILL)
    until(lambda: status(pair.b).get("pid") not in (None, killed), what="B's node")
    wait_connected(pair.b)
    killed = node_pid(pair.b)
    gone = lookups(pair.b, "miss", "node_gone")
    # Its predecessor was killed seconds ago: this time B waits a little longer before it starts another.
    assert fetch_through(pair, lambda: os.kill(killed, signal.SIGKILL)) < FAULT_S
    died_at_s = time.monotonic()
    assert lookups(pair.b, "miss", "node_gone") == gone + 1
    until(lambda: status(pair.b).get("pid") not in (None, killed), what="B's node")
    wait_connected(pair.b)
    print(f"B's node was back within {time.monotonic() - died_at_s:.1f} s of the answer")
    pair.link.rate_bytes_s = 0
    wait_hit(pair, BACK_S)
    print(f"B hit again within {time.monotonic() - died_at_s:.1f} s of the answer")


# --- little room -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cramped(servers: Servers, directories: list[Path], environments: list[dict[str, str]]) -> Iterator[Server]:
    """C: KV blocks for three prompts, shared memory for 16 rows, no disk to spare."""
    little = {"HYPERSPACE_ARENA_BYTES": str(16 * ROW_BYTES)}
    flags = ("--num-gpu-blocks-override", "40", "--max-model-len", "4096")
    with ExitStack() as running:
        if not running.enter_context(small_disk(directories[2] / "chunks")):
            little["HYPERSPACE_DISK_BYTES"] = str(MiB)
        environment = environments[2] | little
        server = running.enter_context(
            Server("C", MODELS["tiny"], directories[2], arguments=flags, environment=environment)
        )
        server.ready().complete("warm up " * 40, max_tokens=2)
        wait_connected(server)
        yield server
        for log in logs(server):
            written = log.read_text(errors="replace")
            assert "Traceback" not in written, written[-3000:]


@pytest.mark.slow
def test_full_shared_memory_is_a_miss(servers: Servers, cramped: Server) -> None:
    text = document(3500)
    prompt, expected = clear_question(cramped, text)
    publish(servers.a, text)
    wait_granted(cramped)
    full = failures(cramped).get("arena_full", 0)
    asked_at_s = time.monotonic()
    answered = ask(cramped, prompt)
    print(f"prefill {answered.prefill_at_s - asked_at_s:.3f} s after the question")
    assert answered.answer.tokens == expected.tokens
    assert answered.prefill_at_s - asked_at_s < FAULT_S
    assert failures(cramped)["arena_full"] > full


@pytest.mark.slow
def test_a_full_disk_leaves_prefixes_in_memory(cramped: Server) -> None:
    text = document(SHORT)
    prompt, expected = clear_question(cramped, text)
    segments = SHORT // 256
    wait_granted(cramped)
    full = failures(cramped).get("disk_full", 0)
    cramped.complete(text, max_tokens=1)
    until(lambda: failures(cramped).get("disk_full", 0) > full, what="a full disk")
    wait_idle(cramped)
    reset(cramped, reset_external=False)
    hits = lookups(cramped, "hit", "memory")
    answered = ask(cramped, prompt)
    assert answered.answer.tokens == expected.tokens
    assert answered.answer.cached_tokens == segments * 256
    assert lookups(cramped, "hit", "memory") == hits + 1


@pytest.mark.slow
def test_preempted_requests_answer_as_if_they_were_alone(cramped: Server) -> None:
    # Each needs 12 of the 40 blocks to start and 15 to end.
    asked = [clear_question(cramped, document(1500)) for _ in range(6)]
    preempted = cramped.metric("vllm:num_preemptions_total")
    fields = LOGPROBS | {"max_tokens": 300, "ignore_eos": True}
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda question: cramped.complete(question[0], **fields), asked))
    assert cramped.metric("vllm:num_preemptions_total") > preempted
    for (_, expected), answer in zip(asked, answers, strict=True):
        assert answer.usage["completion_tokens"] == 300
        assert answer.tokens[:TOKENS] == expected.tokens
    wait_quiet(cramped)


@pytest.mark.slow
def test_after_a_reset_of_vllms_prefix_cache_and_of_the_connector_the_same_weights_share_again(cramped: Server) -> None:
    text = document(SHORT)
    cramped.complete(text, max_tokens=1)
    wait_idle(cramped)
    for external in (False, True):
        reset(cramped, reset_external=external)
        assert cramped.complete(f"{text} {external}", max_tokens=1).cached_tokens == SHORT // 256 * 256
