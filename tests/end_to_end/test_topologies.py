"""Every way to start vLLM: responses and another node's KV are hits, salts and tenants are separate, metrics exist.

CI has time for one, two API servers: tests/end_to_end/test_hub_model.py.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from bench.machine import dtype
from bench.servers import MODELS, Server, free_port, have_machine, introduce
from tests.end_to_end.test_serve import completion, hit, post
from tests.support.until import until

pytestmark = [pytest.mark.vllm, pytest.mark.topology, pytest.mark.timeout(1200)]

KEYS = ("sk-one", "sk-two")
SMALL = {"HYPERSPACE_ARENA_BYTES": str(64 << 20), "HYPERSPACE_FETCH": "always", "HYPERSPACE_P2P_LISTEN": ""}
OURS: dict[str, object] = {"kv_connector": "hyperspace", "kv_role": "kv_both"}


def several(*children: dict[str, object]) -> str:
    extra = {"connectors": children}
    return json.dumps({"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra})


@dataclass(frozen=True)
class Topology:
    """How a server is started."""

    name: str
    arguments: tuple[str, ...]
    connector: bool = True  # --kv-connector hyperspace
    program: tuple[str, ...] | None = None  # instead of `vllm serve`
    engines: int = 1
    keys: tuple[str, ...] = ()


EXAMPLE: dict[str, object] = {
    "kv_connector": "ExampleConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"shared_storage_path": "DIRECTORY"},
}
PLAIN = Topology("plain", ())
TOPOLOGIES = [
    Topology("2 API servers, 2 engines", ("--api-server-count", "2", "--data-parallel-size", "2"), engines=2),
    Topology("2 API servers", ("--api-server-count", "2")),
    Topology("2 API servers, 2 API keys", ("--api-server-count", "2", "--api-key", *KEYS), keys=KEYS),
    Topology("1 API server, 2 engines", ("--api-server-count", "1", "--data-parallel-size", "2"), engines=2),
    Topology("MultiConnector", ("--kv-transfer-config", several(OURS)), connector=False),
    Topology(
        "MultiConnector beside ExampleConnector",
        ("--kv-transfer-config", several(EXAMPLE, OURS), "--disable-hybrid-kv-cache-manager"),
        connector=False,
    ),
    Topology("python -m vllm.entrypoints.openai.api_server", (), program=("-m", "vllm.entrypoints.openai.api_server")),
    Topology("--config file.yaml", ("--config", "DIRECTORY/config.yaml"), connector=False),
    Topology("n-gram speculation", ("--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3}')),
    Topology("no chunked prefill", ("--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192")),
]


def as_features(topologies: Sequence[Topology]) -> list[object]:
    """Parameters whose outcomes are rows of the table in docs/operations.md."""
    marks = {each.name: pytest.mark.feature(f"started as: {each.name}") for each in topologies}
    return [pytest.param(each, id=each.name, marks=marks[each.name]) for each in topologies]


@pytest.fixture(scope="module")
def producer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, dict[str, str], Path]]:
    """A plain server that another node knows: its environment and data directory."""
    directories = [tmp_path_factory.mktemp(name) for name in ("producer", "consumer")]
    environments = introduce(directories, [free_port(), free_port()])
    with Server("producer", MODELS["tiny"], directories[0], environment=SMALL | environments[0]) as server:
        yield server.ready(600), environments[1], directories[1]


def started(topology: Topology, environment: dict[str, str], directory: Path) -> Server:
    (directory / "config.yaml").write_text("kv-connector: hyperspace\n")
    arguments = [argument.replace("DIRECTORY", str(directory)) for argument in topology.arguments]
    program = None if topology.program is None else [sys.executable, *topology.program, "--model", str(MODELS["tiny"])]
    return Server(
        topology.name, MODELS["tiny"], directory, connector=topology.connector, program=program,
        # Without vLLM's own prefix cache, cached tokens came from Hyperspace.
        arguments=["--no-enable-prefix-caching", *arguments], environment=SMALL | environment,
    )  # fmt: skip


def long_prompt(name: str) -> str:
    return name + "".join(f"{n} bottles of beer on the wall. " for n in range(40))


def check(topology: Topology, producer: Server, environment: dict[str, str], directory: Path) -> None:
    keys = [{"Authorization": f"Bearer {key}"} for key in topology.keys or ("",)]
    shared = long_prompt(topology.name)
    producer.complete(shared + "A")
    until(lambda: producer.node_status()["publish"]["waiting_rows"] == 0, what="publishing")  # type: ignore[index]
    with started(topology, environment, directory) as server:
        server.ready(900)

        # L1: every API server answers with what one of them has stored.
        stored_only = {"Cache-Control": "only-if-cached"}
        hits = 0

        def all_hit(key: dict[str, str]) -> bool:
            nonlocal hits
            again = [post(server, completion(topology.name), key | stored_only) for _ in range(8)]
            hits += sum(hit(headers) for _, headers, _ in again)
            return all(status == 200 for status, _, _ in again)

        for key in keys:
            status, headers, body = post(server, completion(topology.name), key)
            assert status == 200, body
            assert not hit(headers), "of another tenant"
        for key in keys:
            until(partial(all_hit, key), what="the response in every API server")
            assert not hit(post(server, completion(topology.name, cache_salt="s"), key)[1])
        assert server.metric("hyperspace_l1_lookups_total", 'result="hit"', 'reason="local"') == hits

        # L2: each engine loads the other node's KV; it loads none for a tenant's or a salted prompt.
        def cached(prompt: str, key: dict[str, str], **fields: object) -> int:
            headers = key | {"Cache-Control": "no-cache"}
            return server.complete(prompt, headers=headers, **fields).cached_tokens  # type: ignore[arg-type]

        if topology.keys:
            until(lambda: cached(shared + "own", keys[0]) >= 1024, what="the tenant's own KV")
            assert cached(shared + "own", keys[1]) == 0
        else:
            engines = range(topology.engines)
            found = [cached(f"{shared}{rank}", {"X-data-parallel-rank": str(rank)}) for rank in engines]
            looked_up = {name: value for name, value in server.metrics().items() if "l2_lookups_total" in name}
            assert min(found) >= 1024, (found, looked_up)
            if "ExampleConnector" not in topology.name:  # it doesn't separate salts
                assert cached(shared + "salted", {}, cache_salt="s") == 0
        counted = {
            name for name in server.metrics() if name.startswith("hyperspace_l2_lookups_total") and '"hit"' in name
        }
        assert len({name.partition('engine="')[2].partition('"')[0] for name in counted}) == topology.engines
        assert server.metric("vllm:request_success_total", 'finished_reason="error"') == 0
        assert "please report" not in server.log_path.read_text()


@pytest.mark.parametrize("topology", as_features(TOPOLOGIES))
def test_every_way_to_start_a_server_shares_what_others_computed(
    topology: Topology, producer: tuple[Server, dict[str, str], Path]
) -> None:
    check(topology, *producer)


@pytest.mark.feature("started as: 2 engines, one of them --headless")
def test_an_engine_on_another_host_keeps_tenants_apart_and_says_what_is_off(tmp_path: Path) -> None:
    """Both are on this host, but neither inherits from the other."""
    port = str(free_port())
    parallel = (
        "--data-parallel-size", "2", "--data-parallel-size-local", "1",
        "--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", port, "--no-enable-prefix-caching",
    )  # fmt: skip
    head = Server(
        "head", MODELS["tiny"], tmp_path / "head", environment=SMALL,
        arguments=("--api-server-count", "1", "--api-key", *KEYS, *parallel),
    )  # fmt: skip
    engine = Server(
        "headless", MODELS["tiny"], tmp_path / "engine", environment=SMALL,
        arguments=("--headless", "--data-parallel-start-rank", "1", *parallel),
    )  # fmt: skip
    with head, engine:
        head.ready(900)
        assert "KV of this engine stays on this host" in engine.log_path.read_text()
        for rank in ("0", "1"):
            headers = {"X-data-parallel-rank": rank, "Cache-Control": "no-cache"}
            keys = [{"Authorization": f"Bearer {key}", **headers} for key in KEYS]
            shared = long_prompt(f"rank {rank} ")

            def cached(key: dict[str, str], end: str, shared: str = shared) -> int:
                return head.complete(shared + end, headers=key).cached_tokens

            until(partial(lambda own, key: own(key, "own") >= 1024, cached, keys[0]), what="the tenant's own KV")
            assert cached(keys[1], "own") == 0
        assert head.metric("hyperspace_l2_lookups_total", 'engine="1"', 'result="hit"') >= 1


OFFLINE = """
import gc, multiprocessing
def generate():
    from vllm import LLM, SamplingParams
    transfer = {"kv_connector": "hyperspace", "kv_role": "kv_both"}
    llm = LLM(MODEL, dtype=DTYPE, kv_transfer_config=transfer, enforce_eager=True, max_model_len=2048)
    llm.generate("word " * 200, SamplingParams(max_tokens=4))
    del llm
    gc.collect()  # a child process that still has one does not end
