"""A spoken toy task: espeak-ng voices say one of four words, and the answer is the word in JSON."""

import csv
import json
from functools import cache
from pathlib import Path

import soundfile

from data.synthesis import Voice, synthesize

WORDS = ("left", "right", "open", "seven")
VOICES = ("f1", "f2", "f3", "f4", "m1", "m2", "m3", "m4")
RATES = {140: "train", 190: "train", 215: "train", 165: "test"}  # words a minute


@cache
def write_spoken_words(folder: Path, *, num_voices: int = len(VOICES)) -> Path:
    """Returns `folder` after writing recordings, metadata.csv with `text` and `slots`, and words.jsonl with times."""
    folder.mkdir(parents=True)
    rows, lines = [], []
    for voice in VOICES[:num_voices]:
        for word in WORDS:
            for rate, split in RATES.items():
                name = f"{voice}_{word}_{rate}.wav"
                samples = synthesize(word, Voice(voice, f"en-us+{voice}", rate))
                soundfile.write(folder / name, samples, 16_000)
                rows.append((name, voice, word, json.dumps({"word": word}), split))
                chunk = {"text": f" {word.title()}.", "timestamp": [0.0, len(samples) / 16_000]}
                lines.append(json.dumps({"audio": name, "chunks": [chunk], "split": split}))
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("file_name", "speaker_id", "text", "slots", "split"), *rows])
    (folder / "words.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
