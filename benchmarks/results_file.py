"""Where and how a benchmark stores its result: with machine, versions and date."""

import json
import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from modeling.files import write_whole

RESULTS_FOLDER = Path(__file__).parent / "results"
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets")


def describe_machine() -> dict[str, object]:
    """Returns processor, cores, threads, versions and date, without anything that names the host."""
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{library: version(library) for library in LIBRARIES},
        "date": date.today().isoformat(),
    }


def store_result(name: str, rows: list[dict], table: str, *, folder: str | Path = RESULTS_FOLDER) -> None:
    """Writes `name`.json (rows and machine) and `name`.md (table and machine) into `folder`."""
    machine = describe_machine()
    about = ", ".join(f"{key} {value}" for key, value in machine.items())
    with write_whole(folder) as scratch:
        (scratch / f"{name}.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
        (scratch / f"{name}.md").write_text(f"{table}\n\n{about}\n")
