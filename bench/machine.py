"""Describes the machine that a figure was measured on: printed beside every one."""

import json
import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
# Flags that the native code, or a library it is compared with, has kernels for.
FLAGS = ("avx2", "avx512f", "avx512bw", "gfni", "asimd")


def dtype(kind: Literal["generate", "pool"]) -> str:
    """The number format in which the set-up saw vLLM do that on this machine."""
    with suppress(OSError, ValueError):
        return str(json.loads((ROOT / ".venv" / "setup.json").read_text()).get(f"dtype to {kind}", "float32"))
    return "float32"


def describe() -> str:
    """The CPU, its cores and vector instructions, and the commit, in one line."""
    info: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        name, _, value = line.partition(":")
        info.setdefault(name.strip(), value.strip())
    model = info.get("model name") or platform.processor() or platform.machine()
    has = info.get("flags", info.get("Features", "")).split()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    flags = " ".join(flag for flag in FLAGS if flag in has)
    return f"{model}, {os.cpu_count()} cores, {flags}; commit {commit.stdout.strip() or 'unknown'}"
