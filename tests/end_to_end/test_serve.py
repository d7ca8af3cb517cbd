"""`vllm serve MODEL --kv-connector hyperspace` as users run it: one flag, real HTTP, two servers on one node."""

import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from bench.servers import MODELS, Server
from tests.support.until import until

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.feature("servers of one host: responses, KV, API keys, other middleware"),
]

KEY = "sk-one"
ARENA = {
    "HYPERSPACE_ARENA_BYTES": str(128 << 20),
    "HYPERSPACE_FETCH": "always",
    "HYPERSPACE_SEMANTIC": "balanced",
    "HYPERSPACE_ACRONYMS": "KVC=key value cache",
}
FLAGS = (
    "--api-key", KEY, "--enable-request-id-headers", "--allowed-origins", '["http://shop.example"]',
    "--middleware", "tests.support.engines.operator_middleware.stamp",
)  # fmt: skip


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """Two servers of one data directory, hence of one node."""
    directory = tmp_path_factory.mktemp("serve")
    first = Server("first", MODELS["tiny"], directory, arguments=FLAGS, environment=ARENA)
    by_config = json.dumps({"kv_connector": "hyperspace", "kv_role": "kv_both"})
    second = Server(
        "second", MODELS["tiny"], directory, connector=False, environment=ARENA,
        arguments=("--api-key", KEY, "--kv-transfer-config", by_config),
    )  # fmt: skip
    with first, second:
        yield first.ready(), second.ready()


@pytest.fixture
def server(servers: tuple[Server, Server]) -> Server:
    return servers[0]


@pytest.fixture
def prompt(request: pytest.FixtureRequest) -> str:
    """A prompt of this test alone."""
    return f"{request.node.name} {time.time_ns()}: "


def post(
    server: Server, body: object, headers: dict[str, str] | None = None, path: str = "/v1/completions"
) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of one request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}", **(headers or {})}
    try:
        with urllib.request.urlopen(urllib.request.Request(server.url + path, data, sent), timeout=120) as response:
            return response.status, {k.lower(): v for k, v in response.headers.items()}, response.read()
    except urllib.error.HTTPError as error:
        return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()


def completion(prompt: str, **fields: object) -> dict[str, object]:
    return {"model": "demo", "prompt": prompt, "max_tokens": 8, "temperature": 0, **fields}


def hit(headers: dict[str, str]) -> bool:
    return "hit" in headers.get("cache-status", "").split("; ")


def said(body: bytes) -> dict[str, Any]:
    """The content of a body without its id, which differs in every answer."""
    answer: dict[str, Any] = json.loads(body)
    assert answer.pop("id")
    return answer


def test_the_same_request_again_is_a_hit_with_its_age(server: Server, prompt: str) -> None:
    _, first, body = post(server, completion(prompt))
    _, again, same = post(server, completion(prompt))
    assert not hit(first)
    assert hit(again)
    assert int(again["age"]) >= 0
    assert said(same) == said(body)
    assert json.loads(same)["id"] != json.loads(body)["id"]


def test_a_stream_is_served_from_an_answer_and_an_answer_from_a_stream(server: Server, prompt: str) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key=KEY)

    def chat(text: str, stream: bool) -> str:
        answer: Any = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": text}], max_tokens=8, temperature=0, stream=stream
        )
        if stream:
            return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        return str(answer.choices[0].message.content or "")

    hits = server.metric("hyperspace_l1_lookups_total", 'result="hit"')
    for number, order in enumerate(((False, True), (True, False))):
        stored, replayed = (chat(f"{prompt}{number}", stream) for stream in order)
        assert stored == replayed
    assert server.metric("hyperspace_l1_lookups_total", 'result="hit"') == hits + 2


