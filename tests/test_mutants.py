"""The list of mutants fits the tree, and the runner tells a test that notices a fault from one that does not."""

import ast
from pathlib import Path

import pytest
from mutants import Mutant, find_survivors, read_mutants

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mutant", read_mutants(), ids=lambda mutant: mutant.name)
def test_every_mutant_breaks_one_place_and_names_tests_that_exist(mutant):
    assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.find) == 1
    assert mutant.replace != mutant.find
    for test in mutant.tests:
        path, name = test.split("::")
        functions = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
        assert name.split("[")[0] in {getattr(node, "name", None) for node in functions}


@pytest.fixture
def tree(tmp_path) -> Path:
    """A package of one line and two tests of it, of which one sees what the line does."""
    (tmp_path / "sums.py").write_text("def add(a, b):\n    return a + b\n", encoding="utf-8")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_sums.py").write_text(
        "from sums import add\n\ndef test_value():\n    assert add(2, 3) == 5\n\n"
        "def test_equality():\n    assert add(2, 3) == add(2, 3)\n",
        encoding="utf-8",
    )
    return tmp_path


def test_a_test_that_does_not_notice_is_a_survivor(tree):
    tests = ("tests/test_sums.py::test_value", "tests/test_sums.py::test_equality")
    mutant = Mutant(name="minus", file="sums.py", find="a + b", replace="a - b", tests=tests)
    assert find_survivors(mutant, tree) == ["tests/test_sums.py::test_equality"]
    assert "a + b" in (tree / "sums.py").read_text(encoding="utf-8")


def test_a_mutant_whose_line_is_gone_is_an_error(tree):
    mutant = Mutant(name="minus", file="sums.py", find="a * b", replace="a - b", tests=())
    with pytest.raises(ValueError, match="`find` of 'minus' must occur once in sums.py, got 0 times"):
        find_survivors(mutant, tree)