if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=generate)
    child.start(); child.join(); raise SystemExit(child.exitcode)
"""
BATCH = {
    "custom_id": "1", "method": "POST", "url": "/v1/chat/completions",
    "body": {"model": str(MODELS["tiny"]), "messages": [{"role": "user", "content": "word " * 200}], "max_tokens": 4},
}  # fmt: skip
ENGINE = (
    "--model", str(MODELS["tiny"]), "--dtype", dtype("generate"),
    "--kv-connector", "hyperspace", "--enforce-eager", "--max-model-len", "2048",
)  # fmt: skip
GEMMA = ("--model", str(MODELS["gemma"]))  # its vocabulary has the ids that are drawn
LENGTHS = ("--input-len", "600", "--output-len", "4")
COMMANDS = {
    "LLM() in a child process": ("python", "offline.py"),
    "vllm run-batch": ("vllm", "run-batch", "-i", "batch.jsonl", "-o", "answers.jsonl", *ENGINE),
    "vllm bench latency": (
        "vllm", "bench", "latency", "--num-iters", "1", "--num-iters-warmup", "1", "--batch-size", "1",
        *LENGTHS, *ENGINE, *GEMMA,
    ),
    "vllm bench throughput": (
        "vllm", "bench", "throughput", "--dataset-name", "random", "--num-prompts", "4", *LENGTHS, *ENGINE,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=pytest.mark.feature(f"started as: {name}")) for name in COMMANDS]
)
def test_commands_without_a_server_save_their_prompts_in_the_node(command: str, tmp_path: Path) -> None:
    have_machine()
    (tmp_path / "offline.py").write_text(
        OFFLINE.replace("MODEL", repr(str(MODELS["tiny"]))).replace("DTYPE", repr(dtype("generate")))
    )
    (tmp_path / "batch.jsonl").write_text(json.dumps(BATCH) + "\n")
    first, *rest = COMMANDS[command]
    program = [str(Path(sys.executable).parent / first), *rest]
    environment = {
        **os.environ, **SMALL, "HYPERSPACE_DATA_DIR": str(tmp_path / "data"), "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run(program, cwd=tmp_path, env=environment, stdout=log, stderr=log, timeout=900, check=False)
    said = (tmp_path / "log").read_text()
    assert done.returncode == 0, said[-4000:]
    assert "L2) is off" not in said
    assert "please report" not in said
    rows = [path for path in (tmp_path / "data" / "chunks").rglob("*") if path.is_file()]
    assert rows, "what was computed is on the disk"


@pytest.mark.feature("started as: kv_connector_module_path, without the plugin (nothing is shared)")
def test_without_the_plugin_a_server_serves_and_says_what_is_off(tmp_path: Path) -> None:
    module = {**OURS, "kv_connector_module_path": "hyperspace_vllm.vllm_adapter.entry"}
    server = Server(
        "no plugin", MODELS["tiny"], tmp_path, connector=False, environment=SMALL | {"VLLM_PLUGINS": "none"},
        arguments=("--no-enable-prefix-caching", "--kv-transfer-config", json.dumps(module)),
    )  # fmt: skip
    with server:
        server.ready(900)
        assert server.complete(long_prompt("no plugin")).text
        assert "response cache (L1) is off" in server.log_path.read_text()
        assert "KV sharing (L2) is off" in server.log_path.read_text()


def test_pipelined_engines_start_and_say_that_kv_sharing_is_off(tmp_path: Path) -> None:
    """No request is sent: vLLM's CPU runner fails at the first one, without the plugin too."""
    server = Server(
        "pipeline", MODELS["tiny"], tmp_path, environment=SMALL | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        arguments=("--pipeline-parallel-size", "2"),
    )  # fmt: skip
    with server:
        server.ready(900)
        assert "KV sharing (L2) is off: unsupported: pipeline parallelism" in server.log_path.read_text()