REQUESTS: dict[str, dict[str, object]] = {
    "/v1/completions": {"prompt": "Why?"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Why?"}]},
    "/v1/responses": {"input": "Why?", "max_output_tokens": 8},
    "/v1/messages": {"messages": [{"role": "user", "content": "Why?"}]},
}


@pytest.mark.parametrize("path", REQUESTS)
def test_no_path_leads_to_a_cached_answer_without_the_api_key(server: Server, path: str) -> None:
    body = {"model": "demo", "temperature": 0, "cache_salt": str(time.time_ns()), "max_tokens": 8, **REQUESTS[path]}
    post(server, body, path=path)
    assert hit(post(server, body, path=path)[1])
    for authorization in ("", "Bearer wrong", f"Basic {KEY}", KEY):
        for way in (path, "/" + path, path + "/", path + "?x", path.upper(), path.replace("/v1", "/v1/."), path[3:]):
            headers = {"Authorization": authorization, "X-Api-Key": KEY, "X-Hyperspace-Proof": "1"}
            status, told, answer = post(server, body, headers, way)
            assert status in (401, 404, 307), way
            assert not told.keys() & {"cache-status", "age", "x-hyperspace-proof"}
            assert b"id" not in answer


def test_hits_pass_through_the_middleware_around_vllm(server: Server, prompt: str) -> None:
    post(server, completion(prompt))
    _, headers, _ = post(server, completion(prompt), {"Origin": "http://shop.example", "X-Request-Id": "r-1"})
    assert hit(headers)
    assert headers["x-operator"] == "was here"
    assert headers["x-request-id"] == "r-1"
    assert headers["access-control-allow-origin"] == "http://shop.example"


def test_salts_and_parameters_separate_entries(server: Server, prompt: str) -> None:
    for fields in ({}, {"cache_salt": "a"}, {"cache_salt": "b"}, {"seed": 1}, {"logprobs": 1}, {"vendor_field": 1}):
        assert not hit(post(server, completion(prompt, **fields))[1]), fields
        assert hit(post(server, completion(prompt, **fields))[1]), fields


def test_output_neutral_fields_do_not(server: Server, prompt: str) -> None:
    post(server, completion(prompt))
    assert hit(post(server, completion(prompt, user="somebody", stream=False))[1])


def test_errors_are_vllms_own_and_never_stored(server: Server, prompt: str) -> None:
    for body, status in (
        (b"{", 400), (completion(prompt, model="nobody"), 404), (completion(prompt, max_tokens=-1), 400),
    ):  # fmt: skip
        for _ in range(2):
            answered, headers, _ = post(server, body)
            assert answered == status
            assert not hit(headers)


def test_request_cache_control_is_obeyed(server: Server, prompt: str) -> None:
    def ask(control: str) -> tuple[int, bool]:
        status, headers, _ = post(server, completion(prompt), {"Cache-Control": control})
        return status, hit(headers)

    assert ask("only-if-cached") == (504, False)
    assert ask("no-store") == (200, False)
    assert ask("only-if-cached") == (504, False)
    assert ask("no-cache") == (200, False)
    assert ask("no-cache") == (200, False)
    assert ask("only-if-cached") == (200, True)


def test_servers_of_one_node_compute_a_request_once(servers: tuple[Server, Server], prompt: str) -> None:
    def collapsed() -> bool:
        body = completion(f"{prompt}{time.time_ns()}", max_tokens=200)
        with ThreadPoolExecutor(2) as pool:
            (_, one, one_body), (_, other, other_body) = pool.map(lambda server: post(server, body), servers)
        statuses = sorted(str(headers["cache-status"]) for headers in (one, other))
        if statuses != ["hyperspace; fwd=uri-miss; collapsed", "hyperspace; fwd=uri-miss; stored"]:
            return False
        assert said(one_body) == said(other_body)
        return True

    # A server learns of the other by heartbeats, and waits 10 ms for a node, which may be late on a busy machine.
    until(collapsed, what="a request that one server computed for both", timeout_s=120)


def test_servers_of_one_node_share_answers(servers: tuple[Server, Server], prompt: str) -> None:
    cached_only = {"Cache-Control": "only-if-cached"}
    _, _, body = post(servers[0], completion(prompt))
    until(lambda: post(servers[1], completion(prompt), cached_only)[0] == 200, what="the second server's hit")
    assert said(post(servers[1], completion(prompt), cached_only)[2]) == said(body)


def test_another_wording_of_a_question_is_answered_by_every_server(servers: tuple[Server, Server]) -> None:
    def status() -> Any:
        return servers[0].node_status()

    until(lambda: status()["similar"]["state"] == "on", what="the embedder's start")

    seed = time.time_ns() >> 8

    def ask(server: Server, question: str, **headers: str) -> tuple[str, bytes]:
        body = {"model": "demo", "max_tokens": 8, "seed": seed, "messages": [{"role": "user", "content": question}]}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        _, found, answer = post(server, body, named, "/v1/chat/completions")
        return found["cache-status"], answer

    def cached(server: Server, question: str, wish: str = "balanced") -> tuple[str, bytes]:
        """The question is not computed, so nothing is stored."""
        return ask(server, question, cache_control="only-if-cached", x_hyperspace_semantic=wish)

    _, first = ask(servers[0], "What is a KVC?")
    _, second = ask(servers[1], "How do I learn to play the guitar?")
    for server in servers:
        for question, detail, answer in (
            ("Please explain key value cache", "; detail=canonical", first),
            ("How can I learn to play guitar?", "; detail=semantic; similarity=0.9", second),
        ):
            found: list[bytes] = []

            def is_found(server: Server = server, ask: str = question, want: str = detail) -> bool:
                told, body = cached(server, ask)
                found.append(body)  # noqa: B023
                return want in told

            until(is_found, what=question)
            assert said(found[-1]) == said(answer)
    assert cached(servers[0], "How can I learn to play guitar?", "off")[0] == "hyperspace; detail=uri-miss"
    assert cached(servers[0], "How can I learn to play the violin?")[0] == "hyperspace; detail=uri-miss"
    samples = status()["metrics"]
    wrong = {
        each["labels"]["bound"]: each["value"] for each in samples if each["name"].endswith("semantic_wrong_ratio")
    }
    assert wrong.keys() == {"low", "estimate", "high"}
    assert 0 <= wrong["low"] <= wrong["estimate"] <= wrong["high"] <= 1


def test_servers_of_one_node_share_prefixes(servers: tuple[Server, Server], prompt: str) -> None:
    long = prompt + "".join(f"{n} bottles of beer on the wall. " for n in range(40))
    answer = servers[0].complete(long + "A", headers={"Authorization": f"Bearer {KEY}"})
    assert answer.cached_tokens == 0
    until(lambda: servers[0].node_status()["publish"]["waiting_rows"] == 0, what="publishing")  # type: ignore[index]
    shared = servers[1].complete(long + "B", headers={"Authorization": f"Bearer {KEY}"})
    assert shared.cached_tokens >= 1024
    assert servers[1].metric("hyperspace_l2_lookups_total", 'result="hit"', 'reason="memory"') >= 1


def test_a_salted_prompt_is_not_shared_with_an_unsalted_one(servers: tuple[Server, Server], prompt: str) -> None:
    long = prompt + "".join(f"{n} green bottles hanging on the wall. " for n in range(30))
    key = {"Authorization": f"Bearer {KEY}"}
    servers[0].complete(long, headers=key, cache_salt="mine")
    until(lambda: servers[0].node_status()["publish"]["waiting_rows"] == 0, what="publishing")  # type: ignore[index]
    assert servers[1].complete(long + ".", headers=key).cached_tokens == 0
    assert servers[1].complete(long + "!", headers=key, cache_salt="mine").cached_tokens >= 512


def test_a_disconnected_client_leaves_nothing_behind(server: Server, prompt: str) -> None:
    body = completion(prompt, max_tokens=2000, stream=True)
    request = urllib.request.Request(
        server.url + "/v1/completions", json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=60) as response:
        response.readline()
    until(lambda: server.metric("vllm:num_requests_running") == 0, what="the abort")
    status, _, _ = post(server, body, {"Cache-Control": "only-if-cached"})
    assert status == 504


@pytest.mark.slow
def test_a_killed_server_leaves_no_node_behind(tmp_path: Path) -> None:
    with Server("doomed", MODELS["tiny"], tmp_path, environment=ARENA) as doomed:
        doomed.ready()
        doomed.complete("hello")
        node = int(str(doomed.node_status()["pid"]))
        arena = Path(str(doomed.node_status()["arena"]["path"]))  # type: ignore[index]
        doomed.signal_group(signal.SIGKILL)
        until(lambda: not alive(node), what="the node's end")
        assert not arena.exists()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
