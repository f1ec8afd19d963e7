"""Runs recipes as a user would, for the demo and the benchmarks."""

import os
import subprocess
import sys

import psutil

# Progress of loading and preparing, which libraries draw beside a training's own.
NO_SIDE_BARS = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


def run_recipe(
    name: str, *, config: str | None = None, launcher: str = "cpu", is_quiet: bool = False, **flags: object
) -> None:
    """
    Runs `accelerate launch recipes/<name>.py` from the root of the repository; its output goes to the terminal.

    Args:
        name: Recipe without ".py".
        config: Name of a YAML file in recipes/configs, without ".yaml".
        launcher: Name of a YAML file in accelerate_configs, without ".yaml".
        is_quiet: Show the training's own progress bar, results and errors alone.
        flags: The recipe's flags; a list gives several values.

    Raises:
        SystemExit: The recipe failed and has said why.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    # What accelerate would choose by itself, but with three lines of advice at every start (1.15).
    threads = os.environ.get("OMP_NUM_THREADS") or psutil.cpu_count(logical=False) or 1
    command += ["--num_cpu_threads_per_process", str(threads)]
    command += ["--config_file", f"accelerate_configs/{launcher}.yaml", f"recipes/{name}.py"]
    if config:
        command += ["--config", f"recipes/configs/{config}.yaml"]
    for flag, value in flags.items():
        command += [f"--{flag}", *(str(item) for item in (value if isinstance(value, list) else [value]))]
    environment = {}
    if is_quiet:
        command += ["--log_level", "error"]
        environment = NO_SIDE_BARS | {"PYTHONWARNINGS": "ignore"}
    if code := subprocess.run(command, check=False, env=os.environ | environment).returncode:
        raise SystemExit(code)
