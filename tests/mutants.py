"""
Breaks the condition of a claim, one line at a time, and demands that the tests of the claim notice.

    python tests/mutants.py               all of mutants.yaml
    python tests/mutants.py resume stack  those whose name contains a word

A test of "A equals B" passes as well when A and B are the same thing: a flag that both sides ignore makes them equal.
Each entry of mutants.yaml breaks such a condition in a copy of the tree and names the tests that must then fail.
Libraries that mutate (mutmut, cosmic-ray) change operators at random places and take hours to run a suite like this
one; what is wanted here are a few faults that were seen to survive.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_name("mutants.yaml")
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "__pycache__", "outputs", "*.egg-info", ".*_cache")


@dataclass(frozen=True)
class Mutant:
    """
    A fault that tests must see.

    Args:
        name: What is broken, in a few words.
        file: Path from the root.
        find: Text that occurs there once.
        replace: What stands in its place.
        tests: Ids of tests that must fail, every parameter of each.
    """

    name: str
    file: str
    find: str
    replace: str
    tests: tuple[str, ...]

    def apply(self, root: Path) -> str:
        """Breaks the file under `root` and returns its former text."""
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.find) != 1:
            raise ValueError(
                f"`find` of {self.name!r} must occur once in {self.file}, got {text.count(self.find)} times: "
                f"{self.find!r}. Adapt it to the file as it is now."
            )
        path.write_text(text.replace(self.find, self.replace), encoding="utf-8")
        return text


def read_mutants(path: Path = LIST) -> list[Mutant]:
    """Returns the entries of the list."""
    return [Mutant(**{**entry, "tests": tuple(entry["tests"])}) for entry in yaml.safe_load(path.read_text("utf-8"))]


def run_tests(root: Path, tests: list[str]) -> dict[str, set[str]]:
    """Returns how the tests under `root` ended, by id without parameters: `passed`, `failed`, `skipped`."""
    report = root / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "120"]
    # The copy's packages go before the installed ones, in the tests' own subprocesses too.
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, f"--junitxml={report}", *tests], cwd=root, env=environment, capture_output=True, text=True
    )
    if not report.exists():
        raise RuntimeError(f"pytest did not run {tests}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    outcomes: dict[str, set[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname').replace('.', '/')}.py::{case.get('name').split('[')[0]}"
        tags = {child.tag for child in case}
        ended = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        outcomes.setdefault(name, set()).add(ended)
    return outcomes


def find_survivors(mutant: Mutant, root: Path) -> list[str]:
    """Returns the tests that do not fail while `mutant` is in the tree under `root`."""
    text = mutant.apply(root)
    try:
        outcomes = run_tests(root, list(mutant.tests))
    finally:
        (root / mutant.file).write_text(text, encoding="utf-8")
    return [test for test in mutant.tests if outcomes.get(test.split("[")[0]) != {"failed"}]


def main() -> None:
    """Runs the mutants whose names contain one of the command line's words, or all."""
    words = sys.argv[1:]
    mutants = [mutant for mutant in read_mutants() if not words or any(word in mutant.name for word in words)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "tree"
        shutil.copytree(ROOT, root, ignore=NOT_COPIED)
        outcomes = run_tests(root, sorted({test for mutant in mutants for test in mutant.tests}))
        if broken := sorted(test for test, ended in outcomes.items() if ended != {"passed"}):
            sys.exit(f"These tests must pass before anything is broken: {broken}")
        survivors = {}
        for mutant in mutants:
            survivors[mutant.name] = find_survivors(mutant, root)
            print(f"{'SURVIVED' if survivors[mutant.name] else 'killed  '}  {mutant.name}", flush=True)
    if any(survivors.values()):
        sys.exit("\n".join(f"{name}: {', '.join(tests)}" for name, tests in survivors.items() if tests))
    print(f"All {len(mutants)} mutants were killed.")


if __name__ == "__main__":
    main()
