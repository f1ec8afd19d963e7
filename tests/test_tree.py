"""The house: who imports whom, one name a thing, and a line for each file."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest
from tree import PACKAGES, ROOT, TREE, describe, list_code, render_tree

from modeling.adapters import find_adapter_code

# Rooms, and those that each may import.
LIBRARY = ("modeling", "data")
MAY_IMPORT = {
    "modeling": (),
    "data": (),
    "inference": LIBRARY,
    "publishing": LIBRARY,
    "converters": LIBRARY,
    "training": (*LIBRARY, "inference", "publishing", "converters"),
    "recipes": (*LIBRARY, "inference", "publishing", "converters", "training"),
}
# Each script has the first, each recipe that can be planned the second.
SHARED_NAMES = {"main", "plan_model"}


def list_modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def list_imports(path: Path) -> list[str]:
    """Absolute names of what a file imports, at any depth: functions import too."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def find_forbidden(path: Path, room: str) -> list[str]:
    known = {*MAY_IMPORT, "benchmarks", "tests"} - set(MAY_IMPORT[room])
    if room != "recipes":  # a recipe knows no other
        known -= {room}
    return [name for name in list_imports(path) if name.partition(".")[0] in known]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_room_imports_only_the_rooms_that_it_may_know(room):
    assert {str(path.relative_to(ROOT)): find_forbidden(path, room) for path in list_modules(room)} == {
        str(path.relative_to(ROOT)): [] for path in list_modules(room)
    }


def test_import_of_a_forbidden_room_is_seen_inside_a_function(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("def run():\n    from training.trainer import RecipeTrainer\n    import recipes.plan\n")
    assert find_forbidden(path, "inference") == ["training.trainer.RecipeTrainer", "recipes.plan"]
    assert find_forbidden(path, "recipes") == ["recipes.plan"]


def test_no_two_files_functions_or_classes_share_a_name():
    places = defaultdict(set)
    for room in MAY_IMPORT:
        for path in list_modules(room):
            if path.stem != "__init__":
                places[path.name].add(path)
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                    places[node.name].add(path)
    assert {name: paths for name, paths in places.items() if len(paths) > 1 and name not in SHARED_NAMES} == {}


def test_every_folder_of_code_is_installed_and_tested():
    folders = {path.parent for path in ROOT.rglob("*.py")} - {ROOT / "tests"}
    ours = {folder for folder in folders if not any(part.startswith(".") for part in folder.relative_to(ROOT).parts)}
    assert {".".join(folder.relative_to(ROOT).parts) for folder in ours} == set(PACKAGES)
    assert {path.parent for path in list_code()} == ours


def test_tree_names_every_file_with_its_first_line():
    assert TREE.read_text(encoding="utf-8") == render_tree(), "run `python tests/tree.py`"


def test_tree_has_a_line_for_each_model_file():
    section = render_tree().partition("## modeling/")[2].partition("## ")[0]
    names = [path.name for path in list_modules("modeling") if path.stem != "__init__"]
    assert [line.split("`")[1] for line in section.splitlines() if line.startswith("- ")] == names


def test_tree_refuses_a_file_that_does_not_say_what_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("tree.ROOT", tmp_path)
    (tmp_path / "silent.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"silent\.py must say in its first line what it is for, got nothing"):
        describe(tmp_path / "silent.py")


def test_at_most_six_files_travel_with_an_adapter():
    names = sorted(path.name for path in find_adapter_code())
    blocks = ["adapter_blocks.py", "adapter_config.py", "adapter_layer.py", "adapter_loading.py"]
    assert names == [*blocks, "adapters.py", "fingerprint.py"]
