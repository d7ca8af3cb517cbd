"""Requirements from the operating system: found by looking for the thing itself, not for a package's name."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from progress import step


class Missing(Exception):
    """Something must be installed that the set-up may not install; the text says how."""


@dataclass(frozen=True)
class Need:
    """One thing that the build or vLLM needs, and the Debian package that contains it."""

    package: str
    why: str
    present: Callable[[], bool]


def needed(engine_name: str, pyproject_text: str, tests: bool, bench: bool = False) -> list[Need]:
    """What this machine needs for that build of vLLM, these requirements, and for running the tests or the benches."""
    needs = [
        Need("g++", "compiles the native codec", has_compiler),
        Need(f"python{own_version()}-dev", "Python's headers, for the native codec", has_python_headers),
        Need(f"python{own_version()}-venv", "makes the virtual environment", has_venv),
    ]
    if engine_name == "cpu":
        needs.append(Need("libnuma1", "vLLM's CPU kernels are linked against it", has_numa))
    if "libp2p" in pyproject_text:
        needs.append(Need("libgmp-dev", "libp2p's fastecdsa compiles against it", has_gmp_header))
    if tests:
        # Not the package redis-server, which starts a service.
        needs.append(Need("redis-tools", "its redis-check-rdb is redis-server too: tests run one", has_redis))
        needs.append(Need("npm", "installs js-libp2p, for the test of interoperation with it", has_npm))
    if bench:
        needs.append(Need("libisal-dev", "ISA-L, which the erasure code is measured beside", has_isal_header))
    return needs


def ensure(needs: Iterable[Need]) -> None:
    """Install what is missing if this is root on a Debian; otherwise raise `Missing` with one line to copy."""
    missing = [need for need in needs if not need.present()]
    if not missing:
        return
    packages = [need.package for need in missing]
    if os.geteuid() == 0 and shutil.which("apt-get"):
        with step(f"Installing {', '.join(packages)}"):
            apt_install(packages)
        importlib.invalidate_caches()
        missing = [need for need in missing if not need.present()]
    if missing:
        raise Missing(explain(missing))


def explain(missing: Iterable[Need]) -> str:
    """What is missing and why, then the one line to copy."""
    missing = list(missing)
    reasons = "\n".join(f"  {need.package}: {need.why}" for need in missing)
    line = f"sudo apt-get install -y {' '.join(need.package for need in missing)}"
    return f"These system packages are missing (Debian and Ubuntu call them so):\n{reasons}\n\n{line}"


def apt_install(packages: list[str]) -> None:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-qq", "-y", "--no-install-recommends", *packages],
    ):
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        # A stale index may still have the packages: only a failed installation counts.
        if done.returncode != 0 and "install" in command:
            raise Missing(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}".rstrip())


def own_version() -> str:
    """`3.11`, as in Debian's package names."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++"))


def has_python_headers() -> bool:
    return (Path(sysconfig.get_path("include")) / "Python.h").is_file()


def has_venv() -> bool:
    return all(importlib.util.find_spec(name) for name in ("venv", "ensurepip"))


def has_numa() -> bool:
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        return False
    return True


def has_redis() -> bool:
    return any(shutil.which(name) for name in ("redis-server", "redis-check-rdb"))


def has_npm() -> bool:
    return shutil.which("npm") is not None


def has_gmp_header() -> bool:
    return has_header("gmp.h")


def has_isal_header() -> bool:
    return has_header("isa-l/erasure_code.h")


def has_header(name: str) -> bool:
    places = ["/usr/include", f"/usr/include/{sysconfig.get_config_var('MULTIARCH')}", "/usr/local/include"]
    return any((Path(place) / name).is_file() for place in places)
