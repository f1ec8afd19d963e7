"""README's tree and commands are true, and every shipped YAML is one its recipe takes."""

import importlib
import re
from pathlib import Path

import pytest
import yaml
from readme import README, find_commands
from transformers import HfArgumentParser

from training.arguments import parse_arguments

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
LAUNCHERS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
REQUIRED = {"dataset": "synthetic", "model_name_or_path": "base", "speaker_id": "ann", "output_dir": "out"}


def find_recipe(config: Path) -> str:
    names = [path.stem for path in (ROOT / "recipes").glob("*.py") if config.stem.startswith(path.stem)]
    return max(names, key=len)


def test_readme_tree_is_short_and_names_every_room():
    rows = README[README.index("## Tree") :].split("```")[1].strip().splitlines()
    rooms = [name for row in rows for name in re.findall(r"(\w+)/(?= |$)", row[:20])]
    there = {path.parent.name for path in ROOT.glob("[a-z]*/*.*") if path.suffix in (".py", ".yaml", ".md")}
    assert len(rows) == 10
    assert sorted(rooms) == sorted(there - {"outputs"})


@pytest.mark.parametrize("tokens", find_commands("recipes/"), ids=" ".join)
def test_readme_recipe_commands_have_flags_that_exist(tokens, capsys, monkeypatch):
    script = next(token for token in tokens if token.startswith("recipes/") and token.endswith(".py"))
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    monkeypatch.setattr("sys.argv", [script, "--help"])
    with pytest.raises(SystemExit):
        module.main()
    help_text = capsys.readouterr().out
    flags = [token for token in tokens[tokens.index(script) :] if token.startswith("--")]
    assert [flag for flag in flags if flag not in help_text] == []
    assert all((ROOT / token).is_file() for token in tokens if token.endswith(".yaml"))


@pytest.mark.parametrize("tokens", find_commands("make "), ids=" ".join)
def test_readme_make_targets_exist(tokens):
    assert re.search(rf"^{tokens[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("tokens", find_commands("python -m "), ids=" ".join)
def test_readme_modules_exist(tokens):
    assert callable(importlib.import_module(tokens[2]).main)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_every_recipe_config_parses(config, tmp_path):
    arguments = importlib.import_module(f"recipes.{find_recipe(config)}").ARGUMENTS
    keys = yaml.safe_load(config.read_text())
    known = {action.dest for action in HfArgumentParser(arguments)._actions}
    missing = {key: value for key, value in REQUIRED.items() if key in known and key not in keys}
    missing["output_dir"] = str(tmp_path)
    tokens = [token for key, value in missing.items() for token in (f"--{key}", value)]
    parsed = parse_arguments(*arguments, argv=["--config", str(config), *tokens])
    values = {name: value for part in parsed for name, value in vars(part).items()}
    assert {key: values[key] for key in keys if isinstance(keys[key], (bool, int))} == {
        key: value for key, value in keys.items() if isinstance(value, (bool, int))
    }


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda path: path.name)
def test_every_launcher_config_is_one_that_accelerate_reads(launcher):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(launcher)).num_machines >= 1
