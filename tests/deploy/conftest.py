"""The modules of deploy/setup, imported as its scripts import each other."""

import importlib
import sys
from collections.abc import Iterator
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
