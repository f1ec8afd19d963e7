"""A run has the processes that its launcher was asked for, says so, and ends with its launcher."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

from training.arguments import parse_arguments
from training.processes import (
    ACCELERATE_VARIABLE,
    WORLD_SIZE_VARIABLES,
    choose_device,
    count_requested_processes,
    join_processes,
)
from training.trainer import RecipeTrainingArguments

ROOT = Path(__file__).parents[1]
LAUNCHED_VARIABLES = (*WORLD_SIZE_VARIABLES, ACCELERATE_VARIABLE, "MASTER_ADDR", "ACCELERATE_USE_CPU")


@pytest.fixture
def environment(monkeypatch):
    """Sets what a launcher sets, and nothing else of the kind."""

    def launch(**variables: str) -> None:
        for name in LAUNCHED_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    launch()
    return launch


@pytest.mark.parametrize(
    ("variables", "count"), [({}, 1), ({"WORLD_SIZE": "3"}, 3), ({"OMPI_COMM_WORLD_SIZE": "2", "PMI_SIZE": "2"}, 2)]
)
def test_the_launcher_s_processes_are_counted(environment, variables, count):
    environment(**variables)
    assert count_requested_processes() == count


def test_several_processes_that_were_never_started_are_refused(environment):
    environment(MASTER_ADDR="127.0.0.1", **{ACCELERATE_VARIABLE: "no"})
    with pytest.raises(ValueError, match="`num_processes` must be 1 for the launcher .* Use .*multi_cpu.yaml"):
        parse_arguments(RecipeTrainingArguments, argv=["--output_dir", "unused"])


def test_processes_that_believe_that_they_are_alone_are_refused(environment):
    environment(WORLD_SIZE="2")
    assert PartialState().num_processes == 1
    with pytest.raises(ValueError, match=r"must be the 2 that the launcher started, got 1 on \w+. Give `--use_cpu`"):
        join_processes()


def test_several_processes_share_the_cpu_where_there_is_nothing_else(environment, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    choose_device()
    assert "ACCELERATE_USE_CPU" not in os.environ
    environment(WORLD_SIZE="2")
    choose_device()
    assert os.environ.pop("ACCELERATE_USE_CPU") == "true"


def test_a_training_says_what_it_runs_on(environment, tmp_path, caplog):
    environment(**{ACCELERATE_VARIABLE: "bf16", "ACCELERATE_USE_CPU": "true"})
    parse_arguments(RecipeTrainingArguments, argv=["--output_dir", str(tmp_path)])
    threads = torch.get_num_threads()
    assert f"Runs as 1 process on cpu, {threads} thread" in caplog.text
    assert "mixed precision bf16" in caplog.text


def test_a_training_ends_when_its_launcher_is_ended(tmp_path):
    script = tmp_path / "long_run.py"
    script.write_text(
        "import os, signal\nfrom training.processes import join_processes\n"
        "join_processes()\nprint(os.getpid(), flush=True)\nsignal.pause()\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([*command, str(script)], cwd=ROOT, env=environment, stdout=subprocess.PIPE) as launcher:
        training = int(launcher.stdout.readline())
        launcher.send_signal(signal.SIGTERM)
        try:
            # The output has an end when nobody can write to it any more.
            assert launcher.communicate(timeout=60)[0] == b""
        except subprocess.TimeoutExpired:
            os.kill(training, signal.SIGKILL)
            raise
