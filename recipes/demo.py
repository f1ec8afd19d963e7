"""The main job on the embedded corpus: a recogniser, unusual voices that it mishears, and their adapters.

make demo
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from data.corpora import load_corpus
from data.speakers import select_speakers
from data.synthesis import ORDINARY_VOICES, UNUSUAL_VOICES
from inference.recognizers import open_recognizer
from modeling.adapters import BASE
from modeling.files import write_whole
from publishing.report import RESULTS_NAME, draw_speakers, format_table
from training.endings import run_main
from training.launch import run_recipe

DATASET = "synthetic"
MAX_TRAIN_SECONDS = 40
NUM_SENTENCES = 3


@dataclass(frozen=True)
class Heard:
    """
    A sentence of a speaker.

    Args:
        said: What was said.
        before: What the base heard.
        now: What it hears with the speaker's adapter.
    """

    said: str
    before: str
    now: str


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


def hear_sentences(base: Path, adapters: dict[str, Path], *, dataset: str = DATASET) -> dict[str, list[Heard]]:
    """
    Returns the test sentences of each speaker as the base hears them without and with the speaker's adapter.

    Args:
        base: Folder of the recogniser.
        adapters: Speaker to the folder of the adapter.
        dataset: Corpus of the speakers.
    """
    disable_progress_bar()
    recognizer = open_recognizer(str(base), {name: str(folder) for name, folder in adapters.items()})
    corpus = load_corpus(dataset, split="test", required_columns=("audio", "text", "speaker_id"))
    heard = {}
    for speaker in adapters:
        rows = select_speakers(corpus, [speaker])
        clips, texts = [row["path"] for row in rows["audio"]], rows["text"]
        before, now = (
            [transcript.text for transcript in recognizer.transcribe(clips, adapter_names=[name] * len(clips))]
            for name in (BASE, speaker)
        )
        heard[speaker] = [Heard(*sentence) for sentence in zip(texts, before, now, strict=True)]
    return heard


def pick_misheard(heard: Sequence[Heard]) -> list[Heard]:
    """Returns the first sentences that the base misheard, whatever the adapter makes of them, and then others."""
    return sorted(heard, key=lambda sentence: sentence.before == sentence.said)[:NUM_SENTENCES]


def format_sentences(heard: dict[str, list[Heard]]) -> str:
    """Returns a few sentences of each speaker: what was said, what the base heard, what it hears now."""
    blocks = []
    for speaker, sentences in heard.items():
        blocks.append(f"{speaker}:")
        blocks += [
            f"  said    {sentence.said}\n  before  {sentence.before}\n  now     {sentence.now}"
            for sentence in pick_misheard(sentences)
        ]
    return "\n\n".join(blocks)


def main() -> None:
    """Trains the base, adapts it to each unusual voice, and prints and writes what it hears before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="A folder that does not exist yet.")
    folder = parser.parse_args().output_dir
    if folder.exists():
        parser.error(f"`--output_dir` must not exist, got {folder}. Choose another or remove it.")
    start = time.perf_counter()
    speakers = [voice.speaker_id for voice in UNUSUAL_VOICES]

    # A recogniser of ordinary voices
    print(f"A recogniser learns {len(ORDINARY_VOICES)} ordinary voices.", flush=True)
    run_recipe(
        "train_ctc",
        config="train_ctc_synthetic",
        is_quiet=True,
        exclude_speakers=speakers,
        output_dir=folder / "base",
    )

    # An adapter for each unusual voice
    rows = []
    for speaker in speakers:
        output_dir = folder / speaker
        print(f"\nAn adapter learns the {speaker} from {MAX_TRAIN_SECONDS} s of speech.", flush=True)
        run_recipe(
            "personalize",
            config="personalize_synthetic",
            is_quiet=True,
            model_name_or_path=folder / "base",
            speaker_id=speaker,
            max_train_seconds=MAX_TRAIN_SECONDS,
            output_dir=output_dir,
        )
        rows.append(json.loads((output_dir / RESULTS_NAME).read_text(encoding="utf-8")))

    # Sentences, table and picture
    sentences = format_sentences(hear_sentences(folder / "base", {speaker: folder / speaker for speaker in speakers}))
    table = format_table([describe_row(row) for row in rows])
    draw_speakers(folder / "results.png", rows)
    with write_whole(folder) as scratch:
        (scratch / "results.md").write_text(f"{table}\n\n```\n{sentences}\n```\n", encoding="utf-8")
    print(f"\n{sentences}\n\n{table}\n\nSentences, table and picture: {folder}/results.md, {folder}/results.png")
    print(f"The whole run took {(time.perf_counter() - start) / 60:.1f} minutes.")


if __name__ == "__main__":
    run_main(main)
