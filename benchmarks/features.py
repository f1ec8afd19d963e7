"""Log-mel features of ours and of librosa: time a second of audio, and how far apart they are.

    python -m benchmarks.features

Both compute the logarithm of the same 80 mel energies (16 kHz, 512-point transform, 10 ms hop, 20 ms Hann window,
Slaney filters) of the same speech in room noise, in turn.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import librosa
import numpy as np

from benchmarks.results_file import RESULTS_FOLDER, keep_row, store_result
from benchmarks.timing import MIN_SAMPLE_SECONDS, Timing, alternate
from data.audio import SAMPLING_RATE
from data.synthesis import ORDINARY_VOICES, list_sentences, synthesize
from modeling import DeepSpeech2FeatureExtractor
from modeling.feature_extraction_deepspeech2 import POWER_FLOOR
from publishing.report import format_table

CLIP_SECONDS = (1, 5, 20)
BATCHES = (1, 8)
SNR_DB = 30.0
GOAL_SPEEDUP = 4.0
GOAL_DIFFERENCE = 1e-4


def make_speech(seconds: float, batch: int) -> np.ndarray:
    """Returns `batch` different stretches of synthesised speech in room noise, float32 `(batch, samples)`."""
    generator = np.random.default_rng(0)
    num_samples = round(seconds * SAMPLING_RATE)
    rows = []
    for row in range(batch):
        voice, sentences = ORDINARY_VOICES[row % len(ORDINARY_VOICES)], list_sentences("en")["train"][row:]
        speech = np.zeros(0, dtype=np.float32)
        for sentence in sentences:
            if speech.size >= num_samples:
                break
            speech = np.concatenate([speech, synthesize(sentence, voice)])
        speech = speech[:num_samples]
        noise_level = np.sqrt(np.mean(speech**2)) * 10 ** (-SNR_DB / 20)
        rows.append(speech + noise_level * generator.standard_normal(num_samples, dtype=np.float32))
    return np.stack(rows).astype(np.float32)


def extract_librosa(speech: np.ndarray, extractor: DeepSpeech2FeatureExtractor) -> np.ndarray:
    """Returns librosa's log-mel energies of `speech` `(batch, samples)`, `(batch, mel, frames)`."""
    power = librosa.feature.melspectrogram(
        y=speech,
        sr=extractor.sampling_rate,
        n_fft=extractor.n_fft,
        hop_length=extractor.hop_length,
        win_length=extractor.win_length,
        n_mels=extractor.feature_size,
        pad_mode="constant",
    )
    return np.log(np.maximum(power, POWER_FLOOR))


def extract_ours(speech: np.ndarray, extractor: DeepSpeech2FeatureExtractor) -> np.ndarray:
    """Returns our log-mel energies of `speech` `(batch, samples)`, `(batch, mel, frames)`."""
    return np.stack([extractor.log_mel(row).T for row in speech])


def measure(seconds: float, batch: int, *, repeats: int, min_sample_s: float) -> dict[str, object]:
    """Returns the row of one clip length and batch size: milliseconds a second of audio, ratio and difference."""
    extractor = DeepSpeech2FeatureExtractor()
    speech = make_speech(seconds, batch)
    timings: dict[str, Timing] = alternate(
        {
            "librosa": lambda: extract_librosa(speech, extractor),
            "ours": lambda: [extractor.log_mel(row) for row in speech],
        },
        repeats=repeats,
        warmup=3,  # librosa compiles and plans its first transforms
        min_sample_s=min_sample_s,
    )
    difference = np.abs(extract_librosa(speech, extractor) - extract_ours(speech, extractor)).max()
    milliseconds = {name: 1000 * timing.median_s / (seconds * batch) for name, timing in timings.items()}
    return {
        "clip_seconds": seconds,
        "batch": batch,
        "librosa_ms": milliseconds["librosa"],
        "ours_ms": milliseconds["ours"],
        "speedup": milliseconds["librosa"] / milliseconds["ours"],
        "max_difference": float(difference),
        "notes": {name: timing.note for name, timing in timings.items()},
    }


def summarize(rows: list[dict]) -> str:
    """Returns the table of README, with the goals beside what was reached."""
    return format_table(
        [
            {
                "clip": f"{row['batch']} x {row['clip_seconds']:g} s",
                "librosa, a second of audio": f"{row['librosa_ms']:.3f} ms",
                "ours": f"{row['ours_ms']:.3f} ms",
                f"times librosa's speed (goal {GOAL_SPEEDUP:g})": f"{row['speedup']:.1f}x",
                f"largest difference (goal {GOAL_DIFFERENCE:g})": f"{row['max_difference']:.1e}",
                "samples": "; ".join(dict.fromkeys(row["notes"].values())),
            }
            for row in rows
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="Undisturbed samples of each row.")
    parser.add_argument("--results_folder", type=Path, default=RESULTS_FOLDER, help="Where the result is stored.")
    parser.add_argument("--quick", action="store_true", help="Two short rows, to see that it runs; not for figures.")
    options = parser.parse_args(arguments)
    cases = [(seconds, batch) for batch in BATCHES for seconds in CLIP_SECONDS]
    repeats, min_sample_s = options.repeats, MIN_SAMPLE_SECONDS
    if options.quick:
        cases, repeats, min_sample_s = [(1, 1), (1, 2)], 1, 0.0
    keep = partial(keep_row, "features", folder=options.results_folder)
    rows = [keep(measure(seconds, batch, repeats=repeats, min_sample_s=min_sample_s)) for seconds, batch in cases]
    table = summarize(rows)
    print(table)
    store_result("features", rows, table, source=__file__, folder=options.results_folder)


if __name__ == "__main__":
    main()
