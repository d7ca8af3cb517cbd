"""A real server's keys match what it holds: two checkpoints, adapters replaced on disk, weights loaded again."""

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.servers import MODELS, Completion, Server
from tests.support.until import until

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

ENVIRONMENT = {
    "HYPERSPACE_ARENA_BYTES": str(128 << 20),
    "HYPERSPACE_FETCH": "always",
    "HYPERSPACE_P2P_LISTEN": "",
    "VLLM_SERVER_DEV_MODE": "1",
}


def checkpoint(path: Path, rows: slice) -> Path:
    """The tiny model with some rows of its embeddings changed: those of the letters, or all."""
    shutil.copytree(MODELS["tiny"], path)
    tensors = load_file(path / "model.safetensors")
    name = next(name for name in tensors if "embed_tokens" in name)
    torch.manual_seed(5)
    changed = tensors[name].clone()
    changed[rows] = torch.randn_like(changed[rows].float()).to(changed.dtype)
    save_file({**tensors, name: changed}, path / "model.safetensors", metadata={"format": "pt"})
    return path


def adapter(path: Path, seed: int) -> Path:
    """A LoRA adapter for the tiny model's queries and values."""
    path.mkdir(exist_ok=True)
    config = json.loads((MODELS["tiny"] / "config.json").read_text())
    hidden, width = config["hidden_size"], config["head_dim"]
    torch.manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for module, heads in (("q_proj", "num_attention_heads"), ("v_proj", "num_key_value_heads")):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(8, hidden) * 0.3
            tensors[f"{name}.lora_B.weight"] = torch.randn(config[heads] * width, 8) * 0.3
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    about = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (path / "adapter_config.json").write_text(
        json.dumps({**about, "base_model_name_or_path": "x", "task_type": "CAUSAL_LM"})
    )
    return path


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter(tmp_path_factory.mktemp("adapters") / "lora", seed=1)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, lora: Path) -> Iterator[tuple[Server, Server]]:
    """Two servers of one node: the tiny model, and one that differs from it in the rows of 26 letters."""
    directory = tmp_path_factory.mktemp("weights")
    letters = checkpoint(tmp_path_factory.mktemp("models") / "letters", slice(97, 123))
    flags = ("--no-enable-prefix-caching", "--dtype", "float32")
    loras = ("--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"lora={lora}")
    first = Server("first", MODELS["tiny"], directory, arguments=(*flags, *loras), environment=ENVIRONMENT)
    second = Server("second", letters, directory, arguments=flags, environment=ENVIRONMENT)
    with first, second:
        yield first.ready(), second.ready()


def prompt(name: str) -> str:
    return f"{name}: " + "the quick brown fox jumps over the lazy dog " * 30


def ask(server: Server, text: str, model: str = "demo", tokens: int = 4, **fields: Any) -> Completion:
    return server.complete(text, model=model, max_tokens=tokens, **fields)


def is_hit(answer: Completion) -> bool:
    return "hit" in answer.headers["cache-status"]


def published(server: Server, at_least: int) -> int:
    """Rows in the node's memory, once there are `at_least`."""
    return until(lambda: rows if (rows := rows_of(server)) >= at_least else 0, what=f"{at_least} rows")


def rows_of(server: Server) -> int:
    status = server.node_status()
    arena = status["arena"]
    assert isinstance(arena, dict)
    return int(arena["rows"])


def rpc(server: Server, method: str, **kwargs: object) -> None:
    body = json.dumps({"method": method, "kwargs": kwargs}).encode()
    request = urllib.request.Request(server.url + "/collective_rpc", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=120).read()


def test_a_checkpoint_that_differs_in_a_few_rows_shares_nothing(servers: tuple[Server, Server]) -> None:
    first, second = servers
    text, before = prompt("checkpoints"), rows_of(first)
    computed = ask(first, text)
    published(first, before + 1)
    assert ask(first, text, tokens=5).cached_tokens > 0  # the model itself finds it again
    others = ask(second, text)
    assert (others.cached_tokens, is_hit(others)) == (0, False)
    assert others.text == ask(second, text, cache_salt="apart").text != computed.text


def test_an_adapter_replaced_on_disk_is_not_cached_under_either_name(
    servers: tuple[Server, Server], lora: Path
) -> None:
    first, _ = servers
    text, before = prompt("adapter"), rows_of(first)
    held = ask(first, text, model="lora")
    published(first, before + 1)
    assert ask(first, text, model="lora", tokens=5).cached_tokens > 0
    assert is_hit(ask(first, text, model="lora"))
    adapter(lora, seed=2)
    again = ask(first, text, model="lora")
    assert again.text == held.text  # the engine continues with what it has loaded
    assert (again.cached_tokens, is_hit(again)) == (0, False)
    rows = rows_of(first)
    ask(first, prompt("adapter, replaced"), model="lora")
    assert rows_of(first) == rows


def test_the_same_weights_loaded_anew_share_again_and_others_never(
    servers: tuple[Server, Server], tmp_path: Path
) -> None:
    _, server = servers
    text, before = prompt("reload"), rows_of(server)
    as_loaded = ask(server, text)
    published(server, before + 1)
    rpc(server, "reload_weights")  # the weights it was started with
    assert is_hit(ask(server, text))
    again = ask(server, text, tokens=5)
    assert again.cached_tokens > 0
    assert again.text.startswith(as_loaded.text)
    rpc(server, "reload_weights", weights_path=str(checkpoint(tmp_path / "other", slice(None))))
    changed = ask(server, text)
    assert (changed.cached_tokens, is_hit(changed)) == (0, False)
    assert changed.text != as_loaded.text
    rpc(server, "reload_weights")  # vLLM loads the other path again
    changed = ask(server, text)
    assert (changed.cached_tokens, is_hit(changed)) == (0, False)


def test_a_request_that_vllm_refuses_changes_no_weights(servers: tuple[Server, Server]) -> None:
    first, _ = servers
    text = prompt("refused")
    ask(first, text)
    for path, body in (("/update_weights", b"{}"), ("/collective_rpc", b"not json")):
        request = urllib.request.Request(first.url + path, body, {"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError, match=r"HTTP Error (400|404|422|500)"):
            urllib.request.urlopen(request, timeout=60)
    assert is_hit(ask(first, text))
