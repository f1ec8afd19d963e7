"""Where and how a benchmark stores its result: with its source, machine, versions and date."""

import json
import os
import platform
import re
from datetime import date, datetime
from importlib.metadata import version
from pathlib import Path

import torch
import xxhash

from modeling.files import write_whole

RESULTS_FOLDER = Path(__file__).parent / "results"
ROWS_SUFFIX = ".rows.jsonl"
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


def digest_source(path: str | Path) -> str:
    """Returns 16 hexadecimal digits over a benchmark's file and the files of this folder that it imports from."""
    text = Path(path).read_text(encoding="utf-8")
    names = sorted(set(re.findall(r"^from benchmarks\.(\w+) import", text, re.MULTILINE)))
    texts = [text, *((Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8") for name in names)]
    return xxhash.xxh3_64_hexdigest("\0".join(texts).encode())


def keep_row(name: str, row: dict, *, folder: str | Path = RESULTS_FOLDER) -> dict:
    """Returns `row` after writing it to `name`.rows.jsonl: a failure later on loses no row that was measured."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with (Path(folder) / f"{name}{ROWS_SUFFIX}").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"date": datetime.now().isoformat(timespec="seconds"), **row}) + "\n")
    return row


def store_result(name: str, rows: list[dict], table: str, *, source: str, folder: str | Path = RESULTS_FOLDER) -> None:
    """
    Writes `name`.json (rows, source, machine) and `name`.md (table and the same), in place of the rows that were kept.

    Args:
        name: Of the files.
        rows: What was measured.
        table: It as Markdown.
        source: The benchmark's `__file__`.
        folder: Where the files go.
    """
    machine = describe_machine() | {"source": Path(source).name, "source_digest": digest_source(source)}
    about = ", ".join(f"{key} {value}" for key, value in machine.items())
    with write_whole(folder) as scratch:
        (scratch / f"{name}.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
        (scratch / f"{name}.md").write_text(f"{table}\n\n{about}\n")
    (Path(folder) / f"{name}{ROWS_SUFFIX}").unlink(missing_ok=True)
