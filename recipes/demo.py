"""The main job on the embedded corpus: a recogniser, unusual voices that it mishears, and their adapters.

make demo
"""

import argparse
import json
import time
from pathlib import Path

from data.synthesis import UNUSUAL_VOICES
from modeling.files import write_whole
from publishing.report import RESULTS_NAME, draw_speakers, format_table
from training.endings import run_main
from training.launch import run_recipe

MAX_TRAIN_SECONDS = 40


def describe_row(results: dict) -> dict[str, str]:
    """Returns a speaker's line of the table."""
    share = results["trainable_parameters"] / results["total_parameters"]
    return {
        "speaker": results["speaker_id"],
        "speech": f"{results['train_seconds']:.0f} s",
        "trainable": f"{results['trainable_parameters']:,} ({share:.1%})",
        "WER before": f"{results['base_wer']:.1%}",
        "after": f"{results['eval_wer']:.1%}",
        "CER before": f"{results['base_cer']:.1%}",
        "CER after": f"{results['eval_cer']:.1%}",
        "adapter file": f"{results['adapter_bytes'] / 1024:.0f} KiB",
        "training": f"{results['train_runtime']:.0f} s",
    }


def main() -> None:
    """Trains the base, adapts it to each unusual voice, and prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="A folder that does not exist yet.")
    folder = parser.parse_args().output_dir
    if folder.exists():
        parser.error(f"`--output_dir` must not exist, got {folder}. Choose another or remove it.")
    start = time.perf_counter()
    speakers = [voice.speaker_id for voice in UNUSUAL_VOICES]

    # A recogniser of ordinary voices
    run_recipe("train_ctc", config="train_ctc_synthetic", exclude_speakers=speakers, output_dir=folder / "base")

    # An adapter for each unusual voice
    rows = []
    for speaker in speakers:
        output_dir = folder / speaker
        run_recipe(
            "personalize",
            config="personalize_synthetic",
            model_name_or_path=folder / "base",
            speaker_id=speaker,
            max_train_seconds=MAX_TRAIN_SECONDS,
            output_dir=output_dir,
        )
        rows.append(json.loads((output_dir / RESULTS_NAME).read_text(encoding="utf-8")))

    # Table and picture
    table = format_table([describe_row(row) for row in rows])
    draw_speakers(folder / "results.png", rows)
    with write_whole(folder) as scratch:
        (scratch / "results.md").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n\nTable and picture: {folder}/results.md, {folder}/results.png")
    print(f"The whole run took {(time.perf_counter() - start) / 60:.1f} minutes.")


if __name__ == "__main__":
    run_main(main)
