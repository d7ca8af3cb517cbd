"""The native module: what a user sees when it is missing, and what it chooses when it is there."""

import importlib
import sys

import pytest


def test_without_the_native_code_the_import_says_what_to_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "hyperspace_vllm._native", None)
    monkeypatch.delitem(sys.modules, "hyperspace_vllm.native", raising=False)
    with pytest.raises(ImportError, match=r"pip install \."):
        importlib.import_module("hyperspace_vllm.native")


def test_the_chosen_instruction_set_is_the_first_of_those_that_the_tests_compare():
    from hyperspace_vllm import native

    assert native.isa() == native.isas()[0]
    assert native.isas()[-1] == "portable"
