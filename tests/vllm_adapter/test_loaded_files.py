"""Which files stand for a model, and when: however it is named, as it was when vLLM loaded it."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from hyperspace_vllm.core.records.errors import Refused
from hyperspace_vllm.core.records.ids import sha256
from hyperspace_vllm.file_digests import FileDigests, FileState
from hyperspace_vllm.vllm_adapter import loaded_files
from hyperspace_vllm.vllm_adapter.loaded_files import LoadedFiles, LoadedIdentity, before_load
from hyperspace_vllm.vllm_adapter.model_files import FileSource, model_source, source_of
from tests.support.hub import COMMIT, hub
from tests.support.paths import ROOT
from tests.support.until import until

TINY = ROOT / ".models" / "tiny"


@pytest.fixture(autouse=True)
def own_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_HYPERSPACE_LOADED_FILES", "{}")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def at(model: Path, **options: object) -> VllmConfig:
    return EngineArgs(model=str(model), **options).create_engine_config()


def loaded(config: VllmConfig, data_dir: Path) -> tuple[LoadedFiles, list[LoadedIdentity]]:
    found: list[LoadedIdentity] = []

    def derive(files: LoadedIdentity) -> bytes:
        found.append(files)
        return sha256(repr(files).encode())

    files = LoadedFiles(config, data_dir, "it", derive)
    files.start()
    return files, found


def digest(config: VllmConfig, data_dir: Path) -> bytes | None:
    before_load(config)
    return loaded(config, data_dir)[0].digest()


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def test_a_copy_elsewhere_is_the_same_model_and_every_byte_of_it_counts(tmp_path: Path, model: Path) -> None:
    right = digest(at(TINY), tmp_path)
    assert right is not None
    assert digest(at(model), tmp_path) == right
    flip(model / "model.safetensors", (model / "model.safetensors").stat().st_size - 2)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    others = [digest(at(model), tmp_path), digest(at(TINY, tokenizer=str(model)), tmp_path)]
    assert len({right, *others}) == 3
    assert None not in others


def test_what_does_not_reach_an_answer_does_not_count(tmp_path: Path, model: Path) -> None:
    right = digest(at(model), tmp_path)
    for name in ("README.md", "LICENSE.txt", "use_policy.txt", "model.safetensors.index.json"):
        (model / name).write_text("{}")
    (model / "original").mkdir()
    (model / "original" / "consolidated.00.pth").write_bytes(b"x")
    (model / "pytorch_model.bin").write_bytes(b"x")  # vLLM takes safetensors where they are
    assert digest(at(model), tmp_path) == right
    (model / "extra").mkdir()
    (model / "extra" / "vision.safetensors").write_bytes(b"x")  # some models load from folders
    assert digest(at(model), tmp_path) != right


def test_files_replaced_while_vllm_starts_are_no_identity(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = at(model)
    before_load(config)
    flip(model / "model.safetensors", 5000)
    assert loaded(config, tmp_path)[0].digest() is None
    assert "it is off: changed: the model's files changed while vLLM was starting" in caplog.text


def test_a_file_replaced_later_changes_nothing_until_it_is_loaded(tmp_path: Path, model: Path) -> None:
    config = at(model)
    before_load(config)
    files, _ = loaded(config, tmp_path)
    right = files.digest()
    assert files.unchanged()
    flip(model / "model.safetensors", 5000)
    assert files.digest() == right
    assert not files.unchanged()
    assert digest(at(model), tmp_path) not in (right, None)


@pytest.mark.parametrize("also", ["lora_config", "speculative_config"])
def test_what_is_not_loaded_again_with_the_model_is_never_known_to_be_unchanged(tmp_path: Path, also: str) -> None:
    config = at(TINY)
    before_load(config)
    files, _ = loaded(config, tmp_path)
    assert files.unchanged()
    setattr(config, also, SimpleNamespace())
    assert not files.unchanged()


def test_an_engine_that_was_told_nothing_has_no_identity(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert loaded(at(TINY), tmp_path)[0].digest() is None
    assert "not told in which state the files were before they were loaded" in caplog.text


def test_random_weights_are_named_by_their_seed(tmp_path: Path) -> None:
    first, again, other = (digest(at(TINY, load_format="dummy", seed=seed), tmp_path) for seed in (1, 1, 2))
    assert first == again != other
    assert None not in (first, other)


@pytest.mark.parametrize("load_format", ["tensorizer", "ipc_cache", "modelexpress", "my_own"])
def test_weights_that_do_not_come_from_the_files_are_refused(load_format: str) -> None:
    model = SimpleNamespace(model=str(TINY), revision=None)
    with pytest.raises(Refused, match=f"--load-format {load_format}"):
        model_source(model, SimpleNamespace(load_format=load_format, download_dir=None))


def test_weights_that_are_streamed_from_an_object_store_are_refused() -> None:
    model = SimpleNamespace(model=str(TINY), model_weights="s3://bucket/model", revision=None)
    with pytest.raises(Refused, match="s3://bucket/model is not a local file"):
        model_source(model, SimpleNamespace(load_format="runai_streamer", download_dir=None))


def test_an_id_of_modelscope_is_not_looked_up_in_the_hubs_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "1")
    with pytest.raises(Refused, match="ModelScope: name the directory"):
        source_of("acme/tiny", None)


def test_code_from_another_repository_is_no_known_code(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = at(TINY, trust_remote_code=True)
    config.model_config.hf_config.auto_map = {"AutoModel": "other/repo--modeling.Model"}
    assert digest(config, tmp_path) is None
    assert "code comes from another repository" in caplog.text


def test_code_that_came_with_the_model_counts_where_it_may_run(tmp_path: Path, model: Path) -> None:
    seen = set()
    for text in ("a = 1", "a = 2"):
        (model / "modeling_tiny.py").write_text(text)
        seen.add(digest(at(model, trust_remote_code=True), tmp_path))
    assert len(seen) == 2
    assert None not in seen


@pytest.mark.parametrize(
    ("load_format", "expected"),
    [("auto", ["a.safetensors", "b.safetensors"]), ("pt", ["d.pt"]), ("npcache", ["c.bin"]), ("gguf", ["f.gguf"])],
)
def test_the_kind_of_files_is_the_one_that_the_loader_takes(
    tmp_path: Path, load_format: str, expected: list[str]
) -> None:
    for name in ("a.safetensors", "b.safetensors", "c.bin", "d.pt", "e.pth", "f.gguf", "g.json"):
        (tmp_path / name).write_bytes(b"x")
    found = FileSource(tmp_path, fixed=False).weights(load_format)
    assert [os.path.basename(path) for path in found] == expected


@pytest.mark.parametrize("below", ["", "sub", "additional_chat_templates"])
def test_pipes_devices_and_folders_are_no_files_of_a_model(tmp_path: Path, below: str) -> None:
    folder = tmp_path / below
    folder.mkdir(exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    for kind in (".safetensors", ".jinja", ".json"):
        os.mkfifo(folder / f"pipe{kind}")
        (folder / f"device{kind}").symlink_to("/dev/zero")
        (folder / f"folder{kind}").mkdir()
        (folder / f"link{kind}").symlink_to(tmp_path / "model.safetensors")
    source = FileSource(tmp_path, fixed=False)
    for paths in (source.weights("auto"), source.texts(), source.all_files()):
        assert all(os.path.basename(path).startswith(("model", "link")) for path in paths)
        assert digests(tmp_path, paths)


def digests(tmp_path: Path, paths: tuple[str, ...]) -> bool:
    found = FileDigests(tmp_path / "digests").digest("a model", map(FileState.of, paths))
    return set(found.values()) <= {hashlib.sha256(b"x").hexdigest()}


def snapshot(cache: Path, branch: str | None = "main") -> Path:
    """A repository in a hub's cache, as huggingface_hub lays it out."""
    root = cache / "models--acme--tiny"
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    directory = root / "snapshots" / COMMIT
    directory.mkdir(parents=True)
    for file in TINY.iterdir():
        if file.is_file():
            shutil.copy(file, root / "blobs" / f"blob-{file.name}")
            (directory / file.name).symlink_to(root / "blobs" / f"blob-{file.name}")
    if branch:
        (root / "refs" / branch).write_text(COMMIT)
    return directory


