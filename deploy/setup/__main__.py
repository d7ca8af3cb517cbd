"""`make setup`: makes `.venv`, chooses and installs vLLM, builds the project into it, prepares the models.

It also installs what only the tests need: a Redis server, and js-libp2p with its Node.js.

Each step leaves a stamp in `.venv/setup.json`: a hash of everything that the step depends on. A step whose stamp
matches is skipped, so running it again takes under a second.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036  (the message for users of an older one)
    sys.exit(
        f"Hyperspace needs Python 3.11 or newer; this is {sys.version.split()[0]}. "
        "Name another: make setup PYTHON=/path/to/python3.11"
    )

import argparse
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import dtypes
import engine
import interop
import models
import releases
import system

ROOT = Path(__file__).resolve().parents[2]


def main(argv: list[str] | None = None) -> int:
    """Run the steps that are not done yet; 0, or 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(prog="make setup", description=__doc__)
    parser.add_argument("--engine", choices=("auto", "cpu", "gpu"), default="auto", help="which build of vLLM")
    parser.add_argument("--tests", action="store_true", help="get what only the tests need as well")
    parser.add_argument("--bench", action="store_true", help="get what only the benches need as well")
    parser.add_argument("--releases", nargs="*", default=(), help="make environments for these releases of vLLM, too")
    args = parser.parse_args(argv)
    chosen = engine.choose(args.engine)
    try:
        releases.check(args.releases)
        with only_one_at_a_time(ROOT / "build" / "setup.lock"):
            set_up(chosen, args.tests, args.bench, args.releases)
    except (system.Missing, engine.Failed) as problem:
        print(f"\n{problem}", file=sys.stderr)
        return 1
    print(f"Ready: .venv with {chosen.requirement}, and {', '.join(models.RECIPES)} in .models", file=sys.stderr)
    return 0


def set_up(chosen: engine.Engine, tests: bool, bench: bool, others: Sequence[str] = ()) -> None:
    pyproject = ROOT / "pyproject.toml"
    system.ensure(system.needed(chosen.name, pyproject.read_text(), tests, bench))

    venv = engine.Venv(ROOT / ".venv")
    stamps = Stamps(venv.root / "setup.json")
    if stamps.of("engine name") not in (None, chosen.name):
        venv.remove()  # the two builds of vLLM own the same files: pip can't swap one for the other
    venv.ensure()
    stamps.write("engine name", chosen.name)

    requirements = engine.project_requirements(pyproject)
    wanted = digest(repr(chosen), *requirements, *engine.TOOLS, *models.PACKAGES)
    if stamps.of("engine") != wanted:
        engine.install(venv, chosen, [*requirements, *engine.TOOLS, *models.PACKAGES])
        stamps.write("engine", wanted)

    sources = digest(wanted, pyproject.read_text(), *contents(ROOT / "csrc"))
    if stamps.of("project") != sources:
        engine.install_project(venv, ROOT)
        stamps.write("project", sources)

    missing = [name for name in models.RECIPES if not models.is_current(name, ROOT / ".models" / name)]
    if missing:
        engine.run_models(venv, missing)

    choose_dtypes(venv, chosen, stamps, wanted, tests)
    for release in others:
        releases.install(ROOT, venv, wanted, release)
    if not tests:
        return
    releases.fetch_source(ROOT, venv, releases.RELEASES[-1])
    try:
        interop.install()
    except engine.Failed as problem:  # one test needs it, and tries again; the product doesn't
        print(f"{problem}\nGoing on without js-libp2p: tests/daemon/libp2p/test_interop.py will fail.", file=sys.stderr)


def choose_dtypes(venv: engine.Venv, chosen: engine.Engine, stamps: Stamps, installed: str, tests: bool) -> None:
    """Choose again on another CPU, where a copied environment may be used. Only the tests pool."""
    machine = digest(installed, *sorted(dtypes.cpu_flags()))
    for kind in ("generate", "pool") if tests else ("generate",):
        if stamps.of(f"dtype to {kind}, tried on") != machine:
            stamps.write(f"dtype to {kind}", dtypes.choose(venv, chosen, kind))
            stamps.write(f"dtype to {kind}, tried on", machine)


class Stamps:
    """The steps done in this virtual environment: step -> hash of what the step depended on."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def of(self, step: str) -> str | None:
        return self.read().get(step)

    def write(self, step: str, stamp: str) -> None:
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text(json.dumps(self.read() | {step: stamp}, indent=2) + "\n")
        scratch.replace(self.path)

    def read(self) -> dict[str, str]:
        try:
            return dict(json.loads(self.path.read_text()))
        except (OSError, ValueError):
            return {}


def digest(*texts: str) -> str:
    """One hash over texts, in order; the boundaries between them count."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def contents(directory: Path) -> Iterator[str]:
    """Path and text of every file that the native build reads."""
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(directory))
            yield hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def only_one_at_a_time(lock: Path) -> Iterator[None]:
    """Take a lock: two `make` in one checkout must not install over each other."""
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Waiting for another `make setup` in this directory", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        handle.write(f"{os.getpid()}\n")
        yield


if __name__ == "__main__":
    sys.exit(main())
