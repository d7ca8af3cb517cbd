"""Installs what the interop test's js-libp2p program needs into `tests/interop/node_modules`, Node.js included.

Exactly what `package-lock.json` lists, from where npm is configured to look; no package runs its own scripts. Run as a
script, it prints the path of the Node.js, which may be newer than the machine's.
"""

from __future__ import annotations

import fcntl
import hashlib
import platform
import sys
from pathlib import Path

import engine
from progress import step

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "interop"
NPM_OPTIONS = ("--ignore-scripts", "--no-progress", "--fetch-timeout=60000")
MACHINES = {"x86_64": "x64", "aarch64": "arm64"}


def install() -> Path:
    """Install unless that is done; returns the Node.js to run the program with. `Failed` has npm's message."""
    machine = MACHINES.get(platform.machine(), platform.machine())
    node = PROGRAM / "node_modules" / f"node-linux-{machine}" / "bin" / "node"
    lock = ROOT / "build" / "interop.lock"
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # tests may run in parallel
        if not is_current():
            with step("Installing js-libp2p for the interop test"):
                engine.run(["npm", "ci", "--prefix", str(PROGRAM), *NPM_OPTIONS])
            _stamp().write_text(_wanted())
    if not node.exists():
        raise engine.Failed(f"no Node.js for this machine ({machine}) among the packages of {PROGRAM}")
    return node


def is_current() -> bool:
    """Whether the installed packages are those that the lock file lists now."""
    return _stamp().exists() and _stamp().read_text() == _wanted()


def _stamp() -> Path:
    return PROGRAM / "node_modules" / ".hyperspace"  # `npm ci` begins by removing the directory


def _wanted() -> str:
    return hashlib.sha256((PROGRAM / "package-lock.json").read_bytes()).hexdigest()


def main() -> int:
    try:
        print(install())
    except engine.Failed as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