class Resolved(str):
    """As vLLM 0.32's `ResolvedRevision`: reads as what was asked for and carries the commit."""

    resolved = COMMIT


@pytest.mark.parametrize("revision", [None, "main", COMMIT, Resolved("main"), Resolved("v1.0")])
def test_a_repository_is_found_in_the_hubs_cache_by_whatever_revision_names_it(
    tmp_path: Path, revision: str | None
) -> None:
    directory = snapshot(tmp_path)
    assert source_of("acme/tiny", revision, str(tmp_path)) == FileSource(directory, fixed=True)
    assert source_of(str(directory), None) == FileSource(directory, fixed=True)


@pytest.mark.parametrize("revision", ["v9", "f" * 40, "../../evil"])
def test_a_revision_that_is_not_there_is_refused(tmp_path: Path, revision: str) -> None:
    snapshot(tmp_path)
    with pytest.raises(Refused, match="neither a local path nor in the hub's cache"):
        source_of("acme/tiny", revision, str(tmp_path))


NAMES = """
import json, sys
from pathlib import Path
from huggingface_hub import snapshot_download
from vllm.engine.arg_utils import EngineArgs
from hyperspace_vllm.core.records.ids import sha256
from hyperspace_vllm.vllm_adapter.loaded_files import LoadedFiles, before_load
found = {}
for name, options in json.loads(sys.argv[2]):
    config = EngineArgs(model=name, **options).create_engine_config()
    before_load(config)
    if not Path(name).exists():
        snapshot_download(name)  # what vLLM's loader does
    files = LoadedFiles(config, Path(sys.argv[1]), "it", lambda files: sha256(repr(files).encode()))
    files.start()
    found[f"{name} {options}"] = (files.digest() or b"").hex()
print(json.dumps(found))
"""


