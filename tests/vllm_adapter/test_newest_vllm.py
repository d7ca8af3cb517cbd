"""The newest supported vLLM has no CPU build to run: its source is held against what we use of it.

What we use is read from our own source, by the type checker: every import, attribute, argument and override.
"""

import ast
import difflib
import subprocess
import sys
from pathlib import Path

import pytest

from hyperspace_vllm.core.response.request_fields import ENDPOINTS, FIELDS, Endpoint
from hyperspace_vllm.vllm_adapter.neutral import NEUTRAL_OPTIONS, NEUTRAL_VARIABLES
from tests.support.paths import ROOT, VECTORS
from tests.support.setup_modules import setup_modules
from tests.support.vllm_source import NO_DEFAULT, REQUEST_MODELS, VllmSource, interface
from tests.vllm_adapter.test_neutral import COUNTED, PARTLY

ADAPTER = ROOT / "hyperspace_vllm" / "vllm_adapter"
SNAPSHOT = VECTORS / "kv_connector_interface.txt"
TYPES = """\
[mypy]
python_version = 3.11
check_untyped_defs = True
follow_imports = silent
ignore_missing_imports = True
# What vLLM's own annotations bring up, not what it has: replaced methods, options that are set by the time we look.
disable_error_code = misc, import-untyped, method-assign, union-attr, no-redef
"""
# Fields that releases had which are still supported, and newer ones have no more.
ONLY_OLDER = {"return_assistant_tokens_mask"}  # vLLM 0.30
ONLY_OLDER_OPTIONS = {"enable_bf16x3_router_gemm", "enable_mamba_fine_grained_prefix_cache"}  # vLLM 0.29, 0.30
NO_FLAG = {"mamba_config"}  # can't be given to a server
SAME_DEFAULT = {"reasoning_parser_plugin", "tool_strict_level"}  # none, "" or None; the parser's own, "auto" or None

NEWEST = "0.33.0"


@pytest.fixture(scope="module")
def newest() -> VllmSource:
    with setup_modules("engine", "releases") as setup:
        assert setup.releases.RELEASES[-1] == NEWEST
        base = setup.engine.Venv(Path(sys.prefix))
        return VllmSource(setup.releases.fetch_source(ROOT, base, NEWEST))


