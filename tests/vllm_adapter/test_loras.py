"""LoRA adapters by the files that were loaded, for as long as those lie there."""

import time
from pathlib import Path

import pytest

from hyperspace_vllm.vllm_adapter import adapters
from hyperspace_vllm.vllm_adapter.adapters import Adapters, NamedAdapters
from tests.support.until import until


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return adapter(tmp_path / "lora", b"weights")


def adapter(path: Path, weights: bytes) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    (path / "adapter_model.safetensors").write_bytes(weights)
    return path


def digest(known: Adapters, key: object, path: Path) -> bytes:
    found: list[bytes] = []

    def there() -> bool:
        found.extend(filter(None, [known.digest(key, str(path))]))
        return bool(found)

    until(there)
    return found[0]


def test_copies_are_one_adapter_and_every_byte_counts(tmp_path: Path, lora: Path) -> None:
    known = Adapters(tmp_path / "data")
    same, other = adapter(tmp_path / "same", b"weights"), adapter(tmp_path / "other", b"weighty")
    assert digest(known, 1, lora) == digest(known, 2, same) != digest(known, 3, other)


def test_an_adapter_whose_files_were_replaced_is_not_known_until_it_is_loaded_anew(tmp_path: Path, lora: Path) -> None:
    known = Adapters(tmp_path / "data")
    first = digest(known, 1, lora)
    (lora / "adapter_model.safetensors").write_bytes(b"others!")
    assert known.digest(1, str(lora)) is None
    known.load(1, str(lora))
    assert digest(known, 1, lora) != first


def test_a_file_beside_an_adapter_may_be_anything(tmp_path: Path, lora: Path) -> None:
    known = Adapters(tmp_path / "data")
    (lora / "notes.safetensors").write_bytes((8).to_bytes(8, "little") + b'{"a": 1}')
    assert digest(known, 1, lora)
    (lora / "notes.safetensors").unlink()  # a file that went is a change as well
    assert known.digest(1, str(lora)) is None


def test_an_adapter_that_is_not_there_is_a_miss_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "vllm.hyperspace")
    known = Adapters(tmp_path / "data")
    for _ in range(3):
        assert known.digest(1, "some/hub-adapter") is None
    assert caplog.text.count("some/hub-adapter are not cached yet") == 1
    (tmp_path / "empty").mkdir()
    assert known.digest(2, str(tmp_path / "empty")) is None


def test_a_file_system_that_hangs_is_a_miss_within_moments(
    tmp_path: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Adapters(tmp_path / "data")
    assert digest(known, 1, lora)
    hangs, real = True, adapters._states

    def states(path: str) -> object:
        until(lambda: not hangs)
        return real(path)

    monkeypatch.setattr(adapters, "_states", states)
    began = time.monotonic()
    assert [known.digest(1, str(lora)) for _ in range(100)] == [None] * 100
    assert time.monotonic() - began < 10  # only the first one waited
    hangs = False
    assert digest(known, 1, lora)


def test_a_servers_adapters_are_a_mapping_of_those_that_are_known(tmp_path: Path, lora: Path) -> None:
    named = NamedAdapters(Adapters(tmp_path / "data"), {"a": str(lora), "b": str(tmp_path / "missing")})
    until(lambda: named.get("a") is not None)
    assert named.get("b") is None
    assert named.get("c") is None
    (lora / "adapter_config.json").write_text("{ }")
    assert named.get("a") is None
