"""Transcripts that say when each word is said, as transformers' pipeline gives them, and the tokens of rows of audio.

{"audio": "a.wav", "chunks": [{"text": " light", "timestamp": [0.82, 1.0]}, ...]}

pipeline("automatic-speech-recognition", model="openai/whisper-base", return_timestamps="word")("a.wav")["chunks"]
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .corpora import DEFAULT_SPLIT
from .left_out import report_left_out
from .rows import RowError, Source, read_recording
from .text import normalize_text

SILENCE = -1  # in targets: no word is said
MAX_WORD_SECONDS = 0.7


@dataclass(frozen=True)
class TimedTranscript:
    """
    A recording and its words.

    Args:
        name: What messages call it.
        clips: The recording, undecoded, alone in a tuple.
        words: Each with its first and last second; words do not overlap.
    """

    name: str
    clips: tuple[Mapping, ...]
    words: tuple[tuple[str, float, float], ...]


def load_timed_transcripts(path: str, *, split: str) -> list[TimedTranscript]:
    """
    Returns the transcripts of one split.

    Args:
        path: JSON lines with `audio`, relative to the file, `chunks`, and optionally `split`, else "train".
        split: Lines of this split are read.

    Raises:
        ValueError: There is no such file, no line of the split, or more than 5 % of the lines cannot be used: fewer
            are left out, counted and named in a warning.
    """
    manifest = Path(os.path.expanduser(path))
    if not manifest.is_file():
        raise ValueError(f"`transcripts` must be a file of JSON lines, got {path}, which is none. Make it first.")
    folder = Path(os.path.abspath(manifest.parent))
    source = Source(manifest.name, partial(iter, ()), folders=(folder,), roots=(folder,), is_trusted=True)
    transcripts, reasons = [], []
    for number, line in enumerate(manifest.read_text(encoding="utf-8").splitlines(), start=1):
        where = f"line {number} of {manifest.name}"
        try:
            row = json.loads(line) if line.strip() else {"split": None}
            if not isinstance(row, dict):
                raise RowError(f"{where} must be a JSON object, got {line!r:.80}")
            if row.get("split", DEFAULT_SPLIT) == split:
                clip = read_recording({"audio": row.get("audio")}, f"`audio` of {where}", source)
                transcripts.append(TimedTranscript(where, (clip,), tuple(_read_chunks(row.get("chunks"), where))))
        except json.JSONDecodeError as error:
            reasons.append(f"{where} must be JSON, got {line!r:.80} ({error})")
        except RowError as error:
            reasons.append(str(error))
    left_out = {"what": "transcripts cannot be used", "remedy": "Correct them or remove the lines."}
    report_left_out(reasons, len(transcripts) + len(reasons), **left_out)
    if not transcripts:
        raise ValueError(f"`transcripts` must have lines of split {split!r}, got none in {path}. Name another file.")
    return transcripts


def _read_chunks(chunks: object, where: str) -> list[tuple[str, float, float]]:
    words = []
    if not isinstance(chunks, list):
        raise RowError(f"`chunks` of {where} must be a list, got {chunks!r:.80}")
    for chunk in chunks:
        text, times = (chunk.get("text"), chunk.get("timestamp")) if isinstance(chunk, dict) else (None, None)
        is_pair = isinstance(times, list) and len(times) == 2 and isinstance(times[0], int | float)
        if not isinstance(text, str) or not is_pair:
            raise RowError(f"A chunk of {where} must have `text` and `timestamp` [start, end], got {chunk!r:.80}")
        start, end = times[0], math.inf if times[1] is None else times[1]  # the last word may have no end
        if not end >= start >= (words[-1][1] if words else 0):
            raise RowError(f"`timestamp` of the chunks of {where} must not go back, got {times!r} for {text!r:.80}")
        words.append((text, start, end))
    return words


def tokenize_words(
    words: Sequence[tuple[str, float, float]], tokenizer, *, max_word_seconds: float = MAX_WORD_SECONDS
) -> list[tuple[int, float, float]]:
    """
    Returns each token with its first and last second: a word's own shared evenly by its tokens.

    Words are read as within a sentence: in small letters, without punctuation, behind a space. One that lasts longer
    than `max_word_seconds` is taken to be said at the end of its time, the last one at its beginning: recognisers give
    a pause to the word that follows, and the rest of the recording to the last word.

    Example:

    ```python
    >>> from data.timed_transcripts import tokenize_words

    >>> class Letters:
    ...     def __call__(self, text, add_special_tokens):
    ...         return type("Tokens", (), {"input_ids": list(map(ord, text.strip()))})

    >>> tokenize_words([(" Hi!", 0.0, 0.4)], Letters())
    [(104, 0.0, 0.2), (105, 0.2, 0.4)]

    ```
    """
    tokens = []
    for place, (text, start, end) in enumerate(words):
        ids = tokenizer(f" {normalize_text(text)}", add_special_tokens=False).input_ids if normalize_text(text) else []
        if place == len(words) - 1:
            end = min(end, start + max_word_seconds)
        start = max(start, end - max_word_seconds)
        share = (end - start) / max(1, len(ids))
        tokens += [(token, start + part * share, start + (part + 1) * share) for part, token in enumerate(ids)]
    return tokens


def find_targets(tokens: Sequence[tuple[int, float, float]], *, num_rows: int, row_seconds: float) -> torch.Tensor:
    """
    Returns the token that is said in the middle of each row `(rows,)`, or [`SILENCE`]; every token has a row.

    Args:
        tokens: From [`tokenize_words`].
        num_rows: Of the clip.
        row_seconds: Of each.

    Example:

    ```python
    >>> from data.timed_transcripts import find_targets

    >>> find_targets([(7, 0.1, 0.4), (8, 0.4, 0.45), (9, 0.45, 0.8)], num_rows=5, row_seconds=0.2).tolist()
    [7, 7, 8, 9, -1]

    ```
    """
    targets = torch.full((num_rows,), SILENCE)
    for token, start, end in tokens:
        first = math.ceil(start / row_seconds - 0.5)
        targets[max(0, first) : max(0, math.ceil(end / row_seconds - 0.5))] = token
    for token, start, end in tokens:  # a short one takes the row that its middle is in
        place = min(num_rows - 1, max(0, int((start + end) / 2 / row_seconds)))
        if math.ceil(start / row_seconds - 0.5) >= math.ceil(end / row_seconds - 0.5):
            targets[place] = token
    return targets


__all__ = ["SILENCE", "TimedTranscript", "find_targets", "load_timed_transcripts", "tokenize_words"]
