"""Word error rate of adapters trained from caches in fp32 and in bf16, all speakers of a corpus in one run each.

    python -m benchmarks.cache_precision --dataset fsdd --base outputs/personalization/base_without_theo

Each pair of runs has one seed, so that order, dropout and augmentation are the same and only the cache differs.
"""

import argparse
import json
from pathlib import Path
from statistics import mean

from benchmarks.results_file import store_result
from publishing.report import RESULTS_NAME, format_table
from training.launch import run_recipe

DTYPES = ("float32", "bfloat16")
NUM_VARIANTS = 4


def measure(
    dataset: str, base: str, folder: Path, *, dtype: str, seed: int, seconds: float, epochs: float
) -> list[dict]:
    """Trains an adapter for every speaker from caches of `dtype`; returns one row a speaker."""
    output = folder / f"{dtype}_{seed}"
    if not (output / RESULTS_NAME).exists():
        run_recipe(
            "personalize",
            config="personalize_fsdd",
            model_name_or_path=base,
            dataset=dataset,
            speaker_id="all",
            max_train_seconds=seconds,
            num_train_epochs=epochs,
            cache_dtype=dtype,
            cache_variants=NUM_VARIANTS,
            cache_dir=folder / "cache",
            seed=seed,
            output_dir=output,
        )
    results = json.loads((output / RESULTS_NAME).read_text(encoding="utf-8"))
    return [{"dtype": dtype, "seed": seed, **row} for row in results["speakers"]]


def summarize(rows: list[dict]) -> str:
    """Returns a line for each speaker and one for the mean, over all seeds."""
    speakers = sorted({row["speaker_id"] for row in rows})
    lines = []
    for speaker in [*speakers, "mean"]:
        group = [row for row in rows if speaker in (row["speaker_id"], "mean")]
        wer = {dtype: mean(row["eval_wer"] for row in group if row["dtype"] == dtype) for dtype in DTYPES}
        change = wer["bfloat16"] / wer["float32"] - 1 if wer["float32"] else 0.0
        lines.append(
            {
                "speaker": speaker,
                "WER before": f"{mean(row['base_wer'] for row in group):.2%}",
                **{f"after, {dtype} cache": f"{value:.2%}" for dtype, value in wer.items()},
                "relative change": f"{change:+.2%}",
            }
        )
    return format_table(lines)


def main() -> None:
    """Runs the benchmark; what an earlier run has finished is not run again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="Folder written by `python -m data.prepare_fsdd`.")
    parser.add_argument("--base", required=True, help="Recogniser trained on the same corpus.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/cache_precision"))
    parser.add_argument("--num_seeds", type=int, default=2)
    parser.add_argument("--max_train_seconds", type=float, default=30.0)
    parser.add_argument("--num_train_epochs", type=float, default=30.0)
    arguments = parser.parse_args()
    options = {"seconds": arguments.max_train_seconds, "epochs": arguments.num_train_epochs}
    rows = [
        row
        for seed in range(arguments.num_seeds)
        for dtype in DTYPES
        for row in measure(arguments.dataset, arguments.base, arguments.output_dir, dtype=dtype, seed=seed, **options)
    ]
    table = summarize(rows)
    print(table)
    store_result("cache_precision_fsdd", rows, table, source=__file__)


if __name__ == "__main__":
    main()
