"""Turns the target speech of a translation corpus into units, and writes the corpus with them as TSV manifests.

python recipes/extract_units.py --dataset synthetic_s2st/es --num_units 200 --output_dir outputs/units_es
python recipes/extract_units.py --dataset DATA --encoder openai/whisper-tiny.en --layer 3 --output_dir outputs/units

The output folder is a corpus: `--dataset outputs/units_es` trains on it. `--units OTHER` takes the centroids of
another one, as a vocoder that is there needs.
"""

import csv
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset
from tqdm import tqdm

from data.audio import SAMPLING_RATE, AudioError, audio_seconds, read_audio
from data.corpora import DEFAULT_SPLIT, load_corpus
from data.left_out import report_left_out
from data.synthesis import new_corpus_folder
from data.translation_rows import FRAMES_PER_SECOND
from inference.speech_units import LOG_MEL, UnitExtractor, reduce_units
from training.arguments import parse_arguments
from training.endings import run_main

logger = logging.getLogger(__name__)

COLUMNS = (
    "id", "src_audio", "src_n_frames", "src_text", "tgt_text", "tgt_audio", "tgt_n_frames", "tgt_durations",
    "target_audio", "speaker_id",
)  # fmt: skip
WINDOW_FRAMES = 2  # of a filter bank's 25 ms, at the end of a recording
BLANKS = re.compile(r"\s+")


@dataclass
class UnitArguments:
    """What is turned into units, and what units are made of."""

    dataset: str = field(
        metadata={"help": "synthetic_s2st/es, synthetic_s2st/ko, a folder, a manifest or a Hub name."}
    )
    output_dir: str = field(metadata={"help": "Folder for manifests, recordings and centroids; must be new or empty."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    encoder: str = field(
        default=LOG_MEL, metadata={"help": "log_mel, or a model of transformers: a folder or a Hub name."}
    )
    layer: int | None = field(default=None, metadata={"help": "Layer of a model; 0 is the first one's input."})
    num_units: int = field(default=200, metadata={"help": "Number of units."})
    units: str | None = field(
        default=None, metadata={"help": "Output folder of this recipe, whose centroids are taken instead."}
    )
    max_fit_seconds: float = field(
        default=3600.0, metadata={"help": "Seconds of training speech in which centroids are searched."}
    )
    seed: int = field(default=0, metadata={"help": "Draws that speech and the first centroids."})
    device: str = field(default="cpu", metadata={"help": "Where a model runs, such as cuda."})


def iterate_fit_clips(corpus: Dataset, max_seconds: float, *, seed: int) -> Iterator[np.ndarray]:
    """Yields target recordings of the training split in random order, `max_seconds` of them."""
    rows = [row for row, split in enumerate(corpus["split"]) if split == DEFAULT_SPLIT] or range(len(corpus))
    total = 0.0
    for row in np.random.default_rng(seed).permutation(rows).tolist():
        if total >= max_seconds:
            return
        try:
            samples = read_audio(corpus[row]["target_audio"])
        except AudioError:  # named when all recordings are turned into units
            continue
        total += len(samples) / SAMPLING_RATE
        yield samples


def fit_extractor(arguments: UnitArguments, corpus: Dataset) -> UnitExtractor:
    """Returns units of the target speech that the corpus trains on."""
    clips = iterate_fit_clips(corpus, arguments.max_fit_seconds, seed=arguments.seed)
    return UnitExtractor.fit(
        clips,
        num_units=arguments.num_units,
        encoder=arguments.encoder,
        layer=arguments.layer,
        seed=arguments.seed,
        device=arguments.device,
    )


def place_recording(audio: dict, folder: Path, name: str) -> str:
    """Links or copies a recording into the corpus's folder and returns its path there."""
    suffix = Path(audio["path"] or "").suffix or ".wav"
    path = folder / f"{name}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if audio["bytes"] is not None:
        path.write_bytes(audio["bytes"])
    else:
        try:
            os.link(os.path.realpath(audio["path"]), path)
        except OSError:  # another file system, or one without links
            shutil.copyfile(audio["path"], path)
    return f"{name}{suffix}"


def make_row(row: dict, name: str, extractor: UnitExtractor, folder: Path) -> dict[str, object]:
    """
    Returns a row of a manifest.

    Raises:
        AudioError: A recording cannot be read.
    """
    units, durations = reduce_units(extractor(read_audio(row["target_audio"])))
    num_frames = max(round(audio_seconds(row["audio"]) * FRAMES_PER_SECOND) - WINDOW_FRAMES, 0)
    return {
        "id": name,
        "src_audio": place_recording(row["audio"], folder, f"source/{name}"),
        "src_n_frames": num_frames,
        "src_text": BLANKS.sub(" ", row["text"]),
        "tgt_text": BLANKS.sub(" ", row["target_text"]),
        "tgt_audio": " ".join(map(str, units)),
        "tgt_n_frames": len(units),
        "tgt_durations": " ".join(map(str, durations)),
        "target_audio": place_recording(row["target_audio"], folder, f"target/{name}"),
        "speaker_id": row.get("speaker_id") or "",
    }


def write_manifests(corpus: Dataset, extractor: UnitExtractor, folder: Path) -> dict[str, int]:
    """
    Writes a manifest for each split, and returns how many rows each has.

    Raises:
        ValueError: More than 5 % of the rows have a recording that cannot be read or is too long for the encoder.
    """
    rows: dict[str, list[dict]] = {}
    faults = []
    for number, row in enumerate(tqdm(corpus, desc="extracting units", unit="row")):
        name = f"{row['split']}_{number:06d}"
        try:
            rows.setdefault(row["split"], []).append(make_row(row, name, extractor, folder))
        except ValueError as error:
            faults.append(str(error).removesuffix("."))
    report_left_out(
        faults, len(corpus), what="rows cannot be turned into units", remedy="Correct them or remove the rows."
    )
    for split, manifest in rows.items():
        with (folder / f"{split}.tsv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(
                file, COLUMNS, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None, lineterminator="\n"
            )
            writer.writeheader()
            writer.writerows(manifest)
    return {split: len(manifest) for split, manifest in rows.items()}


def main(argv: list[str] | None = None) -> None:
    """Runs the recipe."""
    # Arguments
    (arguments,) = parse_arguments(UnitArguments, argv=argv)

    with new_corpus_folder(arguments.output_dir) as scratch:
        # Data
        columns = ("audio", "text", "target_text", "target_audio")
        corpus = load_corpus(arguments.dataset, dataset_config=arguments.dataset_config, required_columns=columns)

        # Units
        if arguments.units:
            extractor = UnitExtractor.from_pretrained(arguments.units, device=arguments.device)
        else:
            extractor = fit_extractor(arguments, corpus)

        # Write
        num_rows = write_manifests(corpus, extractor, scratch)
        extractor.write(scratch)
    counts = ", ".join(f"{split} {number}" for split, number in num_rows.items())
    print(f"{arguments.output_dir}: {extractor.settings.num_units} units ({extractor.fingerprint}), rows: {counts}")


if __name__ == "__main__":
    run_main(main)