def complaints(source: VllmSource, tmp_path: Path) -> list[str]:
    """What the type checker says of our adapter beside a release's source."""
    (tmp_path / "mypy.ini").write_text(TYPES)
    command = [sys.executable, "-m", "mypy", "--config-file", str(tmp_path / "mypy.ini"), "--no-site-packages"]
    cache = ["--cache-dir", str(ROOT / ".mypy_cache" / source.root.name), "--no-error-summary"]
    done = subprocess.run(
        [*command, *cache, "-p", "hyperspace_vllm.vllm_adapter"],
        cwd=ROOT,
        env={"MYPYPATH": str(source.root), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stderr
    return done.stdout.splitlines()


@pytest.mark.feature("by its source: all that we use is there", release=NEWEST)
def test_the_newest_vllm_has_all_that_we_use(newest: VllmSource, tmp_path: Path) -> None:
    assert complaints(newest, tmp_path) == []


def test_what_is_missing_from_a_release_is_found(newest: VllmSource, tmp_path: Path) -> None:
    """The check above has teeth: beside a release whose connectors report differently it says so."""
    changed = tmp_path / "changed"
    files = "distributed/kv_transfer/kv_connector/v1/base.py", "v1/core/sched/output.py"
    for path in files:
        text = (newest.root / "vllm" / path).read_text()
        text = text.replace("num_computed_tokens: int,\n", "num_computed_tokens: int, more: int,\n")
        copy = changed / "vllm" / path
        copy.parent.mkdir(parents=True)
        copy.write_text(text.replace("total_num_scheduled_tokens", "all_scheduled_tokens"))
    for package in {parent for path in changed.rglob("*.py") for parent in path.parents if parent != changed}:
        if changed in package.parents:
            (package / "__init__.py").touch()
    found = "\n".join(complaints(VllmSource(changed), tmp_path))
    assert '"SchedulerOutput" has no attribute "total_num_scheduled_tokens"' in found
    assert 'Signature of "get_num_new_matched_tokens" incompatible' in found


def test_the_connector_interface_of_the_newest_vllm_is_the_one_we_were_written_for(newest: VllmSource) -> None:
    base = "distributed/kv_transfer/kv_connector/v1/base.py"
    theirs = [
        line for name in ("KVConnectorBase_V1", "SupportsHMA") for line in interface(next(newest.classes(base, name)))
    ]
    known = SNAPSHOT.read_text().splitlines()
    difference = "\n".join(difflib.unified_diff(known, theirs, "supported vLLM", "newest vLLM", lineterm=""))
    assert not difference, f"vLLM's KV connector interface changed; read what is new, then update it:\n{difference}"


def test_the_newest_vllm_reads_every_variable_that_we_ask_for(newest: VllmSource) -> None:
    ours = {
        node.attr
        for path in ADAPTER.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "envs"
    }
    theirs = {node.value for node in ast.walk(newest.tree("envs.py")) if isinstance(node, ast.Constant)}
    assert ours
    assert ours - theirs == set()


def test_the_newest_vllm_calls_what_we_replace_by_the_names_that_we_replace(newest: VllmSource) -> None:
    called = {
        ast.unparse(node.func)
        for node in ast.walk(newest.tree("entrypoints/launchers/app.py"))
        if isinstance(node, ast.Call)
    }
    assert "init_entrypoints_middleware" in called
    methods = {
        node.name: [ast.unparse(decorator) for decorator in node.decorator_list]
        for node in next(newest.classes("engine/arg_utils.py", "EngineArgs")).body
        if isinstance(node, ast.FunctionDef)
    }
    assert methods["add_cli_args"] == ["staticmethod"]
    assert methods["from_cli_args"] == ["classmethod"]
    assert methods["create_engine_config"] == []
    serving = {
        ast.unparse(node.func)
        for node in ast.walk(newest.tree("entrypoints/openai/responses/serving.py"))
        if isinstance(node, ast.Call)
    }
    assert "self._raise_if_error" in serving


@pytest.mark.feature("every request field is judged", release=NEWEST)
@pytest.mark.parametrize("endpoint", ENDPOINTS.values())
def test_every_field_of_the_newest_vllm_is_classified(newest: VllmSource, endpoint: Endpoint) -> None:
    fields, theirs = FIELDS[endpoint], newest.fields(*REQUEST_MODELS[endpoint])
    known = fields.keyed.keys() | fields.neutral.keys() | fields.forbidden | fields.verbatim
    assert theirs.keys() - known == set(), "fields of vLLM's that we have not judged"
    assert fields.keyed.keys() - theirs.keys() - ONLY_OLDER == set(), "fields that vLLM no longer has"
    for name, default in fields.keyed.items():
        if name in theirs and theirs[name] is not NO_DEFAULT:
            assert theirs[name] == default, f"vLLM's default of {name} has changed"


@pytest.mark.feature("every option of the server is judged", release=NEWEST)
def test_every_option_of_the_newest_vllm_is_judged(newest: VllmSource) -> None:
    options = newest.fields("engine/arg_utils.py", "AsyncEngineArgs")
    options |= newest.fields("entrypoints/common/cli_args.py", "FrontendArgs")
    theirs = {name for name in options if not name.startswith("_")} | added(newest)
    judged = NEUTRAL_OPTIONS | COUNTED["options"].keys()
    assert theirs - judged - NO_FLAG == set(), "options that we have not judged"
    assert {name for name in judged if "." not in name} - theirs - ONLY_OLDER_OPTIONS == set(), "options of no release"
    plain = {name for name, default in options.items() if default is None or isinstance(default, bool | int)}
    for name in plain & COUNTED["options"].keys() - SAME_DEFAULT:
        assert options[name] == COUNTED["options"][name], f"the default of {name} has changed"


@pytest.mark.feature("every option of the server is judged", release=NEWEST)
@pytest.mark.parametrize("name", PARTLY)
def test_every_field_of_an_option_that_counts_in_part_is_judged(newest: VllmSource, name: str) -> None:
    theirs = newest.fields("config/__init__.py", PARTLY[name])
    assert theirs
    assert {f"{name}.{field}" for field in theirs} - NEUTRAL_OPTIONS - set(COUNTED["fields"]) == set()


@pytest.mark.feature("every option of the server is judged", release=NEWEST)
def test_every_variable_of_the_newest_vllm_is_judged(newest: VllmSource) -> None:
    (theirs,) = [
        {key.value for key in node.value.keys if isinstance(key, ast.Constant)}
        for node in ast.walk(newest.tree("envs.py"))
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict) and len(node.value.keys) > 100
    ]
    assert theirs - NEUTRAL_VARIABLES - set(COUNTED["variables"]) == set(), "variables that we have not judged"


def added(source: VllmSource) -> set[str]:
    """Options that `vllm serve` has beside the fields of its classes."""
    calls = [
        node
        for path in ("entrypoints/common/cli_args.py", "engine/arg_utils.py")
        for node in ast.walk(source.tree(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".add_argument") and node.args
    ]
    names = [node.args[0].value for node in calls if isinstance(node.args[0], ast.Constant)]
    return {str(name).lstrip("-").replace("-", "_") for name in names} | {"kv_connector"}


def test_every_request_has_the_salt_that_keeps_tenants_apart(newest: VllmSource) -> None:
    assert [name for name, model in REQUEST_MODELS.items() if "cache_salt" not in newest.fields(*model)] == []
