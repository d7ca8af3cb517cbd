"""Finds the number format in which vLLM's CPU build generates, and pools, on this machine.

Context: on some CPUs vLLM dies of an illegal instruction in bfloat16, on some with AMX in pooling alone; without
bfloat16 instructions it works, emulated, at a tenth of the speed.
Choice: real vLLM answers with the tiny model, in a separate process, in the faster format first; the first format that
succeeds is used by the demo, the tests and the benches. On a GPU vLLM chooses by the model.
Rejected: trying single operations (which ones die depends on what the process ran before); reading the CPU's flags
alone (a virtual machine may refuse what they promise).
Cost: one start of vLLM, once for each kind of work, CPU and release of vLLM.

Run as a script (KIND DTYPE), in the environment's own Python, it is that process.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import engine
from progress import step

ROOT = Path(__file__).resolve().parents[2]
NATIVE_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one is ARM's
LIMIT_S = 120.0


def choose(venv: engine.Venv, chosen: engine.Engine, kind: str) -> str:
    """The format to `generate` or `pool` in; `Failed` where vLLM can't in any."""
    if chosen.name == "gpu":
        return "auto"
    with step(f"Trying in which number format vLLM can {kind} on this machine") as progress:
        command = lambda dtype: [str(venv.python), __file__, kind, dtype]  # noqa: E731
        dtype = first_that_works(preferred(cpu_flags()), command)
        progress.title = f"Tried it: vLLM can {kind} in {dtype} on this machine"
    return dtype


def cpu_flags() -> frozenset[str]:
    """The flags of the first CPU."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return frozenset(found[1].split() if found else ())


def preferred(flags: Iterable[str]) -> tuple[str, ...]:
    """The formats, fastest first for a CPU with these flags."""
    return ("bfloat16", "float32") if NATIVE_BFLOAT16 & set(flags) else ("float32", "bfloat16")


def first_that_works(dtypes: Iterable[str], command: Callable[[str], list[str]], limit_s: float = LIMIT_S) -> str:
    """The first format whose command succeeds within the limit; `Failed` with the outcome of each."""
    refusals = []
    for dtype in dtypes:
        try:
            engine.run(command(dtype), limit_s)
        except engine.Failed as refusal:
            refusals.append(str(refusal))
        else:
            return dtype
    raise engine.Failed("\n".join(refusals))


def answer(kind: str, dtype: str) -> None:
    """Answer a short and a long text: vLLM chooses kernels by size."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_PLUGINS": "",  # no plugins: vLLM alone
    }
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"runner": "pooling", "convert": "embed"} if kind == "pool" else {}
    llm = LLM(str(ROOT / ".models" / "tiny"), dtype=dtype, enforce_eager=True, max_model_len=2048, **options)
    texts = ["sky", "the sea " * 100]
    if kind == "pool":
        llm.embed(texts, use_tqdm=False)
    else:
        llm.generate(texts, SamplingParams(max_tokens=4), use_tqdm=False)


if __name__ == "__main__":
    answer(*sys.argv[1:])
    os._exit(0)  # an error while the libraries shut down says nothing about the format
