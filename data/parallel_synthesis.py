"""The embedded corpus of speech translation: espeak-ng reads Spanish or Korean, and in one voice the English of it."""

import argparse
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from data.audio import SAMPLING_RATE
from data.parallel_sentences import SPLITS, choose_sentences, write_transcript
from data.spoken_numbers import Words
from data.synthesis import RATE_JITTER, Voice, add_room, new_corpus_folder, synthesize, write_metadata

SOURCES = ("es", "ko")
NUM_SENTENCES = {"train": 8_000, "validation": 300, "test": 500}
# Variants of espeak-ng by split, so that who is heard in a test was never trained on.
VARIANTS = {
    "train": (
        *("m1", "m2", "m3", "m4", "m5", "m6", "f1", "f2", "f3", "f4"),
        *("Alex", "Annie", "Denis", "Diogo", "Gene", "Lee", "Mario", "Michael", "linda", "pablo", "quincy", "rob"),
    ),
    "validation": ("m7", "f5", "Jacky", "belinda"),
    "test": ("m8", "Andrea", "steph", "max"),
}
ACCENTS = {"es": ("es", "es-419"), "ko": ("ko",)}  # Spanish of Spain and of Latin America
RATES_WPM = (140, 190)
PITCHES = (35, 65)
TARGET_VOICE = Voice("english", "en-us+f3", 160)
COLUMNS = ("file_name", "text", "target_text", "target_audio", "speaker_id", "split", "pair_id")
CHUNK_SIZE = 100  # pairs that a process makes before it reports


@dataclass(frozen=True)
class Pair:
    """A sentence, who reads it, and the seed of everything else about its recording."""

    name: str
    words: Words
    voice: Voice
    seed: tuple[int, ...]


def list_source_voices(source: str, split: str) -> list[Voice]:
    """
    Returns who reads the source sentences of a split; no voice is in two splits.

    Each has its own rate and pitch, spread evenly over what people use.
    """
    variants, accents = VARIANTS[split], ACCENTS[source]
    steps = np.linspace(0, 1, len(variants))
    return [
        Voice(
            f"{source}_{variant.lower()}",
            f"{accents[number % len(accents)]}+{variant}",
            rate_wpm=round(np.interp(step, (0, 1), RATES_WPM)),
            pitch=round(np.interp(number * 0.382 % 1, (0, 1), PITCHES)),  # the golden section: no two alike
        )
        for number, (variant, step) in enumerate(zip(variants, steps, strict=True))
    ]


def write_parallel_corpus(
    folder: str | Path,
    *,
    language: str,
    num_sentences: dict[str, int] | None = None,
    seed: int = 0,
    num_processes: int | None = None,
) -> Path:
    """
    Writes the embedded parallel corpus: FLAC files of both sides and `metadata.csv` with a row for each pair.

    The source recordings differ in voice, rate (within 8 % of the voice's), loudness and noise; the English ones are
    all of one voice, clean, so that their units depend on the sentence alone. No sentence, in no language, and no
    source voice is in two splits. The folder appears when everything is written.

    Args:
        folder: Where to write; must be new or empty.
        language: Of the source, "es" or "ko".
        num_sentences: Of each split; default 8,000 for training, 300 for validation, 500 for testing.
        seed: Chooses sentences, voices, rates, loudness and noise.
        num_processes: That read at once; default: one a core. The files do not depend on it.

    Returns:
        `folder`.

    Raises:
        ValueError: `language` is unknown, `folder` holds files, or a split has fewer sentences.
    """
    if language not in SOURCES:
        raise ValueError(f"`language` must be one of {', '.join(SOURCES)}, got {language!r}. Choose one of them.")
    counts = {**NUM_SENTENCES, **(num_sentences or {})}
    pairs = {split: list(_draw_pairs(language, split, counts[split], seed)) for split in SPLITS}
    with new_corpus_folder(folder) as scratch:
        for name in (language, "en"):
            (scratch / name).mkdir()
        _write_pairs(scratch, language, [pair for split in SPLITS for pair in pairs[split]], num_processes)
        rows = [_list_cells(pair, language, split) for split in SPLITS for pair in pairs[split]]
        write_metadata(scratch, COLUMNS, rows)
    return Path(folder)


def _draw_pairs(source: str, split: str, num_sentences: int, seed: int) -> Iterator[Pair]:
    voices = list_source_voices(source, split)
    generator = np.random.default_rng([seed, SPLITS.index(split)])
    for number, words in enumerate(choose_sentences(split, num_sentences, seed=seed)):
        voice = voices[generator.integers(len(voices))]
        yield Pair(f"{split}_{number:05d}", words, voice, (seed, SPLITS.index(split), number))


def _list_cells(pair: Pair, source: str, split: str) -> list[str]:
    text, target_text = write_transcript(getattr(pair.words, source)), write_transcript(pair.words.en)
    file_name, target_audio = f"{source}/{pair.name}.flac", f"en/{pair.name}.flac"
    return [file_name, text, target_text, target_audio, pair.voice.speaker_id, split, pair.name]


def _write_pairs(folder: Path, source: str, pairs: Sequence[Pair], num_processes: int | None) -> None:
    chunks = [pairs[start : start + CHUNK_SIZE] for start in range(0, len(pairs), CHUNK_SIZE)]
    num_processes = min(num_processes or os.cpu_count() or 1, len(chunks))
    progress = tqdm(total=len(pairs), desc=f"synthetic_s2st/{source}", unit="pair")
    with progress:
        if num_processes == 1:
            for chunk in chunks:
                progress.update(_write_chunk(folder, source, chunk))
            return
        with ProcessPoolExecutor(num_processes) as pool:
            for num_written in pool.map(_write_chunk, [folder] * len(chunks), [source] * len(chunks), chunks):
                progress.update(num_written)


def _write_chunk(folder: Path, source: str, pairs: Sequence[Pair]) -> int:
    """Writes both sides of some pairs and returns how many these are."""
    for pair in pairs:
        generator = np.random.default_rng(pair.seed)
        rate_wpm = round(pair.voice.rate_wpm * generator.uniform(1 - RATE_JITTER, 1 + RATE_JITTER))
        samples = synthesize(getattr(pair.words, source), replace(pair.voice, rate_wpm=rate_wpm))
        target_samples = synthesize(pair.words.en, TARGET_VOICE)
        soundfile.write(folder / source / f"{pair.name}.flac", add_room(samples, generator), SAMPLING_RATE)
        soundfile.write(folder / "en" / f"{pair.name}.flac", target_samples, SAMPLING_RATE)
    return len(pairs)


def main(arguments: list[str] | None = None) -> None:
    """Writes the embedded parallel corpus into the folder named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m data.parallel_synthesis", description=__doc__, allow_abbrev=False)
    parser.add_argument("out", type=Path, help="Folder to write; must be new or empty.")
    parser.add_argument("--language", choices=SOURCES, default=SOURCES[0], help="Language that is translated.")
    for split in SPLITS:
        parser.add_argument(
            f"--num_{split}", type=int, default=NUM_SENTENCES[split], help=f"Sentences of the split {split}."
        )
    parser.add_argument("--seed", type=int, default=0, help="Chooses sentences, voices, rates, loudness and noise.")
    options = parser.parse_args(arguments)
    counts = {split: getattr(options, f"num_{split}") for split in SPLITS}
    write_parallel_corpus(options.out, language=options.language, num_sentences=counts, seed=options.seed)


if __name__ == "__main__":
    main()
