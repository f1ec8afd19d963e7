"""Where and how a benchmark stores its result: with machine, versions and date."""

import json
import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path

from modeling.files import write_whole

RESULTS_FOLDER = Path(__file__).parent / "results"
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets")


def describe_machine() -> dict[str, object]:
    """Returns processor, cores, versions and date, without anything that names the host."""
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{library: version(library) for library in LIBRARIES},
        "date": date.today().isoformat(),
    }


def store_result(name: str, rows: list[dict], table: str) -> None:
    """Writes `name`.json (rows and machine) and `name`.md (table and machine) under benchmarks/results/."""
    machine = describe_machine()
    about = ", ".join(f"{key} {value}" for key, value in machine.items())
    with write_whole(RESULTS_FOLDER) as folder:
        (folder / f"{name}.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
        (folder / f"{name}.md").write_text(f"{table}\n\n{about}\n")
