"""What is installed is what is imported, and starting is quiet."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tree import PACKAGES, ROOT, list_code

from inference.beam_search import import_flashlight


def _read_names(file_name: str) -> list[str]:
    lines = (ROOT / file_name).read_text(encoding="utf-8").splitlines()
    return [re.split(r"[~=<>;\[ ]", line)[0].lower() for line in lines if line and line[0] not in "#-"]


def _list_imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - set(PACKAGES)


# What README tells to install for one command: a microphone needs a library of the system.
OPTIONAL = {"sounddevice"}


def test_every_imported_package_is_in_requirements_once():
    imported = set().union(*map(_list_imports, list_code())) - OPTIONAL
    owners = importlib.metadata.packages_distributions()
    needed = {owners[name][0].lower().replace("_", "-") for name in imported}
    required = [name.replace("_", "-") for name in _read_names("requirements.txt")]
    assert {"torch", "numpy", "filelock"} <= needed
    assert needed - set(required) == set()
    assert len(required) == len(set(required))


def test_test_tools_are_in_a_file_of_their_own():
    tools = _read_names("requirements-test.txt")
    assert {"pytest", "ruff"} <= set(tools)
    assert set(tools) & set(_read_names("requirements.txt")) == set()


def test_a_warning_of_bitsandbytes_that_nobody_can_act_on_is_not_shown():
    # Only CPUs with AVX512-BF16 warn; the record is made here, after the import order that recipes have.
    code = """
import logging, modeling
logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please", "no kernels")
logger.warning("another warning")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "gemm_4bit_forward" not in done.stderr
    assert "another warning" in done.stderr


def test_the_filter_stands_before_the_import_that_warns():
    lines = (ROOT / "modeling/__init__.py").read_text(encoding="utf-8").splitlines()
    silenced = next(number for number, line in enumerate(lines) if "addFilter" in line)
    assert silenced < next(number for number, line in enumerate(lines) if line.startswith("from ."))


def test_a_beam_search_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashlight.lib.text.decoder", None)
    with pytest.raises(ValueError, match=r"must go with the package flashlight-text.*pip install flashlight-text"):
        import_flashlight()
