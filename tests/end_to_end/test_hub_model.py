"""A model that is served by its hub id, as most are: cached like any other, and shared with its copy in a directory."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.servers import MODELS, Server, free_port, introduce
from tests.support.hub import hub
from tests.support.until import until

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.feature("a model by its hub id, two API servers"),
]

SETTINGS = {"HYPERSPACE_ARENA_BYTES": str(128 << 20), "HYPERSPACE_FETCH": "always"}
PROMPT = "the quick brown fox jumps over the lazy dog " * 30


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """`vllm serve acme/tiny --api-server-count 2`, and a separate node that serves the same files by their path."""
    base = tmp_path_factory.mktemp("hub")
    directories = [base / "by_id", base / "by_path"]
    for directory in directories:
        directory.mkdir(mode=0o700)
    peers = introduce(directories, [free_port(), free_port()])
    with hub("acme/tiny", MODELS["tiny"]) as url:
        online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": url, "HF_HOME": str(base / "hf")}
        by_id = Server(
            "by id", Path("acme/tiny"), directories[0],
            arguments=("--api-server-count", "2"), environment={**SETTINGS, **peers[0], **online},
        )  # fmt: skip
        by_path = Server("by path", MODELS["tiny"], directories[1], environment={**SETTINGS, **peers[1]})
        with by_id, by_path:
            yield by_id.ready(), by_path.ready()


def test_the_second_request_is_a_hit_in_every_api_server(servers: tuple[Server, Server]) -> None:
    by_id, _ = servers
    first = by_id.complete(PROMPT, max_tokens=4)
    assert "miss" in first.headers["cache-status"]
    # Each connection may reach either of the two API servers.
    until(lambda: "hit" in by_id.complete(PROMPT, max_tokens=4).headers["cache-status"], what="a hit")
    again = [by_id.complete(PROMPT, max_tokens=4) for _ in range(12)]
    assert [answer.text for answer in again] == [first.text] * 12
    assert all("hit" in answer.headers["cache-status"] for answer in again)


def test_another_node_that_serves_the_same_files_by_their_path_loads_its_kv(servers: tuple[Server, Server]) -> None:
    by_id, by_path = servers
    prompt = "another node: " + PROMPT
    computed = by_id.complete(prompt, max_tokens=4)

    def published() -> bool:
        publish = by_id.node_status()["publish"]
        assert isinstance(publish, dict)
        return bool(publish["objects"]) and publish["waiting_rows"] == 0

    def connected() -> bool:
        peers = by_path.node_status()["peers"]
        assert isinstance(peers, list)
        return any(peer["connected"] for peer in peers)

    until(published, what="publishing")
    until(connected, what="finding the other node")
    answer = by_path.complete(prompt, max_tokens=5)
    assert answer.cached_tokens >= 1024
    assert by_path.metric("hyperspace_l2_lookups_total", 'result="hit"', 'reason="network"') == 1
    assert answer.text.startswith(computed.text)
