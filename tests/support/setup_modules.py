"""The modules of `deploy/setup`, imported as its scripts import each other."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from tests.support.paths import ROOT

SETUP = ROOT / "deploy" / "setup"


@contextmanager
def setup_modules(*names: str) -> Iterator[SimpleNamespace]:
    """The named modules, removed from `sys.modules` afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(SETUP))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(SETUP))
        for path in SETUP.glob("*.py"):
            if path.stem not in before:
                sys.modules.pop(path.stem, None)
