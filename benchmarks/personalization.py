"""Word error rate of an unheard speaker before and after personalisation, each speaker in turn.

    python -m benchmarks.personalization --dataset fsdd --output_dir outputs/personalization

For each speaker: a base trained without that speaker, then an adapter from 5, 10, 30 and 60 seconds of the speaker's
training recordings, tested on the speaker's test recordings, and on the base speakers' with the adapter on.
"""

import argparse
import json
from pathlib import Path
from statistics import mean

from benchmarks.results_file import store_result
from data.corpora import load_corpus
from publishing.report import RESULTS_NAME, format_table
from training.launch import run_recipe

SECONDS = (5, 10, 30, 60)


def read_json(path: Path) -> dict:
    """Returns the content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def train_base(dataset: str, speaker: str, folder: Path) -> Path:
    """Returns the folder of a base trained without `speaker`, of an earlier run if there is one."""
    base = folder / f"base_without_{speaker}"
    if not (base / RESULTS_NAME).exists():
        run_recipe("train_ctc", config="train_ctc_fsdd", dataset=dataset, exclude_speakers=speaker, output_dir=base)
    return base


def train_adapter(dataset: str, speaker: str, others: list[str], folder: Path, *, seconds: int) -> Path:
    """Returns the folder of an adapter for `speaker` from `seconds` of speech, of an earlier run if there is one."""
    output = folder / f"{speaker}_{seconds}s"
    if not (output / RESULTS_NAME).exists():
        run_recipe(
            "personalize",
            config="personalize_fsdd",
            model_name_or_path=train_base(dataset, speaker, folder),
            dataset=dataset,
            speaker_id=speaker,
            max_train_seconds=seconds,
            base_eval_speakers=others,
            output_dir=output,
        )
    return output


def measure_speaker(dataset: str, speaker: str, others: list[str], folder: Path) -> list[dict]:
    """Trains a base without `speaker` and adapters for `speaker`; returns one row a number of seconds."""
    base_results = read_json(train_base(dataset, speaker, folder) / RESULTS_NAME)
    rows = []
    for seconds in SECONDS:
        output = train_adapter(dataset, speaker, others, folder, seconds=seconds)
        rows.append(
            {
                "speaker": speaker,
                "seconds": seconds,
                **{key: value for key, value in read_json(output / RESULTS_NAME).items() if key != "run"},
                "base_train_runtime": base_results["train_runtime"],
            }
        )
    return rows


def reduction(row: dict) -> float:
    """Returns the relative reduction of the word error rate."""
    return 1 - row["eval_wer"] / row["base_wer"]


def summarize(rows: list[dict]) -> str:
    """Returns the table of README: one line a number of seconds, averaged over speakers, then one line a speaker."""
    lines = []
    for seconds in dict.fromkeys(row["seconds"] for row in rows):
        group = [row for row in rows if row["seconds"] == seconds]
        lines.append(
            {
                "seconds of speech": f"{mean(row['train_seconds'] for row in group):.1f}",
                "WER before": f"{mean(row['base_wer'] for row in group):.1%}",
                "WER after": f"{mean(row['eval_wer'] for row in group):.1%}",
                "relative reduction": f"{mean(map(reduction, group)):.1%}",
                "base speakers' WER, adapter off": f"{mean(row['others_base_wer'] for row in group):.1%}",
                "adapter on": f"{mean(row['others_eval_wer'] for row in group):.1%}",
                "training": f"{mean(row['train_runtime'] for row in group):.0f} s",
            }
        )
    speakers = [
        {
            "speaker": speaker,
            "WER before": f"{group[0]['base_wer']:.1%}",
            **{f"{row['seconds']} s": f"{row['eval_wer']:.1%} ({-reduction(row):+.0%})" for row in group},
            "adapter share": f"{group[0]['trainable_parameters'] / group[0]['total_parameters']:.2%}",
            "base training": f"{group[0]['base_train_runtime'] / 60:.1f} min",
        }
        for speaker in dict.fromkeys(row["speaker"] for row in rows)
        if (group := [row for row in rows if row["speaker"] == speaker])
    ]
    return f"{format_table(lines)}\n\n{format_table(speakers)}"


def main() -> None:
    """Runs the benchmark; what an earlier run has finished is not run again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="Folder written by `python -m data.prepare_fsdd`.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Where bases and adapters go.")
    arguments = parser.parse_args()
    speakers = sorted(set(load_corpus(arguments.dataset, split="test")["speaker_id"]))
    rows = []
    for speaker in speakers:
        others = [other for other in speakers if other != speaker]
        rows += measure_speaker(arguments.dataset, speaker, others, arguments.output_dir)
    table = summarize(rows)
    print(table)
    store_result("personalization_fsdd", rows, table, source=__file__)


if __name__ == "__main__":
    main()
