"""
Writes docs/tree.md, a line for each file: its docstring's first sentence.

    python tests/tree.py
"""

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
TREE = ROOT / "docs" / "tree.md"
ROOMS = ("accelerate_configs", "benchmarks", "converters", "data", "docs", "inference", "modeling", "publishing")
ROOMS += ("recipes", "recipes/configs", "training", "training/objectives")
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
HEAD = """# Tree

A line for each file, from its own first line; `python tests/tree.py` writes it anew. `modeling` and `data` know
nobody; `inference`, `publishing` and `converters` know those two; `training` knows all these; `recipes` know
everything but each other. What travels to the Hub is in `modeling/`.
"""


def list_code() -> list[Path]:
    """Returns every module of the project, without the tests."""
    return sorted(path for package in PACKAGES for path in (ROOT / package.replace(".", "/")).glob("*.py"))


def describe(path: Path) -> str:
    """
    Returns what a file says of itself in its first sentence.

    Raises:
        ValueError: It says nothing.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        said = ast.get_docstring(ast.parse(text)) or ""
    elif path.suffix in (".yaml", ".yml"):
        comment = re.match(r"(?:#.*\n)*", text)[0]
        said = re.sub(r"^# ?", "", comment, flags=re.MULTILINE)
    else:
        said = next((line.lstrip("# ") for line in text.splitlines() if line.strip()), "")
    sentence = re.split(r"(?<=\.)\s", " ".join(said.split("\n\n")[0].split()))[0].rstrip(".:")
    if not sentence:
        raise ValueError(f"{path.relative_to(ROOT)} must say in its first line what it is for, got nothing.")
    return sentence


def render_tree() -> str:
    """Returns docs/tree.md: a section a room, a row a file."""
    sections = [HEAD]
    for room in ROOMS:
        files = sorted(path for path in (ROOT / room).iterdir() if path.suffix in (".py", ".yaml", ".md"))
        names = {path.name: "" if path == TREE else f": {describe(path)}" for path in files}
        init = names.pop("__init__.py", None)
        rows = [f"- `{name}`{said}" for name, said in names.items()]
        sections.append("\n".join([f"## {room}/", *(["", f"{init[2:]}."] if init else []), "", *rows, ""]))
    return "\n".join(sections)


if __name__ == "__main__":
    TREE.write_text(render_tree(), encoding="utf-8")
