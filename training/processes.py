"""The processes of a run: as many as its launcher was asked for, and none that outlives it."""

import os
import signal
import threading
import time

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

# Where torchrun and the MPI launchers write how many processes they started.
WORLD_SIZE_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# What every `accelerate launch` sets.
ACCELERATE_VARIABLE = "ACCELERATE_MIXED_PRECISION"
SECONDS_BETWEEN_LOOKS = 1.0


def count_requested_processes() -> int:
    """
    Returns how many processes the launcher started together, 1 without a launcher.

    Raises:
        ValueError: accelerate was asked for several and started one, as it does on a CPU without MPI.
    """
    sizes = [int(os.environ[name]) for name in WORLD_SIZE_VARIABLES if os.environ.get(name)]
    # accelerate's launcher of single processes writes an address only where it was asked for several.
    if not sizes and ACCELERATE_VARIABLE in os.environ and os.environ.get("MASTER_ADDR"):
        raise ValueError(
            "`num_processes` must be 1 for the launcher that accelerate chose, which starts one process, got more. "
            "Use accelerate_configs/multi_cpu.yaml or `torchrun --nproc_per_node N`; or unset MASTER_ADDR."
        )
    return max(sizes, default=1)


def choose_device() -> None:
    """Has the processes of a launcher of several work on the CPU where there is nothing else; call it first."""
    if count_requested_processes() > 1 and not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # without it, each of them would believe that it is alone


def join_processes() -> PartialState:
    """
    Returns the state that the processes of this run share, of a run by accelerate on the device of its configuration.

    Raises:
        ValueError: They are not as many as the launcher started.
    """
    requested = count_requested_processes()
    # Without arguments it would neither read the launcher's `use_cpu` nor find the other processes of a CPU.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if state.num_processes != requested:
        raise ValueError(
            f"The processes of this run must be the {requested} that the launcher started, got {state.num_processes} "
            f"on {state.device.type}. Give `--use_cpu` to train on CPUs."
        )
    if ACCELERATE_VARIABLE in os.environ:
        watch_launcher()
    return state


def watch_launcher() -> None:
    """Ends this process when it has lost its launcher: accelerate does not pass on the signal that ends it."""
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="watch launcher", daemon=True).start()


def describe_processes(state: PartialState, precision: str) -> str:
    """Returns what a training runs on, such as `2 processes on cpu, 1 thread each, mixed precision no`."""
    processes = _count(state.num_processes, "process", "processes")
    threads = _count(torch.get_num_threads(), "thread", "threads")
    return f"{processes} on {state.device.type}, {threads} each, mixed precision {precision}"


def _count(number: int, singular: str, plural: str) -> str:
    return f"{number} {singular if number == 1 else plural}"
