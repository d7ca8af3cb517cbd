"""What a figure was measured on: printed beside every one."""

import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What the native code, or what it is compared with, has kernels for.
FLAGS = ("avx2", "avx512f", "avx512bw", "gfni", "asimd")


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
