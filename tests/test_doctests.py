"""Every example in a docstring gives what it says."""

import doctest
import importlib

import pytest
from tree import ROOT, list_code

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in list_code() if path.name != "__init__.py"
)


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples_hold(module):
    assert doctest.testmod(importlib.import_module(module)).failed == 0


def test_examples_in_code_fences_are_found():
    assert doctest.testmod(importlib.import_module("modeling.adapter_config")).attempted >= 5
