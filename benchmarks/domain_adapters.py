"""Word error rates before and after a small Whisper is adapted to a simulated vibrometer, by every method.

    python -m benchmarks.domain_adapters --dataset fsdd --output_dir outputs/domain --tables all

The base is trained from scratch on microphone speech (`benchmarks.domain_base`). Then, one run of
`recipes/adapt_domain.py` a row: the methods by each objective that they have, and the domain adapter with parts taken
out or changed.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

from benchmarks.domain_base import train_base
from benchmarks.personalization import read_json
from benchmarks.results_file import store_result
from publishing.report import format_table
from training.launch import run_recipe

OBJECTIVES = {"domain_adapter": ("task", "distill", "both"), "bottleneck": ("task", "distill", "both")}
METHODS = ("domain_adapter", "bottleneck", "projector", "lora_projector", "lora_llm")
ABLATIONS = {
    "domain_adapter, task": {},
    "no gate": {"use_gate": False},
    "no positions": {"use_positions": False},
    "1 layer": {"num_layers": 1},
    "4 layers": {"num_layers": 4},
    "1 head": {"num_heads": 1},
    "16 heads": {"num_heads": 16},
    "scale from 0.1": {"scale_init": 0.1},
    "scale from 0.3": {"scale_init": 0.3},
}
TABLES = ("methods", "ablations")


def list_runs(table: str) -> dict[str, dict[str, object]]:
    """Returns the runs of a table, the name of a row to the recipe's flags; the ablations begin without a change."""
    if table == "ablations":
        as_is = {"method": "domain_adapter", "objective": "task"}
        return {name: as_is | changes for name, changes in ABLATIONS.items()}
    runs: dict[str, dict[str, object]] = {"none": {"method": "none"}}
    for method in METHODS:
        for objective in OBJECTIVES.get(method, ("task",)):
            runs[f"{method}, {objective}"] = {"method": method, "objective": objective}
    return runs


def measure(table: str, *, dataset: str, base: Path, folder: Path) -> list[dict]:
    """Runs the recipe for each row of a table, but for those that an earlier run has finished; returns the rows."""
    rows = []
    for name, flags in list_runs(table).items():
        output = folder / name.replace(", ", "_").replace(" ", "_")
        if not (output / "eval_results.json").exists():
            run_recipe(
                "adapt_domain",
                config="adapt_domain_fsdd",
                model_name_or_path=base,
                dataset=dataset,
                output_dir=output,
                report_clips=2,
                **flags,
            )
        results = read_json(output / "eval_results.json")
        results = {key: value for key, value in results.items() if key not in ("run", "train_runtime")}
        rows.append({"row": name, **results})
    return rows


def summarize(table: str, rows: list[dict]) -> str:
    """Returns a table of the documentation: what trains, and the errors on both domains."""
    first = "method, objective" if table == "methods" else "domain adapter"
    return format_table([{first: row["row"], **_describe(row)} for row in rows])


def _describe(row: Mapping) -> dict[str, str]:
    trainable = f"{row['trainable_parameters']:,}" if "trainable_parameters" in row else ""
    cells = {"trainable": trainable, "LDV before": f"{row['ldv_wer_before']:.1%}"}
    places = {
        "LDV after": "ldv_wer_after",
        "gap closed": "gap_closed",
        "microphone before": "microphone_wer_before",
        "adapter off": "microphone_wer_off",
        "adapter on": "microphone_wer_on",
    }
    return cells | {name: f"{row[key]:.1%}" if key in row else "" for name, key in places.items()}


def main() -> None:
    """Trains the base, if it is not there, and measures the tables named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="Folder written by `python -m data.prepare_fsdd`.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Where the base and the adapters go.")
    parser.add_argument("--tables", choices=(*TABLES, "all"), default="all", help="What to measure.")
    arguments = parser.parse_args()
    base = arguments.output_dir / "base"
    if not (base / "eval_results.json").exists():
        train_base(arguments.dataset, base)
    for table in TABLES if arguments.tables == "all" else (arguments.tables,):
        rows = measure(table, dataset=arguments.dataset, base=base, folder=arguments.output_dir)
        text = summarize(table, rows)
        print(text)
        store_result(f"domain_adapters_{table}", rows, text, source=__file__)


if __name__ == "__main__":
    main()
