"""A recipe that fails ends with one line where the user can act, and with a traceback where nobody expected it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.commands.launch import launch_command, launch_command_parser

from data.audio import read_audio
from training.arguments import parse_arguments
from training.endings import run_main
from training.launch import NO_SIDE_BARS, run_recipe
from training.personal import PersonalTrainingArguments

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.py") if path.stem != "__init__")


def end(main) -> int | None:
    with pytest.raises(SystemExit) as stop:
        run_main(main)
    return stop.value.code


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_ends_through_the_one_door(recipe):
    assert recipe.read_text(encoding="utf-8").endswith('if __name__ == "__main__":\n    run_main(main)\n')


@pytest.mark.parametrize("code", [None, 0, 1])
def test_what_main_returns_is_the_exit_code(code):
    assert end(lambda: code) == code


def test_an_error_about_what_a_user_passed_is_one_line(tmp_path, capsys):
    (tmp_path / "a.wav").write_text("no audio")
    assert end(lambda: read_audio(str(tmp_path / "a.wav"))) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert "a.wav" in output.err
    assert output.err.count("\n") == 1


def test_what_the_system_refuses_is_one_line(tmp_path, capsys):
    assert end(lambda: (tmp_path / "nowhere").read_text()) == 1
    assert capsys.readouterr().err == f"error: [Errno 2] No such file or directory: '{tmp_path}/nowhere'\n"


def test_a_library_s_judgement_of_a_flag_is_one_line(tmp_path, capsys):
    argv = ["--output_dir", str(tmp_path), "--use_cpu", "--save_strategy", "epoch", "--load_best_model_at_end"]
    assert end(lambda: parse_arguments(PersonalTrainingArguments, argv=argv)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --load_best_model_at_end requires")


def test_an_error_that_nobody_raised_on_purpose_keeps_its_traceback():
    with pytest.raises(ValueError, match="too many values to unpack"):
        run_main(lambda: exec("a, b = 1, 2, 3"))
    with pytest.raises(ValueError, match="Expecting value"):
        run_main(lambda: json.loads("x"))  # a library's, far from the command line
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 / 0)


def test_a_variable_shows_the_traceback_of_every_error(monkeypatch):
    monkeypatch.setenv("RECIPE_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        run_main(lambda: Path("nowhere").read_text())


def test_accelerate_adds_no_traceback_to_a_quiet_launch(tmp_path, capfd):
    script = tmp_path / "recipe.py"
    script.write_text("import sys\nprint('error: `x` must be 1, got 2.', file=sys.stderr)\nsys.exit(2)\n")
    config = ROOT / "accelerate_configs" / "cpu.yaml"
    parser = launch_command_parser()
    command = ["--config_file", str(config), "--num_cpu_threads_per_process", "1", str(script)]
    with pytest.raises(SystemExit) as stop:
        launch_command(parser.parse_args(["--quiet", *command]))
    assert stop.value.code == 1
    assert capfd.readouterr().err == "error: `x` must be 1, got 2.\n"
    with pytest.raises(subprocess.CalledProcessError):  # what README's commands would end with otherwise
        launch_command(parser.parse_args(command))


@pytest.mark.slow
def test_a_wrong_flag_ends_each_way_of_starting_a_recipe_with_its_line(capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    line = "error: `--fils` is not a flag of this recipe. Did you mean `files`?\n"
    started = subprocess.run([sys.executable, "recipes/transcribe.py", "--fils=a.wav"], env=os.environ, check=False)
    assert (started.returncode, capfd.readouterr().err) == (2, line)
    with pytest.raises(SystemExit) as stop:
        run_recipe("transcribe", fils="a.wav")
    assert (stop.value.code, capfd.readouterr().err) == (1, line)


def test_a_quiet_recipe_shows_its_own_progress_and_errors_alone(monkeypatch):
    started = []
    monkeypatch.setattr(
        "subprocess.run",
        lambda command, **options: started.append((command, options)) or SimpleNamespace(returncode=0),
    )
    for is_quiet in (False, True):
        run_recipe("personalize", is_quiet=is_quiet, seed=1)
    (plain, plain_options), (quiet, quiet_options) = started
    assert quiet == [*plain, "--log_level", "error"]
    added = set(quiet_options["env"].items()) - set(plain_options["env"].items())
    assert {name for name, _ in added} <= {*NO_SIDE_BARS, "PYTHONWARNINGS"}
    assert NO_SIDE_BARS.items() <= quiet_options["env"].items()