@pytest.mark.io
@pytest.mark.slow
def test_the_same_files_have_one_identity_whichever_way_they_are_named(tmp_path: Path) -> None:
    data, cache = tmp_path / "data", tmp_path / "hf"

    def ask(names: list[tuple[str, dict[str, str]]], environment: dict[str, str]) -> dict[str, str]:
        environ = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
        environ |= {"HF_HOME": str(cache), "VLLM_LOGGING_LEVEL": "ERROR", **environment}
        command = [sys.executable, "-c", NAMES, str(data), json.dumps(names)]
        done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
        return found

    with hub("acme/tiny", TINY) as url:
        online = ask(
            [
                *(("acme/tiny", revision) for revision in ({}, {"revision": "main"}, {"revision": COMMIT})),
                (str(TINY), {}),
            ],
            {"HF_ENDPOINT": url},
        )
    directory = cache / "hub" / "models--acme--tiny" / "snapshots" / COMMIT
    offline = ask([("acme/tiny", {}), (str(directory), {})], {"HF_HUB_OFFLINE": "1"})
    identities = {**online, **{f"offline {name}": value for name, value in offline.items()}}
    assert set(identities.values()) == {online[f"{TINY} {{}}"]}, identities
    assert len(identities) == 6
    assert all(identities.values())


def test_notes_of_several_models_stand_beside_each_other(tmp_path: Path, model: Path) -> None:
    flip(model / "model.safetensors", 5000)
    configs = [at(TINY), at(model)]
    for config in configs:
        before_load(config)
    found = [loaded(config, tmp_path)[0].digest() for config in configs]
    assert None not in found
    assert found[0] != found[1]


def test_reading_that_takes_long_is_told_and_nothing_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    may_read, real = threading.Event(), FileState.hash

    def slow(self: FileState, advance: Callable[[int], None]) -> str:
        may_read.wait(60)
        return real(self, advance)

    monkeypatch.setattr(FileState, "hash", slow)
    monkeypatch.setattr(loaded_files, "_START_S", 0.01)
    monkeypatch.setattr(loaded_files, "_QUIET_S", 0.01)
    caplog.set_level("INFO", "vllm.hyperspace")
    config = at(TINY)
    before_load(config)
    files, _ = loaded(config, tmp_path)
    assert files.digest() is None
    until(lambda: "identifying the model's files" in caplog.text)
    may_read.set()
    until(lambda: files.digest() is not None)
    until(lambda: "hyperspace: it is on, after" in caplog.text)
